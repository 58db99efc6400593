"""Chains on a GPU: records (:mod:`gradkern.codegen.chain`) laid out for a thread block.

A block takes a tile of samples through the whole chain in shared memory, which holds, in this order,

* the *region*: scratch for buffers that live within one run of per-sample records, for as many samples as are
  *resident* at a time; a record that takes all samples at once (a linear layer) uses it for its temporary matrices;
* for every sample, the buffers that outlive a run; those with disjoint lifetimes overlap;
* for every sample, its bits.

Everything is known to the byte when the chain is lowered.  `DeviceLowering.finish` tries seed tiles, resident samples
and sample tiles and keeps the cheapest that fits.  If none fits, it raises `TooLarge`, and the plan splits the chain or
leaves the step to ATen.  Nothing ever spills to global memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ...ir.program import Contract, Dense, Program, Windows
from .. import limits
from ..aliasing import Cotangent
from ..chain import Chain, Row
from ..encoding import CudaSizes, encode
from ..lowering import LaidOut, Lowering, lower_to_chain
from ..machine import Device, Machine, TooLarge
from ..records import Bands, ContractionT, DenseT, MoveT, Place, Record, ScatterAlgorithm, ScatterT, Zero
from ..units import Node, Unit, UnitGraph, planar
from ..weights import ScatterLayout, mergeable
from . import clock_model
from .fuse import fused
from .shared_memory import Arrangement, Passes
from .slices import COUNTS as SLICES
from .slices import sliced
from .weights import DeviceScatter, DeviceWindow, NarrowScatter, QuadScatter

#: A contraction with a larger weight than this leaves its chain.  A block reads the weight for its own few samples, and
#: reading a mebibyte from L2 takes a multiprocessor about 40,000 clocks.  UNMEASURED.
CHAIN_WEIGHT = 1 << 18
MAX_TILE = 64  # samples of a block
MAX_RESIDENT = 32  # samples at a time in scratch


@dataclass(frozen=True)
class Tiling:
    """A way to cut the work (seeds at a time, samples of a block, and for every run of records the samples that are
    resident in scratch together), and the shared memory that it takes."""

    seed_tile: int
    block: int
    resident: tuple[int, ...]
    region: int  # elements
    bytes: int
    cost: float  # clocks per sample, estimated


class DeviceLowering(Lowering):
    """One group on a GPU."""

    slack, multiple = 0, 4
    window_type = DeviceWindow
    machine: Device

    def __init__(
        self, graph: UnitGraph, machine: Machine, itemsize: int, seeds: int, wrt: tuple[int, ...], onehot: bool
    ):
        assert isinstance(machine, Device)
        super().__init__(graph, machine, itemsize, seeds, wrt, onehot)
        self.machine = machine
        self.written: set[int] = set()  # stores that a record has written
        self.prices: dict[tuple, float] = {}
        self.band_options: dict[int, list[Bands]] = {}  # offset of a transposed convolution's weights → its options
        if max(len(graph.inputs), len(graph.outputs)) > limits.PORTS:
            raise TooLarge(machine.shared_bytes + 1, machine.shared_bytes)

    # ---- records that differ from the CPU's

    def choose_scatter(self, unit: Unit, pattern: Unit | None) -> DeviceScatter:
        """One window per position, or one for all taps of the pool after it, walked channel by live channel or in
        quads: the layout that is expected to be fastest if all warps are busy."""
        if unit.dense:
            return DeviceScatter.of(unit, 1)
        upstream = self.cotangents.of(unit.out)
        types: tuple[type[DeviceScatter], ...] = (DeviceScatter, QuadScatter, NarrowScatter)
        layouts = [t.of(unit, 1) for t in types]
        taps = 1
        if pattern is not None and pattern.windows:
            taps = pattern.windows.taps
            if mergeable(unit, pattern):
                layouts += [t.merge(unit, 1, pattern.windows, 1) for t in types]
        if upstream is None or upstream.rows:  # seed rows lie in global memory: only the walk reads them there
            fitting = [s for s in layouts if s.algorithm == ScatterAlgorithm.Walk]
        else:
            fitting = [s for s in layouts if s.fits(unit.reads[0], upstream.node)]
        return min(fitting, key=lambda s: self.scatter_clocks(s, taps, pattern is not None))

    def scatter_clocks(self, layout: DeviceScatter, taps: int, pattern: bool) -> float:
        """Clocks per pool output for all seeds."""
        elements, planes = len(layout.window), taps if layout.merged else 1
        if isinstance(layout, NarrowScatter):
            return taps / planes * clock_model.narrow_clocks(elements, layout.O, self.seeds, planes, self.itemsize)[0]
        if isinstance(layout, QuadScatter):
            args = (elements // 4, layout.O, self.seeds, planes, pattern)
            by_lanes = (clock_model.quad_clocks(*args, n, self.itemsize)[0] for n in clock_model.QUAD_LANES)
            return taps / planes * min(by_lanes)
        most = limits.WALK_SEEDS.of(self.itemsize)
        walks, together = math.ceil(self.seeds / most), clock_model.even(self.seeds, most)
        return walks * clock_model.walk_clocks(elements, layout.O, layout.merged, together, taps, pattern)

    def prepare(self, unit: Unit) -> None:
        """Zero borders, and places that copies leave out, for every tile, because buffers share memory."""
        node = unit.out
        filled = node.C * node.P
        if unit.kind == "move":
            filled = sum(sum(runs[2::5]) for runs in self.runs(unit, node))
        if node.store not in self.written and node.size != filled:
            self.forward.append(Zero(dst=Place(self.store(node), 0), elements=node.size))
        self.written.add(node.store)

    def contraction(
        self, unit: Unit, layout: ScatterLayout, read: Node, common: ContractionT, assign: bool
    ) -> ContractionT:
        assert isinstance(layout, DeviceScatter)
        elements = len(layout.window)
        if unit.dense:
            if read.P != 1 or (common.pattern and common.pattern.taps > 1):
                raise AssertionError("a linear layer gives one position")
            joined = len(layout.runs) == 1  # the window is one run
            return DenseT(**vars(common), window_elements=elements, joined=joined, assign=assign)
        sizes = {"H": read.H, "W": read.W, "C": layout.channels, "groups": layout.groups}
        taps = self.table(layout.offsets()) if isinstance(layout, QuadScatter) else 0
        gpu_fields = {
            "merged": layout.merged,
            "window_elements": elements,
            "algorithm": layout.algorithm,
            "tap_table": taps,
        }
        op = ScatterT(**vars(common) | sizes | gpu_fields)
        self.band_options[op.weights] = bands(unit, op)
        return op

    def backward_move(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        """If no number was read twice, every run has its own warp."""
        super().backward_move(unit, operand, upstream)
        op = self.backward[-1]
        assert isinstance(op, MoveT)
        runs = self.tables[op.run_table : op.run_table + 5 * op.runs]
        read = [r + i * step for r, n, step in zip(runs[::5], runs[2::5], runs[3::5], strict=True) for i in range(n)]
        self.backward[-1] = replace(op, distinct=len(set(read)) == len(read))

    def transpose_right(self, unit: Unit) -> None:
        """No copy: the kernel reads the right side of a matrix product with any strides, and memory is scarce."""

    def right_transposed(self, unit: Unit) -> tuple[Place, int]:
        b = unit.reads[1]
        return Place(self.store(b), b.interior, b.row, 1), b.C

    # ---- layout of shared memory

    def finish(self) -> LaidOut:
        """The records for the cheapest way to cut the work."""
        best: tuple[Passes, Arrangement, Tiling] | None = None
        least = 0
        forward, stores, saved = fused(self.forward, self.backward), self.stores.values(), self.saved.values()
        for backward in self.variants():
            passes = Passes.of(forward, backward, stores, saved)
            for tile in sorted({math.ceil(self.seeds / i) for i in range(1, self.seeds + 1)} or {1}, reverse=True):
                arrangement = Arrangement.of(passes, tile)
                least = self.bytes(max(*arrangement.strides, passes.temporary(1, tile)), arrangement.sample, 1)
                tiling = self.best_tiling(passes, arrangement, tile)
                if tiling and (best is None or tiling.cost < best[2].cost):
                    best = passes, arrangement, tiling
        if best is None:
            raise TooLarge(least, self.machine.shared_bytes)
        return self.laid_out(*best)

    def variants(self) -> list[list[Record]]:
        """The backward pass with its last wide layer whole, or in slices; the ones that need least memory last."""
        cut = (sliced(self.backward, self.tables, count) for count in SLICES)
        return [self.backward, *(ops for ops in cut if ops is not None)]

    def laid_out(self, passes: Passes, arrangement: Arrangement, tiling: Tiling) -> LaidOut:
        """Enter the places of buffers, and write into the records how workers share the work."""
        for buffer, life in passes.lives.items():
            buffer.per_sample = life.run is None
            buffer.base = arrangement.bases[buffer] + (tiling.region if buffer.per_sample else 0)
        ops: list[Record] = []
        rows: list[Row] = []
        clocks: list[float] = []
        for i, (op, run) in enumerate(zip(passes.records, passes.runs, strict=True)):
            resident, forward = tiling.resident[run], i < len(passes.forward)
            work = self.work(resident, tiling.block, tiling.seed_tile)
            if isinstance(op, ScatterT):
                _, lanes, shares = work.transposed(op)
                op = replace(op, lanes=lanes, bands=shares)
            ops.append(op)
            # A negative stride between samples means scratch; it is negative even if one sample is resident.
            rows.append(encode(op, arrangement.sample, -max(arrangement.strides[run], 4), resident))
            clocks.append(work.clocks(op, forward) * (1 if forward else self.rounds(tiling.seed_tile)))
        # Idle lanes and prefetched weights may read up to that far past the last row.
        slack = 8 * max((x.row_length for x in self.layouts), default=0) + clock_model.WARP * 4 * max(limits.QUADS)
        most, n = max(tiling.resident, default=1), len(passes.forward)
        return LaidOut(
            forward=tuple(ops[:n]),
            backward=tuple(ops[n:]),
            forward_rows=tuple(rows[:n]),
            backward_rows=tuple(rows[n:]),
            sizes=CudaSizes(tiling.region, arrangement.sample, self.bit_bytes, most, tiling.bytes, tiling.block),
            packed_size=self.packed + slack,
            seed_tile=tiling.seed_tile,
            scratch=tiling.bytes,
            clocks=tuple(clocks),
        )

    def bytes(self, region: int, sample: int, block: int) -> int:
        return ((region + block * sample) * self.itemsize + block * self.bit_bytes + 15) // 16 * 16

    def best_tiling(self, passes: Passes, arrangement: Arrangement, tile: int) -> Tiling | None:
        """The cheapest numbers of block and resident samples for a seed tile; None if nothing fits."""
        scratch, sample, best = arrangement.strides, arrangement.sample, None
        runs = self.priced(passes, tile)
        for block in range(1, MAX_TILE + 1):
            needed = max(*scratch, passes.temporary(block, tile))
            if self.bytes((needed + 3) // 4 * 4, sample, block) > self.machine.shared_bytes:
                break
            room = (self.machine.shared_bytes - self.bytes(0, sample, block)) // self.itemsize
            wanted = max(needed, *(min(block, MAX_RESIDENT) * each for each in scratch))
            region = min(room // 4 * 4, (wanted + 3) // 4 * 4)
            most_resident = [min(block, MAX_RESIDENT, region // each if each else block) for each in scratch]
            each_run = zip(runs, most_resident, strict=True)
            picked = [(run.price(0, block), 1) if run.whole_block else run.best(most) for run, most in each_run]
            price = sum(clocks for clocks, _ in picked)
            if best is None or price < best.cost:
                resident = tuple(n for _, n in picked)
                best = Tiling(tile, block, resident, region, self.bytes(region, sample, block), price)
        return best

    def rounds(self, tile: int) -> int:
        """How many tiles of seeds there are."""
        return math.ceil(self.seeds / tile) if self.seeds else 0

    def priced(self, passes: Passes, tile: int) -> list[clock_model.RunPrice]:
        """The prices of the runs of records, by the number of samples that they take at a time."""
        prices: list[clock_model.RunPrice] = []
        for i, (op, run) in enumerate(zip(passes.records, passes.runs, strict=True)):
            if run == len(prices):
                prices.append(clock_model.RunPrice(op.whole_block, self.work(0, 0, tile), self.prices))
            forward = i < len(passes.forward)
            prices[run].add(op, forward, 1 if forward else self.rounds(tile))
        return prices

    def work(self, resident: int, block: int, tile: int) -> clock_model.Work:
        warps = self.machine.threads // clock_model.WARP
        return clock_model.Work(warps, resident, block, tile, self.itemsize, self.band_options)


def bands(unit: Unit, op: ScatterT) -> list[Bands]:
    """The rectangles of positions that workers may own, and the number of colours that separate them.

    Position ``q`` of an axis reaches from ``q·step`` to ``q·step + reach`` of the destination.  Bands of ``length``
    positions, every ``n``-th of one colour, touch different memory when ``((n - 1)·length + 1)·step > reach``.  So an
    axis has bands in two colours, or single positions in as many colours as they need.
    """
    (kh, kw), (sh, sw), _, (dh, dw) = planar(unit.convolution)
    p = op.pattern
    pools = ((p.sh, (p.kh - 1) * p.dh), (p.sw, (p.kw - 1) * p.dw)) if p else ((1, 0), (1, 0))
    axes = []
    for extent, k, s, d, (pool_step, pool_reach) in zip((op.H, op.W), (kh, kw), (sh, sw), (dh, dw), pools, strict=True):
        step, reach = pool_step * s, pool_reach * s + (k - 1) * d
        axes.append({(min(extent, max(1, reach // step)), 2), (1, reach // step + 1)})
    rows, columns = (sorted(axis, reverse=True) for axis in axes)
    return [Bands(high, wide, n, m) for high, n in rows for wide, m in columns]


def too_heavy_reason(program: Program, i: int) -> str | None:
    """Why a contraction should not be part of a chain although it might fit one; None if it should."""
    step = program.steps[i]
    form = step.form
    if not isinstance(form, Contract) or form.weight is None or not isinstance(form.map, Dense | Windows):
        return None
    axis = -1 if isinstance(form.map, Dense) else 0
    weights = program.shape(step.inputs[0])[axis] * step.shape[axis]
    if isinstance(form.map, Windows):
        weights = weights // form.map.groups * form.map.taps
    if weights <= CHAIN_WEIGHT:
        return None
    return f"a chain would read its {weights / 1e6:.1f} million weights anew for every few samples"


#: `gradkern.codegen.lowering.lower_to_chain` for a GPU.  Raises `TooLarge`.
lower_device = partial(lower_to_chain, lowering=DeviceLowering)


def lower_for(machine: Machine) -> Callable[..., Chain]:
    """`lower_to_chain` or `lower_device`, by the machine."""
    return lower_device if isinstance(machine, Device) else lower_to_chain
