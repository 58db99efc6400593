"""Units and nodes: a native group of steps, regrouped the way the kernels run it.

Between the :class:`~gradkern.program.Program` and the records of :mod:`gradkern.chain` stand two small graphs:

* a **node** is a piece of storage: one value, or several that are views of each other.  Inside a chain every node
  is *channels-last*, ``[H][W][C]`` per sample, because then the window of a convolution is a few contiguous runs;
* a **unit** is what one kernel does: a contraction with the batch norms behind it folded in, a ReLU and max pool
  as one bit pattern, …

A flattened node keeps the channels-last order of what it was flattened from; a linear layer behind it permutes
its weight when packed, so the flatten costs nothing.  A value whose *last* axis holds the channels (tokens, a
transposed signal) is the same storage read in another order: such values are in ``turned``, and a transpose between
``[C, L]`` and ``[L, C]`` costs nothing either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .functions import RECTIFYING
from .indexing import along, is_permutation, whole
from .program import (
    Channels,
    Contract,
    Dense,
    Given,
    Index,
    LowRank,
    Positions,
    Product,
    Program,
    Scale,
    Select,
    Step,
    Sum,
    View,
    Windows,
)

UnitKind = Literal["load", "window", "mix", "pattern", "scale", "sum", "move", "lowrank", "product", "matmul"]

#: Elementwise functions that csrc/scale.h knows, with the number of parameters each takes there.
NATIVE_FUNCTIONS = {
    "relu": 0, "leaky_relu": 1, "elu": 3, "tanh": 0, "sigmoid": 0, "affine": 2, "gelu": 0, "gelu_tanh": 0, "silu": 0,
    "mish": 0, "softplus": 2, "hardtanh": 2, "clamp": 2, "hardswish": 0, "hardsigmoid": 0, "square": 0, "power": 1,
    "negative_part": 0, "exp": 0, "expm1": 0, "log": 0, "log1p": 0, "sqrt": 0, "rsqrt": 0, "reciprocal": 0, "abs": 0,
    "erf": 0, "sin": 0, "cos": 0,
}  # fmt: skip
#: The ReLU, and the two of attribution rules: patterns of bits.
RELUS = frozenset({"relu"}) | RECTIFYING
MAX_CHANNELS = 65535  # channel lists are uint16
MAX_TAPS = 256  # planes of a pattern


def geometry(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """``(C, H, W)`` of a per-sample shape: the first axis is the channels; None where there are more than 3 axes."""
    match shape:
        case ():
            return 1, 1, 1
        case (c,):
            return c, 1, 1
        case (c, w):
            return c, 1, w
        case (c, h, w):
            return c, h, w
    return None


def tokens(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """``(C, H, W)`` of a shape whose last axis is the channels."""
    found = geometry(shape)
    if found is None or len(shape) < 2:
        return found
    return (shape[1], 1, shape[0]) if len(shape) == 2 else (shape[2], shape[0], shape[1])


def storage_axes(rank: int, turned: bool) -> str:
    """The storage axis of each axis of a value."""
    first = {0: "C", 1: "C", 2: "CW", 3: "CHW"}[rank]
    return first[1:] + first[0] if turned and rank > 1 else first


def why_not(program: Program, step: Step) -> str | None:
    """Why no kernel runs this step; None where one does."""
    shapes = [program.shape(v) for v in step.inputs] + [step.shape]
    if any(geometry(s) is None for s in shapes):
        return "values of more than 3 axes per sample have no kernel yet"
    if any(math.prod(s) == 0 for s in shapes):
        return "empty values have no kernel"
    if any(geometry(s)[0] > MAX_CHANNELS for s in shapes):  # type: ignore[index]
        return f"more than {MAX_CHANNELS} channels"
    match step.form:
        case Contract(map=Windows() as w) if len(w.kernel) != len(shapes[0]) - 1:
            return "convolution over other than the trailing axes"
        case Contract(map=Positions(axes)) if len(axes) != len(shapes[0]) - 1:
            return "pooling over other than the trailing axes"
        case Contract(map=Channels(axis)) if axis not in (0, len(shapes[0]) - 1):
            return "factors along a middle axis have no kernel"
        case Contract() | Sum() | View() | Index() | Given() | Product() | LowRank():
            return None
        case Select(ties="split"):
            return "a maximum whose ties share has no kernel yet"
        case Select(windows=w):
            if len(w.kernel) != len(shapes[0]) - 1:
                return "pooling over other than the trailing axes"
            return None if w.taps <= MAX_TAPS else f"max pool windows of more than {MAX_TAPS} taps"
        case Scale(function=f) if f in RELUS:
            return None
        case Scale(function=f, params=p):
            if f not in NATIVE_FUNCTIONS:
                return f"the function {f} has no kernel yet"
            return None if len(p) == NATIVE_FUNCTIONS[f] else f"{f} with {len(p)} parameters has no kernel"
    return "no kernel knows this form"


@dataclass
class Node:
    """Storage of one value (and its views): channels-last ``[H][W][C]``, with a zero halo where windows need one."""

    id: int
    C: int
    H: int
    W: int
    producer: Unit | None = None
    readers: list[Unit] = field(default_factory=list)  # once per read
    halo: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # top, bottom, left, right
    store: int = -1  # nodes of equal `store` share forward memory (a ReLU in place)

    @property
    def row(self) -> int:
        return (self.W + self.halo[2] + self.halo[3]) * self.C

    @property
    def size(self) -> int:
        return (self.H + self.halo[0] + self.halo[1]) * self.row

    @property
    def interior(self) -> int:
        """Offset of position (0, 0) from the start of the storage."""
        return self.halo[0] * self.row + self.halo[2] * self.C

    @property
    def P(self) -> int:
        return self.H * self.W

    @property
    def trivial(self) -> bool:
        """Whether channels-last and row-major order agree."""
        return self.C == 1 or self.P == 1

    def is_a(self, geometry: tuple[int, int, int] | None) -> bool:
        return geometry == (self.C, self.H, self.W)


@dataclass(frozen=True)
class Fold:
    """A batch norm behind a window, folded into its weights: channels ``first``, … of the norm's own."""

    form: Contract
    first: int = 0


@dataclass(frozen=True)
class Side:
    """One side of a move: a value's shape, and whether its storage is read channels-last (``turned``)."""

    shape: tuple[int, ...]
    turned: bool


@dataclass
class Unit:
    """What one kernel does, reading ``reads`` and writing ``out``.  ``steps`` are the program's step indices."""

    kind: UnitKind
    reads: list[Node]
    out: Node
    steps: list[int]
    form: object = None  # the Contract, Scale, LowRank, … itself
    windows: Windows | None = None  # of a pattern: its pool; None for a bare ReLU
    relu: bool = False
    rectify: bool = False  # of a pattern with a guided or opened ReLU: negative cotangents stop here
    opened: bool = False  # the others pass, also where the ReLU is off: the bits are not read
    slope: int = -1  # of a given scale: the external value that holds its slopes
    folds: list[Fold] = field(default_factory=list)  # batch norms folded into a window unit
    first: int = 0  # of a batch norm over some of its channels: the first of them
    turned: bool = False  # of a linear layer: what it reads is flat in storage order
    sides: list[Side] = field(default_factory=list)  # of a move: its sources, and at the end its destination
    along: str = "C"  # of a norm or softmax: the storage axis that it works along

    @property
    def dense(self) -> bool:
        return self.kind == "window" and isinstance(self.form.map, Dense)  # type: ignore[attr-defined]


@dataclass
class Graph:
    """The units of one group in forward order, with the nodes of its external inputs and outputs."""

    units: list[Unit]
    inputs: dict[int, Node]  # external value → node
    outputs: dict[int, Node]
    turned: set[int]  # external values whose storage is in their own row-major order (channels last)


class Builder:
    """Lowers a group of native steps to units.  ``live_out`` are the values wanted from it."""

    def __init__(self, program: Program, steps: list[int], live_out: list[int]):
        self.program, self.live_out = program, live_out
        self.steps = steps = leading_to(program, steps, live_out)
        self.nodes: dict[int, Node] = {}  # value → node
        self.turned: set[int] = set()  # values that read their node channels-last
        self.copies: dict[tuple[int, bool], Node] = {}  # a value's node in another order
        self.units: list[Unit] = []
        self.count = 0
        self.done: set[int] = set()
        base = len(program.inputs)
        inside = {base + i for i in steps}
        self.base = base
        self.reads: dict[int, list[int]] = {}  # value → steps of this group that read it
        for i in steps:
            for v in program.steps[i].inputs:
                self.reads.setdefault(v, []).append(i)
        self.external = [v for v in sorted(self.reads) if v not in inside]

    def build(self) -> Graph:
        for v in self.external:
            if any(self.wants_tokens(self.program.steps[i], v) for i in self.reads[v]):
                self.turned.add(v)
            node = self.node(self.program.shape(v), v in self.turned)
            self.add(Unit("load", [], node, []))
            self.nodes[v] = node
        inputs = {v: self.nodes[v] for v in self.external}
        for i in self.steps:
            if i not in self.done:
                self.lower(i, self.program.steps[i])
        outputs = {v: self.nodes[v] for v in self.live_out}
        for unit in self.units:
            if unit.kind == "window":
                self.reserve_halo(unit)
        self.share_in_place(outputs)
        return Graph(self.units, inputs, outputs, self.turned & {*inputs, *outputs})

    # ---- small helpers

    def node(self, shape: tuple[int, ...], turned: bool = False) -> Node:
        c, h, w = tokens(shape) if turned else geometry(shape)  # type: ignore[misc]
        self.count += 1
        return Node(self.count - 1, c, h, w, store=self.count - 1)

    def add(self, unit: Unit) -> None:
        unit.out.producer = unit
        for n in unit.reads:
            n.readers.append(unit)
        self.units.append(unit)

    def only_reader(self, value: int) -> int | None:
        """The one step that reads a value which nobody else wants."""
        readers = self.reads.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.live_out else None

    def follow(self, i: int, wanted) -> int | None:
        """The step behind step ``i``, if it alone reads the result and ``wanted(step)`` holds."""
        j = self.only_reader(self.base + i)
        return j if j is not None and wanted(self.program.steps[j]) else None

    def wants_tokens(self, step: Step, value: int) -> bool:
        """Whether a step would rather read the value with its last axis as the channels."""
        shape, form = self.program.shape(value), step.form
        last = len(shape) - 1
        match form:
            case _ if last < 1:
                return False
            case Contract(map=Dense()) | Product(function="matmul"):
                return True
            case Contract(map=Channels(axis)) | LowRank(axis=axis):
                return axis == last
            case Index(parts=(part,)):
                return is_permutation(part, shape) and part.order == (last, *range(last))
        return False

    def in_order(self, value: int, turned: bool) -> Node:
        """The value's node in the geometry of its own shape, copied where it is stored in another order."""
        node, shape = self.nodes[value], self.program.shape(value)
        fits = node.is_a(tokens(shape) if turned else geometry(shape))
        if fits and (node.trivial or (value in self.turned) == turned):
            return node
        if (value, turned) not in self.copies:
            copy = self.node(shape, turned)
            sides = [Side(shape, value in self.turned), Side(shape, turned)]
            self.add(Unit("move", [node], copy, [], sides=sides))
            self.copies[value, turned] = copy
        return self.copies[value, turned]

    def canonical(self, value: int) -> Node:
        return self.in_order(value, False)

    # ---- one step

    def lower(self, i: int, step: Step) -> None:
        self.done.add(i)
        form, source = step.form, step.inputs[0]
        match form:
            case View():
                self.view(i, step)
            case Index():
                self.index(i, step)
            case Contract(map=Dense()) if len(step.shape) > 1:
                point = Windows((1,), (1,), ((0, 0),), (1,))
                self.window(i, self.in_order(source, True), Contract(point, form.weight, form.bias), True)
            case Contract(map=Dense()):
                self.window(i, self.nodes[source], form)
                self.nodes[self.base + i].producer.turned = source in self.turned  # type: ignore[union-attr]
            case Contract(map=Windows()):
                self.convolution(i, step)
            case Contract():
                last = isinstance(form.map, Channels) and form.map.axis > 0
                self.unit("mix", i, [self.in_order(source, last)], last, form=form)
            case Given():
                self.unit("scale", i, [self.nodes[source]], like=source, form=form, slope=step.inputs[1])
                self.units[-1].turned = source in self.turned
            case Select() | Scale(function="relu" | "guided_relu" | "open_relu"):
                self.pattern(i, step)
            case Scale():
                self.unit("scale", i, [self.nodes[source]], like=source, form=form)
            case Sum():
                self.sum(i, step)
            case LowRank(axis=axis):
                turned = source in self.turned and self.nodes[source].is_a(tokens(step.shape))
                turned |= axis > 0 and axis == len(step.shape) - 1 and self.stays_turned(i)
                node = self.in_order(source, turned)
                order = storage_axes(len(step.shape), turned)
                self.unit("lowrank", i, [node], turned, form=form, along=order[axis])
            case Product(function="matmul"):
                self.unit("matmul", i, [self.in_order(v, True) for v in step.inputs], True, form=form)
            case Product():
                turned = any(v in self.turned for v in step.inputs)
                self.unit("product", i, [self.in_order(v, turned) for v in step.inputs], turned, form=form)

    def stays_turned(self, i: int) -> bool:
        """Whether somebody behind the step wants its result channels-last."""
        value = self.base + i
        return any(self.wants_tokens(self.program.steps[j], value) for j in self.reads.get(value, []))

    def unit(
        self, kind: UnitKind, i: int, reads: list[Node], turned: bool = False, like: int | None = None, **more
    ) -> Node:
        """A unit whose result has the step's shape, or lies as the value ``like`` does."""
        if like is not None:
            node = self.nodes[like]
            self.count += 1
            out = Node(self.count - 1, node.C, node.H, node.W, store=self.count - 1)
            turned = like in self.turned
        else:
            out = self.node(self.program.steps[i].shape, turned)
        self.add(Unit(kind, reads, out, [i], **more))
        self.place(i, out, turned)
        return out

    def place(self, i: int, node: Node, turned: bool = False) -> None:
        self.nodes[self.base + i] = node
        if turned:
            self.turned.add(self.base + i)

    def sum(self, i: int, step: Step) -> None:
        first = step.inputs[0]
        nodes, like = [self.nodes[v] for v in step.inputs], first
        same = all(n.is_a((nodes[0].C, nodes[0].H, nodes[0].W)) for n in nodes)
        if not same or len({v in self.turned for v in step.inputs}) > 1:
            turned = any(v in self.turned and self.nodes[v].is_a(tokens(step.shape)) for v in step.inputs)
            nodes = [self.in_order(v, turned) for v in step.inputs]
            total = nodes[0]
            self.place(i, total, turned)
            for other in nodes[1:]:
                total = self.unit("sum", i, [total, other], turned)
            return
        total = nodes[0]
        self.place(i, total, like in self.turned)
        for other in nodes[1:]:
            total = self.unit("sum", i, [total, other], like=like)

    def view(self, i: int, step: Step) -> None:
        source = step.inputs[0]
        node, turned = self.nodes[source], source in self.turned
        if node.is_a(tokens(step.shape) if turned else geometry(step.shape)) or len(step.shape) == 1:
            self.place(i, node, turned)
            return
        sides = [Side(self.program.shape(source), turned), Side(step.shape, False)]
        self.unit("move", i, [node], sides=sides)

    def index(self, i: int, step: Step) -> None:
        """Copies; a change between channels first and channels last is none."""
        form, source = step.form, step.inputs[0]
        assert isinstance(form, Index)
        shape, turned = self.program.shape(source), source in self.turned
        last = len(shape) - 1
        if len(form.parts) == 1 and is_permutation(form.parts[0], shape):
            to_last = not turned and self.nodes[source].is_a(geometry(shape))
            to_first = turned and self.nodes[source].is_a(tokens(shape))
            order = form.parts[0].order
            if (to_last and order == (*range(1, last + 1), 0)) or (to_first and order == (last, *range(last))):
                self.place(i, self.nodes[source], to_last)
                return
        reads = [self.nodes[v] for v in step.inputs]
        steps = [i]
        if len(reads) > 1 and self.side_by_side(step):
            reads, steps = self.pull_forward(i, step, reads)
        keeps = all(v in self.turned for v in step.inputs) and all(
            p.order == tuple(range(len(p.order))) for p in form.parts
        )
        out = self.node(step.shape, keeps)
        sides = [Side(self.program.shape(v), v in self.turned) for v in step.inputs] + [Side(step.shape, keeps)]
        self.add(Unit("move", reads, out, steps, form=form, sides=sides))
        self.place(steps[-1], out, keeps)

    def side_by_side(self, step: Step) -> bool:
        """Whether a concatenation fills every channel, of values that lie channels first."""
        rows = [p.axes for p in step.form.parts]  # type: ignore[union-attr]
        full = all(axes[1:] == tuple(whole(n) for n in step.shape[1:]) for axes in rows)
        count = sum(c for axes in rows for start, c, _ in axes[0] if start >= 0)
        straight = all(
            v not in self.turned and self.nodes[v].is_a(geometry(self.program.shape(v))) for v in step.inputs
        )
        return full and straight and count == step.shape[0] and len(step.shape) > 1

    def pull_forward(self, i: int, step: Step, nodes: list[Node]) -> tuple[list[Node], list[int]]:
        """Elementwise steps behind a concatenation are done to its parts: a norm folds, a ReLU stays bits."""
        steps, alone = [i], [self.only_reader(v) == i for v in step.inputs]
        while (j := self.follow(steps[-1], is_elementwise)) is not None:
            form, first = self.program.steps[j].form, 0
            for k, node in enumerate(nodes):
                producer = node.producer
                if isinstance(form, Contract) and alone[k] and producer.kind == "window" and not node.readers:  # type: ignore[union-attr]
                    producer.folds.append(Fold(form, first))  # type: ignore[union-attr]
                else:
                    self.count += 1
                    out = Node(self.count - 1, node.C, node.H, node.W, store=self.count - 1)
                    relu = is_relu(self.program.steps[j])
                    kind: UnitKind = "mix" if isinstance(form, Contract) else "pattern" if relu else "scale"
                    self.add(Unit(kind, [node], out, [j], form=form, first=first, relu=relu))
                    nodes[k], alone[k] = out, True
                first += node.C
            self.done.add(j)
            steps.append(j)
        return nodes, steps

    def convolution(self, i: int, step: Step) -> None:
        form, node = step.form, self.canonical(step.inputs[0])
        groups, per_group = form.map.groups, step.shape[0] // form.map.groups  # type: ignore[union-attr]
        if groups != node.C or groups == 1:
            return self.window(i, node, form)  # type: ignore[arg-type]
        if per_group > 1:  # depthwise with several results per channel: each channel that often
            shape = self.program.shape(step.inputs[0])
            each = along(shape, 0, [c for c in range(groups) for _ in range(per_group)])
            wide = (groups * per_group, *shape[1:])
            copy = self.node(wide)
            self.add(Unit("move", [node], copy, [], form=Index((each,)), sides=[Side(shape, False), Side(wide, False)]))
            node = copy
        self.unit("mix", i, [node], form=form)

    def window(self, i: int, node: Node, form: Contract, turned: bool = False) -> None:
        out = self.unit("window", i, [node], turned, form=form)
        unit, last = self.units[-1], i

        def norm(step: Step) -> bool:
            return (
                is_channels(step)
                and (step.form.map.axis == 0 or turned)
                and (  # type: ignore[union-attr]
                    step.form.map.axis > 0 or not turned  # type: ignore[union-attr]
                )
            )

        while (j := self.follow(last, norm)) is not None:
            unit.folds.append(Fold(self.program.steps[j].form))  # type: ignore[arg-type]
            unit.steps.append(j)
            self.done.add(j)
            self.place(j, out, turned)
            last = j

    def pattern(self, i: int, step: Step) -> None:
        """ReLU, max pool, or the two in either order: all of them are one bit per unit and tap."""
        source = step.inputs[0]
        node, turned = self.nodes[source], source in self.turned
        relu, rectify, opened, windows, steps, last = False, rectifies(step), False, None, [i], i
        if isinstance(step.form, Select):
            node, windows, turned = self.canonical(source), step.form.windows, False
            j = self.follow(i, is_relu)
            relu = j is not None
            rectify = j is not None and rectifies(self.program.steps[j])
        else:
            relu = True
            j = self.follow(i, is_pool) if not turned and node.is_a(geometry(step.shape)) else None
            opened = step.form.function == "open_relu"  # type: ignore[union-attr]
            if j is not None and (opened or (rectify and overlaps(self.program.steps[j]))):
                j = None  # what arrives from several windows is added before it is rectified
            if j is not None and why_not(self.program, self.program.steps[j]) is None:
                windows = self.program.steps[j].form.windows  # type: ignore[union-attr]
            else:
                j = None
        if j is not None:
            steps.append(j)
            self.done.add(j)
            last = j
        if windows:
            out = self.node(self.program.steps[last].shape)
        else:
            self.count += 1
            out = Node(self.count - 1, node.C, node.H, node.W, store=self.count - 1)
        self.add(Unit("pattern", [node], out, steps, windows=windows, relu=relu, rectify=rectify, opened=opened))
        self.place(last, out, turned)

    # ---- storage

    def reserve_halo(self, unit: Unit) -> None:
        """Padding becomes a zero border of the storage that is read, wide enough for every window on it."""
        m = unit.form.map  # type: ignore[attr-defined]
        if not isinstance(m, Windows):
            return
        node, out = unit.reads[0], unit.out
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = planar(m)
        reach_h = (out.H - 1) * sh + (kh - 1) * dh - ph[0] - (node.H - 1)
        reach_w = (out.W - 1) * sw + (kw - 1) * dw - pw[0] - (node.W - 1)
        for side, need in enumerate((ph[0], reach_h, pw[0], reach_w)):
            node.halo[side] = max(node.halo[side], need)

    def share_in_place(self, outputs: dict[int, Node]) -> None:
        """A bare ReLU or a scale writes over its input where nobody else reads that."""
        kept = {n.id for n in outputs.values()}
        for unit in self.units:
            if unit.kind in ("pattern", "scale") and unit.windows is None:
                source = unit.reads[0]
                # What a move leaves out must stay zero, and an input's storage is loaded again for the next sample.
                if len(source.readers) == 1 and source.id not in kept and source.producer.kind not in ("load", "move"):  # type: ignore[union-attr]
                    both = [max(a, b) for a, b in zip(source.halo, unit.out.halo, strict=True)]
                    source.halo[:] = both
                    unit.out.halo = source.halo  # the same list: one storage, one border
                    unit.out.store = source.store


def leading_to(program: Program, steps: list[int], wanted: list[int]) -> list[int]:
    """Those of ``steps`` that the values ``wanted`` need: nothing may wait for a cotangent that never comes."""
    base, needed = len(program.inputs), set(wanted)
    for i in reversed(steps):
        if base + i in needed:
            needed.update(program.steps[i].inputs)
    return [i for i in steps if base + i in needed]


def is_channels(step: Step) -> bool:
    return isinstance(step.form, Contract) and isinstance(step.form.map, Channels)


def is_relu(step: Step) -> bool:
    """A ReLU that may be one pattern with a pool."""
    return isinstance(step.form, Scale) and step.form.function in ("relu", "guided_relu")


def rectifies(step: Step) -> bool:
    return isinstance(step.form, Scale) and step.form.function in RECTIFYING


def overlaps(step: Step) -> bool:
    """Do a pool's windows share places, so that cotangents add up before they reach the step below?"""
    w = step.form.windows  # type: ignore[union-attr]
    return any(s < (k - 1) * d + 1 for s, k, d in zip(w.stride, w.kernel, w.dilation, strict=True))


def is_elementwise(step: Step) -> bool:
    if rectifies(step):
        return False
    return isinstance(step.form, Scale) or (is_channels(step) and step.form.map.axis == 0)  # type: ignore[union-attr]


def is_pool(step: Step) -> bool:
    return isinstance(step.form, Select) and step.form.ties == "first"


def planar(w: Windows):
    """``(kernel, stride, padding, dilation)`` of a 1-D or 2-D window as 2-D pairs."""
    if len(w.kernel) == 2:
        return w.kernel, w.stride, w.padding, w.dilation
    return (1, *w.kernel), (1, *w.stride), ((0, 0), *w.padding), (1, *w.dilation)
