"""What the records of a chain are made of while it is lowered: buffers, tables, packed weights, and their fields.

Records are dictionaries here.  They keep nodes and buffers symbolic until `gradkern.codegen.lowering.Lowering.resolve`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .aliasing import Cotangent, Cotangents
from .chain import KINDS, Machine
from .scratch import SLACK, Buffer, padded
from .units import Graph, Node, Unit, planar
from .weights import ScatterLayout, WindowLayout, mergeable, scatter_cost


class Recording:
    """The records of one group so far, and all that they refer to."""

    slack = SLACK
    window_type: type[WindowLayout] = WindowLayout

    def __init__(self, graph: Graph, machine: Machine, itemsize: int, seeds: int, wrt: tuple[int, ...], onehot: bool):
        self.graph, self.lanes, self.itemsize, self.onehot = graph, machine.vector_bytes // itemsize, itemsize, onehot
        self.seeds = seeds
        self.wrt = tuple(v for v in graph.inputs if v in wrt)
        self.cotangents = Cotangents(graph, self.wrt, onehot)
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
        self.touched: set[int] = set()  # nodes whose cotangent memory has been zeroed or written
        self.bits: dict[int, int] = {}  # unit index → byte offset in the per-sample bit record
        self.bit_bytes = 0
        self.idx = self.segs = 64  # entries and segments of the lists that skip zeros
        rows_unit = self.cotangents.rows_unit
        self.rows = None if rows_unit is None else self.scatter(rows_unit, None)  # the layout of the seed rows

    # ---- tables and packed weights

    def table(self, numbers: list[int]) -> int:
        key = tuple(numbers)
        if key not in self.interned:
            self.interned[key] = len(self.tables)
            self.tables += numbers
        return self.interned[key]

    def layout(self, kind: str, unit: Unit, make: Callable[[], Any]) -> Any:
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
        alone = len(self.cotangents.readers(node)) == 1 and not self.cotangents.is_output(node)
        private = node.producer.kind == "load" and alone  # type: ignore[union-attr]
        (th, _), (sh, _) = planar(pool)[1], planar(unit.form.map)[1]  # type: ignore[arg-type, attr-defined]
        top = node.halo[0] - planar(unit.form.map)[2][0][0]  # type: ignore[attr-defined]
        private &= not any(n is node for v, n in self.graph.inputs.items() if v in self.graph.turned)
        folds = [f for f in (1, 2, 4) if f == 1 or (private and node.H > 1 and th * sh % f == 0 and top % f == 0)]
        merged = [ScatterLayout.merge(unit, self.lanes, pool, f) for f in folds]  # type: ignore[arg-type]
        best = min([plain, *merged], key=lambda s: scatter_cost(s, min(self.seeds, 5), pool.taps))  # type: ignore[union-attr]
        if best.fold > 1:
            self.folded[node.id] = best.fold
        return best

    # ---- buffers

    def store(self, node: Node) -> Buffer:
        return self.stores.setdefault(node.store, Buffer(node.size + self.slack))

    def grad(self, node: Node) -> Buffer:
        fold = self.folded.get(node.id, 1)  # interleaved rows round up, and so do the windows on them
        extra = 0 if fold == 1 else 3 * fold * node.row
        return self.grads.setdefault(node.id, Buffer(padded(node.size + extra + self.slack)))

    def slope(self, unit: Unit, more: int = 0) -> dict[str, Any]:
        """The per-sample buffer of derivatives (or probabilities) that the backward pass reads."""
        buffer = self.slopes.setdefault(id(unit), Buffer(unit.out.size + more + self.slack, per_sample=True))
        return {"aux": (buffer, unit.out.interior), "aux_row": unit.out.row}

    def turned_over(self, unit: Unit) -> tuple[Buffer, int]:
        """Where the right side of a matrix product lies turned over, ``[H][columns][rows]``."""
        right = unit.reads[1]
        return self.slopes.setdefault(id(unit), Buffer(right.C * right.P + self.slack, per_sample=True)), 0

    # ---- records and their fields

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

    def outside(self, prefix: str, value: int, node: Node, buffer: Buffer) -> dict[str, Any]:
        """Fields of a record that meets the caller's row-major tensor: storage order is its order where turned."""
        if value not in self.graph.turned:
            return self.at(prefix, node, buffer) | self.extent(node)
        return self.at(prefix, node, buffer) | {f"{prefix}_px": 1, "C": 1, "H": node.H, "W": node.W * node.C}

    def plain(self, behind: Cotangent) -> dict[str, Any]:
        """Fields of a cotangent that is read as it lies."""
        if behind.rows or behind.pattern is not None:
            raise AssertionError("only contractions read through patterns")
        return self.at("src", behind.node, self.grad(behind.node))

    def into(self, node: Node) -> dict[str, Any]:
        """Fields of a cotangent that is added to."""
        self.first_touch(node)
        return self.at("dst", node, self.grad(node))

    def first_touch(self, node: Node) -> None:
        """Zero a cotangent buffer before its first accumulation."""
        if node.id in self.touched:
            return
        self.touched.add(node.id)
        self.emit(self.backward, "Zero", dst=(self.grad(node), 0), size=self.grad(node).elements)

    def turn(self, unit: Unit, node: Node) -> int:
        """Which read of the unit this is: a unit may read one node twice, and is asked once per read."""
        places = [k for k, n in enumerate(unit.reads) if n is node]
        asked = self.asked.get((id(unit), node.id), 0)
        self.asked[id(unit), node.id] = asked + 1
        return places[asked]
