"""Buffers, tables and packed weights, which records refer to while a chain is lowered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from .aliasing import Cotangent, Cotangents
from .machine import Machine
from .records import Extent, PatternRef, Place, Record, Zero
from .scratch import SLACK, Buffer, round_up
from .units import POINT, Node, Unit, UnitGraph, planar
from .weights import Layout, ScatterLayout, StencilLayout, WindowLayout, mergeable, scatter_cost

L = TypeVar("L", bound=Layout)


class Recording:
    """The records of one group so far, and everything that they refer to."""

    slack, multiple = SLACK, 16  # elements past the end of every buffer; its size is a multiple of the second
    window_type: type[WindowLayout] = WindowLayout

    def __init__(
        self, graph: UnitGraph, machine: Machine, itemsize: int, seeds: int, wrt: tuple[int, ...], onehot: bool
    ):
        self.graph, self.lanes, self.itemsize, self.onehot = graph, machine.vector_bytes // itemsize, itemsize, onehot
        self.seeds = seeds
        self.wrt = tuple(v for v in graph.inputs if v in wrt)
        self.cotangents = Cotangents(graph, self.wrt, onehot)
        self.tables: list[int] = []
        self.interned: dict[tuple[int, ...], int] = {}
        self.layouts: list[Layout] = []
        self.layout_of: dict[tuple[str, int], Layout] = {}
        self.tables_of: dict[tuple[int, int], list[list[int]]] = {}  # unit, row of the result → runs of a move
        self.folded: dict[int, int] = {}  # node id → rows interleaved in its cotangent
        self.packed = 0
        self.forward: list[Record] = []
        self.backward: list[Record] = []
        self.stores: dict[int, Buffer] = {}  # Node.store → forward memory
        self.grads: dict[int, Buffer] = {}  # node id → cotangent memory
        self.saved: dict[int, Buffer] = {}  # unit → values for its backward pass: derivatives, probabilities, …
        self.touched: set[int] = set()  # nodes whose cotangent memory has been zeroed or written
        self.bits: dict[int, int] = {}  # unit → byte offset among a sample's bits
        self.bit_bytes = 0
        self.entries = self.segments = 64  # of the lists that skip zeros
        rows_unit = self.cotangents.rows_unit
        self.rows = None if rows_unit is None else self.scatter(rows_unit, None)  # the layout of the seed rows

    # ---- tables and packed weights

    def table(self, entries: list[int]) -> int:
        key = tuple(entries)
        if key not in self.interned:
            self.interned[key] = len(self.tables)
            self.tables += entries
        return self.interned[key]

    def layout(self, kind: type[L], unit: Unit, make: Callable[[], L]) -> L:
        """The unit's layout of one kind, made and placed at its first use."""
        key = (kind.__name__, id(unit))
        if key not in self.layout_of:
            self.layout_of[key] = new = make()
            self.layouts.append(new)
            new.weights, self.packed = self.packed, self.packed + new.size
        layout = self.layout_of[key]
        assert isinstance(layout, kind)
        return layout

    def window(self, unit: Unit) -> WindowLayout:
        return self.layout(WindowLayout, unit, lambda: self.window_type.of(unit, self.lanes))

    def stencil(self, unit: Unit) -> StencilLayout:
        return self.layout(StencilLayout, unit, lambda: StencilLayout.of(unit))

    def scatter(self, unit: Unit, pattern: Unit | None) -> ScatterLayout:
        return self.layout(ScatterLayout, unit, lambda: self.choose_scatter(unit, pattern))

    def choose_scatter(self, unit: Unit, pattern: Unit | None) -> ScatterLayout:
        """The cheaper of one window per position and one merged window per pool output; rows are folded if free."""
        one_tap = ScatterLayout.of(unit, self.lanes)
        if unit.dense or pattern is None or not mergeable(unit, pattern):
            return one_tap
        node, pool = unit.reads[0], pattern.windows
        assert pool is not None
        private = node.producer.kind == "load" and self.cotangents.read_once(node)
        (th, _), (sh, _) = planar(pool)[1], planar(unit.convolution)[1]
        top = node.halo[0] - planar(unit.convolution)[2][0][0]
        private &= not any(n is node for v, n in self.graph.inputs.items() if v in self.graph.channels_last)
        folds = [f for f in (1, 2, 4) if f == 1 or (private and node.H > 1 and th * sh % f == 0 and top % f == 0)]
        merged = [ScatterLayout.merge(unit, self.lanes, pool, f) for f in folds]
        best = min([one_tap, *merged], key=lambda s: scatter_cost(s, min(self.seeds, 5), pool.taps))
        if best.fold > 1:
            self.folded[node.id] = best.fold
        return best

    # ---- buffers

    def store(self, node: Node) -> Buffer:
        return self.stores.setdefault(node.store, Buffer(round_up(node.size + self.slack, self.multiple)))

    def grad(self, node: Node) -> Buffer:
        fold = self.folded.get(node.id, 1)  # interleaved rows round up, and so do the windows on them
        extra = 0 if fold == 1 else 3 * fold * node.row
        elements = round_up(node.size + extra + self.slack, self.multiple)
        return self.grads.setdefault(node.id, Buffer(elements, cotangent=True))

    def keep(self, unit: Unit, elements: int) -> Buffer:
        """Memory for the values that the unit's backward pass needs of every sample."""
        return self.saved.setdefault(id(unit), Buffer(elements + self.slack, per_sample=True))

    # ---- places

    def value(self, node: Node) -> Place:
        """A node's interior in forward memory."""
        return interior(node, self.store(node))

    def cotangent(self, node: Node) -> Place:
        """A node's interior in its cotangent's memory."""
        return interior(node, self.grad(node))

    def upstream(self, cotangent: Cotangent) -> Place:
        """A cotangent that is read directly from its buffer."""
        if cotangent.rows or cotangent.pattern is not None:
            raise AssertionError("only contractions read through patterns")
        return self.cotangent(cotangent.node)

    def accumulated(self, node: Node) -> Place:
        """A cotangent that is added to."""
        self.first_touch(node)
        return self.cotangent(node)

    def assigns(self, node: Node) -> bool:
        """Whether a record that writes all of a cotangent (except its border) is the first to write it."""
        first = node.size == node.C * node.P and node.id not in self.touched
        if first:
            self.touched.add(node.id)
        return first

    def first_touch(self, node: Node) -> None:
        """Zero a cotangent buffer before its first accumulation."""
        if node.id not in self.touched:
            self.touched.add(node.id)
            buffer = self.grad(node)
            self.backward.append(Zero(dst=Place(buffer, 0), elements=buffer.elements))

    def outside(self, value: int, node: Node, buffer: Buffer) -> tuple[Place, Extent]:
        """A node that is copied from or to the caller's row-major tensor, and its extent in that order."""
        place = interior(node, buffer)
        if value not in self.graph.channels_last:
            return place, extent(node)
        return Place(buffer, place.offset, node.row, 1), Extent(1, node.H, node.W * node.C)

    def pattern(self, unit: Unit) -> PatternRef:
        """A pattern unit's bits, placed at its first use."""
        source, out = unit.reads[0], unit.out
        kernel, stride, padding, dilation = planar(unit.windows or POINT)
        taps, plane_bytes = math.prod(kernel), (out.C + 15) // 16 * 2
        if id(unit) not in self.bits:
            self.bits[id(unit)] = self.bit_bytes
            self.bit_bytes += (out.P * taps * plane_bytes + 63) // 64 * 64
        (kh, kw), (sh, sw), (dh, dw), ((ph, _), (pw, _)) = kernel, stride, dilation, padding
        bits = self.bits[id(unit)]
        return PatternRef(bits, taps, plane_bytes, source.H, source.W, kh, kw, sh, sw, ph, pw, dh, dw)


def interior(node: Node, buffer: Buffer) -> Place:
    return Place(buffer, node.interior, node.row, node.C)


def extent(node: Node) -> Extent:
    return Extent(node.C, node.H, node.W)
