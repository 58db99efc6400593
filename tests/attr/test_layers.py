"""Layer and neuron methods against stock Captum: layers of every kind, their inputs and outputs, all outputs."""

from __future__ import annotations

import inspect

import pytest
import torch
from captum import attr as stock
from torch import nn

import gradkern
from gradkern import attr as ours
from gradkern.attr.attribute_all import as_attribute_all
from gradkern.attr.gradient import GradientMethod
from gradkern.attr.layer import layer_methods as layers
from gradkern.attr.layer.layer_methods import LayerMethod, make_attribute, make_attribute_all
from gradkern.attr.layer.split import layer_value
from gradkern.attr.points import Points
from tests.cases import CASES

pytestmark = [pytest.mark.filterwarnings("ignore")]
METHODS = {
    "LayerGradientXActivation": {},
    "LayerGradCam": {"relu_attributions": True},
    "InternalInfluence": {"n_steps": 3, "method": "riemann_left"},
    "LayerConductance": {"n_steps": 3, "return_convergence_delta": True},
    "LayerIntegratedGradients": {"n_steps": 3, "return_convergence_delta": True},
}
LAYERS = [
    ("maxpool1d", "0"),
    ("maxpool1d", "2"),
    ("residual", "conv1"),
    ("residual", "bn1"),
    ("residual", "middle"),
    ("softmax", "3"),
    ("dropout", "2"),
    ("shared_conv", "act"),
    ("skips_all", "fc2"),
    ("lstm", "fc"),
    ("two_inputs", "conv"),
]


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def net(name, n=3):
    case = CASES[name]
    inputs = case.inputs(n, dtype=torch.float64)
    return case.build(dtype=torch.float64), inputs if len(inputs) > 1 else inputs[0]


def stacked(results):
    if isinstance(results[0], tuple):
        return tuple(stacked([r[i] for r in results]) for i in range(len(results[0])))
    return torch.stack(results, 1)


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize(("case", "layer"), LAYERS)
def test_layer_methods_equal_stock_captum(case, layer, to_input):
    model, x = net(case)
    module = model.get_submodule(layer)
    classes = gradkern.jacobian(model, x)
    classes = (classes[0] if isinstance(classes, tuple) else classes).shape[1]
    for name, options in METHODS.items():
        if name != "LayerGradientXActivation" and name != "LayerGradCam":
            options = options | {"baselines": 0.5 if isinstance(x, torch.Tensor) else (0.5, 0.5)}
        theirs = getattr(stock, name)(model, module)
        try:
            found = [
                theirs.attribute(x, target=c, attribute_to_layer_input=to_input, **options) for c in range(classes)
            ]
        except RuntimeError:
            continue  # Captum cannot: a layer that is used at two places of different shapes
        want = stacked(found)
        for engine in ("kernel", "reference", "autograd"):
            mine = getattr(ours, name)(model, module, engine=engine)
            same(mine.attribute(x, target=1, attribute_to_layer_input=to_input, **options), found[1])
            same(mine.attribute_all(x, attribute_to_layer_input=to_input, **options), want)


def test_layer_methods_use_the_engine_that_is_chosen(monkeypatch):
    model, x = net("residual")
    monkeypatch.setattr(layers.LayerMethod, "_spent", None)  # called after stock Captum has run
    for name, options in METHODS.items():
        getattr(ours, name)(model, model.conv2, engine="kernel").attribute(x, target=1, **options)


def test_long_paths_in_blocks(monkeypatch):
    from gradkern.attr import points
    from gradkern.util import chunks

    monkeypatch.setattr(chunks, "CPU_CACHED_BYTES", 1)
    monkeypatch.setattr(points, "LEAST_BLOCK", 4)
    model, x = net("residual", 5)
    for name in ("InternalInfluence", "LayerConductance", "LayerIntegratedGradients"):
        want = getattr(stock, name)(model, model.conv1).attribute(x, target=2, n_steps=9)
        same(getattr(ours, name)(model, model.conv1, engine="kernel").attribute(x, target=2, n_steps=9), want)
        same(getattr(ours, name)(model, model.conv1).attribute_all(x, n_steps=9)[:, 2], want)


def test_targets_and_options():
    model, x = net("residual", 4)
    whole = ours.LayerGradCam(model, model.conv2).attribute_all(x, attr_dim_summation=False)
    same(
        ours.LayerGradCam(model, model.conv2).attribute_all(x, targets=[3, 1], attr_dim_summation=False),
        whole[:, [3, 1]],
    )
    for target in ([0, 3, 1, 2], torch.tensor([1, 1, 0, 3]), -1):
        got = ours.LayerGradCam(model, model.conv2, engine="kernel").attribute(
            x, target=target, attr_dim_summation=False
        )
        same(got, stock.LayerGradCam(model, model.conv2).attribute(x, target=target, attr_dim_summation=False))
    best, index = ours.LayerGradientXActivation(model, model.conv2).attribute_all(x, targets=gradkern.TopK(1))
    full = ours.LayerGradientXActivation(model, model.conv2).attribute_all(x)
    same(best[:, 0], full[torch.arange(4), index[:, 0]])


UNITS = [("residual", "conv1", (2, 7)), ("residual", "fc", 1), ("residual", "bn1", (-1, 0)), ("maxpool1d", "2", (0, 3))]


@pytest.mark.parametrize(("case", "layer", "unit"), UNITS)
def test_neuron_gradient(case, layer, unit):
    model, x = net(case)
    module = model.get_submodule(layer)
    for engine in ("kernel", "reference", "autograd"):
        for to_input in (False, True):
            selector = unit if isinstance(unit, tuple) or not to_input else 3
            got = ours.NeuronGradient(model, module, engine=engine).attribute(x, selector, None, to_input)
            same(got, stock.NeuronGradient(model, module).attribute(x, selector, None, to_input))
    both = ours.NeuronGradient(model, module, engine="kernel")
    for selector in (lambda y: y.flatten(1).sum(1), (slice(0, 1), *unit[1:]) if isinstance(unit, tuple) else unit):
        same(both.attribute(x, selector), stock.NeuronGradient(model, module).attribute(x, selector))


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Linear(3 * 16, 3)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).flatten(1))


def test_guided_grad_cam():
    torch.manual_seed(0)
    model, x = Modules().double().eval(), torch.randn(3, 1, 6, 6, dtype=torch.float64)
    want = stacked([stock.GuidedGradCam(model, model.conv).attribute(x, target=c) for c in range(3)])
    mine = ours.GuidedGradCam(model, model.conv)
    same(mine.attribute_all(x), want)
    same(mine.attribute_all(x, targets=[2, 1]), want[:, [2, 1]])
    same(mine.attribute(x, target=2), want[:, 2])
    fast = gradkern.accelerate(stock.GuidedGradCam(model, model.conv))
    same(fast.attribute_all(x), want)


def test_lists_of_layers_stay_with_captum():
    torch.manual_seed(0)
    model, x = Modules().double().eval(), torch.randn(3, 1, 6, 6, dtype=torch.float64)
    layers_ = [model.conv, model.relu]
    for name in ("LayerGradientXActivation",):
        got, want = (getattr(p, name)(model, layers_).attribute(x, target=1) for p in (ours, stock))
        same(got, want)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class LayerSquaredGradient(LayerMethod, stock.LayerGradientXActivation):
    """A method that gradkern lacks: its mathematics and two lines."""

    attribute = make_attribute(stock.LayerGradientXActivation)
    attribute_all = make_attribute_all(stock.LayerGradientXActivation)

    def layer_maps(self, view, seeds, options):
        return view.at_inputs(seeds)[1] ** 2


def test_methods_written_for_the_release_before_still_work():
    with pytest.warns(DeprecationWarning, match=r"Earlier\._layer is now Earlier\.layer_maps;") as caught:

        class Earlier(LayerMethod, stock.LayerGradientXActivation):
            attribute_all = make_attribute_all(stock.LayerGradientXActivation)

            def _layer(self, view, index, seeds, options):
                return view.at_inputs(index, seeds)[1] ** 2

    assert caught[0].filename == __file__
    model, x = net("residual")
    same(Earlier(model, model.conv2).attribute_all(x), LayerSquaredGradient(model, model.conv2).attribute_all(x))

    with pytest.warns(DeprecationWarning, match=r"Indexed\.row_maps\(…, index, seeds, options\)"):

        class Indexed(ours.GuidedBackprop):
            def row_maps(self, points, index, seeds, options):
                return points.gradients(points.inputs, points.more, index, seeds)

    for targets in (None, [2, 0], torch.arange(len(x))[:, None] % 3):
        same(Indexed(model).attribute_all(x, targets=targets), gradkern.jacobian(model, x, targets))

    with pytest.warns(DeprecationWarning, match=r"Negative\._finish is now Negative\.finish_gradient;"):

        class Negative(GradientMethod, stock.Saliency):
            @as_attribute_all
            def attribute_all(self, inputs, *, targets=None, additional_forward_args=None, out=None, wrt=None):
                return self._jacobian(inputs, targets, additional_forward_args, out, wrt, {})

            def _finish(self, gradient, x, options):
                gradient.neg_()

    with pytest.warns(DeprecationWarning, match="_jacobian is now GradientMethod.attribute_by_jacobian;"):
        same(Negative(model).attribute_all(x), -ours.Saliency(model).attribute_all(x, abs=False))


def test_a_new_layer_method_is_its_mathematics():
    model, x = net("residual")
    mine = LayerSquaredGradient(model, model.conv2, engine="kernel")
    plain = stock.LayerGradientXActivation(model, model.conv2, multiply_by_inputs=False)
    want = stacked([plain.attribute(x, target=c) ** 2 for c in range(4)])
    same(mine.attribute_all(x), want)
    same(mine.attribute(x, 1), want[:, 1])
    same(mine.attribute_all(x, targets=[2, 0], attribute_to_layer_input=False), want[:, [2, 0]])


@pytest.mark.parametrize("name", METHODS)
def test_signatures_are_captums(name):
    mine, captums = getattr(ours, name), getattr(stock, name)
    assert inspect.signature(mine.attribute) == inspect.signature(captums.attribute)
    every = inspect.signature(mine.attribute_all).parameters
    kept = ["targets" if n == "target" else n for n in inspect.signature(captums.attribute).parameters]
    assert sorted(every) == sorted([*kept, "out", "wrt", "engine", "progress"])
    by_place = [n for n, p in every.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_place == [n for n in kept if n in ("self", "inputs", "baselines")]
    with pytest.raises(TypeError, match="nonsense"):
        mine(nn.Linear(3, 3), None).attribute_all(torch.zeros(1, 3), nonsense=1)


class Twins(nn.Module):
    """Two layers, of which one is seen through an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.seen, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.seen(self.a(x))) * self.b(x))


def test_a_layer_that_could_not_be_told_apart_is_looked_for_again():
    """While both layers have the same weights, either may be what the identity sees."""
    model, x = Twins().double().eval(), torch.randn(3, 5, dtype=torch.float64)
    model.b.load_state_dict(model.a.state_dict())

    def value() -> int | None:
        points = Points(model, (x,))
        program = points.captured()
        assert program is not None
        return layer_value(points, program, model.seen, "seen", False)

    assert value() is None
    with torch.no_grad():
        model.b.weight.mul_(2)
    found = value()
    assert found is not None
    model.b.load_state_dict(model.a.state_dict())
    assert value() == found  # what was certain once is remembered with the graph
