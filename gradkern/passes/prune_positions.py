"""Pruning: removes the positions that the output of a program does not depend on.

A causal network that reads its last time step needs only every 2nd, 4th, 8th … position of its dilated layers; slices
and strides leave others unread.  Which positions are needed depends on structure alone.  So they are computed once, per
axis, as arithmetic places from the output back, and the program is then rewritten for them.  A
convolution of every g-th position with dilation d becomes one with dilation d/g over the remaining positions.

Results are equal, because the cotangents of removed positions are exact zeros.  Inputs keep their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..ir import indexing
from ..ir import program as ir
from ..ir.graph import renumber
from ..ir.macs import forward_macs
from ..util.memo import Memo

WORTHWHILE = 0.9  # at most this share of the operations may be left; otherwise copying parts of values costs too much


class OnlyPadding(Exception):
    """The needed results of a convolution read only padding; a `Progression` cannot say that no input is needed."""


@dataclass(frozen=True)
class Progression:
    """Positions ``start``, ``start + step``, … of an axis, ``count`` of them."""

    start: int
    step: int
    count: int

    @property
    def last(self) -> int:
        return self.start + (self.count - 1) * self.step

    def positions(self) -> range:
        return range(self.start, self.last + 1, self.step)

    def within(self, other: Progression) -> Progression:
        """These positions, counted along ``other``, which contains all of them."""
        step = self.step // other.step if self.count > 1 else 1
        return Progression((self.start - other.start) // other.step, step, self.count)


Progressions = tuple[Progression, ...]  # one per axis


def every(shape: ir.Shape) -> Progressions:
    return tuple(Progression(0, 1, n) for n in shape)


def covering(positions: Sequence[int]) -> Progression:
    """The shortest progression through all of these (ascending) positions."""
    step = math.gcd(*(p - positions[0] for p in positions)) or 1
    return Progression(positions[0], step, (positions[-1] - positions[0]) // step + 1)


def union(a: Progression, b: Progression) -> Progression:
    return covering(sorted({a.start, a.start + a.step * (a.count > 1), a.last, b.start,
                            b.start + b.step * (b.count > 1), b.last}))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The positions that are needed


def free_axes(step: ir.Step, source: ir.Shape) -> list[bool]:
    """Axes along which a step can compute part of its results; ``source``: the shape of its first input."""
    form, rank = step.form, len(step.shape)
    match form:
        case ir.View():
            return [a < common_axes(step.shape, source) for a in range(rank)]
        case ir.Scale() | ir.Sum() | ir.Index() | ir.Product():
            return [True] * rank
        case ir.Contract(map=ir.Channels(axis)) | ir.LowRank(axis=axis):
            return [a != axis for a in range(rank)]
        case ir.Contract(map=ir.Dense()):
            return [a < rank - 1 for a in range(rank)]
        case ir.Contract(map=ir.Windows() as w) if len(w.kernel) == rank - 1:
            return [a > 0 for a in range(rank)]
    return [False] * rank


def common_axes(a: ir.Shape, b: ir.Shape) -> int:
    """How many leading axes two shapes have in common."""
    return next((k for k, (n, m) in enumerate(zip(a, b, strict=False)) if n != m), min(len(a), len(b)))


def needed_positions(step: ir.Step, places: Progressions, shapes: Sequence[ir.Shape]) -> list[Progressions]:
    """The positions of its inputs (of these ``shapes``) that a step reads for the results ``places``."""
    match step.form:
        case ir.Scale() | ir.Sum() | ir.Contract(map=ir.Channels()) | ir.LowRank():
            return [places] * len(shapes)
        case ir.Contract(map=ir.Dense()):
            return [(*places[:-1], Progression(0, 1, shapes[0][-1]))]
        case ir.Contract(map=ir.Windows() as w) if len(w.kernel) == len(places) - 1:
            reached = (
                reach(w, k, place, n) for k, (place, n) in enumerate(zip(places[1:], shapes[0][1:], strict=True))
            )
            return [(Progression(0, 1, shapes[0][0]), *reached)]
        case ir.Product(function="mul"):
            return [tuple(p if n > 1 else Progression(0, 1, 1) for p, n in zip(places, s, strict=True)) for s in shapes]
        case ir.View():
            common = common_axes(step.shape, shapes[0])
            return [(*places[:common], *every(shapes[0])[common:])]
        case ir.Product():  # [*B, M, K] @ [*B, K, P]
            inner = Progression(0, 1, shapes[0][-1])
            return [(*places[:-1], inner), (*places[:-2], inner, places[-1])]
        case ir.Index(parts=parts):
            return [positions_read(part, places) for part in parts]
    return [every(s) for s in shapes]


def taps(w: ir.Windows, axis: int, place: Progression) -> tuple[int, int, int]:
    """``(first position, step between windows, step between all positions read)``, padding included."""
    stride, dilation = place.step * w.stride[axis], w.dilation[axis]
    step = math.gcd(stride if place.count > 1 else 0, dilation if w.kernel[axis] > 1 else 0) or 1
    return place.start * w.stride[axis] - w.padding[axis][0], stride, step


def reach(w: ir.Windows, axis: int, place: Progression, length: int) -> Progression:
    """The positions of an axis of ``length`` that the windows of ``place`` read."""
    first, stride, step = taps(w, axis, place)
    last = first + (place.count - 1) * stride + (w.kernel[axis] - 1) * w.dilation[axis]
    start = first if first >= 0 else first % step
    count = (min(last, length - 1) - start) // step + 1
    if count <= 0:
        raise OnlyPadding
    return Progression(start, step if count > 1 else 1, count)


def positions_read(part: ir.Part, places: Progressions) -> Progressions:
    """The positions that a part of an `Index` reads for the results ``places``, in the order of the input's axes."""
    positions_of: dict[int, Progression] = {}
    for axis, order, place in zip(part.axes, part.order, places, strict=True):
        every_index = indexing.indices(axis)
        read = sorted({every_index[k] for k in place.positions()} - {-1})
        positions_of[order] = covering(read) if read else Progression(0, 1, 1)
    return tuple(positions_of[a] for a in range(len(positions_of)))


def demands(program: ir.Program) -> dict[int, Progressions]:
    """The positions of every value that some step needs; values that no step needs are left out."""
    base = len(program.inputs)
    positions_of = {program.output: every(program.output_shape)}
    for i in reversed(range(len(program.steps))):
        step, places = program.steps[i], positions_of.get(base + i)
        if places is None:
            continue
        free = free_axes(step, program.shape(step.inputs[0]) if step.inputs else ())
        places = tuple(p if f else Progression(0, 1, n) for p, f, n in zip(places, free, step.shape, strict=True))
        positions_of[base + i] = places
        shapes = [program.shape(v) for v in step.inputs]
        for v, need in zip(step.inputs, needed_positions(step, places, shapes), strict=True):
            before = positions_of.get(v)
            positions_of[v] = need if before is None else tuple(union(a, b) for a, b in zip(before, need, strict=True))
    return positions_of | {v: every(shape) for v, shape in enumerate(program.inputs)}


# ---------------------------------------------------------------------------------------------------------------
# The program for these positions


@dataclass
class PruningWriter:
    """Rewrites a program for the positions ``places`` of its values."""

    program: ir.Program
    places: dict[int, Progressions]

    def __post_init__(self) -> None:
        self.base = len(self.program.inputs)
        self.steps: list[ir.Step] = []
        self.number = {v: v for v in range(self.base)}  # old value → new
        self.cuts: dict[tuple[int, Progressions], int] = {}

    def write(self) -> ir.Program:
        for i, step in enumerate(self.program.steps):
            if self.base + i in self.places:
                self.number[self.base + i] = self.step(step, self.places[self.base + i])
        return replace(self.program, steps=tuple(self.steps), output=self.number[self.program.output])

    def emit(self, step: ir.Step) -> int:
        self.steps.append(step)
        return self.base + len(self.steps) - 1

    def cut(self, value: int, places: Progressions, like: ir.Step) -> int:
        """The value at these positions only."""
        have = self.places[value]
        if places == have:
            return self.number[value]
        if (value, places) not in self.cuts:
            axes = tuple(indexing.runs(p.within(h).positions()) for p, h in zip(places, have, strict=True))
            form = ir.Index((ir.Part(tuple(range(len(axes))), axes),))
            shape = tuple(p.count for p in places)
            step = ir.Step(form, (self.number[value],), shape, like.op, like.module)
            self.cuts[value, places] = self.emit(step)
        return self.cuts[value, places]

    def step(self, step: ir.Step, places: Progressions) -> int:
        shape = tuple(p.count for p in places)
        needs = needed_positions(step, places, [self.program.shape(v) for v in step.inputs])
        reads: tuple[int, ...]
        match step.form:
            case ir.Contract(map=ir.Windows() as w) if len(w.kernel) == len(places) - 1:
                (source,), have = step.inputs, self.places[step.inputs[0]]
                windows = fit_windows(w, places[1:], have[1:])
                if windows is None:
                    have, windows = needs[0], fit_windows(w, places[1:], needs[0][1:])
                assert windows is not None, "what the windows need is enough for them"
                form: ir.Form = replace(step.form, map=windows)
                reads = (self.cut(source, have, step),)
            case ir.Index(parts=parts):
                sources = [self.places[v] for v in step.inputs]
                form = ir.Index(tuple(part_of(p, places, s) for p, s in zip(parts, sources, strict=True)))
                reads = tuple(self.number[v] for v in step.inputs)
            case ir.Opaque():
                return self.emit(renumber(step, self.number))
            case _:
                form = step.form
                reads = tuple(self.cut(v, need, step) for v, need in zip(step.inputs, needs, strict=True))
        return self.emit(replace(step, form=form, inputs=reads, shape=shape))


def fit_windows(w: ir.Windows, places: Progressions, have: Progressions) -> ir.Windows | None:
    """The windows of the results ``places`` over the positions ``have``; None if some lie outside."""
    stride, padding, dilation = [], [], []
    for axis, (place, h) in enumerate(zip(places, have, strict=True)):
        first, step, _ = taps(w, axis, place)
        kernel = w.kernel[axis]
        stride.append(step // h.step if place.count > 1 else 1)
        dilation.append(w.dilation[axis] // h.step if kernel > 1 else 1)
        before = (h.start - first) // h.step
        after = (place.count - 1) * stride[-1] + (kernel - 1) * dilation[-1] + 1 - before - h.count
        if before < 0 or after < 0 or (h.start - first) % h.step:
            return None
        padding.append((before, after))
    return replace(w, stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))


def part_of(part: ir.Part, places: Progressions, have: Progressions) -> ir.Part:
    """A part of an `Index` for the results ``places``, over an input that has only the positions ``have`` left."""
    axes = []
    for axis, order, place in zip(part.axes, part.order, places, strict=True):
        h, every_index = have[order], indexing.indices(axis)
        read = [every_index[k] for k in place.positions()]
        axes.append(indexing.runs(-1 if i < 0 else (i - h.start) // h.step for i in read))
    return ir.Part(part.order, tuple(axes))


# ---------------------------------------------------------------------------------------------------------------

_pruned: Memo[ir.Program] = Memo(256)


def prune(program: ir.Program) -> ir.Program:
    """``program`` for the positions that its output needs; unchanged if that saves little."""

    def make() -> ir.Program:
        smaller = _prune_once(program)
        _pruned.put(smaller.key, smaller)  # nothing is left to prune
        return smaller

    return _pruned.get_or_make(program.key, make)


def _prune_once(program: ir.Program) -> ir.Program:
    try:
        places = demands(program)
    except OnlyPadding:
        return program
    if all(tuple(place.count for place in axes) == program.shape(v) for v, axes in places.items()):
        return program
    new = PruningWriter(program, places).write()
    before, after = (sum(forward_macs(p, i) for i in range(len(p.steps))) for p in (program, new))
    return new if after <= WORTHWHILE * before else program
