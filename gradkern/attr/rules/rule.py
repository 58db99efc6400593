"""Rules, which replace each step's derivative for an attribution method, and the plain executor that runs them.

A gradient is the product of the steps' transposed linear maps.  A rule keeps this structure and changes the maps:
DeepLift replaces slopes by secants; LRP changes weights and normalizes.  `StepMap` is one step's map.  `pull` runs a
Program backwards through such maps in plain torch, all seeds at once, and :mod:`gradkern.attr.rules.linear` on kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir import graph
from ...ir.calls import Params
from ...ir.functions import FUNCTIONS
from ...ir.program import Contract, Form, Index, LowRank, Product, Program, Scale, Select, Sum, View, Windows
from ...runtime import reference

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class StepMap:
    """A step's transposed linear map under a rule: from the cotangent of its value to those of its inputs.

    First, the cotangent is multiplied by ``output_factor [N, *shape]``.  Then comes the step's own transposed map (with
    ``weight`` in place of the step's own, if given), or the identity (``through``), or that of a pool given by ``taps``
    (the share of each window's value that goes to its t-th place, ``[N, *shape]`` each), or any function (``custom``).
    Last, the results are multiplied by ``input_factors``, one ``[N, *in]`` or None per input.  ``reads``: the values
    whose cotangents ``custom`` gives, if they are not the step's inputs (a rule for several steps).
    """

    output_factor: Tensor | None = None
    through: bool = False
    taps: tuple[Tensor, ...] | None = None
    custom: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    weight: Tensor | None = None
    input_factors: tuple[Tensor | None, ...] = ()
    reads: tuple[int, ...] | None = None


class Values:
    """The values of a forward pass, ``[N, *shape]`` each; those not stored are computed from others when asked for."""

    def __init__(self, program: Program, params: Params, stored: dict[int, Tensor]) -> None:
        self.program, self.params, self.stored = program, params, stored

    def __getitem__(self, v: int) -> Tensor:
        if v not in self.stored:
            i = v - len(self.program.inputs)
            args = [self[u] for u in self.program.steps[i].inputs]
            self.stored[v] = reference.forward_step(self.program, i, args, self.params)
        return self.stored[v]


class Rule:
    """The gradient itself, and the base of the other rules.  ``at(i)`` is step i's map."""

    #: The function that makes a step's map, by the name of its elementwise function, or else by its form.
    table: ClassVar[Mapping[str | type, Maker]] = {}

    def __init__(self, program: Program, params: Params, values: Values) -> None:
        self.program, self.params, self.values = program, params, values
        self.base = len(program.inputs)

    @classmethod
    def maker(cls, form: Form) -> Maker | None:
        """The entry of ``table`` for a form."""
        named = isinstance(form, (Scale, LowRank, Product)) and cls.table.get(form.function)
        return named or cls.table.get(type(form))

    def at(self, i: int) -> StepMap:
        return (self.maker(self.program.steps[i].form) or use_own_derivative)(self, i)

    def values_passed(self, wrt: Sequence[int]) -> set[int]:
        """The values that cotangents pass on their way to the values ``wrt``."""
        return graph.descendants(self.program, wrt)

    # ---- what a rule sees of a step

    def form(self, i: int, kind: type[Kind]) -> Kind:
        form = self.program.steps[i].form
        assert isinstance(form, kind), f"step {i}: got {form}, expected {kind.__name__}"
        return form

    def source(self, i: int) -> int:
        """The index of a step's (first) input."""
        return self.program.steps[i].inputs[0]

    def pre(self, i: int) -> Tensor:
        return self.values[self.source(i)]

    def post(self, i: int) -> Tensor:
        return self.values[self.base + i]

    def slope(self, i: int) -> Tensor:
        """The derivative of an elementwise step."""
        form, x = self.form(i, Scale), self.pre(i)
        return FUNCTIONS[form.function].df(x, self.post(i), *form.params).to(x.dtype)


Maker = Callable[[Any, int], StepMap]  # (rule, step) to the step's map


def own_map(rule: Rule, i: int) -> StepMap:
    """The step's own transposed map."""
    return StepMap()


def pass_through(rule: Rule, i: int) -> StepMap:
    return StepMap(through=True)


def scale_by_derivative(rule: Rule, i: int) -> StepMap:
    """The derivative of an elementwise step."""
    return StepMap(output_factor=rule.slope(i), through=True)


def route_to_maximum(rule: Rule, i: int) -> StepMap:
    """A pool: everything goes to the place of the maximum."""
    form, x = rule.form(i, Select), rule.pre(i)
    if form.ties != "first":
        return use_own_derivative(rule, i)
    return StepMap(taps=tuple(t.to(x.dtype) for t in mark_maxima(form.windows, x, rule.post(i).shape)))


def use_own_derivative(rule: Rule, i: int) -> StepMap:
    """A step without a rule: its own derivative at the input."""
    args = [rule.values[v] for v in rule.program.steps[i].inputs]
    return StepMap(custom=lambda g: reference.vjp_step(rule.program, i, args, rule.post(i), g, rule.params))


Rule.table = {
    Contract: own_map,
    View: own_map,
    Sum: own_map,
    Index: own_map,
    Scale: scale_by_derivative,
    Select: route_to_maximum,
}


def is_linear(form: Form) -> bool:
    """Whether the step's own transposed map ignores the values."""
    return isinstance(form, (Contract, View, Sum, Index))


# ---------------------------------------------------------------------------------------------------------------
# Windows, tap by tap


def tap_slices(w: Windows, t: int, counts: Sequence[int]) -> tuple[slice, ...]:
    """The t-th place of every window in the padded input, as a slice per spatial axis."""
    place = list(itertools.product(*(range(k) for k in w.kernel)))[t]
    return tuple(
        slice(j * d, j * d + (n - 1) * s + 1, s) for j, d, s, n in zip(place, w.dilation, w.stride, counts, strict=True)
    )


def at_place(w: Windows, t: int, wide: Tensor, counts: Sequence[int]) -> Tensor:
    """The t-th place of every window in a padded value, as a view."""
    index: Any = (..., *tap_slices(w, t, counts))
    return wide[index]


def pad_for_windows(w: Windows, x: Tensor, value: float) -> Tensor:
    """``[..., *spatial]`` with the windows' padding."""
    sides = [p for pair in reversed(w.padding) for p in pair]
    return F.pad(x, sides, value=value) if any(sides) else x


def mark_maxima(w: Windows, x: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """For each place of a window, whether it holds the maximum (the first of equals): bool ``[N, C, *out]``."""
    counts = shape[2:]
    wide = pad_for_windows(w, x, float("-inf"))
    taps = [at_place(w, t, wide, counts) for t in range(w.taps)]
    top = taps[0]
    for tap in taps[1:]:
        top = torch.maximum(top, tap)
    places, free = [], torch.ones_like(top, dtype=torch.bool)
    for tap in taps:
        won = (tap == top) & free
        free = free & ~won
        places.append(won)
    return places


def scatter_taps(w: Windows, taps: Sequence[Tensor], g: Tensor, spatial: Sequence[int]) -> Tensor:
    """``g [N, S, C, *out]`` to the places of the windows: ``[N, S, C, *spatial]``."""
    sizes = [n + a + b for n, (a, b) in zip(spatial, w.padding, strict=True)]
    back = g.new_zeros(*g.shape[:3], *sizes)
    for t, share in enumerate(taps):
        at_place(w, t, back, g.shape[3:]).add_(g * share.unsqueeze(1))
    inner: Any = (..., *(slice(a, a + n) for n, (a, _) in zip(spatial, w.padding, strict=True)))
    return back[inner]


# ---------------------------------------------------------------------------------------------------------------
# The plain executor


def pull(rule: Rule, cotangent: Tensor, wrt: Sequence[int]) -> dict[int, Tensor]:
    """``cotangent [N, S, *out]`` back through the rule's maps: the cotangents of the values ``wrt``.

    Values that no cotangent reaches are missing in the result.
    """
    program, base = rule.program, rule.base
    leads = rule.values_passed(wrt)
    cotangents = {program.output: cotangent}
    for i in range(len(program.steps) - 1, -1, -1):
        v = base + i
        if v not in leads or v in wrt or v not in cotangents:
            continue
        step_map = rule.at(i)
        back = transposed_step(rule, i, step_map, cotangents.pop(v))
        for u, part in zip(step_map.reads or program.steps[i].inputs, back, strict=True):
            if u in leads:
                cotangents[u] = cotangents[u] + part if u in cotangents else part
    return cotangents


def transposed_step(rule: Rule, i: int, step_map: StepMap, g: Tensor) -> tuple[Tensor, ...]:
    """One step: ``g [N, S, *shape]`` to one ``[N, S, *in]`` per input."""
    inputs = rule.program.steps[i].inputs
    back: Sequence[Tensor]
    if step_map.output_factor is not None:
        g = g * step_map.output_factor.unsqueeze(1)
    if step_map.custom is not None:
        back = step_map.custom(g)
    elif step_map.through:
        back = (g,)
    elif step_map.taps is not None:
        back = (scatter_taps(rule.form(i, Select).windows, step_map.taps, g, rule.program.shape(inputs[0])[1:]),)
    else:
        params = rule.params
        if step_map.weight is not None:
            weight = rule.form(i, Contract).weight
            assert weight is not None
            params = {**params, weight.name: step_map.weight}
        # a linear step's VJP needs only the shapes of its inputs
        shapes = [g.new_empty(1).expand(g.shape[0], *rule.program.shape(v)) for v in inputs]
        back = reference.vjp_step(rule.program, i, shapes, g, g, params)
    if not any(b is not None for b in step_map.input_factors):
        return tuple(back)
    return tuple(
        part if factor is None else part * factor.unsqueeze(1)
        for part, factor in zip(back, step_map.input_factors, strict=True)
    )
