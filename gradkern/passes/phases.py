"""Transposed convolutions without the zeros between the elements of their input.

They are lowered as an `Index` that inserts zeros and a convolution with stride 1, so only one in stride² products is
not by zero.  Each residue of an output position modulo the stride (its phase) has its own taps.  Here all phases become
the channels of one convolution over the elements themselves, and an `Index` interleaves its results.  All values stay
the same and keep their numbers, except for the one with the inserted zeros, which nothing else reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import product

from ..ir import indexing
from ..ir.program import Call, Contract, Derived, Index, Param, Part, Program, Shape, Step, Windows


@dataclass(frozen=True)
class Axis:
    """The phases along one axis: window ``first[a] + i``, of ``taps`` elements, gives the output ``stride · i + a``."""

    stride: int
    taps: int
    padding: tuple[int, int]
    count: int  # the number of windows
    residue: tuple[int, ...]  # by phase: its first tap, in the kernel of the convolution over zeros
    first: tuple[int, ...]

    @classmethod
    def of(cls, n: int, stride: int, kernel: int, before: int, outputs: int) -> Axis:
        """For ``n`` elements and a kernel with ``before`` zeros of padding."""
        residue = tuple((before - a) % stride for a in range(stride))
        starts = [(a - before + r) // stride for a, r in enumerate(residue)]  # the element of the first tap, for i = 0
        taps, low = -(-kernel // stride), before // stride
        last = max(start + (outputs - 1 - a) // stride for a, start in enumerate(starts) if a < outputs)
        high = max(0, last + taps - n)
        return cls(stride, taps, (low, high), n + low + high - taps + 1, residue, tuple(s + low for s in starts))

    def reads(self, phase: int, outputs: int) -> list[int]:
        """The window of each output of a phase, -1 for those of others."""
        return [self.first[phase] + y // self.stride if y % self.stride == phase else -1 for y in range(outputs)]


def strides_of(form: Index, source: Shape) -> Shape | None:
    """The distances between elements if an `Index` only inserts zeros between them; otherwise None."""
    part = form.parts[0]
    if len(form.parts) > 1 or part.order != tuple(range(len(source))) or len(source) < 2:
        return None
    strides = []
    for axis, n in zip(part.axes, source, strict=True):
        reads = indexing.indices(axis)
        stride = next((k for k in range(1, len(reads)) if reads[k] >= 0), 1) if n > 1 else 1
        places = [k // stride if k % stride == 0 and k // stride < n else -1 for k in range(len(reads))]
        if reads != places or len(reads) <= (n - 1) * stride:
            return None
        strides.append(stride)
    return None if strides[0] != 1 or math.prod(strides) == 1 else tuple(strides[1:])


def without_zeros(program: Program, kept: Collection[int]) -> Program:
    """``program`` with its transposed convolutions computed by phases, except where a value is in ``kept``.

    The result's derived tensors are only those that are new.
    """
    base, steps = len(program.inputs), list(program.steps)
    derived: list[Derived] = []
    for i, step in enumerate(program.steps):
        readers = program.consumers[base + i]
        if not isinstance(step.form, Index) or len(readers) != 1 or base + i in kept:
            continue
        form, source = program.steps[readers[0]].form, program.shape(step.inputs[0])
        strides = strides_of(step.form, source)
        if strides is None or not (isinstance(form, Contract) and isinstance(form.map, Windows)):
            continue
        w = form.map
        if w.groups > 1 or set(w.stride) != {1} or set(w.dilation) != {1} or len(w.kernel) != len(strides):
            continue
        steps[i], steps[readers[0]], weights = by_phases(program, i, readers[0], strides)
        derived += weights
    return replace(program, steps=tuple(steps), derived=tuple({d.name: d for d in derived}.values()))


def by_phases(program: Program, i: int, j: int, strides: Shape) -> tuple[Step, Step, list[Derived]]:
    """The convolution in place of the `Index` step ``i``, and the `Index` in place of the convolution ``j``."""
    step, read, source = program.steps[j], program.steps[i].inputs, program.shape(program.steps[i].inputs[0])
    form, out = step.form, step.shape
    assert isinstance(form, Contract) and isinstance(form.map, Windows) and form.weight is not None
    w, dims = form.map, len(strides)
    axes = [
        Axis.of(n, s, k, before, m)
        for n, s, k, (before, _), m in zip(source[1:], strides, w.kernel, w.padding, out[1:], strict=True)
    ]
    taps, phases = tuple(axis.taps for axis in axes), math.prod(strides)
    more = [pad for s, t, k in reversed(list(zip(strides, taps, w.kernel, strict=True))) for pad in (0, s * t - k)]
    call = Call("aten.constant_pad_nd.default", (form.weight, tuple(more)))
    split = [size for t, s in zip(taps, strides, strict=True) for size in (t, s)]
    call = Call("aten.reshape.default", (call, (out[0], source[0], *split)))
    order = (*range(3, 3 + 2 * dims, 2), 0, 1, *range(2, 2 + 2 * dims, 2))
    call = Call("aten.permute.default", (call, order))
    call = Call("aten.reshape.default", (call, (phases * out[0], source[0], *taps)))
    name = f"{form.weight.name}/{'×'.join(map(str, strides))}"
    derived, bias = [Derived(name, call)], None
    if form.bias is not None:
        bias = Param(f"{form.bias.name}·{phases}")
        derived.append(Derived(bias.name, Call("aten.repeat.default", (form.bias, (phases,)))))
    windows = Windows(taps, (1,) * dims, tuple(axis.padding for axis in axes), (1,) * dims)
    parts = []
    for phase in product(*map(range, strides)):
        number = 0  # the phase's place among the channels, which are in the order of residues
        for axis, a in zip(axes, phase, strict=True):
            number = number * axis.stride + axis.residue[a]
        spatial = (indexing.runs(axis.reads(a, m)) for axis, a, m in zip(axes, phase, out[1:], strict=True))
        channels = indexing.runs(range(number * out[0], (number + 1) * out[0]))
        parts.append(Part(tuple(range(1 + dims)), (channels, *spatial)))
    shape = (phases * out[0], *(axis.count for axis in axes))
    convolution = Step(Contract(windows, Param(name), bias), read, shape, step.op, step.module)
    value = len(program.inputs) + i
    return convolution, replace(step, form=Index(tuple(parts)), inputs=(value,) * phases), derived
