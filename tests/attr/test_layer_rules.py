"""Layer and neuron forms of DeepLift, LRP, GradientShap, conductance and guided backpropagation against Captum's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum import attr as stock
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, GammaRule
from torch import Tensor

import gradkern
from gradkern import attr as ours
from gradkern.attr import points
from gradkern.attr.layer.layer_methods import LayerMethod
from gradkern.util import chunks
from tests.support.rule_networks import UsedOnce

N = 4
pytestmark = [pytest.mark.filterwarnings("ignore")]
ENGINES = ("kernel", "reference", "autograd")


@pytest.fixture(scope="module")
def net() -> UsedOnce:
    torch.manual_seed(0)
    return UsedOnce(5).double().eval()


def samples(n: int, seed: int) -> Tensor:
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, BASE = samples(N, 0), samples(3, 1)
LAYERED: dict[str, dict[str, Any]] = {
    "LayerDeepLift": {"baselines": BASE[:1], "return_convergence_delta": True},
    "LayerDeepLiftShap": {"baselines": BASE, "return_convergence_delta": True},
    "LayerGradientShap": {"baselines": BASE, "n_samples": 3, "stdevs": 0.2, "return_convergence_delta": True},
    "LayerLRP": {"return_convergence_delta": True},
}
NEURON: dict[str, dict[str, Any]] = {
    "NeuronIntegratedGradients": {"baselines": BASE[:1], "n_steps": 5},
    "NeuronDeepLift": {"baselines": BASE[:1]},
    "NeuronDeepLiftShap": {"baselines": BASE},
    "NeuronGradientShap": {"baselines": BASE, "n_samples": 3, "stdevs": 0.2},
    "NeuronGuidedBackprop": {},
    "NeuronDeconvolution": {},
    "NeuronConductance": {"baselines": BASE[:1], "n_steps": 5, "target": 2},
}


def drawn(call: Any) -> Any:
    torch.manual_seed(1)
    np.random.seed(1)
    return call()


def same(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, check_stride=False)


def engine_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if stock Captum runs."""
    monkeypatch.setattr(LayerMethod, "_spent", None)


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1"])
@pytest.mark.parametrize("name", LAYERED)
def test_layer_deep_lift_and_lrp_equal_stock_captum(
    name: str, layer: str, to_input: bool, net: UsedOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LAYERED[name] | {"attribute_to_layer_input": to_input}
    module = net.get_submodule(layer)
    want = [drawn(lambda: getattr(stock, name)(net, module).attribute(X, target=c, **options)) for c in range(3)]  # noqa: B023
    for engine in ENGINES:
        mine = getattr(ours, name)(net, module, engine=engine)
        maps, delta = drawn(lambda: mine.attribute_all(X, **options))  # noqa: B023
        for c in range(3):
            same((maps[:, c], delta[:, c]), want[c])
        with monkeypatch.context() as patch:
            if engine != "autograd":
                engine_ran(patch)
            same(drawn(lambda: mine.attribute(X, target=1, **options)), want[1])  # noqa: B023


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize(("layer", "unit"), [("conv2", (2, 0, 0)), ("fc1", -1)])
@pytest.mark.parametrize("name", NEURON)
def test_neuron_deep_lift_equals_stock_captum(
    name: str, layer: str, unit: Any, to_input: bool, net: UsedOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = NEURON[name] | {"attribute_to_neuron_input": to_input, "neuron_selector": unit}
    module = net.get_submodule(layer)
    want = drawn(lambda: getattr(stock, name)(net, module).attribute(X, **options))
    for engine in ENGINES:
        mine = getattr(ours, name)(net, module, engine=engine)
        with monkeypatch.context() as patch:
            if engine != "autograd":
                engine_ran(patch)
            same(drawn(lambda: mine.attribute(X, **options)), want)  # noqa: B023
            same(drawn(lambda: mine.attribute((X,), **options)), (want,))  # noqa: B023
    for selector in (lambda y: y.flatten(1)[:, 1], (slice(0, 2), *unit[1:]) if isinstance(unit, tuple) else unit):
        options["neuron_selector"] = selector
        got, want = (drawn(lambda: getattr(p, name)(net, module).attribute(X, **options)) for p in (ours, stock))  # noqa: B023
        same(got, want)


def test_conductance_of_a_unit_for_all_outputs(net: UsedOnce) -> None:
    options: dict[str, Any] = {"n_steps": 5, "baselines": BASE[:1]}
    for engine in ENGINES:
        mine = ours.NeuronConductance(net, net.conv2, engine=engine)
        every = mine.attribute_all(X, (2, 0, 0), **options)
        for c in range(3):
            same(every[:, c], stock.NeuronConductance(net, net.conv2).attribute(X, (2, 0, 0), target=c, **options))
        (pair,) = mine.attribute_all((X,), (2, 0, 0), **options, targets=[2, 0])
        same(pair, every[:, [2, 0]])


def test_conductance_adds_up_over_units_and_steps(net: UsedOnce) -> None:
    """Over all units, and with many steps, conductance is what integrated gradients give (arXiv:1805.12233)."""
    mine = ours.NeuronConductance(net, net.fc1, engine="kernel")
    total = sum(mine.attribute(X, unit, target=1, method="gausslegendre") for unit in range(6))
    same(total, ours.IntegratedGradients(net).attribute(X, target=1))


@pytest.mark.parametrize("name", ["LayerDeepLiftShap", "LayerGradientShap", "NeuronConductance", "NeuronDeepLiftShap"])
def test_layer_rules_in_small_blocks_change_no_result(
    name: str, net: UsedOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LAYERED.get(name) or NEURON[name] | {"neuron_selector": (2, 0, 0)}
    options = {k: v for k, v in options.items() if k != "target"}
    target = {} if name == "NeuronDeepLiftShap" else {"target": 1}

    def found() -> Any:
        return drawn(lambda: getattr(ours, name)(net, net.conv2, engine="kernel").attribute(X, **target, **options))

    want = found()
    monkeypatch.setattr(chunks, "CPU_CACHED_BYTES", 1)
    monkeypatch.setattr(points, "LEAST_BLOCK", 2)
    same(found(), want)


def test_layer_rules_take_targets_of_all_kinds(net: UsedOnce) -> None:
    own = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 2]])
    for name, options in LAYERED.items():
        options = {k: v for k, v in options.items() if k != "return_convergence_delta"}
        mine = getattr(ours, name)(net, net.conv2, engine="kernel")
        whole = drawn(lambda: mine.attribute_all(X, **options))  # noqa: B023
        same(drawn(lambda: mine.attribute_all(X, targets=own, **options)), whole[torch.arange(N)[:, None], own])  # noqa: B023
        one = drawn(lambda: mine.attribute(X, target=own[:, 1], **options))  # noqa: B023
        same(one, whole[torch.arange(N), own[:, 1]])


def test_rules_of_lrp(net: UsedOnce) -> None:
    """Rules set on modules count, and serve one call, as in Captum."""
    results = []
    for package in (stock, ours):
        net.conv2.rule, net.fc1.rule = GammaRule(), Alpha1_Beta0_Rule()
        with gradkern.use("kernel"):
            results.append(package.LayerLRP(net, net.conv2).attribute(X, target=1))
        assert not any("rule" in m.__dict__ for m in net.modules())
    same(results[1], results[0])
    net.conv2.rule, net.fc1.rule = GammaRule(), Alpha1_Beta0_Rule()
    for engine in ENGINES:
        same(ours.LayerLRP(net, net.conv2, engine=engine).attribute_all(X)[:, 1], results[0])
        assert isinstance(net.conv2.rule, GammaRule)
    del net.conv2.rule, net.fc1.rule


def test_layer_rules_with_a_custom_attribution_function(net: UsedOnce) -> None:
    def custom(multipliers: Any, inputs: Any, baselines: Any) -> Any:
        return tuple(m.abs() * (x + b) for m, x, b in zip(multipliers, inputs, baselines, strict=True))

    options: dict[str, Any] = {"custom_attribution_func": custom}
    for name, base in (("LayerDeepLift", BASE[:1]), ("LayerDeepLiftShap", BASE)):
        want = getattr(stock, name)(net, net.conv2).attribute(X, base, target=1, **options)
        for engine in ENGINES:
            mine = getattr(ours, name)(net, net.conv2, engine=engine)
            same(mine.attribute(X, base, target=1, **options), want)
            same(mine.attribute_all(X, base, **options)[:, 1], want)
    for name, base in (("NeuronDeepLift", BASE[:1]), ("NeuronDeepLiftShap", BASE)):
        got, want = (getattr(p, name)(net, net.fc1).attribute(X, 2, base, **options) for p in (ours, stock))
        same(got, want)


def test_accelerated_objects(net: UsedOnce) -> None:
    for name in (*LAYERED, *NEURON):
        options = dict(LAYERED.get(name) or NEURON[name])
        options |= {"neuron_selector": (2, 0, 0)} if name in NEURON else {"target": 2}
        fast = gradkern.accelerate(getattr(stock, name)(net, net.conv2), "kernel")
        assert type(fast) is getattr(ours, name)
        want = drawn(lambda: getattr(stock, name)(net, net.conv2).attribute(X, **options))  # noqa: B023
        same(drawn(lambda: fast.attribute(X, **options)), want)  # noqa: B023
