"""A batch in pieces: ranges of samples, and how much memory a sample takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

MOST_COTANGENTS = 3  # whole cotangents at a time: a step's own, that of its input, and one that waits for a sum


def spans(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Even pieces of at most ``chunk``: no lone sample at the end, which some models treat differently."""
    count = stop - start
    pieces = -(-count // chunk) if count else 0
    for i in range(pieces):
        yield start + count * i // pieces, start + count * (i + 1) // pieces


def stepwise_bytes(shapes: Sequence[Sequence[int]], seeds: int, itemsize: int) -> int:
    """Bytes per sample, beside the result, where steps run one by one: all values, and cotangents of all seeds.

    ``shapes``: per sample, of every value.
    """
    sizes = [math.prod(shape) for shape in shapes]
    return max(1, itemsize * (sum(sizes) + MOST_COTANGENTS * seeds * max(sizes)))
