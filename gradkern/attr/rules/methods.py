"""Guided backpropagation and deconvolution, and what every method made of a rule shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from captum import attr as captum_attr
from captum._utils.common import _format_output, _format_tensor_into_tuples, _is_tuple
from captum._utils.gradient import apply_gradient_requirements, undo_gradient_requirements
from captum.log import log_usage
from torch import Tensor

from ...dispatch import batching
from ...ir.program import Program, Scale
from ...runtime import binding
from ...util import options
from ...util.options import Complaint
from ..attribute_all import RowMethod, points_for
from ..plug import GradientFunc, captum_seeds
from ..points import Points, part
from .linear import attribute as rule_attribute
from .linear import forward_values, looked_at
from .rule import Params, Rule

CHUNK_BYTES = 64 << 20  # values and slopes that a CPU holds at a time, where the budget allows it


class RuleMethod(RowMethod):
    """An input method that is a rule per form.  ``_rule`` makes the rule for a chunk of rows."""

    def _rule(
        self,
        program: Program,
        params: Params,
        rows: Sequence[Tensor],
        a: int,
        b: int,
        given: dict[str, Any],
        plain: bool,
    ) -> Rule:
        raise NotImplementedError

    def _supports(self, program: Program) -> bool:
        """Has the rule something to say about every step?"""
        return True

    def _rows(self, rows, more, index, seeds, given):
        points = Points(self.forward_func, rows, more, self.gradient_func.engine)  # type: ignore[attr-defined]
        program = points.traced()
        if program is None or not self._supports(program):
            return None
        inputs = tuple(x.detach().contiguous() for x in (*rows, *more))
        device = inputs[0].device
        targets = torch.arange(program.outputs, device=device) if index is None else index.to(device)
        plain = options.engine(points.engine) == "reference" or any(map(batching.not_native, inputs))
        results = tuple(x.new_empty(x.shape[0], seeds, *x.shape[1:]) for x in inputs[: len(rows)])
        with torch.inference_mode(False), torch.no_grad():
            params = binding.bind(program, points.module)
            n = inputs[0].shape[0]
            step = chunk_of(program, seeds, inputs[0].dtype, device)
            for a in range(0, n, step):
                b = min(a + step, n)
                here = tuple(x[a:b] for x in inputs)
                rule = self._rule(program, params, here, a, b, given, plain)
                chosen = targets[a:b] if targets.dim() == 2 else targets
                found = rule_attribute(rule, here, chosen, points.wrt, native=not plain)
                for result, part_ in zip(results, self._finished(rule, found, here, chosen, a, b, given), strict=True):
                    result[a:b] = part_
        return results

    def _finished(
        self,
        rule: Rule,
        found: tuple[Tensor, ...],
        rows: Sequence[Tensor],
        targets: Tensor,
        a: int,
        b: int,
        given: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """The reduction: multipliers ``[n, S, *in]`` to attributions."""
        return found


def one_target(
    method: Any, inputs: tuple[Tensor, ...], target: Any, extra: Any, given: dict[str, Any]
) -> tuple[Tensor, ...] | None:
    """Attributions ``[N, *in]`` of Captum's ``target``; None where the call is Captum's, its errors included."""
    points = points_for(method, inputs, extra)
    if points is None:
        return None
    try:
        program = points.traced()
        if program is None or any(not program.consumers[w] for w in points.wrt):
            return None
        seeds, _ = points.choose(lambda n, out: captum_seeds(target, n, out))
        parts = method._rows(inputs, points.more, part(seeds, 0, points.samples), seeds.count, given)
    except Complaint:
        return None
    return None if parts is None else tuple(p[:, 0] for p in parts)


def chunk_of(program: Program, seeds: int, dtype: torch.dtype, device: torch.device) -> int:
    """Samples at a time: their values, references and slopes, and the plain executor's cotangents."""
    numels = [math.prod(program.shape(v)) for v in range(len(program.inputs) + len(program.steps))]
    each = dtype.itemsize * (4 * sum(numels) + 3 * seeds * max(numels))
    budget = options.memory_budget(device)
    room = min(CHUNK_BYTES, budget) if device.type == "cpu" else budget // 3  # a GPU wants large pieces
    return max(1, room // max(each, 1))


def values_of(program: Program, params: Params, rows: Sequence[Tensor], plain: bool, outputs_too: bool = False) -> Any:
    """The forward pass that a rule looks at."""
    from .rule import Values

    if plain:
        return Values(program, params, dict(enumerate(rows)))
    return forward_values(program, params, rows, looked_at(program, outputs_too))


class _Rectifying(RowMethod):
    """Guided backpropagation and deconvolution: the gradient of a network whose ReLUs send no negative numbers back."""

    _relu = ""

    def __init__(self, model: torch.nn.Module, engine: str | None = None) -> None:
        super().__init__(model)  # type: ignore[call-arg]
        self.gradient_func = GradientFunc(engine)

    @log_usage(part_of_slo=True)
    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        """As Captum's, but for every ReLU of the network, functional, in-place and reused ones included."""
        rows = _format_tensor_into_tuples(inputs)
        found = None
        if all(isinstance(x, Tensor) for x in rows) and isinstance(self.gradient_func, GradientFunc):
            found = one_target(self, rows, target, additional_forward_args, {})
        if found is None:
            stock: Callable[..., Any] = super().attribute.__wrapped__  # type: ignore[misc]
            return stock(self, inputs, target, additional_forward_args)
        undo_gradient_requirements(rows, apply_gradient_requirements(rows))  # Captum's warnings
        return _format_output(_is_tuple(inputs), found)

    def attribute_all(
        self, inputs: Tensor | tuple[Tensor, ...], targets: Any = None, additional_forward_args: Any = None
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``."""
        return self._every(inputs, targets, additional_forward_args, {})

    def _rows(self, rows, more, index, seeds, given):
        points = Points(self.forward_func, rows, more, self.gradient_func.engine)
        program = points.traced()
        if program is None:
            return None
        return points.gradients(rows, more, index, seeds, program=with_relu(program, self._relu))


class GuidedBackprop(_Rectifying, captum_attr.GuidedBackprop):
    """The gradient that passes a ReLU only where its input and the gradient are positive (arXiv:1412.6806).

    A drop-in for `captum.attr.GuidedBackprop`.  Attribute logits: a softmax mixes the other classes' negative
    gradients in, which the rule then drops at random.
    """

    _relu = "guided_relu"


class Deconvolution(_Rectifying, captum_attr.Deconvolution):
    """The gradient that passes a ReLU only where it is positive, whatever its input was (arXiv:1311.2901).

    A drop-in for `captum.attr.Deconvolution`.  Attribute logits, as for guided backpropagation.
    """

    _relu = "open_relu"


def with_relu(program: Program, function: str) -> Program:
    """The Program with another function for every ReLU, remembered."""
    key = (program.key, function)
    found = _rewritten.get(key)
    if found is None:
        steps = tuple(
            replace(s, form=Scale(function)) if isinstance(s.form, Scale) and s.form.function == "relu" else s
            for s in program.steps
        )
        found = replace(program, steps=steps)
        if len(_rewritten) > 64:
            _rewritten.clear()
        _rewritten[key] = found
    return found


_rewritten: dict[tuple[str, str], Program] = {}
