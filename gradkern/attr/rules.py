"""Rules: what an attribution method puts in place of each step's derivative, and the plain executor of it.

A gradient is the product of the steps' transposed linear maps.  A rule keeps that shape and changes maps: DeepLift
replaces slopes by secants, LRP changes weights and normalises.  `Local` is one step's map.  `pull` runs a Program
backwards through such maps in plain torch, all seeds at once; :mod:`gradkern.attr.linear` runs the same on the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ir.functions import FUNCTIONS
from ..ir.program import Contract, Program, Scale, Select, Sum, View, Windows
from ..runtime import reference

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Local:
    """A step's linear map as a rule wants it, transposed: from the cotangent of its value to those of its inputs.

    First ``after [N, *shape]`` multiplies.  Then comes the step's own transposed map (with ``weight`` in place of
    its own where given), or none at all (``through``), or that of a pool given by ``taps`` (how much of each window's
    value goes to its t-th place, ``[N, *shape]`` each), or anything (``own``).  Last, ``before`` multiplies, one
    ``[N, *in]`` or None per input.
    """

    after: Tensor | None = None
    through: bool = False
    taps: tuple[Tensor, ...] | None = None
    own: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    weight: Tensor | None = None
    before: tuple[Tensor | None, ...] = ()


class Values:
    """The values of a forward pass, ``[N, *shape]`` each; those not stored are computed from others when asked for."""

    def __init__(self, program: Program, params: Params, found: dict[int, Tensor]) -> None:
        self.program, self.params, self.found = program, params, found

    def __getitem__(self, v: int) -> Tensor:
        if v not in self.found:
            i = v - len(self.program.inputs)
            args = [self[u] for u in self.program.steps[i].inputs]
            self.found[v] = reference.forward_step(self.program, i, args, self.params)
        return self.found[v]


class Rule:
    """The gradient itself, and the base of the other rules.  ``at(i)`` is step i's map."""

    def __init__(self, program: Program, params: Params, values: Values) -> None:
        self.program, self.params, self.values = program, params, values
        self.base = len(program.inputs)

    def at(self, i: int) -> Local:
        form = self.program.steps[i].form
        if is_linear(form):
            return Local()
        if isinstance(form, Scale):
            return self.scale(i)
        if isinstance(form, Select):
            return self.select(i)
        return self.other(i)

    def scale(self, i: int) -> Local:
        return Local(after=self.slope(i), through=True)

    def select(self, i: int) -> Local:
        if self.program.steps[i].form.ties != "first":
            return self.other(i)
        x = self.pre(i)
        windows = self.program.steps[i].form.windows
        return Local(taps=tuple(t.to(x.dtype) for t in chosen(windows, x, self.post(i).shape)))

    def other(self, i: int) -> Local:
        """A step without a rule: its own derivative at the input."""
        step = self.program.steps[i]
        args = [self.values[v] for v in step.inputs]

        def own(g: Tensor) -> tuple[Tensor, ...]:
            return reference.vjp_step(self.program, i, args, self.post(i), g, self.params)

        return Local(own=own)

    # ---- what a rule sees of a step

    def pre(self, i: int) -> Tensor:
        return self.values[self.program.steps[i].inputs[0]]

    def post(self, i: int) -> Tensor:
        return self.values[self.base + i]

    def slope(self, i: int) -> Tensor:
        """The derivative of an elementwise step."""
        form, x = self.program.steps[i].form, self.pre(i)
        return FUNCTIONS[form.function].df(x, self.post(i), *form.params).to(x.dtype)


def is_linear(form: object) -> bool:
    """Does the step's own transposed map ignore the values?"""
    return isinstance(form, (Contract, View, Sum)) or type(form).__name__ == "Index"


# ---------------------------------------------------------------------------------------------------------------
# Windows, tap by tap


def tap_slices(w: Windows, t: int, counts: Sequence[int]) -> tuple[slice, ...]:
    """Where the t-th place of every window lies in the padded input, per spatial axis."""
    place = list(itertools.product(*(range(k) for k in w.kernel)))[t]
    return tuple(
        slice(j * d, j * d + (n - 1) * s + 1, s) for j, d, s, n in zip(place, w.dilation, w.stride, counts, strict=True)
    )


def padded(w: Windows, x: Tensor, value: float) -> Tensor:
    """``[..., *spatial]`` with the windows' padding."""
    sides = [p for pair in reversed(w.padding) for p in pair]
    return F.pad(x, sides, value=value) if any(sides) else x


def chosen(w: Windows, x: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """For each place of a window, where it holds the maximum (the first of equals): bool ``[N, C, *out]``."""
    counts = shape[2:]
    wide = padded(w, x, float("-inf"))
    taps = [wide[(..., *tap_slices(w, t, counts))] for t in range(w.taps)]
    top = taps[0]
    for tap in taps[1:]:
        top = torch.maximum(top, tap)
    found, free = [], torch.ones_like(top, dtype=torch.bool)
    for tap in taps:
        here = (tap == top) & free
        free = free & ~here
        found.append(here)
    return found


def scatter_taps(w: Windows, taps: Sequence[Tensor], g: Tensor, spatial: Sequence[int]) -> Tensor:
    """``g [N, S, C, *out]`` to the places of the windows: ``[N, S, C, *spatial]``."""
    sizes = [n + a + b for n, (a, b) in zip(spatial, w.padding, strict=True)]
    back = g.new_zeros(*g.shape[:3], *sizes)
    for t, share in enumerate(taps):
        back[(..., *tap_slices(w, t, g.shape[3:]))] += g * share.unsqueeze(1)
    inner = tuple(slice(a, a + n) for n, (a, _) in zip(spatial, w.padding, strict=True))
    return back[(..., *inner)]


# ---------------------------------------------------------------------------------------------------------------
# The plain executor


def pull(rule: Rule, cotangent: Tensor, wrt: Sequence[int], stop: Sequence[int] = ()) -> dict[int, Tensor]:
    """``cotangent [N, S, *out]`` back through the rule's maps: the cotangents of the values ``wrt``.

    Values of ``stop`` are not passed.  What nothing reaches is missing in the result.
    """
    program, base = rule.program, rule.base
    leads = set(wrt)
    for i, step in enumerate(program.steps):
        if any(v in leads for v in step.inputs):
            leads.add(base + i)
    held = {program.output: cotangent}
    for i in range(len(program.steps) - 1, -1, -1):
        v = base + i
        if v not in leads or v in stop or v in wrt or v not in held:
            continue
        step = program.steps[i]
        back = through(rule, i, rule.at(i), held.pop(v))
        for u, part in zip(step.inputs, back, strict=True):
            if u in leads:
                held[u] = held[u] + part if u in held else part
    return held


def through(rule: Rule, i: int, local: Local, g: Tensor) -> tuple[Tensor, ...]:
    """One step: ``g [N, S, *shape]`` to one ``[N, S, *in]`` per input."""
    step = rule.program.steps[i]
    if local.after is not None:
        g = g * local.after.unsqueeze(1)
    if local.own is not None:
        back = local.own(g)
    elif local.through:
        back = (g,)
    elif local.taps is not None:
        back = (scatter_taps(step.form.windows, local.taps, g, rule.program.shape(step.inputs[0])[1:]),)
    else:
        params = rule.params
        if local.weight is not None:
            params = {**params, step.form.weight.name: local.weight}
        back = reference.vjp_step(rule.program, i, [_Shape(rule, v, g) for v in step.inputs], g, g, params)
    if not any(b is not None for b in local.before):
        return tuple(back)
    return tuple(
        part if factor is None else part * factor.unsqueeze(1) for part, factor in zip(back, local.before, strict=True)
    )


def _Shape(rule: Rule, v: int, g: Tensor) -> Tensor:
    """A stand-in for a value of which a linear step's VJP needs the shape alone."""
    return g.new_empty(1).expand(g.shape[0], *rule.program.shape(v))
