"""Chain: a native group of steps as records for the compiled interpreter (`csrc/program.h` is the mirror).

`lower` decides everything that does not depend on tensor data: which cotangents are materialised and which are
read through a pattern, where each buffer lies, what is zeroed, how many seeds and samples are worked on at a time.
It is pure: equal arguments give equal chains.

**Cotangents as expressions.**  The cotangent of a node with a single reader is often only another cotangent seen
through bits (ReLU, max pool) or the very same one (a sum).  Such a node gets no buffer: :class:`Cotangent` names
the buffer, and the pattern to read it through, and the contraction behind it skips what the bits say is zero.
When the group ends in a linear layer and the seeds are one-hot, the first cotangents are rows of its weight, and
nothing is computed for them at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .chain_forms import FormRecords
from .pack import MixLayout, ScatterLayout, WindowLayout
from .program import Program, Windows
from .units import MAX_CHANNELS, Builder, Graph, Node, Unit, planar

#: The record layout; `gradkern.ops` compares it with the compiled one when it loads.
_FIELDS = (
    "kind block src src_n src_s src_row src_px aux aux_n aux_row aux_px dst dst_n dst_s dst_row dst_px H W Hi Wi C O "
    "groups K R L slots sh sw kh kw ph pw dh dw wf bias wb ldw table table2 entries bits bits_n nb taps relu fn "
    "p0 p1 p2 ext rows assign outer merged fold size"
)
_KINDS = (
    "Load Window Stencil Pattern Scale Sum Move Product Lines Store SeedRows SeedOneHot SeedDense Zero WindowT "
    "StencilT Expand MulD Add MoveT ProductT LinesT StoreT Rectify MatMul MatMulT"
)
FIELDS, KINDS = tuple(_FIELDS.split()), tuple(_KINDS.split())

POINT = Windows((1,), (1,), ((0, 0),), (1,))  # the window of a bare ReLU
SLACK = 64  # elements past every buffer that a vector may read or an unused lane may touch
L1_BYTES = 24 << 10  # weights above this are walked tile by tile (half of a common 48 KiB L1)
BLOCK_BYTES = 512 << 10  # scratch that a thread's block of samples should fit (half of a common L2)
SEED_BYTES = 256 << 10  # cotangent scratch of one sample
MAX_BLOCK = 32
SCRATCH_BYTES = 32 << 20  # per thread, unless one sample with one seed needs more


@dataclass(frozen=True)
class Machine:
    """What the kernels' layout depends on."""

    isa: str
    vector_bytes: int
    registers: int


@dataclass(frozen=True)
class Chain:
    """Records, tables and layouts of one group.  Read-only; shared by every call with the same plan."""

    forward: tuple[tuple[int, ...], ...]
    backward: tuple[tuple[int, ...], ...]
    tables: tuple[int, ...]
    layouts: tuple[WindowLayout | ScatterLayout | MixLayout, ...]
    sizes: tuple[int, ...]  # arena: shared, per sample, bit bytes shared, per sample, list, segments, block
    packed_size: int
    inputs: tuple[int, ...]  # external values, in the order of the records' `ext`
    outputs: tuple[int, ...]
    output_sizes: tuple[int, ...]
    wrt: tuple[int, ...]  # external inputs whose cotangents are stored, in the order of StoreT's `ext`
    seed_tile: int
    rows: tuple[int, int] | None  # (offset, row length) in the packed weights of the seed rows
    rectify_rows: bool  # the rows pass a guided ReLU: without their negative part
    scratch: int  # bytes per thread


@dataclass
class Buffer:
    """A piece of the arena: per-sample where it must outlive a stage, shared between samples otherwise."""

    elements: int
    stages: set[int] = field(default_factory=set)
    base: int = -1
    per_sample: bool = False


@dataclass(frozen=True)
class Cotangent:
    """Where a node's cotangent is read: the buffer of ``node`` (or the seed rows), through ``pattern`` if any."""

    node: Node
    rows: bool = False
    pattern: Unit | None = None


class Lowering(FormRecords):
    """One group on one machine, for ``seeds`` seeds of element size ``itemsize``.

    The layout of weights and arena is the machine's: :mod:`gradkern.device` has the GPU's.
    """

    slack = SLACK
    window_type: type[WindowLayout] = WindowLayout

    def __init__(self, graph: Graph, machine: Machine, itemsize: int, seeds: int, wrt: tuple[int, ...], onehot: bool):
        self.graph, self.lanes, self.itemsize, self.onehot = graph, machine.vector_bytes // itemsize, itemsize, onehot
        self.seeds = seeds
        self.wrt = tuple(v for v in graph.inputs if v in wrt)
        self.outputs = list(graph.outputs.values())
        self.tables: list[int] = []
        self.interned: dict[tuple[int, ...], int] = {}
        self.layouts: list[Any] = []
        self.layout_of: dict[tuple[str, int], Any] = {}
        self.asked: dict[tuple[int, int], int] = {}  # (unit, node) → how many of its reads have been answered
        self.tables_of: dict[tuple[int, int], list[list[int]]] = {}  # unit, row of the result → runs of a move
        self.folded: dict[int, int] = {}  # node id → rows interleaved in its cotangent
        self.packed = 0
        self.forward: list[dict[str, Any]] = []
        self.backward: list[dict[str, Any]] = []
        self.stores: dict[int, Buffer] = {}  # Node.store → forward memory
        self.grads: dict[int, Buffer] = {}  # node id → cotangent memory
        self.slopes: dict[int, Buffer] = {}  # unit index → derivative / probabilities
        self.forward_blocks = True  # whether the forward pass says how many samples go together
        self.bits: dict[int, int] = {}  # unit index → byte offset in the per-sample bit record
        self.bit_bytes = 0
        self.idx = self.segs = 64
        self.needs = self.reachable()
        self.expressions: dict[int, Cotangent | None] = {}
        self.rows_unit = self.find_rows_unit()

    # ---- analysis

    def reachable(self) -> set[int]:
        """Nodes whose cotangent matters: they depend on a wanted input."""
        found = {self.graph.inputs[v].id for v in self.wrt}
        for unit in self.graph.units:
            if any(n.id in found for n in unit.reads):
                found.add(unit.out.id)
        return found

    def find_rows_unit(self) -> Unit | None:
        """The last linear layer, if one-hot seeds start there: their first cotangents are its weight's rows."""
        if not self.onehot or len(self.outputs) != 1:
            return None
        out = self.outputs[0]
        unit = out.producer
        if unit is None or not unit.dense or out.readers or not self.wants(unit):
            return None
        return unit if len(self.scatter(unit, None).runs) == 1 else None

    def wants(self, unit: Unit) -> bool:
        return any(n.id in self.needs for n in unit.reads)

    def grad_readers(self, node: Node) -> list[Unit]:
        return [u for u in node.readers if u.out.id in self.needs]

    def express(self, node: Node) -> Cotangent | None:
        """The cotangent of a node as an expression, ``.node is node`` for a buffer of its own; None: not wanted."""
        if node.id not in self.expressions:
            self.expressions[node.id] = self.decide(node)
        return self.expressions[node.id]

    def decide(self, node: Node) -> Cotangent | None:
        own = Cotangent(node)
        if node.id not in self.needs:
            return None
        readers = self.grad_readers(node)
        wanted = any(node is n for n in self.outputs)
        if self.rows_unit is not None and node is self.rows_unit.out:
            return None
        if wanted or len(readers) != 1:
            return own
        reader, producer = readers[0], node.producer
        through_bits = producer.kind in ("window", "sum")  # type: ignore[union-attr]
        if reader is self.rows_unit:
            return Cotangent(node, rows=True) if self.takes_rows(node) else own
        behind = self.express(reader.out)
        if behind is None:
            return None
        if reader.opened:
            return behind if behind.node is reader.out and not behind.rows else own
        if reader.kind == "pattern" and through_bits and behind.pattern is None:
            return Cotangent(behind.node, behind.rows, reader)
        if reader.kind == "sum" and producer.rectify:  # type: ignore[union-attr]
            return own  # its negative part goes, and the sum's other branches keep theirs
        if reader.kind == "sum" and (through_bits or not (behind.rows or behind.pattern)):
            return behind
        if reader.kind == "scale" and behind.node is reader.out:
            return behind  # multiplied in place
        return own

    def takes_rows(self, node: Node) -> bool:
        """Whether everything that will read this cotangent is a contraction, straight or through one pattern."""
        producer = node.producer
        if producer.kind == "pattern":  # type: ignore[union-attr]
            if producer.opened:  # type: ignore[union-attr]
                return False
            source = producer.reads[0]  # type: ignore[union-attr]
            alone = len(self.grad_readers(source)) == 1 and not self.is_output(source)
            return alone and source.producer.kind == "window"
        return producer.kind == "window"  # type: ignore[union-attr]

    def is_output(self, node: Node) -> bool:
        return any(node is n for n in self.outputs)

    # ---- tables and packed weights

    def table(self, numbers: list[int]) -> int:
        key = tuple(numbers)
        if key not in self.interned:
            self.interned[key] = len(self.tables)
            self.tables += numbers
        return self.interned[key]

    def layout(self, kind: str, unit: Unit, make) -> Any:
        """The unit's layout of one kind, made and placed at its first use."""
        key = (kind, id(unit))
        if key not in self.layout_of:
            self.layout_of[key] = layout = make()
            self.layouts.append(layout)
            self.packed = layout.place(self.packed)
        return self.layout_of[key]

    def window(self, unit: Unit) -> WindowLayout:
        return self.layout("window", unit, lambda: self.window_type.of(unit, self.lanes))

    def scatter(self, unit: Unit, pattern: Unit | None) -> ScatterLayout:
        return self.layout("scatter", unit, lambda: self.choose_scatter(unit, pattern))

    def choose_scatter(self, unit: Unit, pattern: Unit | None) -> ScatterLayout:
        """The cheaper of one window per position and one merged window per pool output, rows folded where free."""
        plain = ScatterLayout.of(unit, self.lanes)
        if unit.dense or pattern is None or not mergeable(unit, pattern):
            return plain
        node, pool = unit.reads[0], pattern.windows
        private = node.producer.kind == "load" and len(self.grad_readers(node)) == 1 and not self.is_output(node)  # type: ignore[union-attr]
        (th, _), (sh, _) = planar(pool)[1], planar(unit.form.map)[1]  # type: ignore[arg-type, attr-defined]
        top = node.halo[0] - planar(unit.form.map)[2][0][0]  # type: ignore[attr-defined]
        private &= not any(n is node for v, n in self.graph.inputs.items() if v in self.graph.turned)
        folds = [f for f in (1, 2, 4) if f == 1 or (private and node.H > 1 and th * sh % f == 0 and top % f == 0)]
        merged = [ScatterLayout.merge(unit, self.lanes, pool, f) for f in folds]
        best = min([plain, *merged], key=lambda s: scatter_cost(s, min(self.seeds, 5), pool.taps))
        if best.fold > 1:
            self.folded[node.id] = best.fold
        return best

    # ---- buffers

    def store(self, node: Node) -> Buffer:
        return self.stores.setdefault(node.store, Buffer(node.size + self.slack))

    def grad(self, node: Node) -> Buffer:
        fold = self.folded.get(node.id, 1)  # interleaved rows round up, and so do the windows on them
        extra = 0 if fold == 1 else 3 * fold * node.row
        return self.grads.setdefault(node.id, Buffer((node.size + extra + self.slack + 15) // 16 * 16))

    # ---- emission: records keep nodes and buffers symbolic until `finish`

    def emit(self, ops: list[dict[str, Any]], kind: str, block: bool = False, **fields: Any) -> dict[str, Any]:
        op = {"kind": KINDS.index(kind), "block": int(block), **fields}
        ops.append(op)
        return op

    def at(self, prefix: str, node: Node, buffer: Buffer, offset: int = 0) -> dict[str, Any]:
        """Fields that address a node's interior in a buffer."""
        return {
            prefix: (buffer, node.interior + offset),
            f"{prefix}_row": node.row,
            f"{prefix}_px": node.C,
        }

    def extent(self, node: Node) -> dict[str, int]:
        return {"C": node.C, "H": node.H, "W": node.W}

    def load_slopes(self) -> None:
        """All that a linear group's backward pass needs: the given slopes, put where a forward pass would have."""
        order = list(self.graph.inputs)
        self.forward_blocks = False
        for unit in self.graph.units:
            if unit.kind == "scale":
                buffer, interior = self.slope(unit)["aux"]
                out, place = unit.out, {"dst": (buffer, interior), "dst_row": unit.out.row, "dst_px": unit.out.C}
                extent = self.extent(out)
                if unit.turned:  # storage order is the tensor's own
                    place["dst_px"], extent = 1, {"C": 1, "H": out.H, "W": out.W * out.C}
                self.emit(self.forward, "Load", ext=order.index(unit.slope), **place, **extent)

    def outside(self, prefix: str, value: int, node: Node, buffer: Buffer) -> dict[str, Any]:
        """Fields of a record that meets the caller's row-major tensor: storage order is its order where turned."""
        if value not in self.graph.turned:
            return self.at(prefix, node, buffer) | self.extent(node)
        return self.at(prefix, node, buffer) | {f"{prefix}_px": 1, "C": 1, "H": node.H, "W": node.W * node.C}

    def run_forward(self) -> None:
        order = list(self.graph.inputs)
        for unit in self.graph.units:
            out = unit.out
            self.prepare(unit)
            fields = self.at("dst", out, self.store(out)) | self.extent(out)
            if unit.reads:
                fields |= self.at("src", unit.reads[0], self.store(unit.reads[0]))
            getattr(self, f"forward_{unit.kind}")(unit, fields)
            if unit.kind == "load":
                value = next(v for v in order if self.graph.inputs[v] is out)
                self.forward[-1] |= self.outside("dst", value, out, self.store(out)) | {"ext": order.index(value)}
        for k, (value, node) in enumerate(self.graph.outputs.items()):
            self.emit(self.forward, "Store", ext=k, **self.outside("src", value, node, self.store(node)))

    def prepare(self, unit: Unit) -> None:
        """Before a unit's record: the CPU's arena starts out as zeros, and borders stay so."""

    def forward_load(self, unit: Unit, fields: dict[str, Any]) -> None:
        self.emit(self.forward, "Load", **fields)

    def forward_window(self, unit: Unit, fields: dict[str, Any]) -> None:
        layout = self.window(unit)
        source = unit.reads[0]
        fields["src"] = (self.store(source), source.interior + layout.origin)
        self.emit(
            self.forward,
            "Window",
            unit.dense,
            **fields | {"C": layout.channels, "O": layout.O, "groups": layout.groups, "K": layout.R * layout.L},
            R=layout.R,
            L=layout.L,
            sh=layout.stride[0],
            sw=layout.stride[1],
            wf=layout.wf,
            bias=layout.bias,
            table=self.table(layout.runs),
        )

    def forward_pattern(self, unit: Unit, fields: dict[str, Any]) -> None:
        self.emit(self.forward, "Pattern", **fields, **self.pattern_fields(unit), relu=int(unit.relu))

    def pattern_fields(self, unit: Unit) -> dict[str, Any]:
        source, out = unit.reads[0], unit.out
        kernel, stride, padding, dilation = planar(unit.windows or POINT)
        taps, nb = math.prod(kernel), (out.C + 15) // 16 * 2
        if id(unit) not in self.bits:
            self.bits[id(unit)] = self.bit_bytes
            self.bit_bytes += (out.P * taps * nb + 63) // 64 * 64
        return {
            "bits": self.bits[id(unit)],
            "nb": nb,
            "taps": taps,
            "Hi": source.H,
            "Wi": source.W,
            "kh": kernel[0],
            "kw": kernel[1],
            "sh": stride[0],
            "sw": stride[1],
            "ph": padding[0][0],
            "pw": padding[1][0],
            "dh": dilation[0],
            "dw": dilation[1],
        }

    def slope(self, unit: Unit, more: int = 0) -> dict[str, Any]:
        """The per-sample buffer of derivatives (or probabilities) that the backward pass reads."""
        buffer = self.slopes.setdefault(id(unit), Buffer(unit.out.size + more + self.slack, per_sample=True))
        return {"aux": (buffer, unit.out.interior), "aux_row": unit.out.row}

    def turned_over(self, unit: Unit) -> tuple[Buffer, int]:
        """Where the right side of a matrix product lies turned over, ``[H][columns][rows]``."""
        right = unit.reads[1]
        return self.slopes.setdefault(id(unit), Buffer(right.C * right.P + self.slack, per_sample=True)), 0

    def forward_sum(self, unit: Unit, fields: dict[str, Any]) -> None:
        other = self.at("aux", unit.reads[1], self.store(unit.reads[1]))
        other.pop("aux_px")
        self.emit(self.forward, "Sum", **fields, **other)

    # ---- backward

    def run_backward(self) -> None:
        for node in self.outputs:  # decide from the end, so that expressions see what is behind them
            self.express(node)
        self.touched: set[int] = set()
        for k, (value, node) in enumerate(self.graph.outputs.items()):
            if node.id in self.needs and not (self.rows_unit is not None and node is self.rows_unit.out):
                self.seed(k, value, node)
        for unit in reversed(self.graph.units):
            if unit.kind == "load" or unit.out.id not in self.needs:
                continue
            if unit is self.rows_unit:
                self.backward_rows(unit)
                continue
            behind = self.express(unit.out)
            if behind is None:
                continue
            if unit.rectify and not behind.rows:
                buffer = self.grad(behind.node)
                self.emit(self.backward, "Rectify", dst=(buffer, 0), size=buffer.elements)
            for node in unit.reads:
                if node.id in self.needs:
                    getattr(self, f"backward_{unit.kind}")(unit, node, behind)
        for k, value in enumerate(self.wrt):
            node = self.graph.inputs[value]
            source = self.express(node)
            if source is None or (source.node is node and node.id not in self.touched):
                if source is None:
                    continue
                self.first_touch(node)
            place = self.outside("src", value, source.node, self.grad(source.node))
            if (fold := self.folded.get(source.node.id, 1)) > 1:
                place |= {"src": (self.grad(node), 0), "fold": fold, "Hi": node.halo[0], "Wi": node.halo[2]}
            self.emit(self.backward, "StoreT", ext=k, **place)

    def first_touch(self, node: Node, block: bool = False) -> None:
        """Zero a cotangent buffer before its first accumulation."""
        if node.id in self.touched:
            return
        self.touched.add(node.id)
        self.emit(self.backward, "Zero", block=False, dst=(self.grad(node), 0), size=self.grad(node).elements)

    def seed(self, k: int, value: int, node: Node) -> None:
        self.first_touch(node)
        kind = "SeedOneHot" if self.onehot else "SeedDense"
        self.emit(self.backward, kind, ext=k, **self.outside("dst", value, node, self.grad(node)))

    def backward_rows(self, unit: Unit) -> None:
        node = unit.reads[0]
        expression = self.express(node)
        if expression is None or expression.rows:
            return
        self.first_touch(node)
        self.emit(self.backward, "SeedRows", **self.at("dst", node, self.grad(node)), size=node.C * node.P)

    def backward_window(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        out, pattern_unit = unit.out, behind.pattern
        layout = self.scatter(unit, pattern_unit)
        whole = unit.dense and len(layout.runs) == 1 and node.size == node.C * node.P
        assign = whole and node.id not in self.touched
        if assign:
            self.touched.add(node.id)
        else:
            self.first_touch(node)
        if behind.rows:
            source = {"src": 0, "src_row": behind.node.W * behind.node.C, "src_px": behind.node.C}
        else:
            source = self.at("src", behind.node, self.grad(behind.node))
        if behind.pattern is not None:
            pattern = self.pattern_fields(behind.pattern)
            pooled = behind.pattern.out
            extent = {"H": pooled.H, "W": pooled.W}
            segments = pooled.P * pattern["taps"] + 1
            entries = segments * ((pooled.C + 15) // 16 * 16) + 64
        else:
            pattern, extent = {"taps": 0}, {"H": out.H, "W": out.W}
            entries, segments = out.C, out.P
        self.idx, self.segs = max(self.idx, entries), max(self.segs, segments)
        self.emit(
            self.backward,
            "WindowT",
            unit.dense,
            **source,
            **extent,
            **pattern,
            dst=(self.grad(node), node.interior + layout.origin),
            dst_row=layout.step[0],
            dst_px=layout.step[1],
            C=layout.channels,
            O=layout.O,
            groups=layout.groups,
            slots=len(layout.slots) // 2,
            wb=layout.wb,
            ldw=layout.ldw,
            table2=self.table(layout.slots),
            rows=int(behind.rows),
            assign=int(assign),
            outer=self.sweep(unit, layout),
            merged=int(layout.merged),
        )

    def sweep(self, unit: Unit, layout: ScatterLayout) -> int:
        """Segments per sweep over the weights: few while the weights stay in L1, more where they come from L2."""
        if unit.dense:
            return 1 << 30
        weights = layout.ldw * layout.O * len(layout.taps) * self.itemsize
        return 8 if weights <= L1_BYTES else 64

    def plain(self, behind: Cotangent) -> dict[str, Any]:
        if behind.rows or behind.pattern is not None:
            raise AssertionError("only contractions read through patterns")
        return self.at("src", behind.node, self.grad(behind.node))

    def into(self, node: Node) -> dict[str, Any]:
        self.first_touch(node)
        return self.at("dst", node, self.grad(node))

    def backward_pattern(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        expression = self.express(node)
        if expression is not None and expression.pattern is unit:
            return
        if unit.opened:
            if expression is not behind:
                self.emit(self.backward, "Add", **self.plain(behind), **self.into(node), **self.extent(node))
            return
        self.emit(
            self.backward,
            "Expand",
            **self.plain(behind),
            **self.into(node),
            **self.extent(unit.out),
            **self.pattern_fields(unit),
        )

    def backward_sum(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        if self.express(node) is behind:
            return
        if behind.pattern is not None:
            pattern = behind.pattern
            self.emit(
                self.backward,
                "Expand",
                **self.at("src", behind.node, self.grad(behind.node)),
                **self.into(node),
                **self.extent(pattern.out),
                **self.pattern_fields(pattern),
            )
            return
        self.emit(self.backward, "Add", **self.plain(behind), **self.into(node), **self.extent(node))

    # ---- layout of the arena

    def finish(self) -> tuple[tuple[int, ...], int]:
        """Place all buffers; returns the arena sizes and the seed tile."""
        stage = 0
        for ops in (self.forward, self.backward):
            previous = None
            for op in ops:
                if previous is None or op["block"] or previous["block"]:
                    stage += 1
                previous = op
                for key in ("src", "aux", "dst"):
                    if isinstance(op.get(key), tuple):
                        op[key][0].stages.add(stage)
            stage += 1
        for buffer in (*self.stores.values(), *self.grads.values()):
            buffer.per_sample = len(buffer.stages) > 1
        per_seed = sum(b.elements for b in self.grads.values()) * self.itemsize
        tile = max(1, min(self.seeds, max(6, SEED_BYTES // max(per_seed, 1)), SCRATCH_BYTES // 2 // max(per_seed, 1)))
        tile = math.ceil(self.seeds / math.ceil(self.seeds / tile)) if self.seeds else 1
        shared = sample = 0
        plain = [(b, 1) for b in (*self.stores.values(), *self.slopes.values())]
        for buffer, copies in plain + [(b, tile) for b in self.grads.values()]:
            size = (buffer.elements + 15) // 16 * 16 * copies
            buffer.base = sample if buffer.per_sample else shared
            if buffer.per_sample:
                sample += size
            else:
                shared += size
        sample += 48  # an odd multiple of 16 elements: samples do not fall on the same cache sets
        for buffer in (*self.stores.values(), *self.slopes.values(), *self.grads.values()):
            if buffer.per_sample:
                buffer.base += shared
        blocked = any(op["block"] for op in (self.forward if self.forward_blocks else self.backward))
        each = sample * self.itemsize + self.bit_bytes
        block = max(4, min(MAX_BLOCK, (BLOCK_BYTES - shared * self.itemsize) // max(each, 1))) if blocked else 8
        room = SCRATCH_BYTES - shared * self.itemsize
        block = max(1, min(block, room // (each + 2 * self.idx + 32 * self.segs)))
        sizes = (shared, sample, 0, self.bit_bytes, self.idx * block, self.segs * block, block)
        return sizes, tile

    def scratch(self, sizes: tuple[int, ...]) -> int:
        """Bytes of scratch per thread."""
        shared, sample, _, bits, idx, segs, block = sizes
        return (shared + sample * block) * self.itemsize + bits * block + idx * 4 + segs * 32

    def resolve(self, op: dict[str, Any], sample: int) -> tuple[int, ...]:
        """A symbolic record → numbers in the order of `FIELDS`."""
        out = dict.fromkeys(FIELDS, 0)
        for key, value in op.items():
            if isinstance(value, tuple):
                buffer, offset = value
                out[key] = buffer.base + offset
                out[f"{key}_n"] = sample if buffer.per_sample else 0
                if f"{key}_s" in out and any(buffer is b for b in self.grads.values()):
                    out[f"{key}_s"] = (buffer.elements + 15) // 16 * 16
            else:
                out[key] = value
        out["bits_n"] = self.bit_bytes
        return tuple(int(out[f]) for f in FIELDS)


def mergeable(unit: Unit, pattern: Unit) -> bool:
    """Whether all taps of the pool behind a convolution can share one window: no groups, dilation or overhang."""
    pool, w = pattern.windows, unit.form.map  # type: ignore[attr-defined]
    if pool is None or pool.taps == 1 or w.groups != 1 or any(d != 1 for d in w.dilation):
        return False
    (qh, qw), (th, tw), padding, (eh, ew) = planar(pool)
    out, source = pattern.out, unit.out
    inside = (out.H - 1) * th + (qh - 1) * eh < source.H and (out.W - 1) * tw + (qw - 1) * ew < source.W
    return inside and all(p[0] == 0 for p in padding) and pool.taps * source.C <= MAX_CHANNELS


def scatter_cost(layout: ScatterLayout, seeds: int, taps: int) -> float:
    """Cycles per pool output, roughly: per window a start and a read-add-write of every slot, per live channel one
    multiply-add per slot, two at a time; about three in four pool outputs are alive."""
    slots = len(layout.slots) // 2
    windows = 1 if layout.merged else taps
    return windows * (40 + 1.5 * slots * seeds) + 0.75 * layout.O * slots * seeds / 2


def lower(
    program: Program,
    steps: list[int],
    live_out: list[int],
    machine: Machine,
    itemsize: int,
    seeds: int,
    wrt: tuple[int, ...],
    onehot: bool = True,
    lowering: type[Lowering] = Lowering,
    linear: bool = False,
) -> Chain:
    """Lower the native steps ``steps`` of a program.

    ``live_out``: values wanted from the group; ``wrt``: external values whose cotangents are wanted; ``onehot``:
    the seeds are one-hot at the single output (else dense cotangents are given for every output).  ``linear``: no
    value is computed, as every scale of the group is `Given` (its slopes are external values).
    """
    graph = Builder(program, steps, live_out).build()
    low = lowering(graph, machine, itemsize, seeds, wrt, onehot)
    low.load_slopes() if linear else low.run_forward()
    if seeds:
        low.run_backward()
    sizes, tile = low.finish()
    rows = None
    if low.rows_unit is not None:
        layout = low.scatter(low.rows_unit, None)
        rows = (layout.wb, layout.ldw)
    return Chain(
        forward=tuple(low.resolve(op, sizes[1]) for op in low.forward),
        backward=tuple(low.resolve(op, sizes[1]) for op in low.backward),
        tables=tuple(low.tables),
        layouts=tuple(low.layouts),
        sizes=sizes,
        packed_size=low.packed,
        inputs=tuple(graph.inputs),
        outputs=tuple(live_out),
        output_sizes=tuple(math.prod(program.shape(v)) for v in live_out),
        wrt=low.wrt,
        seed_tile=tile,
        rows=rows,
        rectify_rows=rows is not None and low.rows_unit.reads[0].producer.rectify,  # type: ignore[union-attr]
        scratch=low.scratch(sizes),
    )
