"""Layer methods along a path of inputs or activations, whose steps are summed as they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dispatch.targets import Seeds
from ..attribute_all import Options
from ..captum_compat import approximation_parameters, format_input_baseline, stock, tensorize_baseline
from ..paths import path_steps, times_difference
from ..points import between, blocks, gradient_bytes, repeat_rows, weighted_sum
from .layer_methods import LayerMethod, make_attribute, make_attribute_all
from .split import LayerView


class InternalInfluence(LayerMethod, stock.InternalInfluence):
    """The mean gradient at a layer along a path of inputs (Leino et al., arXiv:1802.03788).

    A drop-in for `captum.attr.InternalInfluence`.  Attribute logits: the path saturates in probabilities.
    """

    _takes_integers = False  # nothing is between them

    attribute = make_attribute(stock.InternalInfluence)
    attribute_all = make_attribute_all(stock.InternalInfluence)

    def layer_maps(self, view: LayerView, seeds: Seeds, options: Options) -> Tensor:
        weights, alphas = path_steps(options["method"], options["n_steps"])
        total = view.zeros(seeds.count)
        for block in blocks_of_path(view, alphas, seeds, options):
            total[block.a : block.b] += weighted_sum(block.gradients, weights[block.first : block.last])
        return total


class LayerConductance(LayerMethod, stock.LayerConductance):
    """How much of integrated gradients flows through each unit of a layer (Dhamdhere et al., arXiv:1805.12233).

    A drop-in for `captum.attr.LayerConductance`.  Logits and probabilities are both complete; prefer logits.
    """

    _takes_integers = False  # nothing is between them

    attribute = make_attribute(stock.LayerConductance)
    attribute_all = make_attribute_all(stock.LayerConductance)

    def layer_maps(self, view: LayerView, seeds: Seeds, options: Options) -> Tensor:
        _, places = approximation_parameters(options["method"])
        alphas = torch.tensor(places(options["n_steps"] + 1), dtype=torch.float64)
        total = view.zeros(seeds.count)
        last: tuple[Tensor, Tensor] | None = None  # the activations and gradients of the previous step
        for block in blocks_of_path(view, alphas, seeds, options):
            steps, rows = block.last - block.first, block.b - block.a
            values = block.values.view(steps, rows, 1, *view.shape)
            gradients = block.gradients.view(steps, rows, seeds.count, *view.shape)
            if block.first and last is not None:
                total[block.a : block.b] += last[1] * (values[0] - last[0])
            for k in range(steps - 1):
                total[block.a : block.b] += gradients[k] * (values[k + 1] - values[k])
            last = (values[-1], gradients[-1])
        return total


class LayerIntegratedGradients(LayerMethod, stock.LayerIntegratedGradients):
    """Integrated gradients on a path between a layer's activations at the baseline and at the input.

    A drop-in for `captum.attr.LayerIntegratedGradients`.  Logits and probabilities are both complete; prefer logits.
    """

    attribute = make_attribute(stock.LayerIntegratedGradients)
    attribute_all = make_attribute_all(stock.LayerIntegratedGradients)

    def layer_maps(self, view: LayerView, seeds: Seeds, options: Options) -> Tensor | None:
        if not view.exclusive:  # Captum changes the value only for the layer, not for its other readers
            return None
        inputs, start = format_input_baseline(view.points.inputs, options["baselines"])
        value, *crossing = view.forward(inputs, view.points.more)
        base = view.forward(tensorize_baseline(inputs, start), view.points.more)[0]
        weights, alphas = path_steps(options["method"], options["n_steps"])
        total = value.new_zeros(len(value), seeds.count, *view.shape)
        size, most = gradient_bytes([value], seeds.count), options["internal_batch_size"]
        for a, b, first, last in blocks(len(value), len(alphas), size, value.device, most):
            steps = last - first
            tail_inputs = (*between([value], [base], a, b, alphas[first:last]), *repeat_rows(crossing, a, b, steps))
            gradients = view.gradients(tail_inputs, seeds.part(a, b).repeat(steps))
            total[a:b] += weighted_sum(gradients, weights[first:last].float())
        if self.multiplies_by_inputs:
            times_difference([total], [value], [base])
        return total


@dataclass(frozen=True)
class PathBlock:
    """The steps ``first:last`` of the samples ``a:b``, steps first."""

    a: int
    b: int
    first: int
    last: int
    values: Tensor  # the layer's, [K (b - a), *layer]
    gradients: Tensor  # [K (b - a), S, *layer]


def blocks_of_path(view: LayerView, alphas: Tensor, seeds: Seeds, options: Options) -> Iterator[PathBlock]:
    """The layer along the path of inputs from the baselines, block by block."""
    points = view.points
    inputs, start = format_input_baseline(points.inputs, options["baselines"])
    layer = torch.empty((), dtype=inputs[0].dtype).expand(1, *view.shape)
    size, most = gradient_bytes([layer], seeds.count), options["internal_batch_size"]
    for a, b, first, last in blocks(points.samples, len(alphas), size, inputs[0].device, most):
        at, steps = between(inputs, start, a, b, alphas[first:last]), last - first
        values = view.forward(at, repeat_rows(points.more, a, b, steps))
        yield PathBlock(a, b, first, last, values[0], view.gradients(values, seeds.part(a, b).repeat(steps)))
