"""Chains on a GPU: the same records as on the CPU (:mod:`gradkern.chain`), laid out for a thread block.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arena import Buffer
from .chain import FIELDS, KINDS, Chain, Machine
from .cotangents import Cotangent
from .lowering import Lowering, lower
from .pack import ScatterLayout, WindowLayout, aligned, mergeable
from .program import Program
from .units import Graph, Node, Unit, planar

WARP = 32
PLAIN, TF32, BF16, TF32X3 = 0, 1, 2, 3  # how dense contractions multiply; csrc/cuda/args.h
#: By `torch.get_float32_matmul_precision()`.  "highest" is the fp32 pipe until three TF32 products have been measured
#: to be as accurate.
MATH = {"highest": PLAIN, "high": TF32X3, "medium": BF16}
#: Dtypes that are cast to float32 on the way in and back on the way out, and the products that lose nothing of them.
HALVES = {torch.float16: TF32, torch.bfloat16: BF16}
STEPS = ("auto", "kernel", "aten")  # what runs layers that fit no chain
STEPS_VARIABLE = "GRADKERN_STEPS"
MAX_TILE = 64  # samples of a block
MAX_PORTS = 16  # external inputs or outputs of a chain; csrc/cuda/args.h: kPorts
TILE_SUMS = 512  # sums in a warp's tile of a forward contraction; csrc/cuda/window.cuh
PARTS = 4096  # elements of the region that a block op gets at least, for parts of long sums
WALK_SEEDS, WALK_SLOTS = 5, 5  # csrc/cuda/scatter.cuh: kMaxSeeds, kMaxSlots
ISSUE = 128 * 0.7  # lanes that a multiprocessor issues per clock, and the share of it that loops are expected to reach
BARRIER = 150  # clocks from one record to the next
L2_PACE = 24.0  # bytes per clock that one of an H200's multiprocessors gets from L2 while all of them read


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
    math: int = PLAIN  # of dense contractions
    steps: str = "auto"  # layers too large for a chain: the step kernel, ATen, or whichever is expected to be faster


class DeviceWindow(WindowLayout):
    """Forward weights ``[groups][K][O to a multiple of 4]``."""

    @property
    def ldf(self) -> int:
        return (self.O + 3) // 4 * 4

    def place(self, offset: int) -> int:
        self.wf = offset
        self.bias = self.wf + aligned(self.groups * self.K * self.ldf)
        return self.bias + aligned(self.groups * self.ldf)

    def fill(self, packed: Tensor, params: Mapping[str, Tensor]) -> None:
        w, b = self.folded(params)  # [groups·O, K], [groups·O]
        g, o, k = self.groups, self.O, self.K
        wide = packed[self.wf : self.wf + g * k * self.ldf].view(g, k, self.ldf)
        wide[:, :, :o] = w.reshape(g, o, k).transpose(1, 2)
        packed[self.bias : self.bias + g * self.ldf].view(g, self.ldf)[:, :o] = b.reshape(g, o)


class DeviceScatter(ScatterLayout):
    """Backward weights ``[taps · O][window to a multiple of 4]``; ``slots`` are the window's offsets, one by one."""

    @property
    def slots(self) -> list[int]:
        return [r + i for r in self.runs for i in range(self.L)]

    @property
    def ldw(self) -> int:
        return (len(self.runs) * self.L + 3) // 4 * 4

    def place(self, offset: int) -> int:
        return super().place(offset) + WARP * WALK_SLOTS  # idle lanes read on past the last row

    def fill(self, packed: Tensor, params: Mapping[str, Tensor]) -> None:
        w, _ = self.folded(params)
        if self.merged:
            w = self.shifted(w)
        back = packed[self.wb : self.wb + w.shape[0] * self.ldw].view(w.shape[0], self.ldw)
        back[:, : w.shape[1]] = w


@dataclass(frozen=True)
class Choice:
    """A way to cut the work: seeds and samples at a time, slots of scratch, and the arena that it takes (elements)."""

    seed_tile: int
    slots: int
    block: int
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
        self.math = machine.math if itemsize == 4 else PLAIN
        self.written: set[int] = set()  # stores that a record has written
        self.choice = Choice(1, 1, 1, 0, 0, 0.0)
        super().__init__(graph, machine, itemsize, seeds, wrt, onehot)
        if max(len(graph.inputs), len(graph.outputs)) > MAX_PORTS:
            raise TooLarge(machine.shared_bytes + 1, machine.shared_bytes)

    # ---- records that differ from the CPU's

    def store(self, node: Node) -> Buffer:
        return self.stores.setdefault(node.store, Buffer((node.size + 3) // 4 * 4))

    def grad(self, node: Node) -> Buffer:
        return self.grads.setdefault(node.id, Buffer((node.size + 3) // 4 * 4))

    def choose_scatter(self, unit: Unit, pattern: Unit | None) -> DeviceScatter:
        """One window per position, or one for all taps of the pool behind it: whichever walks less."""
        plain = DeviceScatter.of(unit, 1)
        if unit.dense or pattern is None or not mergeable(unit, pattern):
            return plain  # type: ignore[return-value]
        pool = pattern.windows
        merged = DeviceScatter.merge(unit, 1, pool, 1)  # type: ignore[arg-type]
        seeds = min(self.seeds, WALK_SEEDS)
        taps = pool.taps  # type: ignore[union-attr]
        return min((plain, merged), key=lambda s: walk_cost(len(s.slots), s.O, s.merged, seeds, taps, True))  # type: ignore[return-value]

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
        layout = self.window(unit)
        op = self.forward[-1]
        op["ldw"] = layout.ldf  # type: ignore[attr-defined]
        if self.math and (layout.R > 1 or unit.reads[0].C % 4):
            op["table2"] = self.table([r + i for r in layout.runs for i in range(layout.L)])

    def backward_window(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        super().backward_window(unit, node, behind)
        op, layout = self.backward[-1], self.scatter(unit, behind.pattern)
        op["K"] = len(layout.slots)
        if unit.dense:
            if op["H"] * op["W"] != 1 or op["taps"] > 1:
                raise AssertionError("a linear layer gives one position")
            op["size"] = int(len(layout.runs) == 1)  # the window is one run
        else:
            op["R"], op["L"] = bands(unit, op)

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
        ops = self.forward + self.backward
        runs, run = [], 0
        for i, op in enumerate(ops):
            fresh = i == len(self.forward) or op["block"] or (i and ops[i - 1]["block"])
            run += bool(fresh)
            runs.append(run)
        spans: dict[int, list[int]] = {}
        for i, op in enumerate(ops):
            for key in ("src", "aux", "dst"):
                if isinstance(op.get(key), tuple):
                    buffer = op[key][0]
                    first = spans.setdefault(id(buffer), [i, i])
                    first[1] = i
                    buffer.stages.add(runs[i])
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
        best: Choice | None = None
        least = 0
        for tile in sorted({math.ceil(self.seeds / i) for i in range(1, self.seeds + 1)} or {1}, reverse=True):
            scratch, sample = self.arrange(buffers, spans, tile)
            least = self.bytes(max(scratch, self.temporary(1, tile)), sample, 1)
            found = self.choose(scratch, sample, tile)
            if found and (best is None or found.cost < best.cost):
                best = found
        if best is None:
            raise TooLarge(least, self.machine.shared_bytes)
        self.choice = best
        self.scratch_size, sample = self.arrange(buffers, spans, best.seed_tile)
        for buffer in buffers:
            buffer.base += best.region * buffer.per_sample
        sizes = (best.region, sample, self.math, self.bit_bytes, best.slots, best.bytes, best.block)
        return sizes, best.seed_tile

    def arrange(self, buffers: list[Buffer], spans: dict[int, list[int]], tile: int) -> tuple[int, int]:
        """Place buffers whose lifetimes overlap beside each other; returns elements of scratch and per sample."""
        ends = [0, 0]
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
            ends[buffer.per_sample] = max(ends[buffer.per_sample], base + size)
        scratch, sample = ends
        sample += (4 - sample) % WARP if sample else 0  # neighbours start four banks apart
        return scratch, sample

    def temporary(self, block: int, tile: int) -> int:
        """Elements of the region that block ops want."""
        wanted = 0
        for op in self.forward + self.backward:
            if op["block"]:
                wanted = max(wanted, PARTS)
                if op["kind"] == KINDS.index("WindowT"):
                    rows, channels = (block * tile + 3) // 4 * 4, min(op["O"], 64)
                    wanted = max(wanted, rows * (channels + 48 if self.math else channels) + WARP)
        return wanted

    def bytes(self, region: int, sample: int, block: int) -> int:
        return ((region + block * sample) * self.itemsize + block * self.bit_bytes + 15) // 16 * 16

    def choose(self, scratch: int, sample: int, tile: int) -> Choice | None:
        """The cheapest slots and sample tile for a seed tile; None where nothing fits."""
        blocked = any(op["block"] for op in self.forward + self.backward)
        found = None
        for slots in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            for block in range(MAX_TILE if blocked else slots, slots - 1, -1):
                region = max(slots * scratch, self.temporary(block, tile))
                region = (region + 3) // 4 * 4
                size = self.bytes(region, sample, block)
                if size > self.machine.shared_bytes:
                    continue
                cost = self.cost(slots, block, tile)
                if found is None or cost < found.cost:
                    found = Choice(tile, slots, block, region, size, cost)
                break
        return found

    def cost(self, slots: int, block: int, tile: int) -> float:
        """Estimated clocks per sample of a multiprocessor."""
        warps, rounds = self.machine.threads // WARP, math.ceil(self.seeds / tile) if self.seeds else 0
        total = BARRIER * (len(self.forward) + rounds * len(self.backward)) / slots
        for op in self.forward:
            if op["kind"] == KINDS.index("Window"):
                total += self.window_cost(op, block if op["block"] else slots, warps)
            elif op["kind"] == KINDS.index("Pattern"):
                total += op["H"] * op["W"] * op["nb"] * 8 * (12 + 8 * op["taps"]) / ISSUE
            elif op["kind"] == KINDS.index("MatMul"):
                total += self.matmul_cost(op, slots, 1)
        for op in self.backward:
            if op["kind"] == KINDS.index("Zero"):
                total += 3 * op["size"] * self.seeds / ISSUE
            elif op["kind"] == KINDS.index("MatMulT"):
                total += rounds * self.matmul_cost(op, slots, tile)
            elif op["kind"] == KINDS.index("WindowT") and op["block"]:
                total += rounds * self.product_cost(op, block, tile)
            elif op["kind"] == KINDS.index("WindowT"):
                walks = math.ceil(tile / WALK_SEEDS)
                down, across = math.ceil(op["H"] / op["R"]), math.ceil(op["W"] / op["L"])
                colours = min(down, 2) * min(across, 2)
                share = busy(
                    slots * walks * math.ceil(down * across / colours), warps * (WARP // worker_lanes(op["K"]))
                )
                planes = max(op["taps"], 1)
                walk = walk_cost(op["K"], op["O"], op["merged"], math.ceil(tile / walks), planes, op["taps"] > 0)
                total += rounds * walks * walk * op["H"] * op["W"] / ISSUE / share
        return total

    def window_cost(self, op: dict[str, Any], samples: int, warps: int) -> float:
        """A forward contraction: multiply-adds at the share of busy warps, or the weight's way from L2."""
        positions = samples * (1 if op["block"] else op["H"] * op["W"])
        lanes = 8 if op["O"] > 16 else 4 if op["O"] > 8 else 2 if op["O"] > 4 else 1
        tiles = math.ceil(op["O"] / (4 * lanes)) * math.ceil(positions * lanes / (4 * WARP)) * op["groups"]
        share = busy(tiles * (max(warps // tiles, 1) if op["block"] else 1), warps)
        work = tiles * TILE_SUMS * op["K"] * (1.3 if op["L"] % 4 == 0 else 1.6) / ISSUE / share
        return max(work, op["K"] * op["O"] * self.itemsize / L2_PACE if op["block"] else 0.0) / samples

    def product_cost(self, op: dict[str, Any], block: int, tile: int) -> float:
        """A linear layer backward, one tile of seeds: rows in whole tiles of the kernel, or the weight from L2."""
        rows = block * tile
        padded = min(math.ceil(rows / height) * height for height in (8, 16, 24, 32))
        work = padded * math.ceil(op["K"] / 64) * 64 * op["O"] * 1.2 / ISSUE
        return max(work, op["K"] * op["O"] * self.itemsize / L2_PACE) / block

    def matmul_cost(self, op: dict[str, Any], samples: int, copies: int) -> float:
        """A product of two matrices of values: tiles of 4 × 4 or 1 × 4 per thread; csrc/cuda/matmul.cuh chooses so."""

        def pace(height: int) -> int:
            tiles = samples * copies * op["H"] * math.ceil(op["W"] / height) * math.ceil(op["O"] / 4)
            return math.ceil(tiles / self.machine.threads) * (100 + 16 * height + op["C"] * 4 * (height + 1))

        return min(pace(4), pace(1)) * self.machine.threads / ISSUE / samples

    def scratch(self, sizes: tuple[int, ...]) -> int:
        """Bytes of shared memory per block."""
        return sizes[5]

    def resolve(self, op: dict[str, Any], sample: int) -> tuple[int, ...]:
        """A symbolic record → numbers; a negative sample stride means scratch."""
        out = dict.fromkeys(FIELDS, 0)
        grads = {id(b) for b in self.grads.values()}
        for key, value in op.items():
            if isinstance(value, tuple):
                buffer, offset = value
                out[key] = buffer.base + offset
                # A chain of one slot still needs a stride below zero.
                out[f"{key}_n"] = sample if buffer.per_sample else -max(self.scratch_size, 4)
                if f"{key}_s" in out and id(buffer) in grads:
                    out[f"{key}_s"] = buffer.elements
            else:
                out[key] = value
        out["bits_n"] = self.bit_bytes
        return tuple(int(out[f]) for f in FIELDS)


def busy(items: int, workers: int) -> float:
    """The share of workers that have something to do."""
    return items / (math.ceil(items / workers) * workers)


def worker_lanes(slots: int) -> int:
    """Lanes of a worker for a window of ``slots`` elements; csrc/cuda/scatter.cuh decides the same way."""
    best = WARP
    for lanes in (16, 8, 4):
        if slots <= lanes * WALK_SLOTS and lanes * math.ceil(slots / lanes) <= best * math.ceil(slots / best):
            best = lanes
    return best


def walk_cost(slots: int, channels: int, merged: bool, seeds: int, planes: int, pattern: bool) -> float:
    """Issued lanes per pool output: a start and a read-add-write per walk, and per live channel its loads and
    multiply-adds, a few elements of the window per lane.  A pool's maximum is alive in three of four cases."""
    lanes = worker_lanes(slots)
    each = math.ceil(slots / lanes)
    live = channels * (0.75 if planes > 1 else 0.5 if pattern else 1.0)
    walks = 1 if merged else planes
    return lanes * (walks * (30 + 3 * each * seeds) + live * (7 + each + seeds + each * seeds))


def bands(unit: Unit, op: dict[str, Any]) -> tuple[int, int]:
    """``(rows, columns)`` of the rectangles of positions that workers own, so that every second one is apart.

    Position ``q`` of an axis reaches from ``q·step`` to ``q·step + reach`` of the destination.  Bands of ``length``
    positions with one band between them touch different memory when ``(length + 1)·step > reach``.
    """
    (kh, kw), (sh, sw), _, (dh, dw) = planar(unit.form.map)  # type: ignore[attr-defined]
    found = []
    for extent, k, s, d, p in ((op["H"], kh, sh, dh, "h"), (op["W"], kw, sw, dw, "w")):
        pool_step, pool_reach = (op[f"s{p}"], (op[f"k{p}"] - 1) * op[f"d{p}"]) if op["taps"] else (1, 0)
        step, reach = pool_step * s, pool_reach * s + (k - 1) * d
        found.append(min(extent, max(1, reach // step)))
    return found[0], found[1]


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
    """`gradkern.lowering.lower` for a GPU.  Raises `TooLarge`."""
    return lower(program, steps, live_out, machine, itemsize, seeds, wrt, onehot, DeviceLowering, linear)


def lowering(machine: Machine) -> Callable[..., Chain]:
    """`lower` or `lower_device`, by the machine."""
    return lower_device if isinstance(machine, Device) else lower
