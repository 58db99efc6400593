"""The records of each kind of unit: one method for its forward pass, and one for the cotangent of each of its reads."""

from __future__ import annotations

from ..ir.program import Channels, Index, LowRank, Scale
from . import records
from .aliasing import Cotangent
from .recording import Recording, extent, interior
from .records import Along, ContractionT, LineFunction, LineSet, Place, StencilTable, WindowT
from .scratch import Buffer, round_up
from .support import NATIVE_FUNCTIONS
from .tables import move, positions, stencil, transposed
from .units import Node, Unit
from .weights import ScatterLayout, StencilLayout

L1_BYTES = 24 << 10  # weights above this are walked tile by tile (half of a common 48 KiB L1)
LINE_FUNCTIONS = {
    "softmax": LineFunction.Softmax,
    "log_softmax": LineFunction.LogSoftmax,
    "normalize": LineFunction.Normalize,
}
STORAGE_AXES = {"C": Along.Channels, "W": Along.Columns, "H": Along.Rows}


class UnitRecords(Recording):
    """One pair of methods per unit kind.  ``operand``: which of the unit's reads the cotangent is of."""

    def forward_load(self, unit: Unit) -> None:
        node = unit.out
        number, value = next((k, v) for k, (v, n) in enumerate(self.graph.inputs.items()) if n is node)
        dst, shape = self.outside(value, node, self.store(node))
        self.forward.append(records.Load(number, dst, shape))

    def ends(self, unit: Unit) -> tuple[Place, Place]:
        """The places that a unit of one operand reads and writes."""
        return self.value(unit.reads[0]), self.value(unit.out)

    # ---- contractions

    def forward_window(self, unit: Unit) -> None:
        layout, source, out = self.window(unit), unit.reads[0], unit.out
        (down, along), first = layout.stride, source.interior + layout.origin
        src = Place(self.store(source), first, down * source.row, along * source.C)
        sizes = (out.H, out.W, layout.channels, layout.O, layout.groups, layout.R, layout.L)
        where = (self.table(layout.runs), layout.weights, layout.bias)
        self.forward.append(records.Window(src, self.value(out), *sizes, *where, whole_block=unit.dense))

    def backward_window(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        layout = self.scatter(unit, upstream.pattern)
        assign = unit.dense and len(layout.runs) == 1 and self.assigns(node)
        self.first_touch(node)
        source = upstream.node
        pattern = None if upstream.pattern is None else self.pattern(upstream.pattern)
        buffer, first = (None, 0) if upstream.rows else (self.grad(source), source.interior)
        row = source.W * source.C if upstream.rows else source.row
        src = Place(buffer, first, row, source.C)
        dst = Place(self.grad(node), node.interior + layout.origin, *layout.step)
        where = (layout.weights, layout.row_length, self.table(layout.window))
        common = ContractionT(src, upstream.rows, dst, layout.O, pattern, *where, whole_block=unit.dense)
        read = unit.out if upstream.pattern is None else upstream.pattern.out
        self.backward.append(self.contraction(unit, layout, read, common, assign))

    def contraction(
        self, unit: Unit, layout: ScatterLayout, read: Node, common: ContractionT, assign: bool
    ) -> ContractionT:
        """The transposed record of a window unit; ``read``: the node whose cotangent it reads."""
        entries, segments = read.C, read.P  # of the lists of live channels
        if common.pattern is not None:
            segments = read.P * common.pattern.taps + 1
            entries = segments * round_up(read.C) + 64
        self.entries, self.segments = max(self.entries, entries), max(self.segments, segments)
        sizes = {"H": read.H, "W": read.W, "C": layout.channels, "groups": layout.groups}
        vectors, sweep = len(layout.window) // 2, self.sweep(unit, layout)
        cpu_fields = {"merged": layout.merged, "window_vectors": vectors, "sweep": sweep, "assign": assign}
        return WindowT(**vars(common) | sizes | cpu_fields)

    def sweep(self, unit: Unit, layout: ScatterLayout) -> int:
        """Segments per sweep over the weights: few if the weights stay in L1, more if they come from L2."""
        if unit.dense:
            return 1 << 30
        weights = layout.row_length * layout.O * len(layout.taps) * self.itemsize
        return 8 if weights <= L1_BYTES else 64

    # ---- ReLU and max pool

    def forward_pattern(self, unit: Unit) -> None:
        src, dst = self.ends(unit)
        self.forward.append(records.Pattern(src, dst, extent(unit.out), self.pattern(unit), unit.relu))

    def backward_pattern(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        expression = self.cotangents.of(node)
        if expression is not None and expression.pattern is unit:
            return
        if not unit.opened:
            self.through_pattern(unit, self.upstream(upstream), node)
        elif expression is not upstream:
            self.add(upstream, node)

    def through_pattern(self, pattern: Unit, src: Place, node: Node) -> None:
        dst = self.accumulated(node)
        self.backward.append(records.PatternT(src, dst, extent(pattern.out), self.pattern(pattern)))

    # ---- sums

    def forward_add(self, unit: Unit) -> None:
        left, right = map(self.value, unit.reads)
        self.forward.append(records.Add(left, right, self.value(unit.out), extent(unit.out)))

    def backward_add(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        if self.cotangents.of(node) is upstream:
            return
        if upstream.pattern is not None:
            self.through_pattern(upstream.pattern, self.cotangent(upstream.node), node)
        else:
            self.add(upstream, node)

    def add(self, upstream: Cotangent, node: Node) -> None:
        src, dst = self.upstream(upstream), self.accumulated(node)
        self.backward.append(records.Accumulate(src, dst, extent(node)))

    # ---- copies

    def runs(self, unit: Unit, out: Node) -> list[list[int]]:
        """The runs of every source to the elements of ``out``, which is the result or the node of its cotangent."""
        key = (id(unit), out.row)
        if key not in self.tables_of:
            *sides, to = unit.sides
            parts = unit.form.parts if isinstance(unit.form, Index) else [None]
            self.tables_of[key] = [move(n, s, out, to, p) for n, s, p in zip(unit.reads, sides, parts, strict=True)]
        return self.tables_of[key]

    def forward_move(self, unit: Unit) -> None:
        for node, runs in zip(unit.reads, self.runs(unit, unit.out), strict=True):
            self.copy(self.value(node), self.value(unit.out), runs)

    def copy(self, src: Place, dst: Place, runs: list[int]) -> None:
        self.forward.append(records.Move(src, dst, len(runs) // 5, self.table(runs)))

    def backward_move(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        runs = self.runs(unit, upstream.node)[operand]
        dst, src = self.accumulated(node), self.upstream(upstream)
        self.backward.append(records.MoveT(src, dst, len(runs) // 5, self.table(runs)))

    # ---- maps over positions, channel by channel

    def forward_stencil(self, unit: Unit) -> None:
        layout, (src, dst) = self.stencil(unit), self.ends(unit)
        table = self.stencil_table(layout, *stencil(layout.entries, positions(unit.out), keep_empty=True))
        self.forward.append(records.Stencil(src, dst, unit.out.C, table, layout.bias))

    def stencil_table(self, layout: StencilLayout, blocks: list[int], entries: list[int]) -> StencilTable:
        count, tables = len(blocks) // 7, (self.table(blocks), self.table(entries))
        return StencilTable(layout.weights, layout.row_length, count, *tables)

    def backward_stencil(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        layout = self.stencil(unit)
        if isinstance(layout.form.map, Channels) and layout.form.weight is None:
            entries = [[(q, 0)] for q in positions(upstream.node)]
        else:
            entries = transposed(layout.entries, upstream.node, node)
        table = self.stencil_table(layout, *stencil(entries, positions(node), keep_empty=False))
        src, dst = self.upstream(upstream), self.accumulated(node)
        self.backward.append(records.StencilT(src, dst, node.C, table))

    # ---- elementwise functions

    def slope(self, unit: Unit) -> Place:
        """The place of the derivative."""
        return interior(unit.out, self.keep(unit, unit.out.size))

    def forward_elementwise(self, unit: Unit) -> None:
        form = unit.form
        assert isinstance(form, Scale)
        (src, dst), parameters = self.ends(unit), (*form.params, 0.0, 0.0, 0.0)[:3]
        function = list(NATIVE_FUNCTIONS).index(form.function)
        self.forward.append(records.Elementwise(src, dst, self.slope(unit), extent(unit.out), function, *parameters))

    def backward_elementwise(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        in_place = self.cotangents.of(node) is upstream
        src = self.upstream(upstream)
        dst = src if in_place else self.accumulated(node)
        self.backward.append(records.ElementwiseT(src, dst, self.slope(unit), extent(unit.out), in_place))

    # ---- products of two values

    def stretched(self, node: Node, out: Node, buffer: Buffer) -> tuple[Place, int]:
        """A side of a product, and its stride between channels; strides are zero along broadcast axes."""
        row, position = node.row if node.H == out.H else 0, node.C if node.W == out.W else 0
        return Place(buffer, node.interior, row, position), int(node.C == out.C)

    def forward_multiply(self, unit: Unit) -> None:
        (left, left_channel), (right, right_channel) = (self.stretched(n, unit.out, self.store(n)) for n in unit.reads)
        dst = self.value(unit.out)
        self.forward.append(records.Multiply(left, right, dst, extent(unit.out), left_channel, right_channel))

    def backward_multiply(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        other = unit.reads[1 - operand]
        src = self.upstream(upstream)
        self.first_touch(node)
        dst, dst_channel = self.stretched(node, unit.out, self.grad(node))
        side, other_channel = self.stretched(other, unit.out, self.store(other))
        self.backward.append(records.MultiplyT(src, side, dst, extent(unit.out), dst_channel, other_channel))

    # ---- products of two matrices of values, H of them, each as it lies row by row

    def forward_matmul(self, unit: Unit) -> None:
        a, b = unit.reads
        left, right, dst = self.value(a), self.value(b), self.value(unit.out)
        self.forward.append(records.MatMul(left, right, dst, 1, 1, unit.out.H, unit.out.W, b.C, a.C))
        if a.id in self.cotangents.needs:
            self.transpose_right(unit)

    def right_transposed(self, unit: Unit) -> tuple[Place, int]:
        """The transposed right side [columns][terms], as the left side's backward pass reads it, and the stride
        between its columns."""
        b = unit.reads[1]
        return Place(self.keep(unit, b.C * b.P), 0, b.C * b.W, b.W), 1

    def transpose_right(self, unit: Unit) -> None:
        """Store the right side transposed, so that vectors read contiguous columns."""
        b = unit.reads[1]
        runs = [[h * b.row + w * b.C, h * b.C * b.W + w, b.C, 1, b.W] for h in range(b.H) for w in range(b.W)]
        src = self.value(b)
        self.copy(src, Place(self.right_transposed(unit)[0].buffer, 0), [x for run in runs for x in run])

    def backward_matmul(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        a, out = unit.reads[0], unit.out
        assign = self.assigns(node)
        g, dst = self.upstream(upstream), self.accumulated(node)
        if operand == 0:  # g [M, P] · b^T [P, K]
            right, right_column = self.right_transposed(unit)
            left, left_term, terms = g, 1, out.C
        else:  # a^T [K, M] · g [M, P]
            at = self.value(a)
            left, left_term, terms = Place(at.buffer, at.offset, at.row, 1), a.C, out.W
            right, right_column = g, 1
        sizes = (node.H, node.W, node.C, terms)
        self.backward.append(records.MatMulT(left, right, dst, left_term, right_column, *sizes, assign))

    # ---- softmax and norms

    def lines(self, unit: Unit) -> LineSet:
        form, out = unit.form, unit.out
        assert isinstance(form, LowRank)
        saved = interior(out, self.keep(unit, out.size + out.C * out.P))
        what = (STORAGE_AXES[unit.along], LINE_FUNCTIONS[form.function], form.params[0] if form.params else 0.0)
        # The numbers of each line come after the storage.
        return LineSet(extent(out), *what, saved, out.size - out.interior)

    def forward_lines(self, unit: Unit) -> None:
        self.forward.append(records.Lines(*self.ends(unit), self.lines(unit)))

    def backward_lines(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        src, dst = self.upstream(upstream), self.accumulated(node)
        self.backward.append(records.LinesT(src, dst, self.lines(unit)))
