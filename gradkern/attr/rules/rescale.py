"""DeepLift's rules on the Program: the rescale rule, and complete rules for steps that are not elementwise.

A rule is complete if the attributions add up to the change of the output.  For ``y = relu(x)``, ``x = 2`` and the
reference -1, the multiplier is Δy / Δx = 2 / 3 (the slope is 1), and 2 / 3 · 3 is the change 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ir import graph
from ...ir.calls import Params, evaluate
from ...ir.program import Batch, LowRank, Opaque, Param, Product, Program, Scale, Select, Value, Windows
from ...runtime import ops, reference
from . import maxima, recurrent  # noqa: F401  (register their rules)
from .compositions import log_softmax_along, normalize, softmax_along
from .registry import RuledSteps
from .rule import (
    Rule,
    StepMap,
    Values,
    at_place,
    mark_maxima,
    pad_for_windows,
    pass_through,
    scale_by_derivative,
    use_own_derivative,
)
from .tape import InputAndReference, NoRule, Tape, secant_by_formula


class Rescale(Rule):
    """The rescale rule (arXiv:1704.02685, section 3.5.2): at a step that is not linear, Δout / Δin.

    Elementwise steps: the secant, or the derivative at the input where |Δin| < eps.  Max pools: a window's change goes
    to the places of the input's and of the reference's maximum, each in proportion to its own change.  Products: the
    mean of both points.  Softmax, norms, and everything that torch decomposes (attention): compositions of such steps
    (`tape.py`).  All of these are complete.  Detached tensors are constants.  Other steps: the derivative at the
    input; ``unruled`` names them.
    """

    def __init__(
        self,
        program: Program,
        params: Params,
        values: Values,
        reference: Values,
        eps: float,
        native: bool = False,
        inputs: int | None = None,
        ruled_steps: Sequence[RuledSteps] = (),
    ) -> None:
        """``inputs``: how many of the first inputs are attributed (default: all).  ``ruled_steps``: users' rules."""
        super().__init__(program, params, values)
        self.reference, self.eps = reference, eps
        self.native = native and bool(ops.machine(values[0].device))  # `machine` also loads the kernels
        self.detached = detached_values(program)
        first = range(len(program.inputs) if inputs is None else inputs)
        self.moving = graph.descendants(program, first, self.detached)  # the values whose change is attributed
        self.ruled_steps = {ruled.steps[-1]: ruled for ruled in ruled_steps}
        self.unruled: dict[int, str] = {}  # steps that have no rule, and their operation

    def at(self, i: int) -> StepMap:
        if self.detached and self.base + i not in self.moving:
            return StepMap(custom=lambda g: ())  # no cotangent comes here
        if i in self.ruled_steps:
            return self.user_rule_map(self.ruled_steps[i])
        return super().at(i)

    def values_passed(self, wrt: Sequence[int]) -> set[int]:
        return graph.descendants(self.program, wrt, self.detached)

    def user_rule_map(self, ruled: RuledSteps) -> StepMap:
        """The map of a user's rule."""
        u, v = ruled.entry, self.base + ruled.steps[-1]
        x, y = self.values[u], self.values[v]
        factor = ruled.multiplier(x, self.reference[u].expand_as(x), y, self.reference[v].expand_as(y))
        if self.program.steps[ruled.steps[-1]].inputs == (u,):
            return StepMap(output_factor=factor, through=True)
        return StepMap(custom=lambda g: (g * factor.unsqueeze(1),), reads=(u,))

    def differences(self, i: int) -> tuple[Tensor, Tensor]:
        """The differences of a step's input and of its value from those of the reference."""
        u, v = self.source(i), self.base + i
        return self.values[u] - self.reference[u], self.values[v] - self.reference[v]

    def pooled_relu(self, i: int) -> bool:
        """Whether this is a ReLU that only a pool reads; the pool's shares then include its secant."""
        form, readers = self.program.steps[i].form, self.program.consumers[self.base + i]
        alone = len(readers) == 1 and self.base + i != self.program.output
        is_relu = isinstance(form, Scale) and form.function == "relu"
        if not alone or readers[0] in self.ruled_steps or i in self.ruled_steps:
            return False
        return is_relu and isinstance(self.program.steps[readers[0]].form, Select)

    def multipliers(self, u: int, pool: Sequence[int], relu: bool) -> Tensor:
        """The multipliers of a ReLU or pool, by the compiled op, for a value ``[N, C, *spatial]`` and its reference."""
        z, ref = (
            x.reshape(x.shape[0], x.shape[1] if x.dim() > 1 else 1, *(x.shape[2:] if x.dim() == 4 else (1, -1)))
            for x in (self.values[u], self.reference[u])
        )
        return ops.rescale(z.contiguous(), ref.contiguous(), pool, relu, self.eps)


def detached_values(program: Program) -> frozenset[int]:
    """The values that depend on the inputs, and that the network detaches."""
    base = len(program.inputs)
    forms = ((base + i, step.form) for i, step in enumerate(program.steps))
    return frozenset(v for v, form in forms if isinstance(form, Opaque) and form.call.op == "aten.detach.default")


def secant(rule: Rescale, i: int) -> StepMap:
    din, dout = rule.differences(i)
    formula = secant_by_formula(rule.form(i, Scale).function, rule.post(i), rule.reference[rule.base + i])
    if formula is not None:
        return StepMap(output_factor=formula.expand_as(din), through=True)
    still = (din.abs() < rule.eps) | (rule.pre(i) == rule.reference[rule.source(i)])  # also equal infinities
    return StepMap(output_factor=torch.where(still, rule.slope(i), dout / din), through=True)


def relu_secant(rule: Rescale, i: int) -> StepMap:
    if not rule.native:
        return secant(rule, i)
    if rule.pooled_relu(i):
        return pass_through(rule, i)
    u = rule.source(i)
    return StepMap(output_factor=rule.multipliers(u, (), True)[0].reshape(rule.values[u].shape), through=True)


def shared_by_pool(rule: Rescale, i: int) -> StepMap:
    w, u, shape = rule.form(i, Select).windows, rule.source(i), rule.program.steps[i].shape
    if rule.native and len(w.kernel) <= 2:
        relu = u >= rule.base and rule.pooled_relu(u - rule.base)
        pool = [n for pair in zip(*_planar(w, shape[1:]), strict=True) for n in pair]
        shares = rule.multipliers(rule.source(u - rule.base) if relu else u, pool, relu)
        return StepMap(taps=tuple(shares.view(shares.shape[0], -1, *shape)))
    x, x_ref = rule.values[u], rule.reference[u]
    y, y_ref = rule.post(i), rule.reference[rule.base + i]  # [N, C, *out]
    top = torch.maximum(y, y_ref)
    up, down = top - y_ref, y - top
    wide = pad_for_windows(w, x - x_ref, 0.0)
    taps = []
    for t, (wins, wins_ref) in enumerate(
        zip(mark_maxima(w, x, y.shape), mark_maxima(w, x_ref, y_ref.shape), strict=True)
    ):
        din = at_place(w, t, wide, y.shape[2:])
        share = (wins * up + wins_ref * down) / din
        taps.append(torch.where(din.abs() < rule.eps, wins.to(x.dtype), share))
    return StepMap(taps=tuple(taps))


def _planar(w: Windows, counts: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A pool's geometry per axis, rows first: kernel, stride, padding before, dilation, windows."""
    axes = list(zip(w.kernel, w.stride, (a for a, _ in w.padding), w.dilation, counts, strict=True))
    rows, columns = ((1, 1, 0, 1, 1), axes[0]) if len(axes) == 1 else axes
    return rows, columns


def midpoint(rule: Rescale, i: int) -> StepMap:
    middle = [(rule.values[v] + rule.reference[v]) / 2 for v in rule.program.steps[i].inputs]
    out = reference.forward_step(rule.program, i, middle, rule.params)
    return StepMap(custom=lambda g: reference.vjp_step(rule.program, i, middle, out, g, rule.params))


def compose_on_tape(rule: Rescale, i: int) -> StepMap:
    """The map of a step that is no single operation with a rule, by its operations on the tape, transposed by torch."""
    step, dtype = rule.program.steps[i], rule.values[0].dtype
    tape = Tape(dtype, rule.eps)
    args: list[InputAndReference | Tensor] = []
    for v in step.inputs:
        x = rule.values[v]
        args.append(tape.pair(x, rule.reference[v].expand_as(x)) if v in rule.moving else x)
    moving = [p for p in args if isinstance(p, InputAndReference)]
    try:
        with torch.inference_mode(False):
            result = _on_tape(rule, i, tape, args)
    except NoRule as reason:
        rule.unruled[i] = str(reason)
        return use_own_derivative(rule, i)

    def pulled(g: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(result, InputAndReference):  # a constant
            grads = [g.new_zeros(*g.shape[:2], *p.shape[1:]) for p in moving]
        else:
            grads = tape.pull_back(moving, result, g)
        rest = iter(grads)
        still = g.new_zeros(())
        return tuple(
            next(rest) if isinstance(p, InputAndReference) else still.expand(*g.shape[:2], *p.shape[1:]) for p in args
        )

    return StepMap(custom=pulled)


def _on_tape(
    rule: Rescale, i: int, tape: Tape, args: Sequence[InputAndReference | Tensor]
) -> InputAndReference | Tensor:
    step = rule.program.steps[i]
    form, x = step.form, args[0]
    if isinstance(form, LowRank):
        assert isinstance(x, InputAndReference)
        if form.function == "normalize":
            return normalize(tape, x, [form.axis + 1], form.params[0])[0]
        return (softmax_along if form.function == "softmax" else log_softmax_along)(tape, x, form.axis + 1)
    assert isinstance(form, Opaque)
    by_value = dict(zip(step.inputs, args, strict=True))
    samples = x.shape[0]

    def leaf(item: Param | Value | Batch) -> InputAndReference | Tensor | int:
        if isinstance(item, Param):
            return rule.params[item.name]
        return by_value[item.id] if isinstance(item, Value) else item.times * samples

    return evaluate(form.call, leaf, tape)


#: DeepLift's rules: a line for a function, or for all functions of a form.
Rescale.table = {
    **Rule.table,
    Scale: secant,
    "affine": scale_by_derivative,
    "relu": relu_secant,
    Select: shared_by_pool,
    LowRank: compose_on_tape,
    Product: midpoint,
    Opaque: compose_on_tape,
}
