"""Captum on gradkern: the results, errors and side effects of stock Captum, which is the oracle here."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import numpy as np
import pytest
import torch
from captum import attr as captum_attr
from captum._utils import gradient as captum_gradient
from torch import nn

import gradkern
from gradkern.attr import Saliency
from gradkern.attr.plug import GradientFunc
from gradkern.dispatch.request import Request
from gradkern.dispatch.route import decide
from gradkern.dispatch.targets import jacobian_choice
from gradkern.util import options
from gradkern.util.options import GradkernWarning
from tests.cases import CASES

N = 5
ENGINES = ("auto", "autograd", "kernel")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Input Tensor"),
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks"),
    pytest.mark.filterwarnings("ignore:Setting backward hooks"),
]


@pytest.fixture(params=ENGINES)
def engine(request):
    with gradkern.use(request.param):
        yield request.param


@functools.cache
def built(name, engine):
    """One model per engine, so that it is traced once; nobody changes it."""
    return CASES[name].build(dtype=torch.float64)


def net(name="relu_inplace", n=N):
    return built(name, options.engine()), CASES[name].inputs(n, dtype=torch.float64)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


TARGETS = [
    1,
    -1,
    (2,),
    torch.tensor(1),
    torch.tensor([0]),
    torch.tensor([0, 2, 1, 1, 0]),
    [0, 2, 1, 1, 0],
    [(0,), (2,), (1,), (-1,), (0,)],
    (slice(1, 2),),
]


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("abs_", [True, False])
def test_saliency_reads_targets_as_captum(engine, target, abs_):
    model, (x,) = net()
    want = captum_attr.Saliency(model).attribute(x, target=target, abs=abs_)
    same(Saliency(model).attribute(x, target=target, abs=abs_), want)


@pytest.mark.parametrize(
    "target",
    [
        3,
        -4,
        None,
        (0, 1),
        [0, 1],
        [0, 1, 2, 3, 9],
        torch.tensor([0, 1]),
        torch.tensor([0, 1, 2, 1, 7]),
        "1",
        1.5,
        [],
        np.int64(1),
    ],
    ids=repr,
)
def test_bad_targets_raise_what_captum_raises(engine, target):
    model, (x,) = net()
    with pytest.raises(Exception) as want:
        captum_attr.Saliency(model).attribute(x, target=target)
    with pytest.raises(type(want.value)) as got:
        Saliency(model).attribute(x, target=target)
    assert str(got.value) == str(want.value)


def test_saliency_of_outputs_with_several_axes_is_captums(engine):
    model, (x,) = net("softmax_axis")
    for target in ((1, 2), (-1, 0), [(0, 1), (1, 1), (2, 0), (3, 3), (-1, -1)]):
        same(Saliency(model).attribute(x, target=target), captum_attr.Saliency(model).attribute(x, target=target))
    for target in (1, None):  # several numbers left
        with pytest.raises(AssertionError, match="Target not provided when necessary"):
            Saliency(model).attribute(x, target=target)


def test_saliency_of_one_number_per_sample_is_captums(engine):
    model, (x,) = net("scalar_output")
    same(Saliency(model).attribute(x), captum_attr.Saliency(model).attribute(x))


def test_several_inputs(engine):
    model, inputs = net("two_inputs")
    got = Saliency(model).attribute(inputs, target=1)
    assert isinstance(got, tuple)
    same(got, captum_attr.Saliency(model).attribute(inputs, target=1))


def test_additional_forward_args(engine):
    model, (x, extra) = net("two_inputs")
    want = captum_attr.Saliency(model).attribute(x, target=0, additional_forward_args=extra)
    got = Saliency(model).attribute(x, target=0, additional_forward_args=extra)
    assert isinstance(got, torch.Tensor)
    same(got, want)
    same(Saliency(model).attribute(x, target=0, additional_forward_args=(extra,)), want)


class Scaled(nn.Module):
    def forward(self, x, factor):
        return x.square() * factor


@pytest.mark.filterwarnings("error::gradkern.GradkernWarning")
def test_additional_forward_args_that_are_no_rows_are_passed_through():
    x = torch.randn(N, 3)
    with gradkern.use("kernel"):
        got = Saliency(Scaled()).attribute(x, target=0, additional_forward_args=2.0)
    same(got, captum_attr.Saliency(Scaled()).attribute(x, target=0, additional_forward_args=2.0))


@pytest.mark.parametrize("name", ["maxpool1d", "elu", "residual", "bn_after_conv"])
@pytest.mark.parametrize("method", ["Saliency", "InputXGradient", "IntegratedGradients", "GradientShap"])
def test_accelerated_methods(engine, method, name):
    model, (x,) = net(name)
    stock, fast = (getattr(captum_attr, method)(model) for _ in range(2))
    assert gradkern.accelerate(fast) is fast
    options = {"target": torch.tensor([0, 2, 1, 1, 0])}
    if method == "IntegratedGradients":
        options |= {"n_steps": 6, "return_convergence_delta": True}
    if method == "GradientShap":
        options |= {"baselines": torch.zeros_like(x), "n_samples": 3, "stdevs": 0.1, "target": 1}
    results = []
    for attribution in (stock, fast):
        torch.manual_seed(0)
        np.random.seed(0)
        results.append(attribution.attribute(x, **options))
    same(results[1], results[0])


def test_integrated_gradients_in_internal_batches(engine):
    model, (x,) = net()
    options = {"target": 2, "n_steps": 7, "internal_batch_size": 6, "baselines": 0.5}
    want = captum_attr.IntegratedGradients(model).attribute(x, **options)
    same(gradkern.accelerate(captum_attr.IntegratedGradients(model)).attribute(x, **options), want)


def test_noise_tunnel_is_captums_with_the_same_draws(engine):
    model, (x,) = net()
    results = []
    for saliency in (captum_attr.Saliency(model), Saliency(model)):
        torch.manual_seed(0)
        tunnel = captum_attr.NoiseTunnel(saliency)
        results.append(tunnel.attribute(x, target=1, nt_samples=3, nt_type="smoothgrad_sq"))
    same(results[1], results[0])
    inner = captum_attr.Saliency(model)
    tunnel = captum_attr.NoiseTunnel(inner)
    assert gradkern.accelerate(tunnel) is tunnel
    assert isinstance(inner.gradient_func, GradientFunc)


@pytest.mark.parametrize("method", ["DeepLift", "GuidedBackprop", "Deconvolution", "LRP"])
@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_methods_with_their_own_backward(engine, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(N, 6, dtype=torch.float64)
    want = getattr(captum_attr, method)(model).attribute(x, target=1)
    attribution = getattr(captum_attr, method)(model)
    assert gradkern.accelerate(attribution) is attribution
    assert type(attribution) is getattr(gradkern.attr, method)
    same(attribution.attribute(x, target=1), want)
    same(attribution.attribute_all(x)[:, 1], want)


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_layer_methods(engine):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(N, 6, dtype=torch.float64)
    want = captum_attr.LayerIntegratedGradients(model, model[0]).attribute(x, target=1, n_steps=4)
    fast = gradkern.accelerate(captum_attr.LayerIntegratedGradients(model, model[0]))
    same(fast.attribute(x, target=1, n_steps=4), want)
    same(fast.attribute_all(x, n_steps=4)[:, 1], want)


def test_subclass_of_a_captum_method_keeps_its_gradient_function():
    class Mine(captum_attr.LayerGradientXActivation):
        pass

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(N, 6, dtype=torch.float64)
    gradkern.reset()
    with pytest.warns(GradkernWarning, match="Mine"):
        fast = gradkern.accelerate(Mine(model, model[0]))
    same(fast.attribute(x, target=1), captum_attr.LayerGradientXActivation(model, model[0]).attribute(x, target=1))


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_plain_functions_are_attributed_by_captum(engine):
    model, (x,) = net()
    want = captum_attr.Saliency(model).attribute(x, target=1)
    same(Saliency(lambda t: model(t)).attribute(x, target=1), want)
    same(Saliency(model.forward).attribute(x, target=1), want)


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_training_mode_is_captums_except_for_the_buffers(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).double()
    twin = copy.deepcopy(model)
    x = torch.randn(N, 6, dtype=torch.float64)
    torch.manual_seed(1)
    want = captum_attr.Saliency(model).attribute(x, target=1)
    torch.manual_seed(1)
    before = copy.deepcopy(twin.state_dict())
    same(Saliency(twin).attribute(x, target=1), want)
    same(twin.state_dict(), before)  # Captum's call has changed the running statistics


def test_attribution_leaves_the_inputs_grad_as_it_was(engine):
    before = captum_gradient.compute_gradients
    model, (x,) = net()
    x.grad = None
    got = Saliency(model).attribute(x, target=1)
    assert x.grad is None
    assert not x.requires_grad
    assert not got.requires_grad
    x.requires_grad_()
    x.grad = torch.full_like(x, 3.0)
    got = Saliency(model).attribute(x, target=1)
    assert x.requires_grad
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert not got.requires_grad
    assert captum_gradient.compute_gradients is before
    assert captum_attr.Saliency(model).gradient_func is before


def test_an_input_that_is_not_used_is_captums_error(engine):
    class First(nn.Module):
        def forward(self, a, b):
            return a * 2

    inputs = (torch.randn(N, 3), torch.randn(N, 3))
    with pytest.raises(RuntimeError, match="not have been used"):
        captum_attr.Saliency(First()).attribute(inputs, target=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradkernWarning)
        with pytest.raises(RuntimeError, match="not have been used"):
            Saliency(First()).attribute(inputs, target=0)


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_bad_models_and_inputs_raise_what_captum_raises(engine):
    model, (x,) = net()

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    for m, inputs, target in ((Pair(), x, 0), (model, x.float(), 0), (model, x.long(), 0), (model, x[:, :, :3], 0)):
        with pytest.raises(Exception) as want:
            captum_attr.Saliency(m).attribute(inputs, target=target)
        with pytest.raises(type(want.value)) as got:
            Saliency(m).attribute(inputs, target=target)
        assert str(got.value) == str(want.value)


def test_accelerate_refuses_what_has_no_gradient():
    model, _ = net()
    with pytest.raises(TypeError, match="FeatureAblation"):
        gradkern.accelerate(captum_attr.FeatureAblation(model))
    with pytest.raises(ValueError, match="engine="):
        gradkern.accelerate(captum_attr.Saliency(model), engine="warp")


def test_engine_of_one_attribution():
    model, (x,) = net()
    saliency = Saliency(model, engine="kernel")
    saliency.attribute(x, target=0)
    assert decide(Request(model, (x,), (0,), jacobian_choice(None))).program is not None
    again = pickle.loads(pickle.dumps(saliency))
    assert again.gradient_func.engine == "kernel"
    same(again.attribute(x, target=0), saliency.attribute(x, target=0))


def test_captum_methods_use_the_engine_that_is_chosen(monkeypatch):
    from gradkern.attr import plug

    monkeypatch.setattr(plug, "compute_gradients", None)  # a call to it would fail
    model, (x,) = net()
    for engine in ("auto", "reference", "kernel"):
        with gradkern.use(engine):
            Saliency(model).attribute(x, target=0)
            gradkern.accelerate(captum_attr.IntegratedGradients(model)).attribute(x, target=0, n_steps=3)


def test_saliency_attribute_all_is_attribute_of_every_target(engine, tmp_path):
    model, (x,) = net()
    want = torch.stack([captum_attr.Saliency(model).attribute(x, target=c) for c in range(3)], dim=1)
    signed = torch.stack([captum_attr.Saliency(model).attribute(x, target=c, abs=False) for c in range(3)], dim=1)
    saliency = Saliency(model)
    same(saliency.attribute_all(x), want)
    same(saliency.attribute_all(x, abs=False), signed)
    same(saliency.attribute_all((x,), targets=[2, 0])[0], want[:, [2, 0]])
    best, index = saliency.attribute_all(x, targets=gradkern.TopK(1))
    same(best[:, 0], want[torch.arange(N), index[:, 0]])
    mapped = np.memmap(tmp_path / "s.bin", dtype=np.float64, mode="w+", shape=tuple(want.shape))
    assert saliency.attribute_all(x, out=mapped) is mapped
    same(torch.from_numpy(np.array(mapped)), want)
