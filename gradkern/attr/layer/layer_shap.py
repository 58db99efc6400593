"""GradientShap at a layer: gradients at random points, times the change of the layer's value."""

from __future__ import annotations

from typing import Any

from ...dispatch.targets import Seeds
from .. import captum_compat as compat
from ..attribute_all import Options, Tensors
from ..captum_compat import stock
from ..noise_tunnel import AllOutputs, NoiseTunnel
from ..paths import RandomPoint, check_tensors, random_points
from ..points import Points
from .layer_methods import LayerMethod, make_attribute, make_attribute_all
from .split import LayerView


class _AtLayer(RandomPoint):
    """One draw: the gradient at a layer, at a random point, times the layer's change from the baseline."""

    def __init__(self, view: LayerView, multiply_by_inputs: bool) -> None:
        super().__init__(view.points.fn, multiply_by_inputs)
        self.view = view

    def row_maps(self, points: Points, seeds: Seeds, options: Options) -> Tensors:
        rows, baselines = compat.format_input_baseline(points.inputs, options["baselines"])
        view, start = self.view.at(points), compat.tensorize_baseline(rows, baselines)
        values = view.forward(random_points(rows, baselines), points.more)
        gradients = view.gradients(values, seeds)
        if self.multiplies_by_inputs:
            change = view.forward(rows, points.more)[0] - view.forward(start, points.more)[0]
            gradients.mul_(change.unsqueeze(1))
        return (gradients,)


class LayerGradientShap(LayerMethod, stock.LayerGradientShap):
    """Expected gradients at a layer over random baselines and random points on the way (SHAP's GradientExplainer).

    A drop-in for `captum.attr.LayerGradientShap`, with equal numbers for equal seeds of torch and numpy.  Attribute
    logits: only they add up on the scale on which the classes compete.
    """

    _takes_integers = False  # nothing is between them

    attribute = make_attribute(stock.LayerGradientShap)
    attribute_all = make_attribute_all(stock.LayerGradientShap)

    def _maps(self, view: LayerView, seeds: Seeds, options: Options, delta: bool) -> Any:
        points = view.points
        start = check_tensors(compat.format_callable_baseline(options["baselines"], options["inputs"]))
        tunnel = NoiseTunnel(_AtLayer(view, self.multiplies_by_inputs))
        shape = (points.samples, seeds.count, *view.shape)
        run = AllOutputs(tunnel, points.inputs, points, seeds, {"baselines": start}, True, delta, [shape])
        average = run.average(options["n_samples"], None, options["stdevs"])
        assert average is not None
        maps = average.smoothed(tunnel, "smoothgrad", options["n_samples"])
        return maps, average.delta() if delta else None
