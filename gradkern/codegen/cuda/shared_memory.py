"""The places of a chain's buffers in the shared memory of a thread block, as plain values.

`Passes` are the records of both passes and the facts that follow from them alone; `Arrangement` is a place for every
buffer, for a number of seeds at a time.  Nothing here changes a buffer: :mod:`.lowering` enters the places that are
best.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..records import DenseT, Record
from ..scratch import Buffer, first_fit, round_up, runs_of
from . import clock_model


@dataclass(frozen=True)
class Lifetime:
    """The records between which a buffer's content matters, and the run whose scratch holds it.

    There is no run if the content outlives one, or if a record of the whole block uses it.  Then every sample of the
    block keeps its own.
    """

    first: int
    last: int
    run: int | None

    def overlaps(self, other: Lifetime) -> bool:
        """Whether the two buffers, if both are in scratch or both are kept, must not overlap."""
        same_kind = (self.run is None) == (other.run is None)
        return same_kind and self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Passes:
    """The records of both passes, the run that each belongs to, and the lifetime of every buffer in use."""

    forward: tuple[Record, ...]
    backward: tuple[Record, ...]
    runs: tuple[int, ...]
    lifetimes: Mapping[Buffer, Lifetime]

    @classmethod
    def of(
        cls,
        forward: Sequence[Record],
        backward: Sequence[Record],
        stores: Collection[Buffer],
        saved: Collection[Buffer],
    ) -> Passes:
        """``stores``: buffers of values; ``saved``: other buffers that the backward pass needs."""
        ops, runs = (*forward, *backward), runs_of(forward, backward)
        places: dict[Buffer, list[int]] = {}
        for i, op in enumerate(ops):
            for buffer in op.buffers():
                places.setdefault(buffer, []).append(i)
        cotangents = dict.fromkeys(b for op in backward for b in op.buffers() if b.cotangent)
        lifetimes: dict[Buffer, Lifetime] = {}
        for buffer in (*(b for b in (*stores, *cotangents) if b in places), *saved):
            first, last = places[buffer][0], places[buffer][-1]
            if buffer in saved or (not buffer.cotangent and last >= len(forward)):
                last = len(ops)  # the backward pass reads it for every tile of seeds
            used = {runs[i] for i in places[buffer]}
            kept = buffer in saved or len(used) > 1 or any(ops[i].whole_block for i in places[buffer])
            lifetimes[buffer] = Lifetime(first, last, None if kept else used.pop())
        return cls(tuple(forward), tuple(backward), tuple(runs), lifetimes)

    @property
    def records(self) -> tuple[Record, ...]:
        return self.forward + self.backward

    def numbered(self) -> Iterator[tuple[Record, int, bool]]:
        """Every record with its run, and whether it belongs to the forward pass."""
        for i, (op, run) in enumerate(zip(self.records, self.runs, strict=True)):
            yield op, run, i < len(self.forward)

    def temporary(self, block: int, tile: int) -> int:
        """Elements of the workspace that whole-block records want."""
        wanted = 0
        for op in self.records:
            if op.whole_block:
                wanted = max(wanted, clock_model.PARTIAL_SUMS)
            if isinstance(op, DenseT):
                wanted = max(wanted, round_up(block * tile, 4) * min(op.O, 64) + clock_model.WARP)
        return wanted


@dataclass(frozen=True)
class Arrangement:
    """A place for every buffer, in its run's scratch or in the memory that a sample keeps."""

    bases: Mapping[Buffer, int]
    strides: tuple[int, ...]  # elements of every run's scratch for one sample
    sample: int  # elements that a sample keeps

    @classmethod
    def of(cls, passes: Passes, tile: int) -> Arrangement:
        """For ``tile`` seeds at a time; buffers whose lifetimes overlap get disjoint places, the largest first."""
        sample, strides = 0, [0] * (max(passes.runs, default=0) + 1)
        bases: dict[Buffer, int] = {}
        ends: dict[Buffer, int] = {}
        sized = [(b, b.elements * (tile if b.cotangent else 1)) for b in passes.lifetimes]
        for buffer, size in sorted(sized, key=lambda x: -x[1]):
            lifetime = passes.lifetimes[buffer]
            taken = [(bases[b], ends[b]) for b in ends if lifetime.overlaps(passes.lifetimes[b])]
            bases[buffer] = first_fit(size, taken)
            ends[buffer] = bases[buffer] + round_up(size, 4)
            if lifetime.run is None:
                sample = max(sample, ends[buffer])
            else:
                strides[lifetime.run] = max(strides[lifetime.run], ends[buffer])
        sample += (4 - sample) % clock_model.WARP if sample else 0  # neighbouring samples start four banks apart
        return cls(bases, tuple(strides), sample)
