"""Scratch memory of a chain: the places of its buffers, and the seeds and samples that are processed at a time.

Samples share memory that lives within one run of records; memory that outlives a run has room for every sample of a
block.  Cotangents that are never alive together overlap in memory.  Seeds are processed in tiles and samples in blocks,
so that a thread's scratch fits its cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .caches import BLOCK_BYTES, SEED_BYTES

if TYPE_CHECKING:
    from .records import Record

SLACK = 64  # elements past every buffer that a vector may read or an unused lane may touch
MAX_BLOCK = 32  # samples
SCRATCH_BYTES = 32 << 20  # per thread, unless a single sample and seed needs more


@dataclass(eq=False)
class Buffer:
    """A piece of scratch memory: per sample if it must outlive a run of records, otherwise shared between samples."""

    elements: int  # of a single seed if the buffer holds a cotangent
    cotangent: bool = False
    runs: set[int] = field(default_factory=set)  # of records that touch it (`runs_of`)
    base: int = -1
    first: int = -1  # the records between which its content matters
    last: int = -1
    per_sample: bool = False


def round_up(elements: int, multiple: int = 16) -> int:
    return (elements + multiple - 1) // multiple * multiple


def runs_of(forward: Sequence[Record], backward: Sequence[Record]) -> list[int]:
    """The run that each record belongs to: a record that takes the whole block, or all records in between."""
    run_numbers, run, ops = [], -1, (*forward, *backward)
    for i, op in enumerate(ops):
        run += bool(i in (0, len(forward)) or op.whole_block or ops[i - 1].whole_block)
        run_numbers.append(run)
    return run_numbers


def mark_lifetimes(forward: Sequence[Record], backward: Sequence[Record]) -> None:
    """Note in every buffer its first and last record, and the runs that touch it."""
    for i, (op, run) in enumerate(zip((*forward, *backward), runs_of(forward, backward), strict=True)):
        for buffer in op.buffers():
            buffer.runs.add(run)
            buffer.first = i if buffer.first < 0 else buffer.first
            buffer.last = i


def seed_tile(seeds: int, per_seed: int) -> int:
    """How many seeds to process together, in even tiles; ``per_seed``: bytes of cotangents for one of them."""
    if seeds == 0:
        return 1
    most = max(1, min(seeds, max(6, SEED_BYTES // max(per_seed, 1)), SCRATCH_BYTES // 2 // max(per_seed, 1)))
    return even_tile(seeds, most)


def even_tile(seeds: int, most: int) -> int:
    """The size of even tiles of at most ``most`` seeds."""
    return math.ceil(seeds / math.ceil(seeds / most))


def first_fit(size: int, taken: Iterable[tuple[int, int]]) -> int:
    """The lowest place with room for ``size`` elements between the ranges that are taken."""
    base = 0
    for low, high in sorted(taken):
        if base + size <= low:
            break
        base = max(base, high)
    return base


def stack(buffers: Iterable[Buffer]) -> int:
    """Place buffers so that only those that are alive together lie apart; returns the elements that they take.

    The largest are placed first, each at the lowest place that is free during its lifetime.
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


def stack_cotangents(cotangents: Sequence[Buffer]) -> tuple[int, int]:
    """Place cotangents for one seed; returns the elements that samples share, and those of each sample.

    Each is zeroed or fully written before anything is added to it, so its earlier content does not matter.
    """
    shared, sample = (stack(b for b in cotangents if b.per_sample == per_sample) for per_sample in (False, True))
    return shared, sample


def assign_places(
    values: Sequence[Buffer], cotangents: Sequence[Buffer], per_seed: tuple[int, int], tile: int
) -> tuple[int, int]:
    """Give every buffer its base; returns the elements that samples share, and those of each sample.

    ``cotangents``, which `stack_cotangents` placed for one seed, get room for a tile of seeds.  A sample's part follows
    the shared part.
    """
    shared, sample = (size * tile for size in per_seed)
    for buffer in cotangents:
        buffer.base *= tile
    for buffer in values:  # their borders are zeroed only once, so they must not overlap
        size = round_up(buffer.elements)
        if buffer.per_sample:
            buffer.base, sample = sample, sample + size
        else:
            buffer.base, shared = shared, shared + size
    for buffer in (*values, *cotangents):
        if buffer.per_sample:
            buffer.base += shared
    return shared, sample + 48  # an odd multiple of 16 elements: samples do not fall on the same cache sets


def block_size(whole_block: bool, shared: int, sample: int, lists: int) -> int:
    """How many samples to process together; ``whole_block``: some record takes them all at once.

    In bytes: what all samples ``shared``; for each sample, its scratch (``sample``) and its ``lists`` of live channels.
    """
    block = max(4, min(MAX_BLOCK, (BLOCK_BYTES - shared) // max(sample, 1))) if whole_block else 8
    return max(1, min(block, (SCRATCH_BYTES - shared) // (sample + lists)))
