"""Rules on the kernels: a Program whose derivatives a rule has replaced is linear, and its transpose is one chain.

`build` writes the rule's maps as a Program of linear forms: contractions keep their weight, every elementwise
derivative becomes a `Given` slope, and a pool becomes one gather and slope per place of its window.  Consecutive slopes
are multiplied, and those at either end are left to the caller.  The kernels then need no forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...codegen.support import unsupported_reason
from ...ir.calls import Params
from ...ir.program import Contract, Given, Param, Positions, Program, Scale, Select, Shape, Step, Sum, View, Windows
from ...passes.forward_mode import MOST_TAPS
from ...runtime import executor, reference
from ...util.memo import Memo
from .rule import Rule, StepMap, Values, at_place, is_linear, pad_for_windows, pull, tap_slices

Ref = tuple[str, int, int]  # ("output" | "input", step, which input), or ("tap", step, place)


@dataclass(frozen=True)
class FactorProduct:
    """One external value of the linear Program: a product of factors, each a tensor of a `StepMap`."""

    shape: Shape
    refs: tuple[Ref, ...]
    tap: tuple[int, int] | None = None  # (step, place): the share of a pool's place, times `refs` at that place


@dataclass(frozen=True)
class Linear:
    """A rule as a Program: its inputs are the network's, then the products.  ``outer`` multiplies at the output."""

    program: Program
    products: tuple[FactorProduct, ...]
    outer: tuple[Ref, ...]
    weights: tuple[tuple[str, int], ...]  # name in the linear Program → step whose rule changes the weight


Structure = tuple[tuple[Any, ...], ...]


def structure_of(step_maps: Sequence[StepMap]) -> Structure | None:
    """The facts about a rule's maps that `build` needs; None if one is not made of slopes and contractions."""
    if any(x.custom is not None or len(x.taps or ()) > MOST_TAPS for x in step_maps):
        return None

    def shape(x: StepMap) -> tuple[Any, ...]:
        before = tuple(b is not None for b in x.input_factors)
        return x.output_factor is not None, x.through, len(x.taps or ()), x.weight is not None, before

    return tuple(map(shape, step_maps))


class _LinearWriter:
    """Writes the linear Program with symbolic indices: inputs keep theirs; products and steps have separate ones."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps: list[tuple[Any, list[tuple[str, int]], Shape, Step]] = []
        self.products: list[FactorProduct] = []
        self.weights: list[tuple[str, int]] = []
        # by value of the network: the node that stands for it here, and the factors not yet multiplied into that node
        self.at: dict[int, tuple[tuple[str, int], tuple[Ref, ...]]] = {
            v: (("in", v), ()) for v in range(len(program.inputs))
        }

    def emit(self, form: Any, reads: list[tuple[str, int]], shape: Shape, of: Step) -> tuple[str, int]:
        self.steps.append((form, reads, shape, of))
        return ("step", len(self.steps) - 1)

    def times(self, node: tuple[str, int], factors: FactorProduct, of: Step) -> tuple[str, int]:
        self.products.append(factors)
        return self.emit(Given(), [node, ("product", len(self.products) - 1)], factors.shape, of)

    def pool(self, i: int, step: Step, windows: Windows, places: int) -> tuple[str, int]:
        node, refs = self.at[step.inputs[0]]
        spatial = self.program.shape(step.inputs[0])[1:]
        parts = []
        for t in range(places):
            gather = Contract(tap_positions(windows, t, spatial, step.shape[1:]))
            tap = self.emit(gather, [node], step.shape, step)
            parts.append(self.times(tap, FactorProduct(step.shape, refs, (i, t)), step))
        return parts[0] if len(parts) == 1 else self.emit(Sum(), parts, step.shape, step)

    def step(self, i: int, step: Step, shape: tuple[Any, ...]) -> None:
        after, through, places, weight, before = shape
        v = len(self.program.inputs) + i
        rest: tuple[Ref, ...] = (("output", i, 0),) if after else ()
        node, refs = self.at[step.inputs[0]]
        if places:
            assert isinstance(step.form, Select)
            self.at[v] = (self.pool(i, step, step.form.windows, places), rest)
        elif through:
            self.at[v] = (node, refs + rest)
        elif isinstance(step.form, View):
            self.at[v] = (self.emit(step.form, [node], step.shape, step), refs + rest)
        else:
            reads = []
            for k, u in enumerate(step.inputs):
                node, refs = self.at[u]
                if k < len(before) and before[k]:
                    refs = (*refs, ("input", i, k))
                reads.append(self.times(node, FactorProduct(self.program.shape(u), refs), step) if refs else node)
            self.at[v] = (self.emit(self.weighted(i, step.form, weight), reads, step.shape, step), rest)

    def weighted(self, i: int, form: Any, changed: bool) -> Any:
        """The contraction without its bias, and with the rule's weight under a new name."""
        if not isinstance(form, Contract):
            return form
        if changed:
            name = f"rule#{i}"
            self.weights.append((name, i))
            return Contract(form.map, Param(name))
        return replace(form, bias=None)

    def finish(self) -> Linear | None:
        node, outer = self.at[self.program.output]
        if node[0] != "step":
            return None
        n, s = len(self.program.inputs), len(self.products)
        first = {"in": 0, "product": n, "step": n + s}
        steps = tuple(
            Step(form, tuple(first[kind] + k for kind, k in reads), shape, of.op, of.module)
            for form, reads, shape, of in self.steps
        )
        inputs = (*self.program.inputs, *(factors.shape for factors in self.products))
        return Linear(Program(inputs, steps, n + s + node[1]), tuple(self.products), outer, tuple(self.weights))


def tap_positions(w: Windows, t: int, spatial: Shape, counts: Shape) -> Positions:
    """The constant map that reads the t-th place of every window (zero in the padding)."""
    axes = []
    for cut, n, (before, _) in zip(tap_slices(w, t, counts), spatial, w.padding, strict=True):
        places = [p - before for p in range(cut.start, cut.stop, cut.step)]
        axes.append(tuple((p, (1.0,)) if 0 <= p < n else (0, (0.0,)) for p in places))
    return Positions(tuple(axes))


def build(program: Program, structure: Structure) -> Linear | None:
    """The linear Program of a rule; None if it would have no steps."""
    writer = _LinearWriter(program)
    for i, step in enumerate(program.steps):
        writer.step(i, step, structure[i])
    return writer.finish()


# ---------------------------------------------------------------------------------------------------------------
# Remembered

_linear: Memo[Linear | None] = Memo(64)


def linear_of(program: Program, structure: Structure) -> Linear | None:
    """`build`, remembered; None unless kernels run every step of the result."""

    def make() -> Linear | None:
        linear = build(program, structure)
        if linear is None or any(unsupported_reason(linear.program, s) is not None for s in linear.program.steps):
            return None
        return linear

    return _linear.get_or_make((program.key, structure), make)


# ---------------------------------------------------------------------------------------------------------------
# Running


def product(refs: Sequence[Ref], step_maps: Sequence[StepMap], shape: Shape) -> Tensor | None:
    """The factors multiplied, ``[N, *shape]``."""
    total = None
    for kind, i, k in refs:
        factor = step_maps[i].output_factor if kind == "output" else step_maps[i].input_factors[k]
        assert factor is not None
        factor = factor.reshape(factor.shape[0], *shape)
        total = factor if total is None else total * factor
    return total


def product_tensor(factors: FactorProduct, program: Program, step_maps: Sequence[StepMap]) -> Tensor:
    """The values of one product, ``[N, *shape]``, as one contiguous tensor."""
    if factors.tap is None:
        factor = product(factors.refs, step_maps, factors.shape)
        assert factor is not None
        return factor.contiguous()
    i, t = factors.tap
    step, taps = program.steps[i], step_maps[i].taps
    assert taps is not None
    assert isinstance(step.form, Select)
    share, windows = taps[t], step.form.windows
    factor = product(factors.refs, step_maps, program.shape(step.inputs[0]))
    if factor is not None:
        share = share * at_place(windows, t, pad_for_windows(windows, factor, 0.0), factors.shape[1:])
    return share.contiguous()


def run_transposed(
    linear: Linear,
    program: Program,
    params: Params,
    step_maps: Sequence[StepMap],
    inputs: Sequence[Tensor],
    wrt: Sequence[int],
    targets: Tensor,
    cotangent: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The rule's maps, transposed, on the kernels: one ``[N, S, *in]`` per input of ``wrt``.

    Seeds are one-hot at ``targets`` (int64 ``[S]`` or ``[N, S]``), or ``cotangent [N, S, C]`` if it is given.
    """
    lp, n, seeds = linear.program, inputs[0].shape[0], targets.shape[-1]
    outer = product(linear.outer, step_maps, (lp.outputs,)) if linear.outer else None  # [N, C]
    if cotangent is not None and outer is not None:
        cotangent = cotangent * outer.unsqueeze(1)
    if not executor.plan_for(lp, seeds, inputs[0].dtype, inputs[0].device).native:
        raise executor.KernelsUnavailable("no step of the rule has a kernel")
    rule_weights = {name: w for name, i in linear.weights if (w := step_maps[i].weight) is not None}
    results = tuple(inputs[w].new_empty(n, seeds, *inputs[w].shape[1:]) for w in wrt)
    values = [*inputs, *(product_tensor(s, program, step_maps) for s in linear.products)]
    executor.transpose(
        lp, {**params, **rule_weights} if rule_weights else params, values, targets, tuple(wrt), results, cotangent
    )
    if cotangent is None and outer is not None:
        scale = outer[:, targets] if targets.dim() == 1 else outer.gather(1, targets)
        for r in results:
            r.mul_(scale.view(n, seeds, *(1,) * (r.dim() - 2)))
    return results


def rule_values(program: Program, params: Params, inputs: Sequence[Tensor], wanted: Sequence[int]) -> Values:
    """The wanted values of a forward pass, by the kernels if they may run; `Values` computes missing ones."""
    values = dict(enumerate(inputs)) | executor.forward_values(program, params, inputs, wanted)
    return Values(program, params, values)


def values_needed(program: Program, outputs_too: bool, output: bool = False) -> list[int]:
    """The values that a rule needs and that are not cheap to compute from others.

    ``outputs_too``: include the results of linear steps (LRP); otherwise only the inputs of the other steps.
    ``output``: include what the network's output is computed from by linear steps alone.
    """
    base = len(program.inputs)
    wanted = set()
    if output:
        v = program.output
        while v >= base and is_linear(program.steps[v - base].form) and len(program.steps[v - base].inputs) == 1:
            v = program.steps[v - base].inputs[0]
        wanted.add(v)
    for i, step in enumerate(program.steps):
        if is_linear(step.form) and not isinstance(step.form, View):
            if outputs_too:
                wanted.add(base + i)
        elif not is_linear(step.form):
            wanted.update(step.inputs)

    def source(v: int) -> int:
        """Elementwise functions, views and pools of a stored value are computed from it."""
        while v >= base and isinstance(program.steps[v - base].form, (Scale, View, Select)):
            v = program.steps[v - base].inputs[0]
        return v

    return sorted({source(v) for v in wanted} - set(range(base)))


def rule_multipliers(
    rule: Rule, inputs: Sequence[Tensor], targets: Tensor, wrt: Sequence[int], *, native: bool
) -> tuple[Tensor, ...]:
    """The rule's multipliers of the outputs ``targets`` for the inputs ``wrt``: one ``[N, S, *in]`` each.

    Kernels run it if every map is made of slopes and contractions, except in a tail of the network (a softmax).
    """
    program = rule.program
    step_maps: list[StepMap] = [rule.at(i) for i in range(len(program.steps))]
    tail_rule = _PrecomputedRule(rule, step_maps)
    head, cotangent = _head(program, step_maps) if native else None, None
    if head is not None:
        if head is not program:
            seeds = reference.one_hot(program, inputs[0], targets)
            cotangents = pull(tail_rule, seeds, [head.output])
            cotangent = cotangents.get(head.output, seeds.new_zeros(*seeds.shape[:2], head.outputs)).flatten(2)
        structure = structure_of(step_maps[: len(head.steps)])
        linear = None if structure is None else linear_of(head, structure)
        if linear is not None:
            with suppress(executor.KernelsUnavailable):
                return run_transposed(linear, head, rule.params, step_maps, inputs, wrt, targets, cotangent)
    cotangents = pull(tail_rule, reference.one_hot(program, inputs[0], targets), wrt)
    shapes = [(inputs[0].shape[0], targets.shape[-1], *program.inputs[w]) for w in wrt]
    return tuple(cotangents[w] if w in cotangents else inputs[w].new_zeros(s) for w, s in zip(wrt, shapes, strict=True))


class _PrecomputedRule(Rule):
    """A rule whose maps are known already."""

    def __init__(self, rule: Rule, step_maps: Sequence[StepMap]) -> None:
        super().__init__(rule.program, rule.params, rule.values)
        self.rule, self.step_maps = rule, step_maps

    def values_passed(self, wrt: Sequence[int]) -> set[int]:
        return self.rule.values_passed(wrt)

    def at(self, i: int) -> StepMap:
        return self.step_maps[i]


def _head(program: Program, step_maps: Sequence[StepMap]) -> Program | None:
    """The Program without its tail of steps that the kernels cannot run; None if too little remains."""
    if any(x.reads is not None for x in step_maps):
        return None
    base = len(program.inputs)
    steps, output = list(program.steps), program.output
    while steps and any(x.custom is not None for x in step_maps[: len(steps)]):
        last = steps[-1]
        if output != base + len(steps) - 1 or len(last.inputs) != 1:
            return None
        steps.pop()
        output = last.inputs[0]
        if any(output in s.inputs for s in steps):
            return None
    if not steps or output < base:
        return None
    return program if len(steps) == len(program.steps) else replace(program, steps=tuple(steps), output=output)
