"""Chains on a GPU: the same records as on the CPU (:mod:`gradkern.codegen.chain`), laid out for a thread block.

A block takes a tile of samples through the whole chain in shared memory, which holds, in this order,

* the *region*: scratch of what lives within one run of per-sample records, for as many samples as are *resident* at a
  time; a record that takes all samples at once (a linear layer) uses it for its temporary matrices;
* for every sample what outlives a run, buffers with disjoint lifetimes on top of each other;
* for every sample its bits.

Everything is known when the chain is lowered, to the byte.  `DeviceLowering.finish` tries seed tiles, resident samples
and sample tiles and keeps the cheapest that fits; where none does, `TooLarge` says so, and the plan splits the chain or
leaves the step to ATen.  Nothing ever spills to global memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ...ir.program import Contract, Dense, Program, Windows
from ..aliasing import Cotangent
from ..chain import Chain, Row
from ..encoding import CudaSizes, Sizes, encode
from ..lowering import Lowering, lower
from ..machine import Device, Machine, TooLarge
from ..records import Bands, ContractionT, DenseT, MoveT, Place, Record, ScatterAlgorithm, ScatterT, Zero
from ..scratch import Buffer, first_fit
from ..units import Graph, Node, Unit, planar
from ..weights import ScatterLayout, mergeable
from . import cost
from .fuse import fused
from .slices import COUNTS as SLICES
from .slices import sliced
from .weights import DeviceScatter, DeviceWindow, NarrowScatter, QuadScatter

#: Numbers in a weight from which a contraction leaves its chain.  A block reads the weight for its own few samples: a
#: mebibyte from L2 takes a multiprocessor about 40,000 clocks.  UNMEASURED.
CHAIN_WEIGHT = 1 << 18
MAX_TILE = 64  # samples of a block
MAX_RESIDENT = 32  # samples at a time in scratch
MAX_PORTS = 16  # external inputs or outputs of a chain; csrc/cuda/chain.h: kPorts


@dataclass(frozen=True)
class Tiling:
    """A way to cut the work: seeds at a time, samples of a block, and of every run of records those that are resident
    in scratch together; and the shared memory that it takes."""

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

    def __init__(self, graph: Graph, machine: Machine, itemsize: int, seeds: int, wrt: tuple[int, ...], onehot: bool):
        assert isinstance(machine, Device)
        self.machine = machine
        self.written: set[int] = set()  # stores that a record has written
        self.tiling = Tiling(1, 1, (), 0, 0, 0.0)
        self.prices: dict[tuple, float] = {}
        self.band_options: dict[int, list[Bands]] = {}  # offset of a transposed convolution's weights → its options
        self.strides: list[int] = []  # of every run, between resident samples
        super().__init__(graph, machine, itemsize, seeds, wrt, onehot)
        if max(len(graph.inputs), len(graph.outputs)) > MAX_PORTS:
            raise TooLarge(machine.shared_bytes + 1, machine.shared_bytes)

    # ---- records that differ from the CPU's

    def choose_scatter(self, unit: Unit, pattern: Unit | None) -> DeviceScatter:
        """One window per position or one for all taps of the pool after it, walked channel by live channel or in
        quads: whichever is expected to be fastest with all warps at work."""
        if unit.dense:
            return DeviceScatter.of(unit, 1)
        upstream = self.cotangents.of(unit.out)
        types: tuple[type[DeviceScatter], ...] = (DeviceScatter, QuadScatter, NarrowScatter)
        made = [t.of(unit, 1) for t in types]
        taps = 1
        if pattern is not None and pattern.windows:
            taps = pattern.windows.taps
            if mergeable(unit, pattern):
                made += [t.merge(unit, 1, pattern.windows, 1) for t in types]
        if upstream is None or upstream.rows:  # seed rows lie in global memory: only the walk reads them there
            fitting = [s for s in made if s.algorithm == ScatterAlgorithm.Walk]
        else:
            fitting = [s for s in made if s.fits(unit.reads[0], upstream.node)]
        return min(fitting, key=lambda s: self.scatter_clocks(s, taps, pattern is not None))

    def scatter_clocks(self, layout: DeviceScatter, taps: int, pattern: bool) -> float:
        """Clocks per pool output for all seeds."""
        elements, planes = len(layout.window), taps if layout.merged else 1
        if isinstance(layout, NarrowScatter):
            return taps / planes * cost.narrow_clocks(elements, layout.O, self.seeds, planes)[0]
        if isinstance(layout, QuadScatter):
            args = (elements // 4, layout.O, self.seeds, planes, pattern)
            return taps / planes * min(cost.quad_clocks(*args, lanes, self.itemsize)[0] for lanes in cost.QUAD_LANES)
        walks = math.ceil(self.seeds / cost.WALK_SEEDS)
        return walks * cost.walk_clocks(
            elements, layout.O, layout.merged, cost.even(self.seeds, cost.WALK_SEEDS), taps, pattern
        )

    def prepare(self, unit: Unit) -> None:
        """Borders, and what copies leave out, are zeroed for every tile: buffers share memory."""
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

    def backward_move(self, unit: Unit, node: Node, upstream: Cotangent) -> None:
        """Where no number was read twice, every run has its own warp."""
        super().backward_move(unit, node, upstream)
        op = self.backward[-1]
        assert isinstance(op, MoveT)
        runs = self.tables[op.run_table : op.run_table + 5 * op.runs]
        read = [r + i * step for r, n, step in zip(runs[::5], runs[2::5], runs[3::5], strict=True) for i in range(n)]
        self.backward[-1] = replace(op, distinct=len(set(read)) == len(read))

    def transpose_right(self, unit: Unit) -> None:
        """No copy: the kernel reads the right side of a matrix product by any steps, and shared memory is scarce."""

    def right_transposed(self, unit: Unit) -> tuple[Place, int]:
        b = unit.reads[1]
        return Place(self.store(b), b.interior, b.row, 1), b.C

    # ---- layout of shared memory

    def finish(self) -> tuple[Sizes, int]:
        self.forward = fused(self.forward, self.backward)
        best: tuple[Tiling, list[Record]] | None = None
        least = 0
        for backward in self.variants():
            self.use(backward)
            buffers, spans = self.lives()
            for tile in sorted({math.ceil(self.seeds / i) for i in range(1, self.seeds + 1)} or {1}, reverse=True):
                strides, sample = self.arrange(buffers, spans, tile)
                least = self.bytes(max(*strides, self.temporary(1, tile)), sample, 1)
                tiling = self.best_tiling(strides, sample, tile)
                if tiling and (best is None or tiling.cost < best[0].cost):
                    best = tiling, backward
        if best is None:
            raise TooLarge(least, self.machine.shared_bytes)
        self.tiling, backward = tiling, _ = best
        self.use(backward)
        buffers, spans = self.lives()
        self.strides, self.sample = self.arrange(buffers, spans, tiling.seed_tile)
        for buffer in buffers:
            buffer.base += tiling.region * buffer.per_sample
        self.settle()
        # Lanes without work, and weights asked for ahead of time, lie up to that far past the last row.
        self.packed += 8 * max((x.row_length for x in self.layouts), default=0) + cost.WARP * 4 * max(cost.QUADS)
        most = max(tiling.resident, default=1)
        return CudaSizes(tiling.region, self.sample, self.bit_bytes, most, tiling.bytes, tiling.block), tiling.seed_tile

    def settle(self) -> None:
        """Write into the records how the workers of transposed convolutions share the work."""
        for i, (op, run) in enumerate(zip(self.backward, self.runs_of()[len(self.forward) :], strict=True)):
            if isinstance(op, ScatterT):
                _, lanes, shares = self.chosen_work(run).transposed(op)
                self.backward[i] = replace(op, lanes=lanes, bands=shares)

    def runs_of(self) -> list[int]:
        """The run that each record belongs to: a record that takes the whole block, or all records in between."""
        numbers, run, ops = [], -1, self.forward + self.backward
        for i, op in enumerate(ops):
            run += bool(i in (0, len(self.forward)) or op.whole_block or ops[i - 1].whole_block)
            numbers.append(run)
        return numbers

    def variants(self) -> list[list[Record]]:
        """The backward pass with its last wide layer whole, or in slices; the ones that need least memory last."""
        made = (sliced(self.backward, self.tables, count) for count in SLICES)
        return [self.backward, *(ops for ops in made if ops is not None)]

    def use(self, backward: list[Record]) -> None:
        """Take these records as the backward pass, and the cotangents that they have."""
        self.backward = backward
        used = (buffer for op in backward for buffer in op.buffers() if buffer.cotangent)
        self.grads = dict(enumerate(dict.fromkeys(used)))

    def lives(self) -> tuple[list[Buffer], dict[Buffer, list[int]]]:
        """The buffers in use, each marked as scratch or kept per sample, and the first and last record of each."""
        ops = self.forward + self.backward
        for buffer in (*self.stores.values(), *self.grads.values()):
            buffer.stages, buffer.per_sample = set(), False
        spans: dict[Buffer, list[int]] = {}
        for i, (op, run) in enumerate(zip(ops, self.runs_of(), strict=True)):
            for buffer in op.buffers():
                spans.setdefault(buffer, [i, i])[1] = i
                buffer.stages.add(run)
                buffer.per_sample |= op.whole_block
        buffers = [b for b in (*self.stores.values(), *self.grads.values()) if b in spans]
        for buffer in buffers:
            buffer.per_sample |= len(buffer.stages) > 1
        for buffer in self.stores.values():  # a product's backward reads values, for every tile of seeds
            if buffer in spans and spans[buffer][1] >= len(self.forward):
                spans[buffer][1] = len(ops)
        for buffer in self.saved.values():  # so are these
            spans[buffer][1] = len(ops)
            buffers.append(buffer)
        return buffers, spans

    def arrange(self, buffers: list[Buffer], spans: dict[Buffer, list[int]], tile: int) -> tuple[list[int], int]:
        """Place buffers whose lifetimes overlap beside each other; returns elements of every run's scratch for one
        sample, and of what is kept per sample."""
        sample, scratch = 0, [0] * (max(self.runs_of(), default=0) + 1)
        placed: list[tuple[Buffer, int, int]] = []
        sized = [(b, b.elements * (tile if b.cotangent else 1)) for b in buffers]
        for buffer, size in sorted(sized, key=lambda x: -x[1]):
            first, last = spans[buffer]
            taken = (
                (other.base, other.base + extent)
                for other, extent, kind in placed
                if kind == buffer.per_sample and spans[other][0] <= last and first <= spans[other][1]
            )
            buffer.base = first_fit(size, taken)
            size = (size + 3) // 4 * 4
            placed.append((buffer, size, buffer.per_sample))
            if buffer.per_sample:
                sample = max(sample, buffer.base + size)
            else:
                (run,) = buffer.stages
                scratch[run] = max(scratch[run], buffer.base + size)
        sample += (4 - sample) % cost.WARP if sample else 0  # neighbours start four banks apart
        return scratch, sample

    def temporary(self, block: int, tile: int) -> int:
        """Elements of the region that whole-block records want."""
        wanted = 0
        for op in self.forward + self.backward:
            if op.whole_block:
                wanted = max(wanted, cost.PARTIAL_SUMS)
            if isinstance(op, DenseT):
                wanted = max(wanted, (block * tile + 3) // 4 * 4 * min(op.O, 64) + cost.WARP)
        return wanted

    def bytes(self, region: int, sample: int, block: int) -> int:
        return ((region + block * sample) * self.itemsize + block * self.bit_bytes + 15) // 16 * 16

    def best_tiling(self, scratch: list[int], sample: int, tile: int) -> Tiling | None:
        """The cheapest samples of a block and resident samples for a seed tile; None where nothing fits."""
        runs, best = self.priced(tile), None
        for block in range(1, MAX_TILE + 1):
            needed = max(*scratch, self.temporary(block, tile))
            if self.bytes((needed + 3) // 4 * 4, sample, block) > self.machine.shared_bytes:
                break
            room = (self.machine.shared_bytes - self.bytes(0, sample, block)) // self.itemsize
            wanted = max(needed, *(min(block, MAX_RESIDENT) * each for each in scratch))
            region = min(room // 4 * 4, (wanted + 3) // 4 * 4)
            limits = [min(block, MAX_RESIDENT, region // each if each else block) for each in scratch]
            each_run = zip(runs, limits, strict=True)
            picked = [(run.price(0, block), 1) if run.whole_block else run.best(most) for run, most in each_run]
            price = sum(clocks for clocks, _ in picked)
            if best is None or price < best.cost:
                resident = tuple(n for _, n in picked)
                best = Tiling(tile, block, resident, region, self.bytes(region, sample, block), price)
        return best

    def rounds(self, tile: int) -> int:
        """How many tiles of seeds there are."""
        return math.ceil(self.seeds / tile) if self.seeds else 0

    def priced(self, tile: int) -> list[cost.RunPrice]:
        """The runs of records, as prices by the number of samples that they take at a time."""
        prices: list[cost.RunPrice] = []
        for i, (op, run) in enumerate(zip(self.forward + self.backward, self.runs_of(), strict=True)):
            if run == len(prices):
                prices.append(cost.RunPrice(op.whole_block, self.work(0, 0, tile), self.prices))
            prices[run].add(op, i < len(self.forward), 1 if i < len(self.forward) else self.rounds(tile))
        return prices

    def work(self, resident: int, block: int, tile: int) -> cost.Work:
        return cost.Work(self.machine.threads // cost.WARP, resident, block, tile, self.itemsize, self.band_options)

    def chosen_work(self, run: int) -> cost.Work:
        """The work of a run, as it was chosen to be cut."""
        return self.work(self.tiling.resident[run], self.tiling.block, self.tiling.seed_tile)

    def clocks(self) -> tuple[float, ...]:
        """Estimated clocks of a multiprocessor per sample, record by record."""
        runs, n, rounds = self.runs_of(), len(self.forward), self.rounds(self.tiling.seed_tile)
        forward = (self.chosen_work(run).clocks(op, True) for op, run in zip(self.forward, runs[:n], strict=True))
        backward = (self.chosen_work(run).clocks(op, False) for op, run in zip(self.backward, runs[n:], strict=True))
        return (*forward, *(rounds * clocks for clocks in backward))

    def scratch(self, sizes: Sizes) -> int:
        """Bytes of shared memory per block."""
        assert isinstance(sizes, CudaSizes)
        return sizes.bytes

    def encoded(self, ops: list[Record]) -> tuple[Row, ...]:
        """A negative stride between samples means scratch; where one sample is resident it is still below zero."""
        runs = self.runs_of()[: len(self.forward)] if ops is self.forward else self.runs_of()[len(self.forward) :]
        return tuple(
            encode(op, self.sample, -max(self.strides[run], 4), self.tiling.resident[run])
            for op, run in zip(ops, runs, strict=True)
        )


def bands(unit: Unit, op: ScatterT) -> list[Bands]:
    """The rectangles of positions that workers may own, and how many colours part them.

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
    """Why a contraction should not be part of a chain although it might fit one; None where it should."""
    step = program.steps[i]
    form = step.form
    if not isinstance(form, Contract) or form.weight is None or not isinstance(form.map, Dense | Windows):
        return None
    axis = -1 if isinstance(form.map, Dense) else 0
    numbers = program.shape(step.inputs[0])[axis] * step.shape[axis]
    if isinstance(form.map, Windows):
        numbers = numbers // form.map.groups * form.map.taps
    if numbers <= CHAIN_WEIGHT:
        return None
    return f"a chain would read its {numbers / 1e6:.1f} million weights anew for every few samples"


#: `gradkern.codegen.lowering.lower` for a GPU.  Raises `TooLarge`.
lower_device = partial(lower, lowering=DeviceLowering)


def lower_for(machine: Machine) -> Callable[..., Chain]:
    """`lower` or `lower_device`, by the machine."""
    return lower_device if isinstance(machine, Device) else lower
