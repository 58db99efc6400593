"""Guided backpropagation and deconvolution, and code shared by every method based on a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from ...dispatch.targets import Seeds
from ...ir.calls import Params
from ...ir.program import Program, Scale
from ...util.chunks import samples_per_chunk, spans, stepwise_bytes
from ...util.memo import Memo
from ...util.options import BadArgument, Engine
from ...util.outputs import Output
from ...util.renamed import keyword_only
from .. import captum_compat as compat
from ..attribute_all import Inputs, Options, RowMethod, Tensors, as_attribute_all, points_for
from ..call import SharedOptions
from ..captum_compat import stock
from ..captum_targets import captum_seeds
from ..plug import GradientFunc, plug_into
from ..points import Points
from .linear import rule_multipliers, rule_values, values_needed
from .rule import Rule, Values


@dataclass(frozen=True)
class Chunk:
    """The rows ``a:b`` of one call, with all arguments of the model and the options of the attribution."""

    program: Program
    params: Params
    rows: Tensors
    a: int
    b: int
    options: Options
    plain_torch: bool  # no kernel runs (`Points.plain_torch`)

    def values(self, rows: Sequence[Tensor], outputs_too: bool = False) -> Values:
        return values_of(self.program, self.params, rows, self.plain_torch, outputs_too)


class ProgramMethod(RowMethod):
    """An input method that needs the model's Program."""

    def _one(self, rows: Tensors, target: Any, extra: Any, options: Options) -> Tensors | None:
        """Attributions ``[N, *in]`` of Captum's ``target``; None if Captum takes the call, errors included."""
        if not isinstance(self.gradient_func, GradientFunc) or not all(isinstance(x, Tensor) for x in rows):
            return None
        points = points_for(self, rows, extra)
        if points is None:
            return None
        try:
            program = points.captured()
            if program is None or not program.steps:
                return None
            seeds, _ = points.choose(lambda n, out: captum_seeds(target, n, out))
            parts = self.row_maps(points, seeds, options)
        except BadArgument:
            return None
        if parts is None:
            return None
        compat.undo_gradient_requirements(rows, compat.apply_gradient_requirements(rows))  # Captum's warnings
        return tuple(p[:, 0] for p in parts)


class RuleMethod(ProgramMethod):
    """An input method that is a rule per form."""

    def _rule(self, chunk: Chunk) -> Rule:
        raise NotImplementedError

    def _supports(self, program: Program) -> bool:
        """Whether the rule covers every step."""
        return True

    def _attributions(self, chunk: Chunk, rule: Rule, multipliers: Tensors, targets: Tensor) -> Tensors:
        """The last step: multipliers ``[n, S, *in]`` to attributions."""
        return multipliers

    def _done(self, points: Points, rule: Rule) -> None:
        """Called after a call, for example to warn about steps without a rule."""

    def row_maps(self, points: Points, seeds: Seeds, options: Options) -> Tensors | None:
        program = points.captured()
        if program is None or not self._supports(program):
            return None
        points.route.check_reached(points.base_request)
        inputs = tuple(x.detach().contiguous() for x in points.base_request.inputs)
        device, n = inputs[0].device, inputs[0].shape[0]
        results, rule = tuple(x.new_empty(n, seeds.count, *x.shape[1:]) for x in points.inputs), None
        with torch.inference_mode(False), torch.no_grad():
            params = points.bound.params()
            for a, b in spans(0, n, samples_at_a_time(program, seeds.count, inputs[0].dtype, device)):
                chunk = Chunk(program, params, tuple(x[a:b] for x in inputs), a, b, options, points.plain_torch)
                targets = seeds.part(a, b).targets(program.outputs, device)
                rule = self._rule(chunk)
                multipliers = rule_multipliers(rule, chunk.rows, targets, points.wrt, native=not points.plain_torch)
                for result, m in zip(results, self._attributions(chunk, rule, multipliers, targets), strict=True):
                    result[a:b] = m
        if rule is not None:
            self._done(points, rule)
        return results


def samples_at_a_time(
    program: Program, seed_count: int, dtype: torch.dtype, device: torch.device, *, least: int = 1
) -> int:
    """The number of samples for which values and slopes (also at the reference) and cotangents fit in memory.

    The peak is about twice the estimate.  Kernels read the values and slopes again, and write no cotangents.
    ``least``: at least that many even if they do not fit in a CPU's caches, because smaller calls cost more.
    """
    shapes, size = 4 * program.shapes, dtype.itemsize
    peak, cached = 2 * stepwise_bytes(shapes, seed_count, size), stepwise_bytes(shapes, 0, size)
    return samples_per_chunk(device, peak, cached, least=least)


def values_of(
    program: Program, params: Params, rows: Sequence[Tensor], plain_torch: bool, outputs_too: bool = False
) -> Values:
    """The values of the forward pass that a rule uses."""
    if plain_torch:
        return Values(program, params, dict(enumerate(rows)))
    return rule_values(program, params, rows, values_needed(program, outputs_too))


class _Rectifying(ProgramMethod):
    """Guided backpropagation and deconvolution: the gradient of a network whose ReLUs send no negative numbers back."""

    _relu = ""

    @keyword_only("engine", "output")
    def __init__(self, model: torch.nn.Module, *, engine: Engine | None = None, output: Output = None) -> None:
        super().__init__(model)
        plug_into(self, GradientFunc(engine), output)

    @compat.log_usage(part_of_slo=True)
    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Captum's ``attribute``, but for every ReLU of the network, including functional, in-place and reused ones."""
        rows = compat.format_tensor_into_tuples(inputs)
        maps = self._one(rows, target, additional_forward_args, {})
        if maps is not None:
            return compat.format_output(compat.is_tuple(inputs), maps)
        captums: Callable[..., Any] = super().attribute.__wrapped__
        return captums(self, inputs, target, additional_forward_args)

    @as_attribute_all
    def attribute_all(
        self,
        inputs: Inputs,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        **shared: Unpack[SharedOptions],
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``."""
        return self._all(inputs, targets, additional_forward_args, {})

    def row_maps(self, points: Points, seeds: Seeds, options: Options) -> Tensors | None:
        program = points.captured()
        if program is None:
            return None
        return points.gradients(points.inputs, points.more, seeds, program=with_relu(program, self._relu))


class GuidedBackprop(_Rectifying, stock.GuidedBackprop):
    """The gradient that passes a ReLU only where its input and the gradient are positive (arXiv:1412.6806).

    A drop-in for `captum.attr.GuidedBackprop`.  Attribute logits: a softmax mixes in the negative gradients of other
    classes, which the rule then drops at random.
    """

    _relu = "guided_relu"


class Deconvolution(_Rectifying, stock.Deconvolution):
    """The gradient that passes a ReLU only where it is positive, whatever its input was (arXiv:1311.2901).

    A drop-in for `captum.attr.Deconvolution`.  Attribute logits, as for guided backpropagation.
    """

    _relu = "open_relu"


_rectified: Memo[Program] = Memo(64)


def with_relu(program: Program, function: str) -> Program:
    """The Program with another function for every ReLU, remembered."""

    def make() -> Program:
        steps = tuple(
            replace(s, form=Scale(function)) if isinstance(s.form, Scale) and s.form.function == "relu" else s
            for s in program.steps
        )
        return replace(program, steps=steps)

    return _rectified.get_or_make((program.key, function), make)
