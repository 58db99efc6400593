"""Scratch memory of a chain: where its buffers lie, and how much is worked on at a time.

Memory that lives within one run of records is shared between samples; what outlives it has room for every sample of
a block.  Cotangents that are never alive together lie on top of each other.  Seeds are taken in tiles, samples in
blocks, so that a thread's scratch fits its cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .records import Record

SLACK = 64  # elements past every buffer that a vector may read or an unused lane may touch
BLOCK_BYTES = 512 << 10  # scratch that a thread's block of samples should fit (half of a common L2)
SEED_BYTES = 256 << 10  # cotangent scratch of one sample
MAX_BLOCK = 32
SCRATCH_BYTES = 32 << 20  # per thread, unless one sample with one seed needs more


@dataclass(eq=False)
class Buffer:
    """A piece of scratch memory: per-sample where it must outlive a stage, shared between samples otherwise."""

    elements: int  # of one seed, where it holds a cotangent
    cotangent: bool = False
    stages: set[int] = field(default_factory=set)
    base: int = -1
    first: int = -1  # the records between which its content matters
    last: int = -1
    per_sample: bool = False


def round_up(elements: int, multiple: int = 16) -> int:
    return (elements + multiple - 1) // multiple * multiple


def mark_lives(passes: Iterable[Sequence[Record]]) -> None:
    """Note in every buffer its first and last record, and the stages that touch it.

    A stage is a run of records that takes sample after sample; a record that takes all of them at once stands alone.
    """
    stage = count = 0
    for records in passes:
        previous: Record | None = None
        for record in records:
            if previous is None or record.whole_block or previous.whole_block:
                stage += 1
            previous = record
            count += 1
            for buffer in record.buffers():
                buffer.stages.add(stage)
                buffer.first = count if buffer.first < 0 else buffer.first
                buffer.last = count
        stage += 1


def seed_tile(seeds: int, per_seed: int) -> int:
    """How many seeds go together, in even tiles; ``per_seed``: bytes of cotangents that one of them takes."""
    if seeds == 0:
        return 1
    most = max(1, min(seeds, max(6, SEED_BYTES // max(per_seed, 1)), SCRATCH_BYTES // 2 // max(per_seed, 1)))
    return math.ceil(seeds / math.ceil(seeds / most))


def first_fit(size: int, taken: Iterable[tuple[int, int]]) -> int:
    """The lowest place with room for so many elements beside the ranges that are taken."""
    base = 0
    for low, high in sorted(taken):
        if base + size <= low:
            break
        base = max(base, high)
    return base


def stack(buffers: Iterable[Buffer]) -> int:
    """Bases for buffers of which only those must lie apart that are alive together; returns the elements they take.

    The largest come first, each at the lowest place that is free during its life.
    """
    placed: list[Buffer] = []
    height = 0
    for buffer in sorted(buffers, key=lambda b: (-b.elements, b.first)):
        beside = [b for b in placed if b.first <= buffer.last and buffer.first <= b.last]
        size = round_up(buffer.elements)
        buffer.base = first_fit(size, ((b.base, b.base + round_up(b.elements)) for b in beside))
        placed.append(buffer)
        height = max(height, buffer.base + size)
    return height


def stacked(grads: Sequence[Buffer]) -> tuple[int, int]:
    """Bases for cotangents, as of one seed; the elements of those that samples share, and of each sample's own.

    Every one is zeroed or written whole before anything is added to it, so it does not matter what lay there.
    """
    shared, sample = (stack(b for b in grads if b.per_sample == per_sample) for per_sample in (False, True))
    return shared, sample


def place(values: Sequence[Buffer], grads: Sequence[Buffer], sizes: tuple[int, int], tile: int) -> tuple[int, int]:
    """Give every buffer its base; returns the elements that samples share, and those of each sample.

    ``grads``, `stacked` to the ``sizes``, have room for a tile of seeds.  A sample's part follows what is shared.
    """
    shared, sample = (size * tile for size in sizes)
    for buffer in grads:
        buffer.base *= tile
    for buffer in values:  # their borders are zeroed once, so each has a place of its own
        size = round_up(buffer.elements)
        if buffer.per_sample:
            buffer.base, sample = sample, sample + size
        else:
            buffer.base, shared = shared, shared + size
    for buffer in (*values, *grads):
        if buffer.per_sample:
            buffer.base += shared
    return shared, sample + 48  # an odd multiple of 16 elements: samples do not fall on the same cache sets


def block_size(whole_block: bool, shared: int, sample: int, lists: int) -> int:
    """How many samples go together; ``whole_block``: some record takes them all at once.

    Bytes: ``shared`` by all samples, of each ``sample``, and of the ``lists`` that skip zeros, for each sample too.
    """
    block = max(4, min(MAX_BLOCK, (BLOCK_BYTES - shared) // max(sample, 1))) if whole_block else 8
    return max(1, min(block, (SCRATCH_BYTES - shared) // (sample + lists)))
