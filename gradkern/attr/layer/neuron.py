"""Captum's neuron methods, on a Program that ends at the layer."""

from __future__ import annotations

from typing import Any

import torch

from ...ir import graph
from ..attribute_all import Options, Tensors
from ..captum_compat import format_output, is_tuple, stock
from .layer_methods import LayerMethod, one_output
from .split import jacobians


class NeuronGradient(LayerMethod, stock.NeuronGradient):
    """The gradient of one unit of a layer with respect to the input.

    A drop-in for `captum.attr.NeuronGradient`.  It explains the unit, so logits and probabilities do not matter.
    """

    _takes_integers = False  # their gradient is computed

    attribute = one_output(stock.NeuronGradient)

    def _one(self, rows: Tensors, options: Options) -> Any:
        view = self._view(rows, options["additional_forward_args"], options, now=False)
        if view is None:
            return None
        unit = unit_number(options["neuron_selector"], view.shape)
        head, points = graph.up_to(view.program, view.value), view.points
        if unit is None or not head.steps or any(not head.consumers[w] for w in points.wrt):
            return None
        inputs = tuple(x.detach().contiguous() for x in (*rows, *points.more))
        with torch.inference_mode(False), torch.no_grad():
            gradients = jacobians(
                head, view.params, inputs, torch.tensor([unit]), points.wrt, by_reference=view.by_reference
            )
        return format_output(is_tuple(options["inputs"]), tuple(g[:, 0] for g in gradients))


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
