"""Forward mode: the vector-Jacobian product of a network at given values, as a Program of its own.

At a sample, the derivative of a network is a linear map.  Its transpose takes a cotangent of the output to cotangents
of the inputs, and is written here as a Program: contractions have the transposed weight, and every derivative is a
slope that the caller gives (:mod:`gradkern.runtime.forward_mode` computes them from a forward pass).  The reverse mode
of *that* Program takes one-hot seeds at the inputs to the outputs, which is the forward mode of the network.  So
planner, kernels and executor run it as they run any other Program.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..ir import graph, indexing
from ..ir.functions import RECTIFYING
from ..ir.program import (
    Call,
    Channels,
    Contract,
    Dense,
    Derived,
    Form,
    Given,
    Index,
    LowRank,
    Opaque,
    Param,
    Part,
    Positions,
    Product,
    Program,
    Scale,
    Select,
    Shape,
    Step,
    Sum,
    View,
    Windows,
)
from .prune_positions import prune

MOST_TAPS = 16  # places of a pool's window that become a step each

#: The content of a slope: the derivative of a `Scale`; 1 where a pool's window chose a place, for each window or for
#: each position of its input; the share of a maximum in each position; the output of a step, its negative, its negative
#: exponential, or a norm's 1/deviation; a value, broadcast to the slope's shape, or with its last two axes swapped.
Kind = Literal[
    "derivative", "tap", "winner", "share", "output", "-output", "-exp(output)", "1/deviation", "value", "swapped"
]


@dataclass(frozen=True)
class Slope:
    """One input of the transposed Program after the cotangent: numbers of a step or value ``of`` the network."""

    kind: Kind
    of: int  # a step; a value for ``value`` and ``swapped``
    shape: Shape
    place: int = 0  # the number of a ``tap`` in the window


def values_read(program: Program, slopes: Sequence[Slope]) -> tuple[int, ...]:
    """The values of a forward pass that the slopes are computed from."""
    of_values = ("value", "swapped")
    return tuple(sorted({s.of if s.kind in of_values else program.steps[s.of].inputs[0] for s in slopes}))


@dataclass(frozen=True)
class Transposed:
    """The VJP of a network as a Program, whose inputs are the cotangent of the output, and the slopes.

    Its output holds the cotangents of the inputs ``wrt``, flat and one after another if there are several.
    """

    program: Program
    slopes: tuple[Slope, ...]
    wrt: tuple[int, ...]

    @property
    def tangents(self) -> int:
        return self.program.outputs


def no_rule_reason(program: Program, i: int) -> str | None:
    """Why no tangent can pass step ``i``; None if it can."""
    step = program.steps[i]
    shapes = [step.shape, *map(program.shape, step.inputs)]
    if any(math.prod(shape) == 0 for shape in shapes):
        return "it has no elements"
    match step.form:
        case Scale(function=f) if f in RECTIFYING:
            return "its rule looks at the sign of the cotangent"
        case Contract(map=Windows() as w):
            sides = zip(w.kernel, w.stride, w.padding, w.dilation, step.shape[1:], strict=True)
            if any((m - 1) * s - p + d * (k - 1) < 0 for k, s, (p, _), d, m in sides):
                return "it reads only padding"
        case Select(windows=w, ties="first") if w.overlap and w.taps > MOST_TAPS:
            return f"it is a maximum of overlapping windows of {w.taps} places"
        case Given() | Opaque():
            return "it has no forward rule"
    return None


def transpose(program: Program, wrt: Sequence[int], *, computed: bool = True) -> Transposed:
    """The VJP of a network in which every step has a rule.

    ``computed``: a `Given` step computes the derivative of a function; otherwise the caller gives it.
    """
    writer = _TransposingWriter(program, wrt, computed)
    for i in reversed(range(len(program.steps))):
        writer.transpose(i)
    return writer.finish()


COTANGENT = -1  # the number of the first input while steps are written; slopes have the numbers below it


class _TransposingWriter:
    """Writes the steps of the transposed Program; their numbers begin at 0 until all inputs are known."""

    def __init__(self, program: Program, wrt: Sequence[int], computed: bool) -> None:
        self.program, self.wrt, self.base = program, tuple(wrt), len(program.inputs)
        self.reached = graph.descendants(program, wrt)  # only these values have tangents
        self.sums: dict[int, list[int]] = {program.output: [COTANGENT]}  # cotangents of each value, still to be added
        self.steps: list[Step] = []
        self.slopes: dict[Slope, int] = {}
        self.derived: dict[str, Derived] = {}
        # The transpose of a matrix product has products of values in it.  Such a Program is not linear, so its slopes
        # are factors of ordinary products instead of `Given` steps.
        linear = not any(s.form == Product("matmul") for s in program.steps)
        self.factor: Form = Given() if linear else Product()
        self.computed = computed and linear
        self.at = 0  # the step that is being transposed

    # ---- writing

    def emit(self, form: Form, reads: Sequence[int], shape: Shape) -> int:
        of = self.program.steps[self.at]
        self.steps.append(Step(form, tuple(reads), shape, of.op, of.module))
        return len(self.steps) - 1

    def slope(self, kind: Kind, of: int, shape: Shape, place: int = 0) -> int:
        return self.slopes.setdefault(Slope(kind, of, shape, place), COTANGENT - 1 - len(self.slopes))

    def times(self, g: int, kind: Kind, shape: Shape, of: int | None = None, place: int = 0) -> int:
        slope = self.slope(kind, self.at if of is None else of, shape, place)
        return self.emit(self.factor, (g, slope), shape)

    def weight(self, name: str, call: Call) -> Param:
        self.derived.setdefault(name, Derived(name, call))
        return Param(name)

    def send(self, k: int, g: int) -> None:
        """Add ``g`` to the cotangents of the step's ``k``-th input."""
        value = self.program.steps[self.at].inputs[k]
        if value in self.reached:
            self.sums.setdefault(value, []).append(g)

    def total(self, value: int) -> int | None:
        parts = self.sums.pop(value, [])
        return self.emit(Sum(), parts, self.program.shape(value)) if len(parts) > 1 else next(iter(parts), None)

    def reshape(self, g: int, have: Shape, shape: Shape) -> int:
        return g if have == shape else self.emit(View(), (g,), shape)

    def index_axes(self, g: int, have: Shape, axes: Mapping[int, Sequence[int]]) -> int:
        """``g`` at the positions ``axes[a]`` along each axis ``a`` (-1: zeros)."""
        if all(list(wanted) == list(range(have[a])) for a, wanted in axes.items()):
            return g
        runs = tuple(indexing.runs(axes[a]) if a in axes else indexing.identity_runs(n) for a, n in enumerate(have))
        shape = tuple(len(axes[a]) if a in axes else n for a, n in enumerate(have))
        return self.emit(Index((Part(tuple(range(len(have))), runs),)), (g,), shape)

    def along(self, g: int, have: Shape, axis: int, rows: tuple[tuple[int, tuple[float, ...]], ...]) -> int:
        """``g`` times a constant matrix along one axis, in the form of `Positions.axes`."""
        before, after = math.prod(have[:axis]), math.prod(have[axis + 1 :])
        same = tuple((i, (1.0,)) for i in range(after))
        g = self.reshape(g, have, (before, have[axis], after))
        g = self.emit(Contract(Positions((rows, same))), (g,), (before, len(rows), after))
        return self.reshape(g, (before, len(rows), after), (*have[:axis], len(rows), *have[axis + 1 :]))

    def spread_sum(self, g: int, shape: Shape, axis: int, factor: float = 1.0) -> int:
        """The sum along an axis times a factor, at each of its positions."""
        n = shape[axis]
        one = (*shape[:axis], 1, *shape[axis + 1 :])
        return self.index_axes(self.along(g, shape, axis, ((0, (factor,) * n),)), one, {axis: [0] * n})

    # ---- one step

    def transpose(self, i: int) -> None:
        self.at = i
        step, g = self.program.steps[i], self.total(self.base + i)
        if g is None or self.base + i not in self.reached:
            return
        shape, sources = step.shape, [self.program.shape(v) for v in step.inputs]
        match step.form:
            case Contract() as form:
                self.send(0, self.contract(form, g, shape, sources[0]))
            case Scale() as form if self.computed:
                self.send(0, self.emit(Given(form), (g, self.slope("value", step.inputs[0], shape)), shape))
            case Scale():
                self.send(0, self.times(g, "derivative", shape))
            case Select() as form:
                self.send(0, self.select(form, g, shape, sources[0]))
            case LowRank() as form:
                self.send(0, self.low_rank(form, g, shape))
            case Product(function="matmul"):
                self.matmul(step, g, sources)
            case Product():
                for k in (0, 1):
                    self.send(k, self.product(step, g, k, sources[k]))
            case Index(parts=parts):
                for k, part in enumerate(parts):
                    self.send(k, self.undo_copy(part, g, shape, sources[k]))
            case View():
                self.send(0, self.reshape(g, shape, sources[0]))
            case Sum():
                for k in range(len(sources)):
                    self.send(k, g)
            case _:
                raise TypeError(f"step {i}: {no_rule_reason(self.program, i)}")

    def contract(self, form: Contract, g: int, shape: Shape, source: Shape) -> int:
        weight = form.weight
        match form.map:
            case Dense():
                assert weight is not None
                rows = self.weight(f"{weight.name}^T", Call("aten.t.default", (weight,)))
                return self.emit(Contract(Dense(), rows), (g,), source)
            case Positions(axes):
                rows_of = tuple(transposed_rows(rows, n) for rows, n in zip(axes, source[1:], strict=True))
                return self.emit(Contract(Positions(rows_of)), (g,), source)
            case Channels():
                return g if weight is None else self.emit(Contract(form.map, weight), (g,), source)
            case Windows() as w:
                assert weight is not None
                return self.windows(w, weight, g, shape, source)

    def windows(self, w: Windows, weight: Param, g: int, shape: Shape, source: Shape) -> int:
        """A convolution with the flipped weight, over the cotangent with zeros between its elements."""
        spread: dict[int, Sequence[int]] = {}
        padding = []
        for a, (n, size) in enumerate(zip(shape[1:], source[1:], strict=True)):
            stride, reach = w.stride[a], w.dilation[a] * (w.kernel[a] - 1)
            places = [i // stride if i % stride == 0 else -1 for i in range((n - 1) * stride + 1)]
            before = reach - w.padding[a][0]
            after = size + reach - before - len(places)
            places = places[max(0, -before) : len(places) - max(0, -after)]
            spread[a + 1] = places
            padding.append((max(0, before), max(0, after)))
        o, c, groups = shape[0], source[0], w.groups
        call = Call("aten.flip.default", (weight, tuple(range(2, 2 + len(w.kernel)))))
        call = Call("aten.reshape.default", (call, (groups, o // groups, c // groups, *w.kernel)))
        call = Call("aten.transpose.int", (call, 1, 2))
        call = Call("aten.reshape.default", (call, (c, o // groups, *w.kernel)))
        flipped = self.weight(f"{weight.name}^T/{groups}", call)
        g = self.index_axes(g, shape, spread)
        windows = Windows(w.kernel, (1,) * len(w.kernel), tuple(padding), w.dilation, groups)
        return self.emit(Contract(windows, flipped), (g,), source)

    def select(self, form: Select, g: int, shape: Shape, source: Shape) -> int:
        w, spatial = form.windows, source[1:]
        if form.ties == "split":
            g = self.index_axes(g, shape, {a + 1: [0] * n for a, n in enumerate(spatial)})
            return self.times(g, "share", source)
        if not w.overlap:
            reads = {a + 1: [window_of(w, a, p, shape[a + 1]) for p in range(n)] for a, n in enumerate(spatial)}
            return self.times(self.index_axes(g, shape, reads), "winner", source)
        parts = []
        for t in range(w.taps):
            chosen, rest = self.times(g, "tap", shape, place=t), t
            axes: dict[int, list[int]] = {}
            for a in reversed(range(len(spatial))):
                rest, at = divmod(rest, w.kernel[a])
                axes[a + 1] = [tap_of(w, a, p, at, shape[a + 1]) for p in range(spatial[a])]
            parts.append(self.index_axes(chosen, shape, axes))
        return self.emit(Sum(), parts, source)

    def low_rank(self, form: LowRank, g: int, shape: Shape) -> int:
        axis = form.axis
        if form.function == "softmax":
            weighted = self.times(g, "output", shape)
            return self.emit(
                Sum(), (weighted, self.times(self.spread_sum(weighted, shape, axis), "-output", shape)), shape
            )
        if form.function == "log_softmax":
            total = self.spread_sum(g, shape, axis)
            return self.emit(Sum(), (g, self.times(total, "-exp(output)", shape)), shape)
        mean = self.spread_sum(g, shape, axis, -1 / shape[axis])
        spread = self.spread_sum(self.times(g, "output", shape), shape, axis, 1 / shape[axis])
        centred = self.emit(Sum(), (g, mean, self.times(spread, "-output", shape)), shape)
        return self.times(centred, "1/deviation", shape)

    def product(self, step: Step, g: int, k: int, source: Shape) -> int:
        """The other factor times the cotangent, summed over the axes along which this factor is broadcast."""
        if step.inputs[k] not in self.reached:
            return g
        shape = step.shape
        g = self.times(g, "value", shape, of=step.inputs[1 - k])
        for a, n in enumerate(source):
            if n != shape[a]:
                g = self.along(g, shape, a, ((0, (1.0,) * shape[a]),))
                shape = (*shape[:a], 1, *shape[a + 1 :])
        return g

    def matmul(self, step: Step, g: int, sources: Sequence[Shape]) -> None:
        a, b = step.inputs
        for k, other in ((0, b), (1, a)):
            if step.inputs[k] in self.reached:
                *lead, rows, columns = sources[1 - k]
                slope = self.slope("swapped", other, (*lead, columns, rows))
                self.send(k, self.emit(Product("matmul"), (g, slope) if k == 0 else (slope, g), sources[k]))

    def undo_copy(self, part: Part, g: int, shape: Shape, source: Shape) -> int:
        """Every element gets the sum over its copies."""
        reads = [indexing.indices(axis) for axis in part.axes]
        axes: dict[int, Sequence[int]] = {}
        for a, read in enumerate(reads):
            size, times = source[part.order[a]], Counter(i for i in read if i >= 0)
            if max(times.values(), default=0) <= 1:
                places = {i: k for k, i in enumerate(read) if i >= 0}
                axes[a] = [places.get(i, -1) for i in range(size)]
            else:
                g = self.along(g, shape, a, transposed_rows(tuple((max(i, 0), (float(i >= 0),)) for i in read), size))
                shape = (*shape[:a], size, *shape[a + 1 :])
        g = self.index_axes(g, shape, axes)
        if part.order == tuple(range(len(source))):
            return g
        inverse = tuple(sorted(range(len(source)), key=part.order.__getitem__))
        shape = tuple(source[a] for a in part.order)
        return self.emit(Index((indexing.identity(shape, inverse),)), (g,), source)

    # ---- the result

    def finish(self) -> Transposed:
        reached = [(w, g) for w in self.wrt if (g := self.total(w)) is not None]
        output = reached[0][1] if len(self.wrt) == 1 else self.concatenate(dict(reached))
        base = 1 + len(self.slopes)

        def number(v: int) -> int:
            return base + v if v >= 0 else COTANGENT - v

        steps = tuple(replace(s, inputs=tuple(map(number, s.inputs))) for s in self.steps)
        inputs = (self.program.output_shape, *(slope.shape for slope in self.slopes))
        program = without_copies(prune(Program(inputs, steps, number(output), tuple(self.derived.values()))))
        return Transposed(program, tuple(self.slopes), self.wrt)

    def concatenate(self, cotangents: dict[int, int]) -> int:
        """The cotangents of all inputs, flat, one after another."""
        sizes = [math.prod(self.program.inputs[w]) for w in self.wrt]
        total, parts, reads = sum(sizes), [], []
        for k, w in enumerate(self.wrt):
            if w in cotangents:
                flat = self.reshape(cotangents[w], self.program.inputs[w], (sizes[k],))
                before = sum(sizes[:k])
                places = [p - before if before <= p < before + sizes[k] else -1 for p in range(total)]
                parts.append(Part((0,), (indexing.runs(places),)))
                reads.append(flat)
        return self.emit(Index(tuple(parts)), reads, (total,))


def transposed_rows(rows: Sequence[tuple[int, tuple[float, ...]]], n: int) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """The transpose of a matrix with ``n`` columns, in the form of `Positions.axes`."""
    columns: list[dict[int, float]] = [{} for _ in range(n)]
    for r, (first, coefficients) in enumerate(rows):
        for k, c in enumerate(coefficients):
            if c:
                columns[first + k][r] = c
    return tuple(
        (min(col), tuple(col.get(r, 0.0) for r in range(min(col), max(col) + 1))) if col else (0, (0.0,))
        for col in columns
    )


def window_of(w: Windows, axis: int, position: int, count: int) -> int:
    """The only window that reads a position, if windows do not overlap; -1 if none does."""
    number, within = divmod(position + w.padding[axis][0], w.stride[axis])
    read = within % w.dilation[axis] == 0 and within // w.dilation[axis] < w.kernel[axis]
    return number if read and number < count else -1


def tap_of(w: Windows, axis: int, position: int, place: int, count: int) -> int:
    """The window that has a position at ``place``; -1 if there is none."""
    number, rest = divmod(position + w.padding[axis][0] - place * w.dilation[axis], w.stride[axis])
    return number if rest == 0 and 0 <= number < count else -1


def without_copies(program: Program) -> Program:
    """``program`` without the `Index` steps that copy a whole value, which pruning leaves behind."""
    base, number = len(program.inputs), {v: v for v in range(len(program.inputs))}
    steps: list[Step] = []
    for i, step in enumerate(program.steps):
        shape = program.shape(step.inputs[0])
        if step.form == Index((indexing.identity(shape),)) and step.shape == shape:
            number[base + i] = number[step.inputs[0]]
        else:
            number[base + i] = base + len(steps)
            steps.append(graph.renumber(step, number))
    return replace(program, steps=tuple(steps), output=number[program.output])
