"""Layer-wise relevance propagation: Captum's rules on the Program, for more layers than Captum knows.

The relevance of a value is its share of the output.  At a contraction ``z = W a + b`` the rule gives
``R_a = a ⊙ Wᵀ (R_z / z)``, with W changed (gamma, alpha-beta, z-plus) and z stabilised by an epsilon of its own sign.
Activations hand relevance through.  So LRP is a chain of contractions and slopes, like a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from captum import attr as captum_attr
from captum._utils.common import _format_output, _format_tensor_into_tuples, _is_tuple
from captum._utils.gradient import apply_gradient_requirements, undo_gradient_requirements
from captum.attr._utils.common import _sum_rows
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, IdentityRule, PropagationRule
from captum.log import log_usage
from torch import Tensor, nn

from ...dispatch.request import model_of
from ...ir.program import Channels, Contract, Program, Scale, Select, Step, Sum, View
from ...runtime import reference
from ..attribute_all import each_output, resolved, rows_out, with_indices
from ..plug import GradientFunc
from ..points import part
from .methods import RuleMethod, one_target, values_of
from .rule import Local, Params, Rule, Values, chosen

KNOWN = (EpsilonRule, GammaRule, Alpha1_Beta0_Rule, IdentityRule)
EPSILON = 1e-9  # Captum's default


class Relevance(Rule):
    """LRP as maps of relevance, with one of Captum's rules per module path; epsilon where there is none."""

    def __init__(
        self, program: Program, params: Params, values: Values, rules: dict[str, PropagationRule], model: nn.Module
    ) -> None:
        super().__init__(program, params, values)
        self.rules, self.model = rules, model

    def at(self, i: int) -> Local:
        step = self.program.steps[i]
        rule = self.rules.get(step.module)
        if isinstance(step.form, View) or type(step.form).__name__ == "Index":
            return Local()
        if isinstance(rule, IdentityRule):
            return Local(through=True)
        if isinstance(step.form, Contract):
            return self.contract(i, step, rule)
        if isinstance(step.form, Select):
            return self.pool(i, step, rule)
        if isinstance(step.form, Sum) and all(v < self.base for v in step.inputs):
            return Local()  # inputs that are added before anything else share one relevance, as in Captum
        if isinstance(step.form, Sum):
            return Local(after=1 / self.stable(self.post(i), rule), before=tuple(self.values[v] for v in step.inputs))
        if step.form.function == "affine":
            return Local(after=step.form.params[0] * self.pre(i) / self.stable(self.post(i), rule), through=True)
        return Local(through=True)

    def stable(self, z: Tensor, rule: PropagationRule | None) -> Tensor:
        epsilon = EPSILON if rule is None else rule.STABILITY_FACTOR
        return torch.where(z < 0, z - epsilon, z + epsilon)

    def contract(self, i: int, step: Step, rule: PropagationRule | None) -> Local:
        a, z, weight = self.pre(i), None, None
        changed = self.changed(step, rule)
        if changed is None:
            z = self.post(i)
        else:
            weight, bias = changed
            names = {step.form.weight.name: weight}
            if step.form.bias is not None:
                names[step.form.bias.name] = bias
            z = reference.forward_step(self.program, i, [a], {**self.params, **names})
        return Local(after=1 / self.stable(z, rule), weight=weight, before=(a,))

    def changed(self, step: Step, rule: PropagationRule | None) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias as a gamma or alpha-beta rule wants them; None where they stay."""
        form = step.form
        if not isinstance(rule, (GammaRule, Alpha1_Beta0_Rule)) or form.weight is None:
            return None
        weight = self.params[form.weight.name]
        bias = None if form.bias is None else self.params[form.bias.name]
        module = self.model.get_submodule(step.module)
        if isinstance(form.map, Channels) and isinstance(module, nn.modules.batchnorm._BatchNorm):
            return self.batch_norm(module, rule)
        if bias is not None and rule.set_bias_to_zero:
            bias = torch.zeros_like(bias)
        return self.modified(weight, rule), bias

    def modified(self, weight: Tensor, rule: Any) -> Tensor:
        positive = weight.clamp(min=0)
        return weight + rule.gamma * positive if isinstance(rule, GammaRule) else positive

    def batch_norm(self, module: Any, rule: Any) -> tuple[Tensor, Tensor]:
        """A rule changes the factor that was learnt, not the one that includes the variance."""
        inverse = torch.rsqrt(module.running_var + module.eps)
        weight = torch.ones_like(inverse) if module.weight is None else self.modified(module.weight.detach(), rule)
        bias = torch.zeros_like(inverse) if module.bias is None or rule.set_bias_to_zero else module.bias.detach()
        factor = weight * inverse
        return factor, bias - module.running_mean * factor

    def pool(self, i: int, step: Step, rule: PropagationRule | None) -> Local:
        y = self.post(i)
        share = y / self.stable(y, rule)
        places = chosen(step.form.windows, self.pre(i), y.shape)
        return Local(taps=tuple(here * share for here in places))


class LRP(RuleMethod, captum_attr.LRP):
    """Layer-wise relevance propagation (Bach et al., doi:10.1371/journal.pone.0130140).

    A drop-in for `captum.attr.LRP` with Captum's rules (set as ``module.rule``: `EpsilonRule`, `GammaRule`,
    `Alpha1_Beta0_Rule`, which with a bias of zero is z-plus, `IdentityRule`), also for Conv1d, BatchNorm1d, ELU,
    average pools of one dimension, residual sums, functional and reused activations.  Attribute logits: a softmax
    has no rule.
    """

    def __init__(self, model: nn.Module, engine: str | None = None) -> None:
        captum_attr.LRP.__init__(self, model)
        self.gradient_func = GradientFunc(engine)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        """As Captum's.  As there, rules set on modules serve one call and are gone after it."""
        rows = _format_tensor_into_tuples(inputs)
        found = None
        if all(isinstance(x, Tensor) for x in rows) and isinstance(self.gradient_func, GradientFunc):
            with self._rules() as rules:
                given = {"rules": rules}
                if all(type(r) in KNOWN or r is None for r in rules.values()):
                    found = one_target(self, rows, target, additional_forward_args, given)
        if found is None:
            return captum_attr.LRP.attribute.__wrapped__(
                self, inputs, target, additional_forward_args, return_convergence_delta, verbose
            )
        undo_gradient_requirements(rows, apply_gradient_requirements(rows))  # Captum's warnings
        for path, rule in rules.items():
            if verbose:
                print(f"Applied {rule} on layer {self.model.get_submodule(path)}")
            del self.model.get_submodule(path).rule
        result = _format_output(_is_tuple(inputs), found)
        if not return_convergence_delta:
            return result
        return result, self.compute_convergence_delta(found, self._outputs(rows, target, additional_forward_args))

    def attribute_all(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        With ``return_convergence_delta`` also the delta per sample and output, ``[N, C]``.  Rules stay set.
        """
        found = None
        with self._rules() as rules:
            if all(type(r) in KNOWN or r is None for r in rules.values()):
                given = {"rules": rules}
                found = self._fast(inputs, targets, additional_forward_args, given, return_convergence_delta)
        if found is not None:
            return found
        rows = _format_tensor_into_tuples(inputs)
        seeds, out = resolved(self.model, rows, additional_forward_args, targets)

        def attribute(target: Any) -> Any:
            try:
                return self.attribute(inputs, target, additional_forward_args, return_convergence_delta)
            finally:  # Captum takes them off
                for path, rule in rules.items():
                    self.model.get_submodule(path).rule = rule

        return with_indices(each_output(attribute, seeds, out, rows[0].shape[0]), seeds)

    @contextmanager
    def _rules(self) -> Iterator[dict[str, PropagationRule]]:
        """The rules set on modules, by path; taken off meanwhile, as they are no part of the network."""
        found = {path: m for path, m in self.model.named_modules() if "rule" in m.__dict__}
        rules = {path: m.__dict__.pop("rule") for path, m in found.items()}
        try:
            yield rules
        finally:
            for path, m in found.items():
                m.rule = rules[path]

    def _outputs(self, rows: tuple[Tensor, ...], target: Any, extra: Any) -> Tensor:
        from captum._utils.common import _run_forward

        with torch.no_grad():
            return _run_forward(self.model, rows, target, extra)

    def _supports(self, program: Program) -> bool:
        known = (Contract, Select, Sum, View, Scale)
        named = [s.module for s in program.steps if isinstance(s.form, Contract) and s.form.weight and s.module]
        if len(set(named)) < len(named):
            return False  # one layer's weight used twice: Captum's error
        return all(isinstance(s.form, known) or type(s.form).__name__ == "Index" for s in program.steps)

    def _rule(self, program, params, rows, a, b, given, plain):
        values = values_of(program, params, rows, plain, outputs_too=True)
        rules = {path: rule for path, rule in given["rules"].items() if rule is not None}
        return Relevance(program, params, values, rules, model_of(self.forward_func) or self.model)

    def _finished(self, rule, found, rows, targets, a, b, given):
        y = rule.values[rule.program.output].flatten(1)  # [n, C]
        score = y[:, targets] if targets.dim() == 1 else y.gather(1, targets)  # [n, S]
        return tuple(m.mul_(score.view(*score.shape, *(1,) * (m.dim() - 2))) for m in found)

    def _row_delta(self, parts, rows, more, seeds, given):
        with torch.no_grad():
            y = rows_out(self.forward_func, rows, more)
        index = part(seeds, 0, rows[0].shape[0])
        index = None if index is None else index.to(y.device)
        score = y if index is None else y[:, index] if index.dim() == 1 else y.gather(1, index)
        total = sum(_sum_rows(p.flatten(0, 1)).view(p.shape[:2]) for p in parts)
        return score - total
