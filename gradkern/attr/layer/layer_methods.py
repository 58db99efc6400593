"""Captum's layer methods, on a Program that is cut at the layer.

A layer method consists of its mathematics (`layer_maps`, on a `LayerView`) and two lines: `make_attribute` and
`make_attribute_all` read Captum's signature and make ``attribute`` and ``attribute_all``.
"""

from __future__ import annotations

import functools
import inspect
import time
import warnings
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dispatch.targets import Seeds, jacobian_choice
from ...util.options import BadArgument, Engine
from ...util.outputs import Output
from ...util.renamed import keyword_only, old_names
from .. import captum_compat as compat
from ..attribute_all import (
    AttributeAll,
    Inputs,
    Options,
    Tensors,
    answer,
    as_attribute_all,
    completeness,
    one_by_one,
    points_for,
    resolve_targets,
)
from ..call import POSITIONAL, PublicMethod, SharedOptions, keep_buffers
from ..captum_compat import stock
from ..captum_targets import captum_seeds
from ..plug import GradientFunc, plug_into
from ..rules.rule_methods import GuidedBackprop
from .split import LayerView, view_of

LayerMaps = tuple[Tensors, Tensor | None]  # the attributions, and their convergence delta


class LayerMethod(PublicMethod, stock.GradientAttribution):
    """A method of a layer: ``layer_maps`` gives the attributions ``[N, S, *layer]`` from a `LayerView`."""

    _takes_integers = True  # inputs may be indices into an embedding

    def __init__(self, *args: Any, engine: Engine | None = None, output: Output = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plug_into(self, GradientFunc(engine), output)

    def layer_maps(self, view: LayerView, seeds: Seeds, options: Options) -> Tensor | None:
        raise NotImplementedError

    def _maps(self, view: LayerView, seeds: Seeds, options: Options, delta: bool) -> LayerMaps | None:
        """The attributions, and with ``delta`` the convergence delta ``[…, S]``; None if Captum takes the call."""
        maps = self.layer_maps(view, seeds, options)
        if maps is None:
            return None
        return (maps,), self._delta(view, (maps,), seeds, options) if delta else None

    def _delta(self, view: LayerView, parts: Tensors, seeds: Seeds, options: Options) -> Tensor:
        _, start = compat.format_input_baseline(view.points.inputs, options["baselines"])
        return completeness(view.points, parts, start, seeds)

    def _as_tuple(self, options: Options) -> bool:
        """Whether the attributions are a tuple; those of a layer are not."""
        return False

    def _once(self, target: Any, options: Options) -> Any:
        """``attribute`` for one of the outputs of ``attribute_all``."""
        return self.attribute(target=target, **options)

    def _view(self, inputs: Tensors, extra: Any, options: Options, *, now: bool) -> LayerView | None:
        """The model seen from the layer; None if Captum takes this call."""
        if not isinstance(self.gradient_func, GradientFunc) or not all(isinstance(x, Tensor) for x in inputs):
            return None
        if options.get("grad_kwargs") or not isinstance(self.layer, nn.Module) or self.device_ids:
            return None
        points = points_for(self, inputs, extra, integers=self._takes_integers)
        if points is None:
            return None
        to_input = options.get("attribute_to_layer_input") or options.get("attribute_to_neuron_input")
        return view_of(points, self.layer, bool(to_input), now=now)

    def _one(self, rows: Tensors, options: Options, delta: bool) -> Any:
        """``attribute`` on the engine, if there is a Program; with ``delta`` a pair; None if Captum takes the call."""
        try:
            view = self._view(rows, options["additional_forward_args"], options, now=False)
            if view is None:
                return None
            seeds, _ = view.points.choose(lambda n, out: captum_seeds(options["target"], n, out))
            result = self._maps(view, seeds, options, delta)
        except BadArgument:
            return None
        if result is None:
            return None
        parts = tuple(p[:, 0] for p in result[0])
        maps = parts if self._as_tuple(options) else parts[0]
        return maps if result[1] is None else (maps, result[1][:, 0])

    def _all(self, rows: Tensors, targets: Any, options: Options) -> Any:
        """``attribute_all`` on the engine; None if Captum takes the call."""
        view = self._view(rows, options["additional_forward_args"], options, now=True)
        if view is None:
            return None
        seeds, _ = view.points.choose(jacobian_choice(targets))
        result = self._maps(view, seeds, options, bool(options.get("return_convergence_delta")))
        return None if result is None else answer(result[0], self._as_tuple(options), seeds, result[1])

    def _spent(self, rows: Tensors, extra: Any, seconds: float) -> None:
        """Count Captum's time in the decision to capture."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = all(isinstance(x, Tensor) for x in rows)
            points = points_for(self, rows, extra, integers=self._takes_integers) if tensors else None
        if points is not None:
            points.route.entry.work.other += seconds


def make_attribute(kind: Any) -> Any:
    """``attribute`` on the engine, with the signature, results and errors of Captum's class."""
    captums = compat.unlogged(kind)
    signature = inspect.signature(captums)

    @compat.log_usage(part_of_slo=True)
    @functools.wraps(captums)
    def attribute(self: LayerMethod, *args: Any, **kwargs: Any) -> Any:
        options = _arguments(signature, self, args, kwargs)  # Captum's own names
        rows, extra = compat.format_tensor_into_tuples(options["inputs"]), options["additional_forward_args"]
        result = self._one(rows, options, bool(options.get("return_convergence_delta")))
        if result is None:
            keep_buffers(self.forward_func)
            begin = time.perf_counter()
            result = captums(self, **options)
            self._spent(rows, extra, time.perf_counter() - begin)
        return result

    return attribute


def make_attribute_all(kind: Any) -> AttributeAll:
    """``attribute_all`` on the engine: the arguments of Captum's class, most of them by name, with ``targets`` in place
    of ``target``."""
    parameters = dict(inspect.signature(compat.unlogged(kind)).parameters)
    targets = parameters.pop("target").replace(name="targets", annotation=Any, default=None)
    places = [p for name, p in parameters.items() if name in POSITIONAL]
    named = [p for name, p in parameters.items() if name not in POSITIONAL]
    signature = inspect.Signature([*places, *(p.replace(kind=p.KEYWORD_ONLY) for p in (targets, *named))])

    def attribute_all(self: LayerMethod, *args: Any, **kwargs: Any) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *layer]``."""
        options = _arguments(signature, self, args, kwargs)
        targets, inputs = options.pop("targets"), options["inputs"]
        maps = self._all(compat.format_tensor_into_tuples(inputs), targets, options)
        if maps is not None:
            return maps
        extra = options["additional_forward_args"]
        delta = bool(options.get("return_convergence_delta"))
        return one_by_one(self.forward_func, inputs, extra, targets, lambda t: self._once(t, options), delta)

    attribute_all.__signature__ = signature  # type: ignore[attr-defined]
    return as_attribute_all(attribute_all)


__getattr__ = old_names(globals(), {"one_output": "make_attribute", "all_outputs": "make_attribute_all"})


def _arguments(signature: inspect.Signature, method: LayerMethod, args: Any, kwargs: Options) -> Options:
    """The call's arguments by name, without ``self``; paths are checked as Captum checks them."""
    bound = signature.bind(method, *args, **kwargs)
    bound.apply_defaults()
    options = dict(list(bound.arguments.items())[1:])
    if "n_steps" in options and "baselines" in options:
        path = compat.format_input_baseline(options["inputs"], options["baselines"])
        compat.validate_input(*path, options["n_steps"], options["method"])
    return options


class LayerGradientXActivation(LayerMethod, stock.LayerGradientXActivation):
    """Gradient times activation at a layer.

    A drop-in for `captum.attr.LayerGradientXActivation`.  Attribute logits: a probability's gradient vanishes where
    the model is sure.
    """

    attribute = make_attribute(stock.LayerGradientXActivation)
    attribute_all = make_attribute_all(stock.LayerGradientXActivation)

    def layer_maps(self, view: LayerView, seeds: Seeds, options: Options) -> Tensor:
        value, gradients = view.at_inputs(seeds)
        return gradients.mul_(value.unsqueeze(1)) if self.multiplies_by_inputs else gradients


class LayerGradCam(LayerMethod, stock.LayerGradCam):
    """Activations of a layer, weighted by each channel's mean gradient (Grad-CAM, arXiv:1610.02391).

    A drop-in for `captum.attr.LayerGradCam`.  Attribute logits, as the paper does.
    """

    attribute = make_attribute(stock.LayerGradCam)
    attribute_all = make_attribute_all(stock.LayerGradCam)

    def layer_maps(self, view: LayerView, seeds: Seeds, options: Options) -> Tensor:
        value, gradients = view.at_inputs(seeds)  # [N, S, channels, *spatial]
        if gradients.dim() > 3:
            gradients = gradients.mean(tuple(range(3, gradients.dim())), keepdim=True)
        maps = gradients * value.unsqueeze(1)
        if options["attr_dim_summation"]:
            maps = maps.sum(2, keepdim=True)
        return F.relu(maps) if options["relu_attributions"] else maps


class GuidedGradCam(PublicMethod, stock.GuidedGradCam):
    """Guided backpropagation times upsampled Grad-CAM (arXiv:1610.02391).

    A drop-in for `captum.attr.GuidedGradCam`.  Attribute logits, as the paper does.
    """

    @keyword_only("engine", "output")
    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        device_ids: Any = None,
        *,
        engine: Engine | None = None,
        output: Output = None,
    ) -> None:
        super().__init__(model, layer, device_ids)
        plug_into(self, GradientFunc(engine), output)
        self.grad_cam = LayerGradCam(model, layer, device_ids, engine=engine, output=output)
        self.guided_backprop = GuidedBackprop(model, engine=engine, output=output)

    @as_attribute_all
    def attribute_all(
        self,
        inputs: Inputs,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``."""
        rows = compat.format_tensor_into_tuples(inputs)
        seeds, out = resolve_targets(self.forward_func, rows, additional_forward_args, targets)
        chosen = _as_targets(seeds.indices, out)
        given = {"targets": chosen, "additional_forward_args": additional_forward_args}
        cam = self.grad_cam.attribute_all(
            rows, **given, attribute_to_layer_input=attribute_to_layer_input, relu_attributions=True
        )
        guided = self.guided_backprop.attribute_all(rows, **given)
        cam = cam.reshape(cam.shape[0], seeds.count, *cam.shape[1 + len(seeds.axes) :]).flatten(0, 1)
        maps = []
        for x, g in zip(rows, guided, strict=True):
            g = g.reshape(x.shape[0], seeds.count, *x.shape[1:])
            try:
                wide = stock.LayerAttribution.interpolate(cam, tuple(x.shape[2:]), interpolate_mode=interpolate_mode)
                maps.append(g * wide.view(x.shape[0], seeds.count, *wide.shape[1:]))
            except Exception:  # Captum, too, accepts shapes that cannot be interpolated
                warnings.warn(
                    "Couldn't appropriately interpolate GradCAM attributions for some input tensors, returning empty "
                    "tensor for corresponding attributions.",
                    stacklevel=2,
                )
                maps.append(torch.empty(0).reshape(0, *(0,) * len(seeds.axes)))
        return answer(maps, compat.is_tuple(inputs), seeds)


def _as_targets(index: Tensor | None, out: tuple[int, ...]) -> Any:
    """Flat output indices (None, ``[S]`` or ``[N, S]``) as `gradkern.jacobian` takes them."""
    if index is None or len(out) == 1:
        return index.tolist() if index is not None and index.dim() == 1 else index
    axes = torch.stack(torch.unravel_index(index, out), -1)  # [..., axes]
    return axes if axes.dim() == 3 else [tuple(a) for a in axes.tolist()]
