"""From the native steps of a group to units and nodes (:mod:`gradkern.codegen.units`).

A flattened node keeps the channels-last order of its source; a linear layer after it permutes
its weight when packed, so the flatten costs nothing.  A value whose *last* axis holds the channels (tokens, a
transposed signal) is the same storage read in another order: such values are in ``channels_last``, and a transpose
between ``[C, L]`` and ``[L, C]`` costs nothing either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..ir import program as ir
from ..ir.functions import RECTIFYING
from ..ir.graph import steps_to
from ..ir.indexing import along, identity_runs, is_permutation
from . import units
from .support import unsupported_reason
from .units import POINT, Fold, MoveEnd, Node, Unit, UnitGraph, Windows2d, geometry, storage_axes


class GraphBuilder:
    """Makes units of the steps of a native group.  ``live_out``: the values that are read outside of the group."""

    def __init__(self, program: ir.Program, steps: list[int], live_out: list[int]):
        self.program, self.live_out = program, live_out
        self.steps = steps = steps_to(program, live_out, among=steps)
        self.nodes: dict[int, Node] = {}  # value → node
        self.channels_last: set[int] = set()  # values that read their node channels-last
        self.wanted: dict[int, bool] = {}  # values that some step would read channels-last
        self.copies: dict[tuple[int, bool], Node] = {}  # a value's node in another order
        self.units: list[Unit] = []
        self.count = 0
        self.done: set[int] = set()
        self.base = len(program.inputs)
        inside = {self.base + i for i in steps}
        self.reads: dict[int, list[int]] = {}  # value → steps of this group that read it
        for i in steps:
            for v in program.steps[i].inputs:
                self.reads.setdefault(v, []).append(i)
        self.external = [v for v in sorted(self.reads) if v not in inside]

    def build(self) -> UnitGraph:
        for v in self.external:
            if any(self.wants_channels_last(i, v) for i in self.reads[v]):
                self.channels_last.add(v)
            node = self.node(self.program.shape(v), v in self.channels_last)
            self.add(units.Load((), node, (), value=v))
            self.nodes[v] = node
        inputs = {v: self.nodes[v] for v in self.external}
        for i in self.steps:
            if i not in self.done:
                self.add_step(i, self.program.steps[i])
        outputs = {v: self.nodes[v] for v in self.live_out}
        for unit in self.units:
            if isinstance(unit, units.Window):
                reserve_halo(unit)
        share_in_place(self.units, outputs)
        return UnitGraph(self.units, inputs, outputs, self.channels_last & {*inputs, *outputs})

    # ---- small helpers

    def node(self, shape: tuple[int, ...], channels_last: bool = False) -> Node:
        extent = geometry(shape, channels_last)
        assert extent is not None  # `unsupported_reason` refuses others
        c, h, w = extent
        self.count += 1
        return Node(self.count - 1, c, h, w, memory=self.count - 1)

    def alike(self, node: Node) -> Node:
        """New storage in the geometry of a node."""
        self.count += 1
        return Node(self.count - 1, node.C, node.H, node.W, memory=self.count - 1)

    def add(self, unit: Unit) -> None:
        unit.out.producer = unit
        for n in unit.reads:
            n.readers.append(unit)
        self.units.append(unit)

    def only_reader(self, value: int) -> int | None:
        """The only reader of a value that is not wanted outside."""
        readers = self.reads.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.live_out else None

    def is_read_alone(self, value: int, reader: int) -> bool:
        """Whether ``reader`` is the only step that reads the value's storage, which other values may be views of."""
        node = self.nodes[value]
        others = {v for v, n in self.nodes.items() if n is node} - {value}
        read = {self.base + j for v in others for j in self.reads.get(v, [])}  # a view, or the result of a folded norm
        return self.only_reader(value) == reader and others.isdisjoint(self.live_out) and read <= {value, *others}

    def follow(self, i: int, wanted: Callable[[ir.Step], bool]) -> int | None:
        """The step after step ``i``, if it alone reads the result and ``wanted(step)`` holds."""
        j = self.only_reader(self.base + i)
        return j if j is not None and wanted(self.program.steps[j]) else None

    def wants_channels_last(self, step: int, value: int) -> bool:
        """Whether a step, or one after it, prefers to read the value with its last axis as the channels."""
        shape, form = self.program.shape(value), self.program.steps[step].form
        last = len(shape) - 1
        match form:
            case _ if last < 1:
                return False
            case ir.Contract(map=ir.Dense()) | ir.Product(function="matmul"):
                return True
            case ir.Contract(map=ir.Channels(axis)) | ir.LowRank(axis=axis):
                return axis == last
            case ir.Index(parts=(part,)) if is_permutation(part, shape) and part.order == (last, *range(last)):
                return True
            case ir.Index() | ir.View() | ir.Scale():
                return self.stays_channels_last(step)
        return False

    def in_order(self, value: int, channels_last: bool) -> Node:
        """The value's node in the geometry of its own shape, copied if it is stored in another order."""
        node, shape = self.nodes[value], self.program.shape(value)
        fits = node.is_a(geometry(shape, channels_last))
        if fits and (node.trivial or (value in self.channels_last) == channels_last):
            return node
        if (value, channels_last) not in self.copies:
            copy = self.node(shape, channels_last)
            source, result = MoveEnd(shape, value in self.channels_last), MoveEnd(shape, channels_last)
            self.add(units.Move((node,), copy, (), (source,), result))
            self.copies[value, channels_last] = copy
        return self.copies[value, channels_last]

    # ---- one step

    def add_step(self, i: int, step: ir.Step) -> None:
        self.done.add(i)
        form, source = step.form, step.inputs[0]
        match form:
            case ir.View():
                self.view(i, step)
            case ir.Index():
                self.index(i, step)
            case ir.Contract(map=ir.Dense()) if len(step.shape) > 1:
                self.window(i, self.in_order(source, True), ir.Contract(POINT, form.weight, form.bias), True)
            case ir.Contract(map=ir.Dense()):
                self.window(i, self.nodes[source], form, storage_order=source in self.channels_last)
            case ir.Contract(map=ir.Windows()):
                self.convolution(i, step)
            case ir.Contract():
                last = isinstance(form.map, ir.Channels) and form.map.axis > 0
                self.stencil(i, self.in_order(source, last), form, last)
            case ir.Given():
                self.given(i, step, form.of)
            case ir.Select() | ir.Scale(function="relu" | "guided_relu" | "open_relu"):
                self.pattern(i, step)
            case ir.Scale():
                self.add(units.Function((self.nodes[source],), self.alike_result(i, source), (i,), form))
            case ir.Sum():
                self.sum(i, step)
            case ir.LowRank(axis=axis):
                channels_last = source in self.channels_last and self.nodes[source].is_a(geometry(step.shape, True))
                channels_last |= axis > 0 and axis == len(step.shape) - 1 and self.stays_channels_last(i)
                node = self.in_order(source, channels_last)
                order = storage_axes(len(step.shape), channels_last)
                self.add(units.Lines((node,), self.result(i, channels_last), (i,), form, order[axis]))
            case ir.Product(function="matmul"):
                reads = tuple(self.in_order(v, True) for v in step.inputs)
                self.add(units.MatMul(reads, self.result(i, True), (i,)))
            case ir.Product():
                channels_last = any(v in self.channels_last for v in step.inputs)
                reads = tuple(self.in_order(v, channels_last) for v in step.inputs)
                self.add(units.Multiply(reads, self.result(i, channels_last), (i,)))

    def given(self, i: int, step: ir.Step, of: ir.Scale | None) -> None:
        source, slope = step.inputs
        reads, out, order = (self.nodes[source],), self.alike_result(i, source), source in self.channels_last
        if of is None:
            self.add(units.GivenDerivative(reads, out, (i,), slope, order))
        elif of.function == "relu":
            self.add(units.GivenPattern(reads, out, (i,), pool=None, relu=True, slope=slope, storage_order=order))
        else:
            self.add(units.Derivative(reads, out, (i,), slope, order, of))

    def stays_channels_last(self, i: int) -> bool:
        """Whether a later step wants this one's result channels-last."""
        value = self.base + i
        if value not in self.wanted:
            self.wanted[value] = any(self.wants_channels_last(j, value) for j in self.reads.get(value, []))
        return self.wanted[value]

    def result(self, i: int, channels_last: bool = False) -> Node:
        """New storage for the result of step ``i``, in the geometry of its shape."""
        out = self.node(self.program.steps[i].shape, channels_last)
        self.set_node(i, out, channels_last)
        return out

    def alike_result(self, i: int, like: int) -> Node:
        """New storage for the result of step ``i``, in the geometry and order of the value ``like``."""
        out = self.alike(self.nodes[like])
        self.set_node(i, out, like in self.channels_last)
        return out

    def set_node(self, i: int, node: Node, channels_last: bool = False) -> None:
        self.nodes[self.base + i] = node
        if channels_last:
            self.channels_last.add(self.base + i)

    def sum(self, i: int, step: ir.Step) -> None:
        like: int | None = step.inputs[0]
        nodes, channels_last = [self.nodes[v] for v in step.inputs], like in self.channels_last
        same = all(n.is_a((nodes[0].C, nodes[0].H, nodes[0].W)) for n in nodes)
        if not same or len({v in self.channels_last for v in step.inputs}) > 1:
            channels_last = any(
                v in self.channels_last and self.nodes[v].is_a(geometry(step.shape, True)) for v in step.inputs
            )
            nodes, like = [self.in_order(v, channels_last) for v in step.inputs], None
        total = nodes[0]
        self.set_node(i, total, channels_last)
        for other in nodes[1:]:
            out = self.result(i, channels_last) if like is None else self.alike_result(i, like)
            self.add(units.Add((total, other), out, (i,)))
            total = out

    def view(self, i: int, step: ir.Step) -> None:
        source = step.inputs[0]
        node, channels_last = self.nodes[source], source in self.channels_last
        if node.is_a(geometry(step.shape, channels_last)) or len(step.shape) == 1:
            self.set_node(i, node, channels_last)
            return
        keeps = self.stays_channels_last(i)
        side = MoveEnd(self.program.shape(source), channels_last)
        self.add(units.Move((node,), self.result(i, keeps), (i,), (side,), MoveEnd(step.shape, keeps)))

    def index(self, i: int, step: ir.Step) -> None:
        """Copies elements; changing between channels first and channels last needs no copy."""
        form, source = step.form, step.inputs[0]
        assert isinstance(form, ir.Index)
        shape, channels_last = self.program.shape(source), source in self.channels_last
        last = len(shape) - 1
        if len(form.parts) == 1 and is_permutation(form.parts[0], shape):
            to_last = not channels_last and self.nodes[source].is_a(geometry(shape))
            to_first = channels_last and self.nodes[source].is_a(geometry(shape, True))
            order = form.parts[0].order
            if (to_last and order == (*range(1, last + 1), 0)) or (to_first and order == (last, *range(last))):
                self.set_node(i, self.nodes[source], to_last)
                return
        reads = [self.nodes[v] for v in step.inputs]
        steps = [i]
        if len(reads) > 1 and self.side_by_side(step):
            reads, steps = self.pull_forward(i, step, reads)
        in_place = all(p.order == tuple(range(len(p.order))) for p in form.parts)
        keeps = self.stays_channels_last(steps[-1]) or (in_place and all(v in self.channels_last for v in step.inputs))
        out = self.node(step.shape, keeps)
        sources = tuple(MoveEnd(self.program.shape(v), v in self.channels_last) for v in step.inputs)
        self.add(units.Move(tuple(reads), out, tuple(steps), sources, MoveEnd(step.shape, keeps), form.parts))
        self.set_node(steps[-1], out, keeps)

    def side_by_side(self, step: ir.Step) -> bool:
        """Whether a concatenation of values that are stored channels first fills every channel."""
        assert isinstance(step.form, ir.Index)
        rows = [p.axes for p in step.form.parts]
        full = all(axes[1:] == tuple(identity_runs(n) for n in step.shape[1:]) for axes in rows)
        count = sum(c for axes in rows for start, c, _ in axes[0] if start >= 0)
        straight = all(
            v not in self.channels_last and self.nodes[v].is_a(geometry(self.program.shape(v))) for v in step.inputs
        )
        return full and straight and count == step.shape[0] and len(step.shape) > 1

    def pull_forward(self, i: int, step: ir.Step, nodes: list[Node]) -> tuple[list[Node], list[int]]:
        """Apply elementwise steps after a concatenation to its parts, so that a norm folds and a ReLU stays bits."""
        steps, alone = [i], [self.is_read_alone(v, i) for v in step.inputs]
        while (j := self.follow(steps[-1], is_elementwise)) is not None:
            form, first = self.program.steps[j].form, 0
            for k, node in enumerate(nodes):
                unread = node.producer if alone[k] and not node.readers else None
                if isinstance(form, ir.Contract) and isinstance(unread, units.Window):
                    self.fold(unread, Fold(form, first))
                else:
                    nodes[k], alone[k] = self.elementwise(j, node, first), True
                first += node.C
            self.done.add(j)
            steps.append(j)
        return nodes, steps

    def elementwise(self, j: int, node: Node, first: int) -> Node:
        """The result of an elementwise step for channels ``first``, … of its input, which are stored in ``node``."""
        form, out = self.program.steps[j].form, self.alike(node)
        if isinstance(form, ir.Contract):
            self.add(units.Stencil((node,), out, (j,), form, first))
        elif is_relu(self.program.steps[j]):
            self.add(units.Pattern((node,), out, (j,), pool=None, relu=True))
        elif isinstance(form, ir.Scale):
            self.add(units.Function((node,), out, (j,), form))
        return out

    def convolution(self, i: int, step: ir.Step) -> None:
        form, node = step.form, self.in_order(step.inputs[0], False)
        assert isinstance(form, ir.Contract) and isinstance(form.map, ir.Windows)
        groups, per_group = form.map.groups, step.shape[0] // form.map.groups
        if groups != node.C or groups == 1:
            return self.window(i, node, form)
        if per_group > 1:  # depthwise with several results per channel: each channel is repeated
            shape = self.program.shape(step.inputs[0])
            each = along(shape, 0, [c for c in range(groups) for _ in range(per_group)])
            wide = (groups * per_group, *shape[1:])
            copy = self.node(wide)
            self.add(units.Move((node,), copy, (), (MoveEnd(shape, False),), MoveEnd(wide, False), (each,)))
            node = copy
        self.stencil(i, node, form)

    def stencil(self, i: int, node: Node, form: ir.Contract, channels_last: bool = False) -> None:
        self.add(units.Stencil((node,), self.result(i, channels_last), (i,), form))

    def window(
        self, i: int, node: Node, form: ir.Contract, channels_last: bool = False, storage_order: bool = False
    ) -> None:
        """A contraction with the norms after it."""
        out, steps, folds = self.result(i, channels_last), [i], []

        def norm(step: ir.Step) -> bool:
            axis = channel_axis(step)
            return axis is not None and (axis > 0) == channels_last

        while (j := self.follow(steps[-1], norm)) is not None:
            factors = self.program.steps[j].form
            assert isinstance(factors, ir.Contract)
            folds.append(Fold(factors))
            steps.append(j)
            self.done.add(j)
            self.set_node(j, out, channels_last)
        self.add(units.Window((node,), out, tuple(steps), form, tuple(folds), storage_order))

    def fold(self, unit: units.Window, norm: Fold) -> None:
        """Fold one more norm into a window that nothing has read yet."""
        folded = replace(unit, folds=(*unit.folds, norm))
        self.units[self.units.index(unit)] = unit.out.producer = folded
        readers = unit.reads[0].readers
        readers[readers.index(unit)] = folded

    def pattern(self, i: int, step: ir.Step) -> None:
        """ReLU, max pool, or the two in either order: all of them are one bit per unit and tap."""
        source = step.inputs[0]
        node, channels_last = self.nodes[source], source in self.channels_last
        relu, rectify, opened, pool, steps = False, rectifies(step), False, None, [i]
        if isinstance(step.form, ir.Select):
            node, pool, channels_last = self.in_order(source, False), step.form.windows, False
            j = self.follow(i, is_relu)
            relu = j is not None
            rectify = j is not None and rectifies(self.program.steps[j])
        else:
            relu = True
            opened = isinstance(step.form, ir.Scale) and step.form.function == "open_relu"
            first = not channels_last and node.is_a(geometry(step.shape)) and not opened
            j = self.follow(i, lambda s: self.joinable(s, rectify)) if first else None
            pool = None if j is None else pool_of(self.program.steps[j])
        if j is not None:
            steps.append(j)
            self.done.add(j)
        out = self.node(self.program.steps[steps[-1]].shape) if pool else self.alike(node)
        self.add(units.Pattern((node,), out, tuple(steps), pool, relu, rectify, opened))
        self.set_node(steps[-1], out, channels_last)

    def joinable(self, step: ir.Step, rectify: bool) -> bool:
        """Whether a pool can be one pattern with the ReLU before it."""
        windows = pool_of(step)
        if windows is None or unsupported_reason(self.program, step) is not None:
            return False
        return not (rectify and windows.overlap)  # cotangents of overlapping windows are added before rectifying


def reserve_halo(unit: units.Window) -> None:
    """Give the storage that is read a zero border for padding, wide enough for every window on it."""
    m = unit.form.map
    if not isinstance(m, ir.Windows):
        return
    node, out = unit.reads[0], unit.out
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = Windows2d.of(m)
    reach_h = (out.H - 1) * sh + (kh - 1) * dh - ph - (node.H - 1)
    reach_w = (out.W - 1) * sw + (kw - 1) * dw - pw - (node.W - 1)
    for side, need in enumerate((ph, reach_h, pw, reach_w)):
        node.halo[side] = max(node.halo[side], need)


def share_in_place(all_units: list[Unit], outputs: dict[int, Node]) -> None:
    """Let a bare ReLU or a scale overwrite its input if it is the only reader."""
    kept = {n.id for n in outputs.values()}
    for unit in all_units:
        if isinstance(unit, units.Elementwise) or (isinstance(unit, units.Pattern) and unit.pool is None):
            source = unit.reads[0]
            # Places that a move leaves out must stay zero, and the next sample loads an input's storage again.
            own_storage = isinstance(source.producer, units.Load | units.Move)
            if len(source.readers) == 1 and source.id not in kept and not own_storage:
                both = [max(a, b) for a, b in zip(source.halo, unit.out.halo, strict=True)]
                source.halo[:] = both
                unit.out.halo = source.halo  # the same list: one storage, one border
                unit.out.memory = source.memory


def channel_axis(step: ir.Step) -> int | None:
    """The axis along which a step has factors, such as a norm's; None for other steps."""
    return step.form.map.axis if isinstance(step.form, ir.Contract) and isinstance(step.form.map, ir.Channels) else None


def is_relu(step: ir.Step) -> bool:
    """A ReLU that may be one pattern with a pool."""
    return isinstance(step.form, ir.Scale) and step.form.function in ("relu", "guided_relu")


def rectifies(step: ir.Step) -> bool:
    return isinstance(step.form, ir.Scale) and step.form.function in RECTIFYING


def is_elementwise(step: ir.Step) -> bool:
    if rectifies(step):
        return False
    return isinstance(step.form, ir.Scale) or channel_axis(step) == 0


def pool_of(step: ir.Step) -> ir.Windows | None:
    """The windows of a max pool; None for other steps."""
    return step.form.windows if isinstance(step.form, ir.Select) and step.form.ties == "first" else None
