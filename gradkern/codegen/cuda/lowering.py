"""Chains on a GPU: the same records as on the CPU (:mod:`gradkern.codegen.chain`), laid out for a thread block.

A block takes a tile of samples through the whole chain in shared memory.  The arena holds, in this order,

* the *region*: scratch of what lives within one run of per-sample records, for ``slots`` samples at a time; a
  record that takes all samples at once (a linear layer) uses it for its temporary matrices;
* one record per sample of what outlives a run, buffers with disjoint lifetimes on top of each other;
* one record of bits per sample.

Everything is known when the chain is lowered, to the byte.  `DeviceLowering.finish` tries seed tiles, slots and
sample tiles and keeps the cheapest that fits; where none does, `TooLarge` says so, and the plan splits the chain or
leaves the step to ATen.  Nothing ever spills to global memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.program import Contract, Dense, Program, Windows
from ..aliasing import Cotangent
from ..chain import FIELDS, KINDS, Chain, Machine
from ..lowering import Lowering, lower
from ..scratch import Buffer
from ..units import Graph, Node, Unit, planar
from ..weights import mergeable
from .cost import (
    IN_NARROW,
    IN_QUADS,
    PARTS,
    QUAD_LANES,
    QUADS,
    WALK_SEEDS,
    WARP,
    WINDOW_T,
    Bands,
    RunPrice,
    Work,
    even,
    narrow_clocks,
    quad_clocks,
    walk_clocks,
)
from .fuse import fused
from .slices import COUNTS as SLICES
from .slices import sliced
from .weights import DeviceScatter, DeviceWindow, NarrowScatter, QuadScatter

CAST_DTYPES = (torch.float16, torch.bfloat16)  # cast to float32 on the way in, and back on the way out
#: Numbers in a weight from which a contraction leaves its chain.  A block reads the weight for its own few samples: a
#: mebibyte from L2 takes a multiprocessor about 40,000 clocks.  UNMEASURED.
CHAIN_WEIGHT = 1 << 18
MAX_TILE = 64  # samples of a block
MAX_SLOTS = 32  # samples at a time in scratch
MAX_PORTS = 16  # external inputs or outputs of a chain; csrc/cuda/args.h: kPorts


class TooLarge(Exception):
    """A chain that no tile makes small enough; ``.bytes`` is what a single sample and seed would take."""

    def __init__(self, needed: int, limit: int):
        super().__init__(f"needs {needed / 1024:.0f} KiB of shared memory for one sample, of {limit / 1024:.0f}")
        self.bytes = needed


@dataclass(frozen=True)
class Device(Machine):
    """A GPU as the planner sees it: `isa` is ``"cuda"``; weights are read in groups of four numbers."""

    shared_bytes: int = 232448  # that one block may have
    threads: int = 256


@dataclass(frozen=True)
class Choice:
    """A way to cut the work: seeds at a time, samples of a block, of every run of records those that scratch has slots
    for, and the arena that it takes (elements)."""

    seed_tile: int
    block: int
    slots: tuple[int, ...]
    region: int
    bytes: int
    cost: float  # clocks per sample, estimated


class DeviceLowering(Lowering):
    """One group on a GPU."""

    slack = 0
    window_type = DeviceWindow
    machine: Device

    def __init__(self, graph: Graph, machine: Machine, itemsize: int, seeds: int, wrt: tuple[int, ...], onehot: bool):
        assert isinstance(machine, Device)
        self.machine = machine
        self.written: set[int] = set()  # stores that a record has written
        self.choice = Choice(1, 1, (), 0, 0, 0.0)
        self.prices: dict[tuple, float] = {}
        super().__init__(graph, machine, itemsize, seeds, wrt, onehot)
        if max(len(graph.inputs), len(graph.outputs)) > MAX_PORTS:
            raise TooLarge(machine.shared_bytes + 1, machine.shared_bytes)

    # ---- records that differ from the CPU's

    def store(self, node: Node) -> Buffer:
        return self.stores.setdefault(node.store, Buffer((node.size + 3) // 4 * 4))

    def grad(self, node: Node) -> Buffer:
        return self.grads.setdefault(node.id, Buffer((node.size + 3) // 4 * 4))

    def choose_scatter(self, unit: Unit, pattern: Unit | None) -> DeviceScatter:
        """One window per position or one for all taps of the pool behind it, walked channel by live channel or in
        quads: whichever is expected to be fastest with all warps at work."""
        if unit.dense:
            return DeviceScatter.of(unit, 1)  # type: ignore[return-value]
        behind = self.cotangents.of(unit.out)
        types = (DeviceScatter, QuadScatter, NarrowScatter)
        made = [t.of(unit, 1) for t in types]
        taps = 1
        if pattern is not None and mergeable(unit, pattern):
            made += [t.merge(unit, 1, pattern.windows, 1) for t in types]  # type: ignore[arg-type]
        if pattern is not None and pattern.windows:
            taps = pattern.windows.taps
        # Seed rows lie in global memory: only the walk reads them there.
        plain = [s for s in made if type(s) is DeviceScatter]
        rows = behind is None or behind.rows
        fitting = plain if rows else [s for s in made if s.fits(unit.reads[0], behind.node)]  # type: ignore[attr-defined]
        return min(fitting, key=lambda s: self.scatter_clocks(s, taps, pattern is not None))  # type: ignore[return-value, arg-type]

    def scatter_clocks(self, layout: DeviceScatter, taps: int, pattern: bool) -> float:
        """Clocks per pool output for all seeds."""
        slots, planes = len(layout.slots), taps if layout.merged else 1
        if isinstance(layout, NarrowScatter):
            return taps / planes * narrow_clocks(slots, layout.O, self.seeds, planes)[0]
        if isinstance(layout, QuadScatter):
            args = (slots // 4, layout.O, self.seeds, planes, pattern)
            return taps / planes * min(quad_clocks(*args, lanes, self.itemsize)[0] for lanes in QUAD_LANES)
        walks = math.ceil(self.seeds / WALK_SEEDS)
        return walks * walk_clocks(slots, layout.O, layout.merged, even(self.seeds, WALK_SEEDS), taps, pattern)

    def prepare(self, unit: Unit) -> None:
        """Borders, and what copies leave out, are zeroed for every tile: buffers share memory."""
        node = unit.out
        filled = node.C * node.P
        if unit.kind == "move":
            filled = sum(sum(runs[2::5]) for runs in self.runs(unit, node))
        if node.store not in self.written and node.size != filled:
            self.emit(self.forward, "Zero", dst=(self.store(node), 0), size=node.size)
        self.written.add(node.store)

    def forward_window(self, unit: Unit, fields: dict[str, Any]) -> None:
        super().forward_window(unit, fields)
        self.forward[-1]["ldw"] = self.window(unit).ldf  # type: ignore[attr-defined]

    def backward_window(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        super().backward_window(unit, node, behind)
        op, layout = self.backward[-1], self.scatter(unit, behind.pattern)
        op["K"] = len(layout.slots)
        if unit.dense:
            if op["H"] * op["W"] != 1 or op["taps"] > 1:
                raise AssertionError("a linear layer gives one position")
            op["size"] = int(len(layout.runs) == 1)  # the window is one run
        else:
            op["ways"] = bands(unit, op)
            if isinstance(layout, QuadScatter):
                op["fn"], op["table"] = IN_QUADS, self.table(layout.offsets())
            elif isinstance(layout, NarrowScatter):
                op["fn"] = IN_NARROW

    def backward_move(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        """Where no number was read twice, every run has its own warp."""
        super().backward_move(unit, node, behind)
        op = self.backward[-1]
        runs = self.tables[op["table"] : op["table"] + 5 * op["size"]]
        read = [r + i * step for r, n, step in zip(runs[::5], runs[2::5], runs[3::5], strict=True) for i in range(n)]
        op["fn"] = int(len(set(read)) == len(read))

    def turn_over(self, unit: Unit) -> None:
        """No copy: the kernel reads the right side of a matrix product by any steps, and shared memory is scarce."""

    def right_turned(self, unit: Unit) -> dict[str, Any]:
        b = unit.reads[1]
        return self.at("aux", b, self.store(b)) | {"aux_px": 1, "sw": b.C}

    # ---- layout of the arena

    def finish(self) -> tuple[tuple[int, ...], int]:
        self.forward = fused(self.forward, self.backward)
        best: tuple[Choice, list[dict[str, Any]]] | None = None
        least = 0
        for backward in self.variants():
            self.use(backward)
            buffers, spans = self.lives()
            for tile in sorted({math.ceil(self.seeds / i) for i in range(1, self.seeds + 1)} or {1}, reverse=True):
                scratch, sample = self.arrange(buffers, spans, tile)
                least = self.bytes(max(*scratch, self.temporary(1, tile)), sample, 1)
                found = self.choose(scratch, sample, tile)
                if found and (best is None or found.cost < best[0].cost):
                    best = found, backward
        if best is None:
            raise TooLarge(least, self.machine.shared_bytes)
        self.choice, backward = choice, _ = best
        self.use(backward)
        buffers, spans = self.lives()
        scratch, sample = self.arrange(buffers, spans, choice.seed_tile)
        self.settle(scratch)
        for buffer in buffers:
            buffer.base += choice.region * buffer.per_sample
        # Lanes without work, and weights asked for ahead of time, lie up to that far past the last row.
        rows = (getattr(x, name, 0) for x in self.layouts for name in ("ldf", "ldw"))
        self.packed += 8 * max(rows, default=0) + WARP * 4 * max(QUADS)
        most = max(choice.slots, default=1)
        sizes = (choice.region, sample, self.bit_bytes, most, choice.bytes, choice.block)
        return sizes, choice.seed_tile

    def settle(self, scratch: list[int]) -> None:
        """Say in the records what depends on how the work is cut: samples at a time, workers and their bands."""
        choice = self.choice
        for op, run in zip(self.forward + self.backward, self.runs_of(), strict=True):
            op["outer"], op["scratch"] = choice.slots[run], scratch[run]
            if op["kind"] == WINDOW_T and not op["block"]:
                work = self.work(choice.slots[run], choice.block, choice.seed_tile)
                _, op["slots"], (op["R"], op["L"], op["size"], op["entries"]) = work.transposed(op)

    def runs_of(self) -> list[int]:
        """The run that each record belongs to: a record that takes the whole block, or all records in between."""
        found, run, ops = [], -1, self.forward + self.backward
        for i, op in enumerate(ops):
            run += bool(i in (0, len(self.forward)) or op["block"] or ops[i - 1]["block"])
            found.append(run)
        return found

    def variants(self) -> list[list[dict[str, Any]]]:
        """The backward pass with its last wide layer whole, or in slices; the ones that need least memory last."""
        found = (sliced(self.backward, self.tables, count) for count in SLICES)
        return [self.backward, *(ops for ops in found if ops is not None)]

    def use(self, backward: list[dict[str, Any]]) -> None:
        """Take these records as the backward pass: their buffers that are no values are cotangents."""
        self.backward = backward
        values = {id(b) for b in (*self.stores.values(), *self.slopes.values())}
        used = (op[key][0] for op in backward for key in ("src", "aux", "dst") if isinstance(op.get(key), tuple))
        self.grads = dict(enumerate({id(b): b for b in used if id(b) not in values}.values()))

    def lives(self) -> tuple[list[Buffer], dict[int, list[int]]]:
        """The buffers in use, each marked as scratch or kept per sample, and the first and last record of each."""
        ops = self.forward + self.backward
        for buffer in (*self.stores.values(), *self.grads.values()):
            buffer.stages, buffer.per_sample = set(), False
        spans: dict[int, list[int]] = {}
        for i, (op, run) in enumerate(zip(ops, self.runs_of(), strict=True)):
            for key in ("src", "aux", "dst"):
                if isinstance(op.get(key), tuple):
                    buffer = op[key][0]
                    spans.setdefault(id(buffer), [i, i])[1] = i
                    buffer.stages.add(run)
                    buffer.per_sample |= bool(op["block"])
        buffers = [b for b in (*self.stores.values(), *self.grads.values()) if id(b) in spans]
        for buffer in buffers:
            buffer.per_sample |= len(buffer.stages) > 1
        for buffer in self.stores.values():  # a product's backward reads values, for every tile of seeds
            if id(buffer) in spans and spans[id(buffer)][1] >= len(self.forward):
                spans[id(buffer)][1] = len(ops)
        for buffer in self.slopes.values():  # so are these
            spans[id(buffer)][1] = len(ops)
            buffers.append(buffer)
        return buffers, spans

    def arrange(self, buffers: list[Buffer], spans: dict[int, list[int]], tile: int) -> tuple[list[int], int]:
        """Place buffers whose lifetimes overlap beside each other; returns elements of every run's scratch for one
        sample, and of what is kept per sample."""
        sample, scratch = 0, [0] * (max(self.runs_of(), default=0) + 1)
        placed: list[tuple[Buffer, int, int]] = []
        grads = {id(b) for b in self.grads.values()}
        sized = [(b, b.elements * (tile if id(b) in grads else 1)) for b in buffers]
        for buffer, size in sorted(sized, key=lambda x: -x[1]):
            first, last = spans[id(buffer)]
            taken = sorted(
                (other.base, other.base + extent)
                for other, extent, kind in placed
                if kind == buffer.per_sample and spans[id(other)][0] <= last and first <= spans[id(other)][1]
            )
            base = 0
            for low, high in taken:
                if base + size <= low:
                    break
                base = max(base, high)
            buffer.base = base
            size = (size + 3) // 4 * 4
            placed.append((buffer, size, buffer.per_sample))
            if buffer.per_sample:
                sample = max(sample, base + size)
            else:
                (run,) = buffer.stages
                scratch[run] = max(scratch[run], base + size)
        sample += (4 - sample) % WARP if sample else 0  # neighbours start four banks apart
        return scratch, sample

    def temporary(self, block: int, tile: int) -> int:
        """Elements of the region that block ops want."""
        wanted = 0
        for op in self.forward + self.backward:
            if op["block"]:
                wanted = max(wanted, PARTS)
                if op["kind"] == KINDS.index("WindowT"):
                    rows = (block * tile + 3) // 4 * 4
                    wanted = max(wanted, rows * min(op["O"], 64) + WARP)
        return wanted

    def bytes(self, region: int, sample: int, block: int) -> int:
        return ((region + block * sample) * self.itemsize + block * self.bit_bytes + 15) // 16 * 16

    def choose(self, scratch: list[int], sample: int, tile: int) -> Choice | None:
        """The cheapest sample tile and slots for a seed tile; None where nothing fits."""
        runs, found = self.priced(tile), None
        for block in range(1, MAX_TILE + 1):
            needed = max(*scratch, self.temporary(block, tile))
            if self.bytes((needed + 3) // 4 * 4, sample, block) > self.machine.shared_bytes:
                break
            room = (self.machine.shared_bytes - self.bytes(0, sample, block)) // self.itemsize
            wanted = max(needed, *(min(block, MAX_SLOTS) * each for each in scratch))
            region = min(room // 4 * 4, (wanted + 3) // 4 * 4)
            limits = [min(block, MAX_SLOTS, region // each if each else block) for each in scratch]
            picked = [(run.alone(block), 1) if run.block else run.best(n) for run, n in zip(runs, limits, strict=True)]
            cost = sum(clocks for clocks, _ in picked)
            if found is None or cost < found.cost:
                slots = tuple(n for _, n in picked)
                found = Choice(tile, block, slots, region, self.bytes(region, sample, block), cost)
        return found

    def priced(self, tile: int) -> list[RunPrice]:
        """The runs of records, as prices by the number of samples that they take at a time."""
        rounds = math.ceil(self.seeds / tile) if self.seeds else 0
        ops = self.forward + self.backward
        found: list[RunPrice] = []
        for i, (op, run) in enumerate(zip(ops, self.runs_of(), strict=True)):
            if run == len(found):
                warps = self.machine.threads // WARP
                found.append(RunPrice(bool(op["block"]), warps, tile, self.itemsize, self.prices))
            found[run].add(op, i < len(self.forward), 1 if i < len(self.forward) else rounds)
        return found

    def work(self, slots: int, block: int, tile: int) -> Work:
        return Work(self.machine.threads // WARP, slots, block, tile, self.itemsize)

    def clocks(self) -> tuple[float, ...]:
        """Estimated clocks of a multiprocessor per sample, record by record."""
        choice, found = self.choice, []
        rounds = math.ceil(self.seeds / choice.seed_tile) if self.seeds else 0
        for i, (op, run) in enumerate(zip(self.forward + self.backward, self.runs_of(), strict=True)):
            work = self.work(choice.slots[run], choice.block, choice.seed_tile)
            found.append(work.forward(op) if i < len(self.forward) else rounds * work.backward(op))
        return tuple(found)

    def scratch(self, sizes: tuple[int, ...]) -> int:
        """Bytes of shared memory per block."""
        return sizes[4]

    def resolve(self, op: dict[str, Any], sample: int) -> tuple[int, ...]:
        """A symbolic record → numbers; a negative sample stride means scratch."""
        out = dict.fromkeys(FIELDS, 0)
        grads = {id(b) for b in self.grads.values()}
        for key, value in op.items():
            if isinstance(value, tuple):
                buffer, offset = value
                out[key] = buffer.base + offset
                # A chain of one slot still needs a stride below zero.
                out[f"{key}_n"] = sample if buffer.per_sample else -max(op["scratch"], 4)
                if f"{key}_s" in out and id(buffer) in grads:
                    out[f"{key}_s"] = buffer.elements
            else:
                out[key] = value
        out["bits_n"] = self.bit_bytes
        return tuple(int(out[f]) for f in FIELDS)


def bands(unit: Unit, op: dict[str, Any]) -> list[Bands]:
    """Rectangles of positions that workers own, and how many colours part them, in the ways to choose from.

    Position ``q`` of an axis reaches from ``q·step`` to ``q·step + reach`` of the destination.  Bands of ``length``
    positions, every ``n``-th of one colour, touch different memory when ``((n - 1)·length + 1)·step > reach``.  So an
    axis has bands in two colours, or single positions in as many colours as they need.
    """
    (kh, kw), (sh, sw), _, (dh, dw) = planar(unit.form.map)  # type: ignore[attr-defined]
    axes = []
    for extent, k, s, d, p in ((op["H"], kh, sh, dh, "h"), (op["W"], kw, sw, dw, "w")):
        pool_step, pool_reach = (op[f"s{p}"], (op[f"k{p}"] - 1) * op[f"d{p}"]) if op["taps"] else (1, 0)
        step, reach = pool_step * s, pool_reach * s + (k - 1) * d
        axes.append({(min(extent, max(1, reach // step)), 2), (1, reach // step + 1)})
    rows, columns = (sorted(axis, reverse=True) for axis in axes)
    return [(high, wide, n, m) for high, n in rows for wide, m in columns]


def heavy(program: Program, i: int) -> str | None:
    """Why a contraction is no part of a chain although it might fit one; None where it is welcome there."""
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


def lower_device(
    program: Program,
    steps: list[int],
    live_out: list[int],
    machine: Machine,
    itemsize: int,
    seeds: int,
    wrt: tuple[int, ...],
    onehot: bool = True,
    linear: bool = False,
) -> Chain:
    """`gradkern.codegen.lowering.lower` for a GPU.  Raises `TooLarge`."""
    return lower(program, steps, live_out, machine, itemsize, seeds, wrt, onehot, DeviceLowering, linear)


def lowering(machine: Machine) -> Callable[..., Chain]:
    """`lower` or `lower_device`, by the machine."""
    return lower_device if isinstance(machine, Device) else lower
