"""The arena of a chain: where its buffers lie in a thread's scratch, and how much is worked on at a time.

Memory that lives within one run of records is shared between samples; what outlives it has room for every sample of
a block.  Seeds are taken in tiles, samples in blocks, so that a thread's scratch fits its cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

SLACK = 64  # elements past every buffer that a vector may read or an unused lane may touch
BLOCK_BYTES = 512 << 10  # scratch that a thread's block of samples should fit (half of a common L2)
SEED_BYTES = 256 << 10  # cotangent scratch of one sample
MAX_BLOCK = 32
SCRATCH_BYTES = 32 << 20  # per thread, unless one sample with one seed needs more


@dataclass
class Buffer:
    """A piece of the arena: per-sample where it must outlive a stage, shared between samples otherwise."""

    elements: int
    stages: set[int] = field(default_factory=set)
    base: int = -1
    per_sample: bool = False


def padded(elements: int) -> int:
    return (elements + 15) // 16 * 16


def mark_stages(passes: Iterable[Sequence[dict[str, Any]]]) -> None:
    """Note in every buffer the stages that touch it: a record that takes all samples at once stands alone."""
    stage = 0
    for ops in passes:
        previous = None
        for op in ops:
            if previous is None or op["block"] or previous["block"]:
                stage += 1
            previous = op
            for key in ("src", "aux", "dst"):
                if isinstance(op.get(key), tuple):
                    op[key][0].stages.add(stage)
        stage += 1


def seed_tile(seeds: int, per_seed: int) -> int:
    """How many seeds go together, in even tiles; ``per_seed``: bytes of cotangents that one of them takes."""
    if seeds == 0:
        return 1
    most = max(1, min(seeds, max(6, SEED_BYTES // max(per_seed, 1)), SCRATCH_BYTES // 2 // max(per_seed, 1)))
    return math.ceil(seeds / math.ceil(seeds / most))


def place(values: Sequence[Buffer], grads: Sequence[Buffer], tile: int) -> tuple[int, int]:
    """Give every buffer its base; returns the elements that samples share, and those of each sample.

    ``grads`` have room for a tile of seeds.  A sample's part lies behind what is shared.
    """
    shared = sample = 0
    for buffer, copies in [(b, 1) for b in values] + [(b, tile) for b in grads]:
        size = padded(buffer.elements) * copies
        if buffer.per_sample:
            buffer.base, sample = sample, sample + size
        else:
            buffer.base, shared = shared, shared + size
    for buffer in (*values, *grads):
        if buffer.per_sample:
            buffer.base += shared
    return shared, sample + 48  # an odd multiple of 16 elements: samples do not fall on the same cache sets


def block_size(blocked: bool, shared: int, sample: int, lists: int) -> int:
    """How many samples go together; ``blocked``: some record takes them all at once.

    Bytes: ``shared`` by all samples, of each ``sample``, and of the ``lists`` that skip zeros, for each sample too.
    """
    block = max(4, min(MAX_BLOCK, (BLOCK_BYTES - shared) // max(sample, 1))) if blocked else 8
    return max(1, min(block, (SCRATCH_BYTES - shared) // (sample + lists)))
