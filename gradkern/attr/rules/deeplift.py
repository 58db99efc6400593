"""DeepLift and DeepLiftShap by the rescale rule: secants in place of slopes, per sample and complete.

Captum 0.9 hooks modules.  It is wrong if a ReLU comes directly before a max pool, if a pool's input equals its
reference (#1276), or if pool windows overlap, and it mixes samples in a softmax (#1367); docs/captum.md shows this.
Here the rule is applied to the Program, so it also works for functional, in-place and reused activations.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from ...dispatch import state
from ...dispatch.targets import Seeds
from ...util.callables import model_of, name_of
from ...util.options import BadArgument, BadValue, Engine
from ...util.options import engine as engine_of
from ...util.outputs import Output
from ...util.renamed import keyword_only
from .. import captum_compat as compat
from ..attribute_all import Inputs, Options, Tensors, as_attribute_all, check_distribution
from ..call import SharedOptions
from ..captum_compat import stock
from ..captum_targets import captum_seeds
from ..plug import GradientFunc, can_handle_call, plug_into
from ..points import Points, rows_of
from ..references import References
from .averaging import (
    Averages,
    ContributionOptions,
    OverReferences,
    apply_custom_function,
    check_once,
    say_if_large,
    sizes_of,
    with_delta,
)
from .eager import multipliers
from .registry import ruled_steps
from .rescale import Rescale, detached_values
from .rule import Rule, Values
from .rule_methods import Chunk
from .tape import NoRule

Rules = Literal["complete", "captum"]


class DeepLift(OverReferences, stock.DeepLift):
    """Differences from a reference instead of gradients (Shrikumar et al., arXiv:1704.02685), the rescale rule.

    A drop-in for `captum.attr.DeepLift`, complete even in cases where Captum is not.  ``rules="captum"`` gives Captum's
    own numbers, by Captum's own code; docs/captum.md lists the differences.  A step that has no rule gets its
    derivative at the input, and a warning names it; `register_rule` gives it a rule.  What the model detaches is a
    constant, with its value at the input.  Attribute logits: a probability's contributions are mixed with those of all
    other classes.
    """

    eps = 1e-10  # Captum's default, for objects that another constructor has made

    @keyword_only("engine", "output", "rules")
    def __init__(
        self,
        model: nn.Module,
        multiply_by_inputs: bool = True,
        eps: float = 1e-10,
        *,
        engine: Engine | None = None,
        output: Output = None,
        rules: Rules = "complete",
    ) -> None:
        stock.DeepLift.__init__(self, model, multiply_by_inputs, eps)
        plug_into(self, GradientFunc(_engine_of(rules, engine)), output)

    @compat.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Any = None,
        *,
        hypothetical: bool = False,
        n_references: int = 20,
        random_state: int | None = None,
    ) -> Any:
        """Captum's ``attribute``, by the rule above.

        ``baselines`` may also be references per sample, over which the attributions are averaged: a tensor
        ``[N, R, *in]``, or a function ``(inputs, n, random_state) -> [N, n, *in]``, which draws ``n_references``
        for each sample, with a separate seed for each sample if there is a ``random_state``.  The delta is then per
        pair, ``[N · R]``.  ``hypothetical``: the contributions of every base at every position
        of one-hot sequences ``[N, bases, length]`` (see `gradkern.attr.references`).
        """
        rows = compat.format_tensor_into_tuples(inputs)
        references = self._references(baselines, rows, n_references, random_state, hypothetical)
        if references is not None:
            options = ContributionOptions(hypothetical, return_convergence_delta, custom_attribution_func)
            return self._average_one(references, inputs, target, additional_forward_args, options)
        start = compat.format_baseline(baselines, rows)
        if isinstance(self.gradient_func, GradientFunc):
            compat.validate_input(rows, start)
        maps = self._one(rows, target, additional_forward_args, {"baselines": start, "multiply": False})
        if maps is None:
            maps = self._by_tape(rows, start, target, additional_forward_args)
        if maps is None:
            fixed = (target, additional_forward_args, return_convergence_delta, custom_attribution_func)
            result = compat.unlogged(stock.DeepLift)(self, inputs, baselines, *fixed)
            self._on_hooks()
            return result
        start = compat.tensorize_baseline(rows, start)
        if custom_attribution_func is not None:
            maps = compat.call_custom_attribution_func(custom_attribution_func, maps, rows, start)
        elif self.multiplies_by_inputs:
            maps = tuple((x - base) * m for x, base, m in zip(rows, start, maps, strict=True))
        result = compat.compute_conv_delta_and_format_attrs(
            self, return_convergence_delta, maps, start, rows, additional_forward_args, target, compat.is_tuple(inputs)
        )
        if return_convergence_delta and custom_attribution_func is None and self.multiplies_by_inputs:
            say_if_large(self.forward_func, sizes_of(maps, 1), result[1])
        return result

    @as_attribute_all
    def attribute_all(
        self,
        inputs: Inputs,
        baselines: Any = None,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Any = None,
        hypothetical: bool = False,
        n_references: int = 20,
        random_state: int | None = None,
        **shared: Unpack[SharedOptions],
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        With ``return_convergence_delta`` also the delta per sample and output, ``[N, C]``.
        ``custom_attribution_func`` as in ``attribute``; it is called once per output.  References per sample, and
        ``hypothetical``, as in ``attribute``; the delta is then per pair, ``[N · R, C]``.
        """
        rows = compat.format_tensor_into_tuples(inputs)
        references = self._references(baselines, rows, n_references, random_state, hypothetical)
        if references is not None:
            wanted = ContributionOptions(hypothetical, return_convergence_delta, custom_attribution_func)
            return self._average_all(references, inputs, targets, additional_forward_args, wanted)
        start = compat.format_baseline(baselines, rows)
        compat.validate_input(rows, start)
        options = {"baselines": start, "custom_attribution_func": custom_attribution_func}
        return self._all(inputs, targets, additional_forward_args, options, return_convergence_delta)

    def row_maps(self, points: Points, seeds: Seeds, options: Options) -> Tensors | None:
        start = compat.format_baseline(options.get("baselines"), points.inputs)
        custom = options.get("custom_attribution_func")
        options = options | {"baselines": start} | ({} if custom is None else {"multiply": False})
        parts = super().row_maps(points, seeds, options)
        return parts if custom is None or parts is None else apply_custom_function(custom, parts, points.inputs, start)

    def _rule(self, chunk: Chunk) -> Rescale:
        start = _start(chunk)
        if detached_values(chunk.program):
            start = tuple(s.expand(x.shape) for s, x in zip(start, chunk.rows, strict=True))
            return self._rescale(chunk, chunk.values(chunk.rows), Values(chunk.program, chunk.params, {}), start)
        return self._rescale(chunk, chunk.values(chunk.rows), chunk.values(start), start)

    def _rescale(self, chunk: Chunk, values: Values, before: Values, start: Tensors) -> Rescale:
        """The rule between the values at the samples and those ``before`` at ``start``, row by row."""
        constant = detached_values(chunk.program)
        if constant:  # equal at the reference and at the input, and so is everything that follows from them alone
            given = dict(enumerate(start)) | {v: values[v] for v in sorted(constant)}
            before = Values(chunk.program, chunk.params, given)
        inputs, own = len(chunk.options["baselines"]), ruled_steps(chunk.program, model_of(self.forward_func))
        native = not chunk.plain_torch
        return Rescale(chunk.program, chunk.params, values, before, self.eps, native, inputs, own)

    def _done(self, points: Points, rule: Rule) -> None:
        """Warn, once per model, where attributions need not add up to the change of the output."""
        assert isinstance(rule, Rescale)
        name, program = name_of(points.fn), rule.program
        for i, op in rule.unruled.items():
            state.warn(
                points.fn,
                f"{name}: no DeepLift rule for {op} in {program.steps[i].module or name}. Its derivative at the input "
                "is taken, so attributions need not add up to the change of the output. gradkern.attr.register_rule "
                "gives it a rule.",
            )
        constant = [s for i, s in enumerate(program.steps) if rule.base + i in rule.detached]
        constant = [s for s in constant if not rule.moving.isdisjoint(s.inputs)]
        if constant:
            say_constant(points.fn, ", ".join(dict.fromkeys(s.module or name for s in constant)))

    def _one_reference(self, inputs: Tensors, baselines: Tensors, *fixed: Any) -> Any:
        return DeepLift.attribute(self, inputs, baselines, *fixed)

    def _by_tape(self, rows: Tensors, start: Tensors, target: Any, extra: Any) -> Tensors | None:
        """Multipliers of a model that has no Program, by the same rules; None if Captum takes the call."""
        gradients = self.gradient_func
        if not isinstance(gradients, GradientFunc) or not can_handle_call(self.forward_func, rows, gradients.engine):
            return None

        base = tuple(
            s if isinstance(s, Tensor) else torch.full_like(x[:1], s) for x, s in zip(rows, start, strict=True)
        )
        more = compat.format_additional_forward_args(extra) or ()
        try:
            maps, held = multipliers(
                self.forward_func, rows, base, more, lambda n, out: captum_seeds(target, n, out), self.eps
            )
            if held:
                say_constant(self.forward_func, name_of(self.forward_func))
            return tuple(m[:, 0] for m in maps)
        except NoRule as reason:
            state.warn(self.forward_func, f"{name_of(self.forward_func)}: no DeepLift rule for {reason}.")
        except BadArgument:
            pass  # Captum's own error
        return None

    def _on_hooks(self) -> None:
        """Warn that Captum's hooks ran although ``rules="complete"`` was requested."""
        gradients = self.gradient_func
        if isinstance(gradients, GradientFunc) and engine_of(gradients.engine) != "autograd":
            model = model_of(self.forward_func)
            modules = model.named_modules() if model is not None else ()
            lacking = [f"{type(m).__name__} at {path}" for path, m in modules if compat.lacks_deep_lift_rule(m)]
            name, listed = name_of(self.forward_func), ", ".join(["functions such as F.relu", *lacking])
            state.warn(
                self.forward_func,
                f"{name}: DeepLift runs on Captum's hooks, which modules alone have: no DeepLift rule for {listed}. "
                "Attributions need not add up to the change of the output.",
            )

    def _row_delta(self, parts: Tensors, points: Points, seeds: Seeds, options: Options) -> Tensor:
        delta = super()._row_delta(parts, points, seeds, options)
        if self.multiplies_by_inputs and options.get("custom_attribution_func") is None:
            say_if_large(points.fn, sizes_of(parts, 2).flatten(), delta.flatten())
        return delta

    def _attributions(self, chunk: Chunk, rule: Rule, multipliers: Tensors, targets: Tensor) -> Tensors:
        start, own = _start(chunk), len(chunk.options["baselines"])
        assert isinstance(rule, Rescale)
        check_once(self.forward_func, rule, multipliers, chunk.rows[:own], start[:own], targets)
        if not chunk.options.get("multiply", self.multiplies_by_inputs):
            return multipliers
        points = zip(multipliers, chunk.rows, start, strict=False)
        return tuple(m.mul_((x - base).unsqueeze(1)) for m, x, base in points)


def say_constant(fn: Any, where: str) -> None:
    """Warn, once per model, that something is detached in ``where``."""
    state.warn(
        fn,
        f"{name_of(fn)}: DeepLift treats detached tensors (in {where}) as constants, with their values at the input. "
        "Attributions add up to the change of the output with these values fixed, not to the whole change.",
    )


def _engine_of(rules: Rules, engine: Engine | None) -> Engine | None:
    """The engine for these rules: Captum's rules run in Captum's own code, by autograd."""
    if rules not in ("complete", "captum"):
        raise BadValue(f"rules: got {rules!r}, expected 'complete' or 'captum'.")
    return "autograd" if rules == "captum" else engine


def _start(chunk: Chunk) -> Tensors:
    """The chunk's reference (one row for all samples, or one each), followed by the tensors that are not inputs."""
    start = []
    for x, base in zip(chunk.rows, chunk.options["baselines"], strict=False):
        rows = rows_of(base, chunk.a, chunk.b)
        start.append(rows.to(x.dtype) if isinstance(rows, Tensor) else torch.full_like(x[:1], float(rows)))
    more = chunk.rows[len(start) :]
    if more or len({s.shape[0] for s in start}) > 1:
        start = [s.expand(x.shape).contiguous() for s, x in zip(start, chunk.rows, strict=False)]
    return (*start, *more)


def check_references(baselines: Any, inputs: Any) -> Tensors:
    """A distribution of references; raises Captum's error if there are not several."""
    start: Tensors = compat.format_callable_baseline(baselines, inputs)
    if not isinstance(start[0], Tensor) or start[0].shape[0] < 2:
        raise AssertionError(
            "Baselines distribution has to be provided in form of a torch.Tensor with more than one example but "
            f"found: {start[0]}. If baselines are provided in shape of scalars or with a single baseline example, "
            "`DeepLift` approach can be used instead."
        )
    return start


def pairs_of(points: Points, start: Tensors, seeds: Seeds, a: int, b: int) -> tuple[Points, Tensors, Seeds]:
    """The samples ``a:b`` with every reference: the points, their references, and their seeds."""
    count = start[0].shape[0]
    pairs = tuple(x[a:b].detach().repeat_interleave(count, 0) for x in points.inputs)
    more = tuple(x[a:b].repeat_interleave(count, 0) for x in points.more)
    base = tuple(s.detach().repeat(b - a, *(1,) * (s.dim() - 1)) for s in start)
    return points.at(pairs, more), base, seeds.part(a, b).repeat_interleave(count)


class DeepLiftShap(stock.DeepLiftShap, DeepLift):
    """The mean of DeepLift over a distribution of references (SHAP's DeepExplainer, arXiv:1705.07874).

    A drop-in for `captum.attr.DeepLiftShap`, complete even where Captum is not.  Attribute logits, as for DeepLift.
    """

    _is_captums = False  # also for an accelerated object of Captum's class

    @keyword_only("engine", "output", "rules")
    def __init__(
        self,
        model: nn.Module,
        multiply_by_inputs: bool = True,
        *,
        engine: Engine | None = None,
        output: Output = None,
        rules: Rules = "complete",
    ) -> None:
        stock.DeepLiftShap.__init__(self, model, multiply_by_inputs)
        plug_into(self, GradientFunc(_engine_of(rules, engine)), output)
        self._is_captums = rules == "captum"

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Any = None,
        *,
        hypothetical: bool = False,
        n_references: int = 20,
        random_state: int | None = None,
    ) -> Any:
        """Captum's ``attribute``; references per sample, and ``hypothetical``, as in `DeepLift.attribute`."""
        rows = compat.format_tensor_into_tuples(inputs)
        references = self._references(baselines, rows, n_references, random_state, hypothetical)
        wanted = ContributionOptions(hypothetical, return_convergence_delta, custom_attribution_func)
        if references is not None:
            return self._average_one(references, inputs, target, additional_forward_args, wanted)
        start, as_tuple = check_references(baselines, inputs), compat.is_tuple(inputs)
        averages = self._one_on_engine(References.of_all(rows, start), target, additional_forward_args, wanted)
        if averages is not None:
            return with_delta(averages, as_tuple)
        fixed = (target, additional_forward_args, return_convergence_delta, custom_attribution_func)
        return compat.unlogged(stock.DeepLiftShap)(self, inputs, start if as_tuple else start[0], *fixed)

    @as_attribute_all
    def attribute_all(
        self,
        inputs: Inputs,
        baselines: Any = None,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Any = None,
        hypothetical: bool = False,
        n_references: int = 20,
        random_state: int | None = None,
        **shared: Unpack[SharedOptions],
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        ``baselines`` has to be given.  The delta is per pair of sample and reference, as Captum's:
        ``[N · references, C]``.  References per sample, and ``hypothetical``, as in `DeepLift.attribute`.
        """
        check_distribution(self, baselines)
        rows = compat.format_tensor_into_tuples(inputs)
        references = self._references(baselines, rows, n_references, random_state, hypothetical)
        if references is None:
            references = References.of_all(rows, check_references(baselines, inputs))
        wanted = ContributionOptions(hypothetical, return_convergence_delta, custom_attribution_func)
        return self._average_all(references, inputs, targets, additional_forward_args, wanted)

    def _one_by_one(self, references: References, target: Any, extra: Any, wanted: ContributionOptions) -> Averages:
        if not self._is_captums or not references.shared or wanted.hypothetical:
            return super()._one_by_one(references, target, extra, wanted)
        # Captum's softmax rule sees all pairs of samples and references at once, so its numbers depend on them.
        fixed = (target, extra, wanted.delta, wanted.custom)
        result = compat.unlogged(stock.DeepLiftShap)(self, references.inputs, references.given, *fixed)
        return result if wanted.delta else (result, None)

    def _references(
        self, baselines: Any, rows: Tensors, n: int, random_state: int | None, hypothetical: bool
    ) -> References | None:
        """`DeepLift._references`; references that all samples share must be several."""
        drawn = super()._references(baselines, rows, n, random_state, False)
        return References.of_all(rows, check_references(baselines, rows)) if drawn is None and hypothetical else drawn
