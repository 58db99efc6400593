"""Captum's neuron methods: the methods of inputs, on a Program that ends at the layer.

A neuron method is a line that names the method of inputs, and Captum's signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import batching
from ...dispatch.targets import Seeds
from ...ir import graph
from ...ir.program import Program
from .. import captum_compat as compat
from ..attribute_all import Options, RowMethod, Tensors
from ..call import as_instance_of
from ..captum_compat import format_output, is_tuple, stock
from ..noise_tunnel import AllOutputs, NoiseTunnel
from ..paths import IntegratedGradients, RandomPoint, check_tensors, path_steps, times_difference
from ..points import Points, between, blocks, gradient_bytes, repeat_rows, weighted_sum
from ..references import References
from ..rules.averaging import ContributionOptions
from ..rules.deeplift import DeepLift, DeepLiftShap, check_references
from ..rules.rule_methods import Deconvolution, GuidedBackprop
from .layer_methods import LayerMethod, make_attribute, make_attribute_all
from .split import LayerView


class NeuronPoints(Points):
    """A model whose outputs are the units of a layer."""

    def __init__(self, view: LayerView, inputs: Sequence[Tensor] | None = None, more: Sequence[Tensor] = ()) -> None:
        points = view.points
        given = (points.inputs, points.more) if inputs is None else (inputs, more)
        super().__init__(points.fn, *given, points.engine)
        self.view, self.head = view, graph.up_to(view.program, view.value)

    def at(self, inputs: Sequence[Tensor], more: Sequence[Tensor]) -> NeuronPoints:
        return NeuronPoints(self.view, inputs, more)

    def program(self) -> Program:
        return self.head

    def captured(self) -> Program:
        return self.head

    def gradients(
        self,
        points: Sequence[Tensor],
        more: Sequence[Tensor],
        seeds: Seeds,
        *,
        program: Program | None = None,
        ahead: int = 0,
    ) -> Tensors:
        return super().gradients(points, more, seeds, program=program or self.head, ahead=ahead)


class NeuronMethod(LayerMethod):
    """A method of inputs that explains one unit of a layer, and no output."""

    _takes_integers = False  # their gradient is computed
    method_on_inputs: type[RowMethod]

    def _neuron(self, points: NeuronPoints, unit: Seeds, options: Options) -> Tensors | None:
        """Attributions ``[N, 1, *in]`` of the unit."""
        return as_instance_of(self.method_on_inputs, self).row_maps(points, unit, options)

    def _one(self, rows: Tensors, options: Options, delta: bool) -> Any:
        view = self._view(rows, options["additional_forward_args"], options, now=False)
        unit = None if view is None else unit_of(view, options["neuron_selector"])
        if view is None or unit is None:
            return None
        parts = self._neuron(unit[0], unit[1], options)
        return None if parts is None else format_output(is_tuple(options["inputs"]), tuple(p[:, 0] for p in parts))


def unit_of(view: LayerView, selector: Any) -> tuple[NeuronPoints, Seeds] | None:
    """The model up to the layer, and its unit as a seed; None if Captum takes the call."""
    unit, points = unit_number(selector, view.shape), NeuronPoints(view)
    if unit is None or not points.head.steps or any(not points.head.consumers[w] for w in points.wrt):
        return None
    return points, Seeds.of(torch.tensor([unit]))


def unit_number(selector: Any, shape: tuple[int, ...]) -> int | None:
    """A unit's flat index; None for selectors that are left to Captum (slices, functions) or do not fit."""
    axes = (selector,) if isinstance(selector, int) and not isinstance(selector, bool) else selector
    if not isinstance(axes, tuple) or len(axes) != len(shape) or not all(type(a) is int for a in axes):
        return None
    flat = 0
    for a, n in zip(axes, shape, strict=True):
        if not -n <= a < n:
            return None
        flat = flat * n + a % n
    return flat


class NeuronGradient(NeuronMethod, stock.NeuronGradient):
    """The gradient of one unit of a layer with respect to the input.

    A drop-in for `captum.attr.NeuronGradient`.  It explains the unit, so logits and probabilities do not matter.
    """

    attribute = make_attribute(stock.NeuronGradient)

    def _neuron(self, points: NeuronPoints, unit: Seeds, options: Options) -> Tensors:
        return points.gradients(points.inputs, points.more, unit)


class NeuronIntegratedGradients(NeuronMethod, stock.NeuronIntegratedGradients):
    """Integrated gradients of one unit of a layer (arXiv:1703.01365).

    A drop-in for `captum.attr.NeuronIntegratedGradients`.
    """

    method_on_inputs = IntegratedGradients
    attribute = make_attribute(stock.NeuronIntegratedGradients)


class NeuronDeepLift(NeuronMethod, stock.NeuronDeepLift):
    """DeepLift of one unit of a layer (arXiv:1704.02685), by the rules of `DeepLift`.

    A drop-in for `captum.attr.NeuronDeepLift`.
    """

    method_on_inputs = DeepLift
    attribute = make_attribute(stock.NeuronDeepLift)

    def _neuron(self, points: NeuronPoints, unit: Seeds, options: Options) -> Tensors | None:
        compat.validate_input(points.inputs, compat.format_baseline(options["baselines"], points.inputs))
        return super()._neuron(points, unit, options)


class NeuronDeepLiftShap(NeuronMethod, stock.NeuronDeepLiftShap):
    """The mean of DeepLift of one unit of a layer over a distribution of references (arXiv:1705.07874).

    A drop-in for `captum.attr.NeuronDeepLiftShap`.
    """

    attribute = make_attribute(stock.NeuronDeepLiftShap)

    def _neuron(self, points: NeuronPoints, unit: Seeds, options: Options) -> Tensors | None:
        start = check_references(options["baselines"], options["inputs"])
        references, wanted = (
            References.of_all(points.inputs, start),
            ContributionOptions(custom=options["custom_attribution_func"]),
        )
        return as_instance_of(DeepLiftShap, self)._mean(points, unit, references, wanted)[0]


class NeuronGradientShap(NeuronMethod, stock.NeuronGradientShap):
    """Expected gradients of one unit of a layer over random baselines (SHAP's GradientExplainer).

    A drop-in for `captum.attr.NeuronGradientShap`, with equal numbers for equal seeds of torch and numpy.
    """

    attribute = make_attribute(stock.NeuronGradientShap)

    def _neuron(self, points: NeuronPoints, unit: Seeds, options: Options) -> Tensors | None:
        start = check_tensors(compat.format_callable_baseline(options["baselines"], options["inputs"]))
        tunnel = NoiseTunnel(as_instance_of(RandomPoint, self))
        run = AllOutputs(tunnel, points.inputs, points, unit, {"baselines": start}, True, False)
        average = run.average(options["n_samples"], None, options["stdevs"])
        return None if average is None else average.smoothed(tunnel, "smoothgrad", options["n_samples"])


class NeuronGuidedBackprop(NeuronMethod, stock.NeuronGuidedBackprop):
    """Guided backpropagation from one unit of a layer (arXiv:1412.6806).

    A drop-in for `captum.attr.NeuronGuidedBackprop`.
    """

    method_on_inputs = GuidedBackprop
    attribute = make_attribute(stock.NeuronGuidedBackprop)


class NeuronDeconvolution(NeuronMethod, stock.NeuronDeconvolution):
    """Deconvolution from one unit of a layer (arXiv:1311.2901).

    A drop-in for `captum.attr.NeuronDeconvolution`.
    """

    method_on_inputs = Deconvolution
    attribute = make_attribute(stock.NeuronDeconvolution)


class NeuronConductance(NeuronMethod, stock.NeuronConductance):
    """How much of integrated gradients flows from each input through one unit of a layer (arXiv:1805.12233).

    A drop-in for `captum.attr.NeuronConductance`.  Logits and probabilities are both complete over all units of a
    layer; prefer logits.
    """

    attribute = make_attribute(stock.NeuronConductance)
    attribute_all = make_attribute_all(stock.NeuronConductance)
    _one = LayerMethod._one

    def _maps(self, view: LayerView, seeds: Seeds, options: Options, delta: bool) -> Any:
        unit = unit_of(view, options["neuron_selector"])
        return None if unit is None else (self._through(view, *unit, seeds, options), None)

    def _through(self, view: LayerView, points: NeuronPoints, unit: Seeds, seeds: Seeds, options: Options) -> Tensors:
        """``∂y_s/∂unit · ∂unit/∂x`` along the path, ``[N, S, *in]`` per input."""
        inputs, start = compat.format_input_baseline(points.inputs, options["baselines"])
        weights, alphas = path_steps(options["method"], options["n_steps"])
        assert unit.indices is not None
        column = int(unit.indices)
        totals = tuple(x.new_zeros(x.shape[0], seeds.count, *x.shape[1:]) for x in inputs)
        layer = torch.empty((), dtype=inputs[0].dtype).expand(1, *view.shape)
        size, device = gradient_bytes([layer, *inputs], seeds.count), inputs[0].device
        for a, b, first, last in blocks(points.samples, len(alphas), size, device, options["internal_batch_size"]):
            steps = last - first
            at, more = between(inputs, start, a, b, alphas[first:last]), repeat_rows(points.more, a, b, steps)
            outer = view.gradients(view.forward(at, more), seeds.part(a, b).repeat(steps))
            outer = outer.flatten(2)[..., column]  # [K (b - a), S]
            inner = batching.jacobians(points.head, view.params, (*at, *more), unit, points.wrt, points.route.engine)
            with torch.inference_mode(False), torch.no_grad():
                for total, g in zip(totals, inner, strict=True):
                    flow = g * outer.view(*outer.shape, *(1,) * (g.dim() - 2))
                    total[a:b] += weighted_sum(flow, weights[first:last].float())
        if self.multiplies_by_inputs:
            times_difference(totals, inputs, start)
        return totals

    def _as_tuple(self, options: Options) -> bool:
        return is_tuple(options["inputs"])
