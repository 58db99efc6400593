"""Random Programs for property-based tests: every form, every geometry, any DAG.

`programs` is a hypothesis strategy.  A network grows step by step from values that already exist, so residuals,
fan-out, several inputs and values that are read twice all come up; what does not lead to the output is cut away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from gradkern.frontend.lowerings.pool import average_rows, window_count
from gradkern.ir.program import (
    Call,
    Channels,
    Contract,
    Dense,
    Form,
    Opaque,
    Param,
    Positions,
    Program,
    Scale,
    Select,
    Shape,
    Step,
    Sum,
    Value,
    View,
    Windows,
)
from tests.support.random_forms import Forms

MOST = 400  # numbers in one value of a sample
FUNCTIONS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("leaky_relu", (0.2,)),
    ("elu", (0.7, 1.1, 0.9)),
    ("tanh", ()),
    ("sigmoid", ()),
    ("affine", (-1.5, 0.25)),
    ("gelu", ()),
    ("gelu_tanh", ()),
    ("silu", ()),
    ("mish", ()),
    ("softplus", (1.5, 20.0)),
    ("hardtanh", (-0.7, 0.9)),
    ("clamp", (-0.8, 0.6)),
    ("hardswish", ()),
    ("hardsigmoid", ()),
    ("negative_part", ()),
    ("erf", ()),
    ("sin", ()),
    ("cos", ()),
    ("abs", ()),
)


@dataclass(frozen=True)
class Network:
    """A Program and the shapes of its parameters."""

    program: Program
    shapes: tuple[tuple[str, Shape], ...]

    def params(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {
            name: (torch.randn(s, generator=g, dtype=torch.float64) / max(1.0, math.prod(s[1:])) ** 0.5).to(dtype)
            for name, s in self.shapes
        }

    def inputs(self, n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(n, *s, generator=g, dtype=torch.float64).to(dtype).contiguous() for s in self.program.inputs
        )


class Grower(Forms):
    """Grows a network; ``pick(low, high)`` makes every choice."""

    def __init__(self, pick: Callable[[int, int], int], foreign: bool, outside: bool = False) -> None:
        self.pick, self.foreign = pick, foreign
        self.outside = outside  # pools may have windows wholly in the padding, whose results are infinite
        self.inputs: list[Shape] = []
        self.steps: list[Step] = []
        self.params: list[tuple[str, Shape]] = []
        self.ties: set[int] = set()  # values with equal numbers in several places: a maximum of them is a coin toss

    def choose(self, options: Sequence):
        return options[self.pick(0, len(options) - 1)]

    def shape(self, v: int) -> Shape:
        return self.inputs[v] if v < len(self.inputs) else self.steps[v - len(self.inputs)].shape

    def param(self, *shape: int) -> Param:
        name = f"p{len(self.params)}"
        self.params.append((name, shape))
        return Param(name)

    def emit(self, form: Form, reads: tuple[int, ...], shape: Shape, ties: bool = False) -> None:
        self.steps.append(Step(form, reads, tuple(shape)))
        v = len(self.inputs) + len(self.steps) - 1
        if ties or any(r in self.ties for r in reads):
            self.ties.add(v)

    # ---- growing

    def grow(self, length: int) -> Network:
        for _ in range(1 + (self.pick(0, 5) == 0)):
            self.inputs.append(self.input_shape())
        for _ in range(length):
            self.step()
        if self.pick(0, 2) and len(self.shape(self.last)) > 1:
            self.emit(View(), (self.last,), (math.prod(self.shape(self.last)),))
        if len(self.shape(self.last)) == 1 and self.pick(0, 2):
            self.dense(self.last)
        return self.cut()

    @property
    def last(self) -> int:
        return len(self.inputs) + len(self.steps) - 1

    def input_shape(self) -> Shape:
        match self.pick(0, 3):
            case 0:
                return (self.pick(1, 20),)
            case 1 | 2:
                return (self.pick(1, 5), self.pick(1, 24))
        return (self.pick(1, 4), self.pick(1, 8), self.pick(1, 9))

    def step(self) -> None:
        v = self.last if self.pick(0, 3) else self.pick(0, self.last)
        kinds = [self.relu, self.relu, self.scale, self.view, self.sum, self.channels]
        kinds += [self.copy, self.join, self.product, self.low_rank]
        if len(self.shape(v)) > 1:
            kinds += [self.conv, self.conv, self.conv, self.pool, self.pool, self.depthwise, self.average]
            kinds += [self.permute, self.permute, self.dense, self.matmul]
        else:
            kinds += [self.dense, self.dense]
        if self.foreign:
            kinds += [self.opaque, self.strange]
        self.choose(kinds)(v)

    def cut(self) -> Network:
        """Only what leads to the output; numbers closed up."""
        base, output = len(self.inputs), self.last
        wanted = {output}
        for i in reversed(range(len(self.steps))):
            if base + i in wanted:
                wanted |= set(self.steps[i].inputs)
        number = {v: v for v in range(base)}
        steps = []
        for i, step in enumerate(self.steps):
            if base + i in wanted:
                number[base + i] = base + len(steps)
                form = step.form
                if isinstance(form, Opaque):
                    form = replace(form, call=renumbered(form.call, number))
                steps.append(replace(step, form=form, inputs=tuple(number[v] for v in step.inputs)))
        program = Program(tuple(self.inputs), tuple(steps), number[output])
        return Network(program, tuple(self.params))

    # ---- steps

    def relu(self, v: int) -> None:
        self.emit(Scale("relu"), (v,), self.shape(v))

    def scale(self, v: int) -> None:
        name, params = self.choose(FUNCTIONS)
        self.emit(Scale(name, params), (v,), self.shape(v))

    def view(self, v: int) -> None:
        size = math.prod(self.shape(v))
        shapes: list[Shape] = [(size,)]
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        a = self.choose(divisors)
        shapes.append((a, size // a))
        b = self.choose([d for d in divisors if (size // a) % d == 0])
        shapes.append((a, b, size // a // b))
        self.emit(View(), (v,), self.choose(shapes))

    def sum(self, v: int) -> None:
        like = [u for u in range(self.last + 1) if self.shape(u) == self.shape(v)]
        reads = (v, *(self.choose(like) for _ in range(self.pick(1, 2))))
        self.emit(Sum(), reads, self.shape(v))

    def channels(self, v: int) -> None:
        axis = self.choose([0, len(self.shape(v)) - 1])
        c = self.shape(v)[axis]
        which = self.pick(0, 4)
        w = self.param(c) if which != 1 else None
        b = self.param(c) if which != 2 else None
        self.emit(Contract(Channels(axis), w, b), (v,), self.shape(v))

    def dense(self, v: int) -> None:
        i = self.shape(v)[-1]
        o = self.choose([1, 2, 3, 5, 8, 15, 16, 17, 33])
        form = Contract(Dense(), self.param(o, i), self.param(o) if self.pick(0, 3) else None)
        self.emit(form, (v,), (*self.shape(v)[:-1], o))

    def windows(self, v: int, groups: int) -> tuple[Windows, Shape] | None:
        axes = [self.axis(n) for n in self.shape(v)[1:]]
        out = tuple((n + a + b - d * (k - 1) - 1) // s + 1 for n, (k, s, (a, b), d) in self.zipped(v, axes))
        if any(o < 1 for o in out) or math.prod(out) > MOST:
            return None
        kernel, stride, padding, dilation = zip(*axes, strict=True)
        return Windows(kernel, stride, padding, dilation, groups), out

    def zipped(self, v: int, axes):
        return zip(self.shape(v)[1:], axes, strict=True)

    def axis(self, n: int):
        k, d = self.pick(1, min(5, n + 2)), self.choose([1, 1, 1, 2, 3])
        before = self.pick(0, 3) if self.pick(0, 1) else 0
        after = before if self.pick(0, 2) else self.pick(0, 3)
        need = d * (k - 1) + 1 - n - before - after  # what is missing for one window
        return k, self.choose([1, 1, 1, 2, 3]), (before, after + max(need, 0)), d

    def conv(self, v: int) -> None:
        c = self.shape(v)[0]
        groups = self.choose([g for g in range(1, c + 1) if c % g == 0]) if self.pick(0, 2) == 0 else 1
        found = self.windows(v, groups)
        if found is None:
            return
        w, out = found
        o = groups * self.choose([1, 2, 3, 4, 9] if groups > 1 else [1, 2, 4, 5, 16, 17, 20])
        if o * math.prod(out) > 2 * MOST:
            o = groups
        weight = self.param(o, c // groups, *w.kernel)
        self.emit(Contract(w, weight, self.param(o) if self.pick(0, 2) else None), (v,), (o, *out))

    def depthwise(self, v: int) -> None:
        c = self.shape(v)[0]
        found = self.windows(v, c)
        if found is not None:
            w, out = found
            o = c * self.choose([1, 1, 2, 3])
            weight = self.param(o, 1, *w.kernel)
            self.emit(Contract(w, weight, self.param(o) if self.pick(0, 1) else None), (v,), (o, *out))

    def pool(self, v: int) -> None:
        if v in self.ties:
            return
        ceil, outside = self.pick(0, 2) == 0, self.outside and self.pick(0, 19) == 0
        axes, out = [], []
        for n in self.shape(v)[1:]:
            if outside and not axes:  # the only window along this axis has a tap before the input, and one behind it
                axes.append((2, 1, (1, 1), n + 1))
                out.append(1)
                continue
            k, d = self.pick(1, min(4, n)), self.choose([1, 1, 1, 2])
            d = d if d * (k - 1) + 1 <= n else 1
            s, p = self.choose([k, k, 1, 2, 3]), self.choose([0, 0, k // 2])
            count = window_count(n, k, s, p, d, ceil)
            axes.append((k, s, (p, max(p, (count - 1) * s + d * (k - 1) + 1 - n - p)), d))
            out.append(count)
        if any(o < 1 for o in out):
            return
        overlap = any(s < d * (k - 1) + 1 for k, s, _, d in axes)
        kernel, stride, padding, dilation = zip(*axes, strict=True)
        self.emit(Select(Windows(kernel, stride, padding, dilation)), (v,), (self.shape(v)[0], *out), ties=overlap)
        if outside:  # minus infinity
            self.emit(Scale("relu"), (self.last,), self.shape(self.last), ties=True)

    def average(self, v: int) -> None:
        axes = []
        for n in self.shape(v)[1:]:
            k = self.pick(1, n)
            p = self.choose([0, 0, k // 2])
            if window_count(n, k, 1, p, 1, False) < 1:
                return
            axes.append(average_rows(n, k, self.choose([1, 2, k]), p, bool(self.pick(0, 1)), bool(self.pick(0, 1))))
        out = (self.shape(v)[0], *(len(rows) for rows in axes))
        if math.prod(out) <= 2 * MOST:
            self.emit(Contract(Positions(tuple(axes))), (v,), out, ties=True)

    def opaque(self, v: int) -> None:
        call = self.choose(
            [
                Call("aten.cumsum.default", (Value(v), 1)),
                Call("aten.sin.default", (Value(v),)),
                Call("aten.mul.Tensor", (Value(v), Value(v))),
            ]
        )
        self.emit(Opaque(call, "for the test"), (v,), self.shape(v))

    def strange(self, v: int) -> None:
        """A form that the reference alone knows: a maximum that ties share."""
        shape = self.shape(v)
        if len(shape) == 2 and v not in self.ties:
            self.emit(Select(Windows((shape[1],), (1,), ((0, 0),), (1,)), "split"), (v,), (shape[0], 1))
        else:
            self.emit(Scale("power", (2.0,)), (v,), shape)


def renumbered(call: Call, number: dict[int, int]) -> Call:
    return replace(call, args=tuple(Value(number[a.id]) if isinstance(a, Value) else a for a in call.args))


@st.composite
def programs(draw, foreign: bool = False, longest: int = 9) -> Network:
    """Networks of up to ``longest`` steps and a head; ``foreign`` adds steps that no kernel knows."""

    def pick(low: int, high: int) -> int:
        return draw(st.integers(low, high)) if high > low else low

    return Grower(pick, foreign).grow(pick(1, longest))
