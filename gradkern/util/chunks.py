"""A range of samples cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator


def spans(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Even pieces of at most ``chunk``: no lone sample at the end, which some models treat differently."""
    count = stop - start
    pieces = -(-count // chunk) if count else 0
    for i in range(pieces):
        yield start + count * i // pieces, start + count * (i + 1) // pieces
