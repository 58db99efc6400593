"""The records of each kind of unit: one method for its forward pass, and one for the cotangent of each of its reads."""

from __future__ import annotations

from functools import singledispatchmethod

from ..ir.program import Channels, Scale
from . import records, units
from .aliasing import Cotangent
from .buffers import Buffers, extent, interior
from .caches import L1_BYTES, LARGE_WEIGHT_BYTES, LARGE_WEIGHT_POSITIONS
from .layouts import Layouts
from .records import Along, ContractionT, Extent, LineFunction, LineSet, Place, Record, StencilTable, WindowT
from .scratch import Buffer
from .spec import ChainSpec
from .support import NATIVE_FUNCTIONS
from .tables import Runs, Tables, move_runs, positions, stencil, transpose_entries
from .units import Node, Unit
from .weights import ContractionLayout, ScatterLayout, StencilLayout

LINE_FUNCTIONS = {
    "softmax": LineFunction.Softmax,
    "log_softmax": LineFunction.LogSoftmax,
    "normalize": LineFunction.Normalize,
}
STORAGE_AXES = {"C": Along.Channels, "W": Along.Columns, "H": Along.Rows}


class Emitter:
    """Emits the records of one chain, and collects the buffers, tables and weights that they refer to.

    A GPU's records differ in a few methods (:mod:`gradkern.codegen.cuda.emitters`).
    """

    def __init__(self, spec: ChainSpec, layouts: Layouts, buffers: Buffers) -> None:
        self.spec, self.layouts, self.buffers, self.tables = spec, layouts, buffers, Tables()
        self.forward: list[Record] = []
        self.backward: list[Record] = []
        self.written: set[Node] = set()  # nodes whose cotangent has been zeroed or written
        self.known_runs: dict[tuple[units.Move, int], list[Runs]] = {}  # by unit and row of the result

    @singledispatchmethod
    def emit_forward(self, unit: Unit) -> None:
        """The unit's records in the forward pass."""
        raise TypeError(f"{type(unit).__name__} has no forward pass: given slopes belong to linear groups")

    @singledispatchmethod
    def emit_backward(self, unit: Unit, operand: int, upstream: Cotangent) -> None:
        """The records that take the cotangent of the unit's result to that of its ``operand``-th read."""
        raise TypeError(f"{type(unit).__name__} has no backward pass")

    def zero_border(self, unit: Unit) -> None:
        """Called before a unit's forward records.  A CPU's scratch memory starts out as zeros, and borders stay so."""

    # ---- places

    def value(self, node: Node) -> Place:
        """A node's interior in forward memory."""
        return interior(node, self.buffers.value(node))

    def cotangent_buffer(self, node: Node) -> Buffer:
        return self.buffers.cotangent(node, self.layouts.interleaved_rows(node))

    def cotangent(self, node: Node) -> Place:
        """A node's interior in its cotangent's memory."""
        return interior(node, self.cotangent_buffer(node))

    def upstream(self, cotangent: Cotangent) -> Place:
        """A cotangent that is read directly from its buffer."""
        if cotangent.seed_rows or cotangent.pattern is not None:
            raise AssertionError("only contractions read through patterns")
        return self.cotangent(cotangent.node)

    def accumulated(self, node: Node) -> Place:
        """A cotangent that is added to."""
        self.zero_once(node)
        return self.cotangent(node)

    def zero_once(self, node: Node) -> None:
        """Zero a cotangent before anything is added to it."""
        if node not in self.written:
            self.written.add(node)
            buffer = self.cotangent_buffer(node)
            self.backward.append(records.Zero(dst=Place(buffer, 0), elements=buffer.elements))

    def assigns(self, node: Node) -> bool:
        """Whether a record that writes all of a cotangent (except its border) is the first to write it."""
        first = node.size == node.C * node.P and node not in self.written
        if first:
            self.written.add(node)
        return first

    def external(self, value: int, node: Node, buffer: Buffer) -> tuple[Place, Extent]:
        """A node that is copied from or to the caller's row-major tensor, and its extent in that order."""
        place = interior(node, buffer)
        if value not in self.spec.graph.row_major:
            return place, extent(node)
        return Place(buffer, place.offset, row=node.row, position=1), Extent(C=1, H=node.H, W=node.W * node.C)

    # ---- inputs and outputs

    @emit_forward.register
    def load(self, unit: units.Load) -> None:
        number = list(self.spec.graph.inputs).index(unit.value)
        dst, shape = self.external(unit.value, unit.out, self.buffers.value(unit.out))
        self.forward.append(records.Load(input=number, dst=dst, extent=shape))

    # ---- contractions

    @emit_forward.register
    def window(self, unit: units.Window) -> None:
        layout, source, out = self.layouts.window(unit), unit.reads[0], unit.out
        (down, along), first = layout.stride, source.interior + layout.origin
        src = Place(self.buffers.value(source), first, row=down * source.row, position=along * source.C)
        record = records.Window(
            src=src, dst=self.value(out), H=out.H, W=out.W, C=layout.channels, O=layout.O, groups=layout.groups,
            runs=layout.R, run_length=layout.L, run_table=self.tables.add(layout.runs),
            weights=layout.weights, bias=layout.bias, whole_block=self.takes_block(unit, layout),
        )  # fmt: skip
        self.forward.append(record)

    @emit_backward.register
    def window_t(self, unit: units.Window, operand: int, upstream: Cotangent) -> None:
        (node,), pattern = unit.reads, upstream.pattern
        layout = self.layouts.scatter(unit, pattern)
        assign = unit.dense and len(layout.runs) == 1 and self.assigns(node)
        self.zero_once(node)
        source = upstream.node
        if upstream.seed_rows:
            src = Place(None, 0, row=source.W * source.C, position=source.C)
        else:
            src = self.cotangent(source)
        row, position = layout.step
        common = ContractionT(
            src=src, seed_rows=upstream.seed_rows,
            dst=Place(self.cotangent_buffer(node), node.interior + layout.origin, row=row, position=position),
            O=layout.O, pattern=None if pattern is None else self.buffers.pattern(pattern),
            weights=layout.weights, row_length=layout.row_length, window_table=self.tables.add(layout.window),
            whole_block=self.takes_block(unit, layout),
        )  # fmt: skip
        read = unit.out if pattern is None else pattern.out
        self.backward.append(self.contraction_t(unit, layout, read, common, assign))

    def contraction_t(
        self, unit: units.Window, layout: ScatterLayout, read: Node, common: ContractionT, assign: bool
    ) -> ContractionT:
        """The transposed record of a window unit; ``read``: the node whose cotangent it reads."""
        return WindowT(
            **vars(common), H=read.H, W=read.W, C=layout.channels, groups=layout.groups, merged=layout.merged,
            window_vectors=len(layout.window) // 2, sweep=self.sweep(unit, layout), assign=assign,
        )  # fmt: skip

    def sweep(self, unit: units.Window, layout: ScatterLayout) -> int:
        """Segments per sweep over the weights: few if the weights stay in L1, more if they come from L2."""
        if self.takes_block(unit, layout):
            return 1 << 30
        return 8 if self.weight_bytes(layout) <= L1_BYTES else 64

    def weight_bytes(self, layout: ContractionLayout) -> int:
        return layout.size * self.spec.itemsize

    def takes_block(self, unit: units.Window, layout: ContractionLayout) -> bool:
        """Whether the samples of a block go together, so that weights that stay in no cache are read once for all."""
        return unit.dense or (unit.out.P <= LARGE_WEIGHT_POSITIONS and self.weight_bytes(layout) > LARGE_WEIGHT_BYTES)

    # ---- ReLU and max pool

    def emit_derivative(self, unit: Unit) -> None:
        """The bits or slopes of a linear group, computed from the function's argument, which the unit's value holds."""
        value, size = self.value(unit.out), extent(unit.out)
        if isinstance(unit, units.Derivative):
            self.forward.append(self.elementwise(value, value, unit, unit.form))
        elif isinstance(unit, units.GivenPattern):
            bits = self.buffers.pattern(unit)
            self.forward.append(records.Pattern(src=value, dst=value, extent=size, pattern=bits, relu=True))

    @emit_forward.register
    def pattern(self, unit: units.Pattern) -> None:
        src, dst, bits = self.value(unit.reads[0]), self.value(unit.out), self.buffers.pattern(unit)
        self.forward.append(records.Pattern(src=src, dst=dst, extent=extent(unit.out), pattern=bits, relu=unit.relu))

    @emit_backward.register
    def pattern_t(self, unit: units.Pattern, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[0]
        cotangent = self.spec.cotangents.of(node)
        if cotangent is not None and cotangent.pattern is unit:
            return
        if not unit.opened:
            self.through_pattern(unit, self.upstream(upstream), node)
        elif cotangent is not upstream:
            self.accumulate(upstream, node)

    def through_pattern(self, pattern: units.Pattern, src: Place, node: Node) -> None:
        dst, bits = self.accumulated(node), self.buffers.pattern(pattern)
        self.backward.append(records.PatternT(src=src, dst=dst, extent=extent(pattern.out), pattern=bits))

    # ---- sums

    @emit_forward.register
    def add(self, unit: units.Add) -> None:
        left, right = map(self.value, unit.reads)
        self.forward.append(records.Add(left=left, right=right, dst=self.value(unit.out), extent=extent(unit.out)))

    @emit_backward.register
    def add_t(self, unit: units.Add, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[operand]
        if self.spec.cotangents.of(node) is upstream:
            return
        if upstream.pattern is not None:
            self.through_pattern(upstream.pattern, self.cotangent(upstream.node), node)
        else:
            self.accumulate(upstream, node)

    def accumulate(self, upstream: Cotangent, node: Node) -> None:
        src, dst = self.upstream(upstream), self.accumulated(node)
        self.backward.append(records.Accumulate(src=src, dst=dst, extent=extent(node)))

    # ---- copies

    def runs(self, unit: units.Move, out: Node) -> list[Runs]:
        """`move_runs`, remembered because it is slow for large values."""
        key = (unit, out.row)
        if key not in self.known_runs:
            self.known_runs[key] = move_runs(unit, out)
        return self.known_runs[key]

    @emit_forward.register
    def move(self, unit: units.Move) -> None:
        for node, runs in zip(unit.reads, self.runs(unit, unit.out), strict=True):
            self.copy(self.value(node), self.value(unit.out), runs)

    def copy(self, src: Place, dst: Place, runs: Runs) -> None:
        self.forward.append(records.Move(src=src, dst=dst, runs=len(runs) // 5, run_table=self.tables.add(runs)))

    @emit_backward.register
    def move_t(self, unit: units.Move, operand: int, upstream: Cotangent) -> None:
        runs = self.runs(unit, upstream.node)[operand]
        dst, src = self.accumulated(unit.reads[operand]), self.upstream(upstream)
        record = records.MoveT(
            src=src, dst=dst, runs=len(runs) // 5, run_table=self.tables.add(runs), distinct=self.distinct(runs)
        )
        self.backward.append(record)

    def distinct(self, runs: Runs) -> bool:
        """Whether no element is read twice, so that transposed runs can be processed in parallel; unused on a CPU."""
        return False

    # ---- maps over positions, channel by channel

    @emit_forward.register
    def stencil(self, unit: units.Stencil) -> None:
        layout, out = self.layouts.stencil(unit), unit.out
        table = self.stencil_table(layout, *stencil(layout.entries, positions(out), keep_empty=True))
        src, dst = self.value(unit.reads[0]), self.value(out)
        self.forward.append(records.Stencil(src=src, dst=dst, C=out.C, stencil=table, bias=layout.bias))

    def stencil_table(self, layout: StencilLayout, blocks: list[int], entries: list[int]) -> StencilTable:
        return StencilTable(
            weights=layout.weights, row_length=layout.row_length, blocks=len(blocks) // 7,
            block_table=self.tables.add(blocks), entry_table=self.tables.add(entries),
        )  # fmt: skip

    @emit_backward.register
    def stencil_t(self, unit: units.Stencil, operand: int, upstream: Cotangent) -> None:
        node, layout = unit.reads[0], self.layouts.stencil(unit)
        if isinstance(layout.form.map, Channels) and layout.form.weight is None:
            entries = [[(q, 0)] for q in positions(upstream.node)]
        else:
            entries = transpose_entries(layout.entries, upstream.node, node)
        table = self.stencil_table(layout, *stencil(entries, positions(node), keep_empty=False))
        src, dst = self.upstream(upstream), self.accumulated(node)
        self.backward.append(records.StencilT(src=src, dst=dst, C=node.C, stencil=table))

    # ---- elementwise functions

    def slope(self, unit: units.Elementwise) -> Place:
        """The place of the derivative."""
        return interior(unit.out, self.buffers.saved_for(unit, unit.out.size))

    def elementwise(self, src: Place, dst: Place, unit: units.Elementwise, form: Scale) -> records.Elementwise:
        p0, p1, p2 = (*form.params, *[0.0] * (3 - len(form.params)))  # a record has room for three
        return records.Elementwise(
            src=src, dst=dst, slope=self.slope(unit), extent=extent(unit.out),
            function=list(NATIVE_FUNCTIONS).index(form.function), p0=p0, p1=p1, p2=p2,
        )  # fmt: skip

    @emit_forward.register
    def function(self, unit: units.Function) -> None:
        record = self.elementwise(self.value(unit.reads[0]), self.value(unit.out), unit, unit.form)
        self.forward.append(record)

    @emit_backward.register
    def elementwise_t(self, unit: units.Elementwise, operand: int, upstream: Cotangent) -> None:
        node = unit.reads[0]
        in_place = self.spec.cotangents.of(node) is upstream
        src = self.upstream(upstream)
        dst = src if in_place else self.accumulated(node)
        slope, size = self.slope(unit), extent(unit.out)
        self.backward.append(records.ElementwiseT(src=src, dst=dst, slope=slope, extent=size, assign=in_place))

    # ---- products of two values

    def broadcast(self, node: Node, out: Node, buffer: Buffer) -> tuple[Place, int]:
        """A side of a product, and its stride between channels; strides are zero along broadcast axes."""
        row, position = node.row if node.H == out.H else 0, node.C if node.W == out.W else 0
        return Place(buffer, node.interior, row=row, position=position), int(node.C == out.C)

    @emit_forward.register
    def multiply(self, unit: units.Multiply) -> None:
        out = unit.out
        (left, left_channel), (right, right_channel) = (
            self.broadcast(node, out, self.buffers.value(node)) for node in unit.reads
        )
        record = records.Multiply(
            left=left, right=right, dst=self.value(out), extent=extent(out),
            left_channel=left_channel, right_channel=right_channel,
        )  # fmt: skip
        self.forward.append(record)

    @emit_backward.register
    def multiply_t(self, unit: units.Multiply, operand: int, upstream: Cotangent) -> None:
        node, other = unit.reads[operand], unit.reads[1 - operand]
        src = self.upstream(upstream)
        self.zero_once(node)
        dst, dst_channel = self.broadcast(node, unit.out, self.cotangent_buffer(node))
        side, other_channel = self.broadcast(other, unit.out, self.buffers.value(other))
        record = records.MultiplyT(
            src=src, other=side, dst=dst, extent=extent(unit.out), dst_channel=dst_channel, other_channel=other_channel
        )
        self.backward.append(record)

    # ---- products of two matrices of values: H of them, each stored row by row

    @emit_forward.register
    def matmul(self, unit: units.MatMul) -> None:
        (a, b), out = unit.reads, unit.out
        record = records.MatMul(
            left=self.value(a), right=self.value(b), dst=self.value(out), left_term=1, right_column=1,
            matrices=out.H, rows=out.W, columns=b.C, terms=a.C,
        )  # fmt: skip
        self.forward.append(record)
        if a in self.spec.cotangents.needs:
            self.transpose_right(unit)

    def right_transposed(self, unit: units.MatMul) -> tuple[Place, int]:
        """The transposed right side [columns][terms], as the left side's backward pass reads it, and the stride
        between its columns."""
        b = unit.reads[1]
        return Place(self.buffers.saved_for(unit, b.C * b.P), 0, row=b.C * b.W, position=b.W), 1

    def transpose_right(self, unit: units.MatMul) -> None:
        """Store the right side transposed, so that vectors read contiguous columns."""
        b = unit.reads[1]
        runs = [[h * b.row + w * b.C, h * b.C * b.W + w, b.C, 1, b.W] for h in range(b.H) for w in range(b.W)]
        src = self.value(b)
        self.copy(src, Place(self.right_transposed(unit)[0].buffer, 0), [x for run in runs for x in run])

    @emit_backward.register
    def matmul_t(self, unit: units.MatMul, operand: int, upstream: Cotangent) -> None:
        node, a, out = unit.reads[operand], unit.reads[0], unit.out
        assign = self.assigns(node)
        g, dst = self.upstream(upstream), self.accumulated(node)
        if operand == 0:  # g [M, P] · b^T [P, K]
            right, right_column = self.right_transposed(unit)
            left, left_term, terms = g, 1, out.C
        else:  # a^T [K, M] · g [M, P]
            at = self.value(a)
            left, left_term, terms = Place(at.buffer, at.offset, row=at.row, position=1), a.C, out.W
            right, right_column = g, 1
        record = records.MatMulT(
            left=left, right=right, dst=dst, left_term=left_term, right_column=right_column,
            matrices=node.H, rows=node.W, columns=node.C, terms=terms, assign=assign,
        )  # fmt: skip
        self.backward.append(record)

    # ---- softmax and norms

    def line_set(self, unit: units.Lines) -> LineSet:
        form, out = unit.form, unit.out
        return LineSet(
            extent=extent(out), along=STORAGE_AXES[unit.along], function=LINE_FUNCTIONS[form.function],
            epsilon=form.params[0] if form.params else 0.0,
            saved=interior(out, self.buffers.saved_for(unit, out.size + out.C * out.P)),
            deviations=out.size - out.interior,  # which come after the storage
        )  # fmt: skip

    @emit_forward.register
    def lines(self, unit: units.Lines) -> None:
        src, dst = self.value(unit.reads[0]), self.value(unit.out)
        self.forward.append(records.Lines(src=src, dst=dst, lines=self.line_set(unit)))

    @emit_backward.register
    def lines_t(self, unit: units.Lines, operand: int, upstream: Cotangent) -> None:
        src, dst = self.upstream(upstream), self.accumulated(unit.reads[0])
        self.backward.append(records.LinesT(src=src, dst=dst, lines=self.line_set(unit)))
