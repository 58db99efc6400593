"""The search for the cheapest way to cut a chain's work for a GPU.

Seeds are processed a tile at a time, a block takes a number of samples, and in every run of records a number of them is
resident in scratch memory.  `Tiler` tries them all, at the prices of :mod:`.clock_model`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..layouts import Layouts
from ..machine import Device
from ..records import Bands, Record, ScatterT
from ..scratch import round_up
from ..units import Windows2d
from ..weights import ScatterLayout, windows_of
from . import clock_model
from .shared_memory import Arrangement, Passes

MAX_BLOCK = 64  # samples
MAX_RESIDENT = 32  # samples at a time in scratch


@dataclass(frozen=True)
class Tiling:
    """One way to cut the work, and the shared memory that it takes."""

    seed_tile: int
    block: int  # samples
    resident: tuple[int, ...]  # samples in scratch together, for every run of records
    workspace: int  # elements
    bytes: int
    cost: float  # clocks per sample, estimated


@dataclass(frozen=True)
class Tiler:
    """The tilings of one chain."""

    machine: Device
    itemsize: int
    seeds: int
    bit_bytes: int  # bytes of bits per sample
    band_options: clock_model.BandOptions

    def seed_tiles(self) -> list[int]:
        """The numbers of seeds that even tiles can have, the largest first."""
        return sorted({math.ceil(self.seeds / i) for i in range(1, self.seeds + 1)} or {1}, reverse=True)

    def rounds(self, tile: int) -> int:
        """How many tiles of seeds there are."""
        return math.ceil(self.seeds / tile) if self.seeds else 0

    def bytes(self, workspace: int, sample: int, block: int) -> int:
        return round_up((workspace + block * sample) * self.itemsize + block * self.bit_bytes, 16)

    def least_bytes(self, passes: Passes, arrangement: Arrangement, tile: int) -> int:
        """The shared memory that a single sample needs."""
        return self.bytes(max(*arrangement.strides, passes.temporary(1, tile)), arrangement.sample, 1)

    def work(self, resident: int, block: int, tile: int) -> clock_model.Work:
        warps = self.machine.threads // clock_model.WARP
        return clock_model.Work(warps, resident, block, tile, self.itemsize, self.band_options)

    def clocks(self, op: Record, forward: bool, resident: int, tiling: Tiling) -> float:
        """Clocks of a record per sample: once in the forward pass, and once per tile of seeds in the backward pass."""

        def step(samples: int) -> float:
            return self.work(samples, tiling.block, tiling.seed_tile).clocks(op, forward)

        return step(tiling.block) if op.whole_block else clock_model.in_steps(step, tiling.block, resident)

    def best(self, passes: Passes, arrangement: Arrangement, tile: int) -> Tiling | None:
        """The cheapest numbers of block and resident samples for a seed tile; None if nothing fits."""
        strides, sample, best = arrangement.strides, arrangement.sample, None
        runs = self.priced(passes, tile)
        for block in range(1, MAX_BLOCK + 1):
            needed = max(*strides, passes.temporary(block, tile))
            if self.bytes(round_up(needed, 4), sample, block) > self.machine.shared_bytes:
                break
            room = (self.machine.shared_bytes - self.bytes(0, sample, block)) // self.itemsize
            wanted = max(needed, *(min(block, MAX_RESIDENT) * each for each in strides))
            workspace = min(room // 4 * 4, round_up(wanted, 4))
            most_resident = [min(block, MAX_RESIDENT, workspace // each if each else block) for each in strides]
            each_run = zip(runs, most_resident, strict=True)
            options = [(run.price(0, block), 1) if run.whole_block else run.best(block, most) for run, most in each_run]
            cost = sum(clocks for clocks, _ in options)
            if best is None or cost < best.cost:
                resident = tuple(n for _, n in options)
                best = Tiling(tile, block, resident, workspace, self.bytes(workspace, sample, block), cost)
        return best

    def priced(self, passes: Passes, tile: int) -> list[clock_model.RunPrice]:
        """The prices of the runs of records, by the number of samples that they take at a time."""
        prices: list[clock_model.RunPrice] = []
        for op, run, forward in passes.numbered():
            if run == len(prices):
                prices.append(clock_model.RunPrice(op.whole_block, self.work(0, 0, tile)))
            prices[run].add(op, forward, 1 if forward else self.rounds(tile))
        return prices


def band_options(backward: Iterable[Record], layouts: Layouts) -> dict[int, list[Bands]]:
    """The bands that each transposed convolution can have, by the offset of its weights."""
    forms = {x.weights: x.form for x in layouts.made.values() if isinstance(x, ScatterLayout)}
    return {op.weights: bands(windows_of(forms[op.weights]), op) for op in backward if isinstance(op, ScatterT)}


def bands(w: Windows2d, op: ScatterT) -> list[Bands]:
    """The rectangles of positions that workers may own, and the number of colours that separate them.

    Position ``q`` of an axis reaches from ``q·step`` to ``q·step + reach`` of the destination.  Bands of ``length``
    positions, every ``n``-th of one colour, touch different memory when ``((n - 1)·length + 1)·step > reach``.  So an
    axis has bands in two colours, or single positions in as many colours as they need.
    """
    p = op.pattern
    pools = ((p.sh, (p.kh - 1) * p.dh), (p.sw, (p.kw - 1) * p.dw)) if p else ((1, 0), (1, 0))
    axes = []
    for extent, k, s, d, pool in zip((op.H, op.W), w.kernel, w.stride, w.dilation, pools, strict=True):
        pool_step, pool_reach = pool
        step, reach = pool_step * s, pool_reach * s + (k - 1) * d
        axes.append({(min(extent, max(1, reach // step)), 2), (1, reach // step + 1)})
    rows, columns = (sorted(axis, reverse=True) for axis in axes)
    return [Bands(rows=high, columns=wide, row_colours=n, column_colours=m) for high, n in rows for wide, m in columns]
