"""Layer methods along a path of inputs or activations, their steps summed as they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from captum import attr as captum_attr
from captum._utils.common import _format_tensor_into_tuples
from captum.attr._utils.approximation_methods import approximation_parameters
from captum.attr._utils.common import _format_input_baseline, _tensorize_baseline, _validate_input
from captum.log import log_usage
from torch import Tensor

from ..paths import times_difference
from ..plug import GradientFunc
from ..points import Points, between, weighted_sum
from .methods import LayerMethod
from .split import LayerView


class InternalInfluence(LayerMethod, captum_attr.InternalInfluence):
    """The mean gradient at a layer along a path of inputs (Leino et al., arXiv:1802.03788).

    A drop-in for `captum.attr.InternalInfluence`.  Attribute logits: the path saturates in probabilities.
    """

    def __init__(self, *args: Any, engine: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_func = GradientFunc(engine)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Any = None,
    ) -> Any:
        """As Captum's; ``internal_batch_size`` is not needed to bound memory."""
        given = {
            "baselines": baselines,
            "n_steps": n_steps,
            "method": method,
            "attribute_to_layer_input": attribute_to_layer_input,
            "grad_kwargs": grad_kwargs,
        }
        _checked(inputs, given)
        stock = captum_attr.InternalInfluence.attribute.__wrapped__
        return self._one(
            inputs,
            target,
            additional_forward_args,
            given,
            lambda: stock(
                self,
                inputs,
                target=target,
                additional_forward_args=additional_forward_args,
                internal_batch_size=internal_batch_size,
                **given,
            ),
        )

    def attribute_all(
        self,
        inputs: Any,
        targets: Any = None,
        baselines: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *layer]``."""
        given = {
            "baselines": baselines,
            "n_steps": n_steps,
            "method": method,
            "attribute_to_layer_input": attribute_to_layer_input,
        }
        _checked(inputs, given)
        return self._every_output(
            inputs,
            targets,
            additional_forward_args,
            given,
            lambda t: self.attribute(inputs, target=t, additional_forward_args=additional_forward_args, **given),
        )

    def _layer(self, view, index, seeds, given):
        sizes, alphas = approximation_parameters(given["method"])
        weights = torch.tensor(sizes(given["n_steps"]))
        total = _layer_room(view, seeds)
        for a, b, first, last, at, more in _path(view, alphas(given["n_steps"]), seeds, given):
            held = view.forward(at, more)
            grads = view.gradients(held, _repeated(index, a, b, last - first), seeds)
            total[a:b] += weighted_sum(grads, weights[first:last])
        return total


class LayerConductance(LayerMethod, captum_attr.LayerConductance):
    """How much of integrated gradients flows through each unit of a layer (Dhamdhere et al., arXiv:1805.12233).

    A drop-in for `captum.attr.LayerConductance`.  Logits and probabilities are both complete; prefer logits.
    """

    def __init__(self, *args: Any, engine: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_func = GradientFunc(engine)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Any = None,
    ) -> Any:
        """As Captum's; ``internal_batch_size`` is not needed to bound memory."""
        given = {
            "baselines": baselines,
            "n_steps": n_steps,
            "method": method,
            "attribute_to_layer_input": attribute_to_layer_input,
            "grad_kwargs": grad_kwargs,
        }
        rows, start = _checked(inputs, given)
        stock = captum_attr.LayerConductance.attribute.__wrapped__
        found = self._one(
            inputs,
            target,
            additional_forward_args,
            given,
            lambda: stock(
                self,
                inputs,
                target=target,
                additional_forward_args=additional_forward_args,
                internal_batch_size=internal_batch_size,
                **given,
            ),
        )
        if not return_convergence_delta:
            return found
        parts = found if isinstance(found, tuple) else (found,)
        return found, self.compute_convergence_delta(
            parts, start, rows, target=target, additional_forward_args=additional_forward_args
        )

    def attribute_all(
        self,
        inputs: Any,
        targets: Any = None,
        baselines: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *layer]``."""
        given = {
            "baselines": baselines,
            "n_steps": n_steps,
            "method": method,
            "attribute_to_layer_input": attribute_to_layer_input,
        }
        _, start = _checked(inputs, given)
        more = given | {"return_convergence_delta": return_convergence_delta}
        return self._every_output(
            inputs,
            targets,
            additional_forward_args,
            given,
            lambda t: self.attribute(inputs, target=t, additional_forward_args=additional_forward_args, **more),
            start if return_convergence_delta else None,
        )

    def _layer(self, view, index, seeds, given):
        _, alphas = approximation_parameters(given["method"])
        total = _layer_room(view, seeds)
        carried: tuple[Tensor, Tensor] | None = None  # the last step's activations and gradients
        for a, b, first, last, at, more in _path(view, alphas(given["n_steps"] + 1), seeds, given):
            steps, rows = last - first, b - a
            held = view.forward(at, more)
            grads = view.gradients(held, _repeated(index, a, b, steps), seeds)
            acts = held[0].view(steps, rows, 1, *view.shape)
            grads = grads.view(steps, rows, seeds, *view.shape)
            if first and carried is not None:
                total[a:b] += carried[1] * (acts[0] - carried[0])
            for k in range(steps - 1):
                total[a:b] += grads[k] * (acts[k + 1] - acts[k])
            carried = (acts[-1], grads[-1])
        return total


class LayerIntegratedGradients(LayerMethod, captum_attr.LayerIntegratedGradients):
    """Integrated gradients on a path between a layer's activations at the baseline and at the input.

    A drop-in for `captum.attr.LayerIntegratedGradients`.  Logits and probabilities are both complete; prefer logits.
    """

    def __init__(self, *args: Any, engine: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_func = GradientFunc(engine)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Any = None,
    ) -> Any:
        """As Captum's; ``internal_batch_size`` is not needed to bound memory."""
        given = {
            "baselines": baselines,
            "n_steps": n_steps,
            "method": method,
            "attribute_to_layer_input": attribute_to_layer_input,
            "grad_kwargs": grad_kwargs,
        }
        rows, start = _checked(inputs, given)
        stock = captum_attr.LayerIntegratedGradients.attribute.__wrapped__
        found = self._one(
            inputs,
            target,
            additional_forward_args,
            given,
            lambda: stock(
                self,
                inputs,
                target=target,
                additional_forward_args=additional_forward_args,
                internal_batch_size=internal_batch_size,
                **given,
            ),
        )
        if not return_convergence_delta:
            return found
        parts = tuple(t for f in (found if isinstance(found, list) else [found]) for t in _format_tensor_into_tuples(f))
        return found, self.compute_convergence_delta(
            parts, start, rows, additional_forward_args=additional_forward_args, target=target
        )

    def attribute_all(
        self,
        inputs: Any,
        targets: Any = None,
        baselines: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *layer]``."""
        given = {
            "baselines": baselines,
            "n_steps": n_steps,
            "method": method,
            "attribute_to_layer_input": attribute_to_layer_input,
        }
        _, start = _checked(inputs, given)
        more = given | {"return_convergence_delta": return_convergence_delta}
        return self._every_output(
            inputs,
            targets,
            additional_forward_args,
            given,
            lambda t: self.attribute(inputs, target=t, additional_forward_args=additional_forward_args, **more),
            start if return_convergence_delta else None,
        )

    def _layer(self, view, index, seeds, given):
        if not view.exclusive:  # Captum moves the layer's input alone, and other readers of that value stay
            return None
        points = view.points
        inputs, start = _format_input_baseline(points.inputs, given["baselines"])
        start = _tensorize_baseline(inputs, start)
        held = view.forward(inputs, points.more)
        base = view.forward(start, points.more)[0]
        sizes, alphas = approximation_parameters(given["method"])
        weights, places = (
            torch.tensor(sizes(given["n_steps"])).float(),
            torch.tensor(alphas(given["n_steps"]), dtype=torch.float64),
        )
        total = _layer_room(view, seeds)
        inner = Points(points.fn, held[:1])
        for a, b, first, last in inner.blocks(len(places), seeds):
            at = between(held[:1], (base,), a, b, places[first:last])
            steps = last - first
            crossing = [x[a:b].repeat(steps, *(1,) * (x.dim() - 1)) for x in held[1:]]
            grads = view.gradients((*at, *crossing), _repeated(index, a, b, steps), seeds)
            total[a:b] += weighted_sum(grads, weights[first:last])
        if self.multiplies_by_inputs:
            times_difference((total,), held[:1], (base,))
        return total


# ---------------------------------------------------------------------------------------------------------------
# Paths of inputs, seen from a layer


def _checked(inputs: Any, given: dict[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    rows, start = _format_input_baseline(inputs, given["baselines"])
    _validate_input(rows, start, given["n_steps"], given["method"])
    return rows, start


def _layer_room(view: LayerView, seeds: int) -> Tensor:
    x = view.points.inputs[0]
    return torch.zeros(x.shape[0], seeds, *view.shape, dtype=x.dtype, device=x.device)


def _path(view: LayerView, alphas: Sequence[float], seeds: int, given: dict[str, Any]) -> Any:
    """Blocks of points on the way from the baselines: ``(a, b, first, last, points, more)``."""
    points = view.points
    inputs, start = _format_input_baseline(points.inputs, given["baselines"])
    places = torch.tensor(alphas, dtype=torch.float64)
    size = torch.empty((), dtype=inputs[0].dtype).expand(points.samples, *view.shape)
    for a, b, first, last in Points(points.fn, (size,)).blocks(len(alphas), seeds):
        at = between(inputs, start, a, b, places[first:last])
        more = [x[a:b].repeat(last - first, *(1,) * (x.dim() - 1)) for x in points.more]
        yield a, b, first, last, at, more


def _repeated(index: Tensor | None, a: int, b: int, steps: int) -> Tensor | None:
    return index if index is None or index.dim() == 1 else index[a:b].repeat(steps, 1)
