"""DeepLift and DeepLiftShap by the rescale rule: secants in place of slopes, per sample and complete.

Captum 0.9 hooks modules.  It is wrong if a ReLU comes directly before a max pool, if a pool's input equals its
reference (#1276), or if pool windows overlap, and it mixes samples in a softmax (#1367); docs/captum.md shows this.
Here the rule is applied to the Program, so it also works for functional, in-place and reused activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...dispatch import state
from ...dispatch.request import jacobian_choice
from ...dispatch.route import one_call
from ...dispatch.targets import Seeds
from ...util.callables import model_of, name_of
from ...util.chunks import spans
from ...util.options import BadValue, Engine, InputError
from ...util.options import engine as engine_of
from ...util.outputs import Output
from .. import captum_compat as compat
from ..attribute_all import Inputs, Options, Tensors, answer, check_distribution, one_by_one, points_for, typed
from ..captum_compat import stock
from ..plug import GradientFunc, captum_seeds, plug_into, takes_over
from ..points import Points, block_rows, gradient_bytes, rows_of
from .eager import multipliers
from .registry import regions
from .rescale import Rescale, detached
from .rule import Rule, Values
from .rule_methods import Chunk, RuleMethod
from .tape import NoRule

Rules = Literal["complete", "captum"]


class DeepLift(RuleMethod, stock.DeepLift):
    """Differences from a reference instead of gradients (Shrikumar et al., arXiv:1704.02685), the rescale rule.

    A drop-in for `captum.attr.DeepLift`, complete even in cases where Captum is not.  ``rules="captum"`` gives Captum's
    own numbers, by Captum's own code; docs/captum.md lists the differences.  A step that has no rule gets its
    derivative at the input, and a warning names it; `register_rule` gives it a rule.  What the model detaches is a
    constant, with its value at the input.  Attribute logits: a probability's contributions are mixed with those of all
    other classes.
    """

    eps = 1e-10  # Captum's default, for objects that another constructor has made

    def __init__(
        self,
        model: nn.Module,
        multiply_by_inputs: bool = True,
        eps: float = 1e-10,
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
    ) -> Any:
        """As Captum's, by the rule above."""
        rows = compat.format_tensor_into_tuples(inputs)
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
            say_if_large(self.forward_func, maps, result[1])
        return result

    @typed
    def attribute_all(
        self,
        inputs: Inputs,
        baselines: Any = None,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Any = None,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        With ``return_convergence_delta`` also the delta per sample and output, ``[N, C]``.
        ``custom_attribution_func`` as in ``attribute``; it is called once per output.
        """
        rows = compat.format_tensor_into_tuples(inputs)
        start = compat.format_baseline(baselines, rows)
        compat.validate_input(rows, start)
        options = {"baselines": start, "custom_attribution_func": custom_attribution_func}
        return self._all(inputs, targets, additional_forward_args, options, return_convergence_delta)

    def _rows(self, points: Points, index: Tensor | None, seeds: int, options: Options) -> Tensors | None:
        start = compat.format_baseline(options.get("baselines"), points.inputs)
        custom = options.get("custom_attribution_func")
        options = options | {"baselines": start} | ({} if custom is None else {"multiply": False})
        parts = super()._rows(points, index, seeds, options)
        return parts if custom is None or parts is None else customised(custom, parts, points.inputs, start)

    def _rule(self, chunk: Chunk) -> Rescale:
        values, rows, constant = chunk.values(chunk.rows), _start(chunk), detached(chunk.program)
        if constant:  # the same at the reference as at the input
            rows = tuple(s.expand(x.shape) for s, x in zip(rows, chunk.rows, strict=True))
            known = dict(enumerate(rows)) | {v: values[v] for v in sorted(constant)}
            start = Values(chunk.program, chunk.params, known)
        else:
            start = chunk.values(rows)
        inputs, own = len(chunk.options["baselines"]), regions(chunk.program, model_of(self.forward_func))
        native = not chunk.by_reference
        return Rescale(chunk.program, chunk.params, values, start, self.eps, native, inputs, own)

    def _done(self, points: Points, rule: Rule) -> None:
        """Say, once per model, where attributions need not add up to the change of the output."""
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

    def _by_tape(self, rows: Tensors, start: Tensors, target: Any, extra: Any) -> Tensors | None:
        """Multipliers of a model that has no Program, by the same rules; None if Captum takes the call."""
        gradients = self.gradient_func
        if not isinstance(gradients, GradientFunc) or not takes_over(self.forward_func, rows, gradients.engine):
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
        except InputError:
            pass  # Captum's own error
        return None

    def _on_hooks(self) -> None:
        """Say that Captum's hooks ran where rules that complete were asked for."""
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
            say_if_large(points.fn, tuple(p.flatten(0, 1) for p in parts), delta.flatten())
        return delta

    def _finished(self, chunk: Chunk, rule: Rule, multipliers: Tensors, targets: Tensor) -> Tensors:
        if not chunk.options.get("multiply", self.multiplies_by_inputs):
            return multipliers
        points = zip(multipliers, chunk.rows, _start(chunk), strict=False)
        return tuple(m.mul_((x - start).unsqueeze(1)) for m, x, start in points)


def say_constant(fn: Any, where: str) -> None:
    """Warn, once per model, that something is detached in ``where``."""
    state.warn(
        fn,
        f"{name_of(fn)}: DeepLift takes what is detached (in {where}) as constant, with its value at the input. "
        "Attributions add up to the change of the output with these values held, not to all of it.",
    )


LARGE = 0.01  # of the sum of the attributions' sizes


def say_if_large(fn: Any, maps: Tensors, delta: Tensor) -> None:
    """Warn, once per model, if attributions ``[N, *in]`` do not add up: ``delta [N]`` is what they miss."""
    sizes = [m.detach().abs().reshape(m.shape[0], -1).sum(1) for m in maps]
    size = sum(sizes[1:], start=sizes[0])
    large = delta.detach().abs() > LARGE * size
    if delta.shape == size.shape and bool(large.any()):
        state.warn(
            fn,
            f"{name_of(fn)}: DeepLift's attributions do not add up to the change of the output: the delta of some "
            f"samples is more than {LARGE:.0%} of the sum of their sizes.",
        )


def _engine_of(rules: Rules, engine: Engine | None) -> Engine | None:
    """Captum's rules are those of Captum's own code."""
    if rules not in ("complete", "captum"):
        raise BadValue(f"rules: got {rules!r}, expected 'complete' or 'captum'.")
    return "autograd" if rules == "captum" else engine


def customised(custom: Any, multipliers: Tensors, inputs: Tensors, baselines: Sequence[Any]) -> Tensors:
    """The attributions that the caller's function makes of ``multipliers [N, S, *in]``, seed by seed."""
    start = compat.tensorize_baseline(inputs, tuple(baselines))
    by_seed = [
        compat.call_custom_attribution_func(custom, tuple(m[:, s] for m in multipliers), inputs, start)
        for s in range(multipliers[0].shape[1])
    ]
    return tuple(torch.stack(parts, 1) for parts in zip(*by_seed, strict=True))


def _start(chunk: Chunk) -> Tensors:
    """The chunk's reference point: one row if it serves all, else one each; then the tensors that are not inputs."""
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


def pairs_of(
    points: Points, start: Tensors, index: Tensor | None, a: int, b: int
) -> tuple[Points, Tensors, Tensor | None]:
    """The samples ``a:b`` with every reference: the points, their references, and their seeds."""
    count = start[0].shape[0]
    pairs = tuple(x[a:b].detach().repeat_interleave(count, 0) for x in points.inputs)
    more = tuple(x[a:b].repeat_interleave(count, 0) for x in points.more)
    base = tuple(s.detach().repeat(b - a, *(1,) * (s.dim() - 1)) for s in start)
    chosen = index if index is None or index.dim() == 1 else index[a:b].repeat_interleave(count, 0)
    return points.at(pairs, more), base, chosen


class DeepLiftShap(stock.DeepLiftShap, DeepLift):
    """The mean of DeepLift over a distribution of references (SHAP's DeepExplainer, arXiv:1705.07874).

    A drop-in for `captum.attr.DeepLiftShap`, complete even where Captum is not.  Attribute logits, as for DeepLift.
    """

    def __init__(
        self,
        model: nn.Module,
        multiply_by_inputs: bool = True,
        engine: Engine | None = None,
        output: Output = None,
        rules: Rules = "complete",
    ) -> None:
        stock.DeepLiftShap.__init__(self, model, multiply_by_inputs)
        plug_into(self, GradientFunc(_engine_of(rules, engine)), output)

    @typed
    def attribute_all(
        self,
        inputs: Inputs,
        baselines: Any = None,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Any = None,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        ``baselines`` has to be given.  The delta is per pair of sample and reference, as Captum's:
        ``[N · references, C]``.
        """
        check_distribution(self, baselines)
        start = check_references(baselines, inputs)
        as_tuple, rows = compat.is_tuple(inputs), compat.format_tensor_into_tuples(inputs)
        with one_call():
            points = points_for(self, rows, additional_forward_args)
            if points is not None and points.captured() is not None:
                seeds, _ = points.choose(jacobian_choice(targets))
                maps, delta = self._mean(points, seeds, start, return_convergence_delta, custom_attribution_func)
                return answer(maps, as_tuple, seeds, delta)

        def attribute(target: Any) -> Any:
            base = start if as_tuple else start[0]
            fixed = (additional_forward_args, return_convergence_delta, custom_attribution_func)
            return self.attribute(inputs, base, target, *fixed)

        wants_delta = return_convergence_delta
        return one_by_one(self.forward_func, inputs, additional_forward_args, targets, attribute, wants_delta)

    def _mean(
        self, points: Points, seeds: Seeds, start: Tensors, wants_delta: bool, custom: Any = None
    ) -> tuple[Tensors, Tensor | None]:
        """Some samples at a time against all references."""
        rows, n, count, index = points.inputs, points.samples, start[0].shape[0], seeds.rows(0, points.samples)
        means = tuple(x.new_empty(n, seeds.count, *x.shape[1:]) for x in rows)
        deltas = []
        pairs_at_a_time = block_rows(gradient_bytes(rows, seeds.count), rows[0].device)
        for a, b in spans(0, n, max(1, pairs_at_a_time // count)):
            paired, base, chunk_index = pairs_of(points, start, index, a, b)
            options: Options = {"baselines": base, "custom_attribution_func": custom}
            maps = self._rows(paired, chunk_index, seeds.count, options)
            assert maps is not None
            for mean, m in zip(means, maps, strict=True):
                mean[a:b] = m.view(b - a, count, *m.shape[1:]).mean(1)
            if wants_delta:
                deltas.append(self._row_delta(maps, paired, Seeds(seeds.count, seeds.axes, chunk_index), options))
        return means, torch.cat(deltas) if wants_delta else None
