"""Layer and neuron methods: Captum's, on a Program that is cut at the layer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from captum import attr as captum_attr
from captum._utils.common import _format_output, _format_tensor_into_tuples, _is_tuple
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from ..dispatch import state
from ..dispatch.request import jacobian_choice
from ..ir import graph
from ..runtime import executor, reference
from ..util.options import Complaint
from .outputs import answer, completeness, each_output, points_for, resolved, with_indices
from .plug import GradientFunc, captum_seeds
from .points import part
from .rulemethods import GuidedBackprop
from .split import LayerView, view_of


class LayerMethod:
    """A layer method: ``_layer`` gives the attributions ``[N, S, *layer]`` from a `LayerView`."""

    def _layer(self, view: LayerView, index: Tensor | None, seeds: int, given: dict[str, Any]) -> Tensor | None:
        raise NotImplementedError

    def _ours(self, inputs: tuple[Tensor, ...], extra: Any, given: dict[str, Any], *, now: bool) -> LayerView | None:
        """The model seen from the layer, where this call is not Captum's."""
        if not isinstance(self.gradient_func, GradientFunc):  # type: ignore[attr-defined]
            return None
        if given.get("grad_kwargs") or not isinstance(self.layer, nn.Module) or self.device_ids:  # type: ignore[attr-defined]
            return None
        points = points_for(self, inputs, extra)
        if points is None:
            return None
        return view_of(points, self.layer, bool(given.get("attribute_to_layer_input")), now=now)  # type: ignore[attr-defined]

    def _one(self, inputs: Any, target: Any, extra: Any, given: dict[str, Any], stock: Callable[[], Any]) -> Any:
        """``attribute``: the engine where the model is traced, else Captum, whose time counts towards tracing."""
        rows = _format_tensor_into_tuples(inputs)
        found = None
        if all(isinstance(x, Tensor) for x in rows):
            try:
                view = self._ours(rows, extra, given, now=False)
                if view is not None:
                    seeds, _ = view.points.choose(lambda n, out: captum_seeds(target, n, out))
                    found = self._layer(view, part(seeds, 0, view.points.samples), seeds.count, given)
            except Complaint:
                found = None
        if found is not None:
            return found[:, 0]
        begin = time.perf_counter()
        result = stock()
        self._spent(rows, extra, time.perf_counter() - begin)
        return result

    def _spent(self, rows: tuple[Tensor, ...], extra: Any, seconds: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            points = points_for(self, rows, extra) if all(isinstance(x, Tensor) for x in rows) else None
        if points is not None and points.module is not None:
            key = state.key_of(points.module, (*points.inputs, *points.more))
            state.entry(points.module).spend(key, seconds)

    def _every_output(
        self,
        inputs: Any,
        targets: Any,
        extra: Any,
        given: dict[str, Any],
        stock: Callable[[Any], Any],
        delta: Any = None,
    ) -> Any:
        """``attribute_all``; ``delta``: the baselines, where the convergence delta is wanted."""
        rows = _format_tensor_into_tuples(inputs)
        view = self._ours(rows, extra, given, now=True)
        if view is not None:
            seeds, _ = view.points.choose(jacobian_choice(targets))
            found = self._layer(view, part(seeds, 0, view.points.samples), seeds.count, given)
        if view is not None and found is not None:
            off = None
            if delta is not None:
                off = completeness(self.forward_func, (found,), delta, rows, view.points.more, seeds)  # type: ignore[attr-defined]
            return answer((found,), False, seeds, off)
        seeds, out = resolved(self.forward_func, rows, extra, targets)  # type: ignore[attr-defined]
        return with_indices(each_output(stock, seeds, out, rows[0].shape[0]), seeds)


class LayerGradientXActivation(LayerMethod, captum_attr.LayerGradientXActivation):
    """Gradient times activation at a layer.

    A drop-in for `captum.attr.LayerGradientXActivation`.  Attribute logits: a probability's gradient vanishes where
    the model is sure.
    """

    def __init__(self, *args: Any, engine: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_func = GradientFunc(engine)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Any = None,
    ) -> Any:
        """As Captum's."""
        given = {"attribute_to_layer_input": attribute_to_layer_input, "grad_kwargs": grad_kwargs}
        stock = captum_attr.LayerGradientXActivation.attribute.__wrapped__
        return self._one(
            inputs,
            target,
            additional_forward_args,
            given,
            lambda: stock(self, inputs, target, additional_forward_args, attribute_to_layer_input, grad_kwargs),
        )

    def attribute_all(
        self,
        inputs: Any,
        targets: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *layer]``."""
        given = {"attribute_to_layer_input": attribute_to_layer_input}
        return self._every_output(
            inputs,
            targets,
            additional_forward_args,
            given,
            lambda t: self.attribute(inputs, t, additional_forward_args, attribute_to_layer_input),
        )

    def _layer(self, view, index, seeds, given):
        held = view.forward(view.points.inputs, view.points.more)
        found = view.gradients(held, index, seeds)
        return found.mul_(held[0].unsqueeze(1)) if self.multiplies_by_inputs else found


class LayerGradCam(LayerMethod, captum_attr.LayerGradCam):
    """Activations of a layer, weighted by each channel's mean gradient (Grad-CAM, arXiv:1610.02391).

    A drop-in for `captum.attr.LayerGradCam`.  Attribute logits, as the paper does.
    """

    def __init__(self, *args: Any, engine: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_func = GradientFunc(engine)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: Any = None,
    ) -> Any:
        """As Captum's."""
        given = {
            "attribute_to_layer_input": attribute_to_layer_input,
            "relu_attributions": relu_attributions,
            "attr_dim_summation": attr_dim_summation,
        }
        stock = captum_attr.LayerGradCam.attribute.__wrapped__
        return self._one(
            inputs,
            target,
            additional_forward_args,
            given | {"grad_kwargs": grad_kwargs},
            lambda: stock(self, inputs, target, additional_forward_args, **given, grad_kwargs=grad_kwargs),
        )

    def attribute_all(
        self,
        inputs: Any,
        targets: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, 1, *spatial]``."""
        given = {
            "attribute_to_layer_input": attribute_to_layer_input,
            "relu_attributions": relu_attributions,
            "attr_dim_summation": attr_dim_summation,
        }
        return self._every_output(
            inputs,
            targets,
            additional_forward_args,
            given,
            lambda t: self.attribute(inputs, t, additional_forward_args, **given),
        )

    def _layer(self, view, index, seeds, given):
        held = view.forward(view.points.inputs, view.points.more)
        found = view.gradients(held, index, seeds)  # [N, S, channels, *spatial]
        if found.dim() > 3:
            found = found.mean(tuple(range(3, found.dim())), keepdim=True)
        maps = found * held[0].unsqueeze(1)
        if given.get("attr_dim_summation", True):
            maps = maps.sum(2, keepdim=True)
        return F.relu(maps) if given.get("relu_attributions") else maps


class GuidedGradCam(captum_attr.GuidedGradCam):
    """Guided backpropagation times upsampled Grad-CAM (arXiv:1610.02391).

    A drop-in for `captum.attr.GuidedGradCam`.  Attribute logits, as the paper does.
    """

    def __init__(self, model: nn.Module, layer: nn.Module, device_ids: Any = None, engine: str | None = None) -> None:
        super().__init__(model, layer, device_ids)
        self.gradient_func = GradientFunc(engine)
        self.grad_cam = LayerGradCam(model, layer, device_ids, engine=engine)
        self.guided_backprop = GuidedBackprop(model, engine)

    def attribute_all(
        self,
        inputs: Any,
        targets: Any = None,
        additional_forward_args: Any = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``."""
        many, rows = _is_tuple(inputs), _format_tensor_into_tuples(inputs)
        seeds, out = resolved(self.forward_func, rows, additional_forward_args, targets)
        index = part(seeds, 0, rows[0].shape[0])
        chosen = None if index is None else torch.stack(torch.unravel_index(index, out), -1)
        chosen = chosen if chosen is None or len(out) > 1 else chosen[..., 0]
        if chosen is not None and chosen.dim() == 2 and len(out) > 1:  # [S, axes], for all samples
            chosen = [tuple(c) for c in chosen.tolist()]
        cam = self.grad_cam.attribute_all(
            rows, chosen, additional_forward_args, attribute_to_layer_input, relu_attributions=True
        )
        guided = self.guided_backprop.attribute_all(rows, chosen, additional_forward_args)
        cam = cam.reshape(cam.shape[0], seeds.count, *cam.shape[1 + len(seeds.axes) :]).flatten(0, 1)
        found = []
        for x, g in zip(rows, guided, strict=True):
            g = g.reshape(x.shape[0], seeds.count, *x.shape[1:])
            try:
                wide = LayerAttribution.interpolate(cam, tuple(x.shape[2:]), interpolate_mode=interpolate_mode)
                found.append(g * wide.view(x.shape[0], seeds.count, *wide.shape[1:]))
            except Exception:  # as Captum: shapes that cannot be interpolated
                warnings.warn(
                    "Couldn't appropriately interpolate GradCAM attributions for some input tensors, returning empty "
                    "tensor for corresponding attributions.",
                    stacklevel=2,
                )
                found.append(torch.empty(0).reshape(0, *(0,) * len(seeds.axes)))
        return answer(found, many, seeds)


class NeuronGradient(captum_attr.NeuronGradient):
    """The gradient of one unit of a layer with respect to the input.

    A drop-in for `captum.attr.NeuronGradient`.  Logits or probabilities do not matter: the unit is what is explained.
    """

    def __init__(self, *args: Any, engine: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_func = GradientFunc(engine)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        neuron_selector: Any,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """As Captum's."""
        rows = _format_tensor_into_tuples(inputs)
        found = None
        if all(isinstance(x, Tensor) for x in rows) and isinstance(self.gradient_func, GradientFunc):
            found = self._unit(rows, neuron_selector, additional_forward_args, attribute_to_neuron_input)
        if found is not None:
            return _format_output(_is_tuple(inputs), found)
        begin = time.perf_counter()
        stock = captum_attr.NeuronGradient.attribute.__wrapped__
        result = stock(self, inputs, neuron_selector, additional_forward_args, attribute_to_neuron_input)
        LayerMethod._spent(self, rows, additional_forward_args, time.perf_counter() - begin)  # type: ignore[arg-type]
        return result

    def _unit(self, rows: tuple[Tensor, ...], selector: Any, extra: Any, to_input: bool) -> tuple[Tensor, ...] | None:
        if self.device_ids or not isinstance(self.layer, nn.Module):
            return None
        points = points_for(self, rows, extra)
        view = None if points is None else view_of(points, self.layer, to_input, now=False)
        if points is None or view is None:
            return None
        flat = _unit_number(selector, view.shape)
        head = graph.up_to(view.program, view.value)
        if flat is None or not head.steps or any(not head.consumers[w] for w in points.wrt):
            return None
        inputs = tuple(x.detach().contiguous() for x in (*rows, *points.more))
        targets = torch.tensor([flat])
        with torch.inference_mode(False), torch.no_grad():
            if view.plain:
                found = reference.jacobian(head, view.params, inputs, targets, points.wrt)[1]
            else:
                found = executor.jacobian(head, view.params, inputs, targets, points.wrt)[1]
        return tuple(f[:, 0] for f in found)


def _unit_number(selector: Any, shape: tuple[int, ...]) -> int | None:
    """A unit's flat number; None for selectors that are Captum's (slices, functions) or do not fit."""
    axes = (selector,) if isinstance(selector, int) and not isinstance(selector, bool) else selector
    if not isinstance(axes, tuple) or len(axes) != len(shape) or not all(type(a) is int for a in axes):
        return None
    flat = 0
    for a, n in zip(axes, shape, strict=True):
        if not -n <= a < n:
            return None
        flat = flat * n + a % n
    return flat
