"""Layer-wise relevance propagation: Captum's rules on the Program, for more layers than Captum knows.

The relevance of a value is its share of the output.  At a contraction ``z = W a + b`` the rule gives
``R_a = a ⊙ Wᵀ (R_z / z)``, with W changed (gamma, alpha-beta, z-plus) and z stabilised by an epsilon with the sign of
z.  Activations pass relevance on unchanged.  So LRP is a chain of contractions and slopes, like a gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ...dispatch import state
from ...dispatch.targets import Seeds
from ...ir.calls import Params
from ...ir.program import Channels, Contract, Index, Program, Scale, Select, Sum, View
from ...runtime import reference
from ...util.callables import model_of, name_of
from ...util.memo import WeakMemo
from ...util.options import Engine
from ...util.outputs import Output
from ...util.renamed import keyword_only
from .. import captum_compat as compat
from ..attribute_all import Inputs, Options, Tensors, as_attribute_all, one_by_one, pick_outputs, rows_out
from ..call import SharedOptions
from ..captum_compat import stock
from ..plug import GradientFunc, plug_into
from ..points import Points
from .rule import Rule, StepMap, Values, mark_maxima, own_map, pass_through
from .rule_methods import Chunk, RuleMethod

#: Activations that pass relevance on: increasing, with f(0) = 0.  Captum knows ReLU and Tanh.
PASSING = ("relu", "leaky_relu", "elu", "tanh", "negative_part")
#: Modules on which a rule of Captum's has the same meaning here.
RULED = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
)
KNOWN = (compat.EpsilonRule, compat.GammaRule, compat.Alpha1_Beta0_Rule, compat.IdentityRule)
_rule_locks = WeakMemo(threading.RLock)  # of the networks whose modules have no rules for a moment
EPSILON = 1e-9  # Captum's default
Rules = Mapping[str, compat.PropagationRule | None]  # by the module's path


class Relevance(Rule):
    """LRP as maps of relevance, with one of Captum's rules per module path; the default is the epsilon rule."""

    def __init__(self, program: Program, params: Params, values: Values, rules: Rules, model: nn.Module) -> None:
        super().__init__(program, params, values)
        self.rules, self.model = rules, model

    def at(self, i: int) -> StepMap:
        step = self.program.steps[i]
        if isinstance(self.rules.get(step.module), compat.IdentityRule) and not isinstance(step.form, (View, Index)):
            return pass_through(self, i)
        return super().at(i)

    def normalized(self, i: int, z: Tensor) -> Tensor:
        """``1 / z``, stabilised by an epsilon with the sign of ``z``."""
        return 1 / self.stable(i, z)

    def stable(self, i: int, z: Tensor) -> Tensor:
        rule = self.rules.get(self.program.steps[i].module)
        epsilon = EPSILON if rule is None else rule.STABILITY_FACTOR
        return torch.where(z < 0, z - epsilon, z + epsilon)

    def changed(self, i: int) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias as changed by a gamma or alpha-beta rule; None if they stay the same."""
        form, path = self.form(i, Contract), self.program.steps[i].module
        rule = self.rules.get(path)
        if not isinstance(rule, (compat.GammaRule, compat.Alpha1_Beta0_Rule)) or form.weight is None:
            return None
        module = self.model.get_submodule(path)
        if isinstance(form.map, Channels) and isinstance(module, nn.modules.batchnorm._BatchNorm):
            return _batch_norm(module, rule)
        bias = None if form.bias is None else self.params[form.bias.name]
        if bias is not None and rule.set_bias_to_zero:
            bias = torch.zeros_like(bias)
        return _modify_weight(self.params[form.weight.name], rule), bias


def _modify_weight(weight: Tensor, rule: Any) -> Tensor:
    positive = weight.clamp(min=0)
    return weight + rule.gamma * positive if isinstance(rule, compat.GammaRule) else positive


def _batch_norm(module: Any, rule: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a batch norm: a rule changes the learned factor, not the one that includes the variance."""
    inverse = torch.rsqrt(module.running_var + module.eps)
    weight = torch.ones_like(inverse) if module.weight is None else _modify_weight(module.weight.detach(), rule)
    bias = torch.zeros_like(inverse) if module.bias is None or rule.set_bias_to_zero else module.bias.detach()
    factor = weight * inverse
    return factor, bias - module.running_mean * factor


def contraction(rule: Relevance, i: int) -> StepMap:
    a, form, changed = rule.pre(i), rule.form(i, Contract), rule.changed(i)
    if changed is None:
        return StepMap(output_factor=rule.normalized(i, rule.post(i)), input_factors=(a,))
    weight, bias = changed
    params = {p.name: new for p, new in ((form.weight, weight), (form.bias, bias)) if p is not None and new is not None}
    z = reference.forward_step(rule.program, i, [a], {**rule.params, **params})
    return StepMap(output_factor=rule.normalized(i, z), weight=weight, input_factors=(a,))


def winner(rule: Relevance, i: int) -> StepMap:
    """A pool passes relevance to the maximum."""
    y = rule.post(i)
    share = y / rule.stable(i, y)
    return StepMap(taps=tuple(won * share for won in mark_maxima(rule.form(i, Select).windows, rule.pre(i), y.shape)))


def in_proportion(rule: Relevance, i: int) -> StepMap:
    inputs = rule.program.steps[i].inputs
    if all(v < rule.base for v in inputs):
        return StepMap()  # inputs that are added before anything else share one relevance, as in Captum
    return StepMap(output_factor=rule.normalized(i, rule.post(i)), input_factors=tuple(rule.values[v] for v in inputs))


def affine(rule: Relevance, i: int) -> StepMap:
    """The share of ``a x`` in ``y = a x + b``."""
    factor = rule.form(i, Scale).params[0]
    return StepMap(output_factor=factor * rule.pre(i) / rule.stable(i, rule.post(i)), through=True)


#: LRP's rules: a line for a function, or for all functions of a form.  LRP does not support other forms.
Relevance.table = {
    Contract: contraction,
    View: own_map,
    Index: own_map,
    Sum: in_proportion,
    Select: winner,
    **dict.fromkeys(PASSING, pass_through),
    "affine": affine,
}


class LRP(RuleMethod, stock.LRP):
    """Layer-wise relevance propagation (Bach et al., doi:10.1371/journal.pone.0130140).

    A drop-in for `captum.attr.LRP` with Captum's rules (set as ``module.rule``: `EpsilonRule`, `GammaRule`,
    `Alpha1_Beta0_Rule`, which is z-plus for a bias of zero, `IdentityRule`).  It also covers Conv1d, BatchNorm1d, ELU,
    1-D average pools, residual sums, and functional and reused activations.  Attribute logits: a softmax has no rule.
    """

    @keyword_only("engine", "output")
    def __init__(self, model: nn.Module, *, engine: Engine | None = None, output: Output = None) -> None:
        stock.LRP.__init__(self, model)
        plug_into(self, GradientFunc(engine), output)

    @compat.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Captum's ``attribute``.  Rules set on modules serve one call and are then removed, as in Captum."""
        rows = compat.format_tensor_into_tuples(inputs)
        with self._rules() as rules:
            maps = self._one(rows, target, additional_forward_args, {"rules": rules})
        if maps is None:
            fixed = (target, additional_forward_args, return_convergence_delta, verbose)
            return compat.unlogged(stock.LRP)(self, inputs, *fixed)
        self._drop_rules(rules, verbose)
        result = compat.format_output(compat.is_tuple(inputs), maps)
        if not return_convergence_delta:
            return result
        with torch.no_grad():
            outputs = compat.run_forward(self.model, rows, target, additional_forward_args)
        return result, self.compute_convergence_delta(maps, outputs)

    @as_attribute_all
    def attribute_all(
        self,
        inputs: Inputs,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        With ``return_convergence_delta`` also the delta per sample and output, ``[N, C]``.  Rules stay set;
        ``verbose`` prints them.
        """
        with self._rules() as rules:
            options = {"rules": rules}
            maps = self._all_on_engine(inputs, targets, additional_forward_args, options, return_convergence_delta)
        if verbose:
            self._print(rules)
        if maps is not None:
            return maps

        def attribute(target: Any) -> Any:
            with self._rules_put_back():
                return self.attribute(inputs, target, additional_forward_args, return_convergence_delta)

        delta = return_convergence_delta
        return one_by_one(self.forward_func, inputs, additional_forward_args, targets, attribute, delta)

    @property
    def _network(self) -> Any:
        """The caller's module, which `self.model` wraps if one of its outputs is chosen."""
        return model_of(self.forward_func) or self.model

    def _print(self, rules: Rules) -> None:
        for path, rule in rules.items():
            print(f"Applied {rule} on layer {self._network.get_submodule(path)}")

    def _drop_rules(self, rules: Rules, verbose: bool) -> None:
        """Remove the rules after a call, as Captum does."""
        if verbose:
            self._print(rules)
        for path in rules:
            del self._network.get_submodule(path).rule

    @contextmanager
    def _rules_put_back(self) -> Iterator[None]:
        """Set the rules on modules again afterwards, because Captum removes them."""
        with self._rules() as rules:
            pass
        try:
            yield
        finally:
            for path, rule in rules.items():
                self._network.get_submodule(path).rule = rule

    @contextmanager
    def _rules(self) -> Iterator[Rules]:
        """The rules set on modules, by path.  Inside, modules have none, as rules are not part of the network."""
        with _rule_locks.of(self._network):  # other threads may not find the modules without their rules
            ruled = {path: m for path, m in self._network.named_modules() if "rule" in m.__dict__}
            if ruled:
                rules = {path: m.__dict__.pop("rule") for path, m in ruled.items()}
                try:
                    yield rules
                finally:
                    for path, m in ruled.items():
                        m.rule = rules[path]
                return
        yield {}

    def _indivisible(self) -> bool:
        return any("rule" in m.__dict__ for m in self.model.modules())

    def _knows(self, rules: Rules) -> bool:
        return all(self._same_here(path, rule) for path, rule in rules.items())

    def _supports(self, program: Program) -> bool:
        named = [s.module for s in program.steps if isinstance(s.form, Contract) and s.form.weight and s.module]
        if len(set(named)) < len(named):
            return False  # one layer's weight is used twice, for which Captum raises an error
        lacking = [s for s in program.steps if Relevance.maker(s.form) is None]
        for step in lacking:
            name = name_of(self.forward_func)
            state.warn(
                self.forward_func,
                f"{name}: no LRP rule for {step.op} in {step.module or name}. Captum's own method takes the call: it "
                "raises for modules that have no rule, and takes the gradient of functions.",
            )
        return not lacking

    def row_maps(self, points: Points, seeds: Seeds, options: Options) -> Tensors | None:
        if "rules" not in options:
            with self._rules() as rules:
                return self.row_maps(points, seeds, options | {"rules": rules})
        if not self._knows(options["rules"]):
            return None
        return super().row_maps(points, seeds, options)

    def _same_here(self, path: str, rule: compat.PropagationRule | None) -> bool:
        """Whether a rule on this module has the same meaning here as in Captum."""
        module = self._network.get_submodule(path)
        if rule is None or isinstance(module, (nn.ReLU, nn.Tanh, nn.Dropout)):
            return rule is None or type(rule) in KNOWN
        if isinstance(rule, compat.IdentityRule) and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return False  # relevance of one shape for a value of another, for which Captum raises an error
        return type(rule) in KNOWN and type(module) in RULED

    def _rule(self, chunk: Chunk) -> Relevance:
        values = chunk.values(chunk.rows, outputs_too=True)
        return Relevance(chunk.program, chunk.params, values, chunk.options["rules"], self._network)

    def _attributions(self, chunk: Chunk, rule: Rule, multipliers: Tensors, targets: Tensor) -> Tensors:
        score = pick_outputs(rule.values[chunk.program.output], targets)  # [n, S]
        return tuple(m.mul_(score.view(*score.shape, *(1,) * (m.dim() - 2))) for m in multipliers)

    def _row_delta(self, parts: Tensors, points: Points, seeds: Seeds, options: Options) -> Tensor:
        with torch.no_grad():
            score = pick_outputs(rows_out(points), seeds.indices)
        sums = [compat.sum_rows(p.flatten(0, 1)).view(p.shape[:2]) for p in parts]
        return score - sum(sums[1:], sums[0])
