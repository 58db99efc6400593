"""InputXGradient, IntegratedGradients, GradientShap and NoiseTunnel against stock Captum, for every target at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum import attr as stock
from torch import nn

import gradkern
from gradkern import attr as ours
from gradkern.attr import points
from gradkern.attr.noise_tunnel import Noise
from gradkern.util import chunks
from tests.cases import CASES

N = 5
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few points, so that every loop over blocks turns."""
    monkeypatch.setattr(chunks, "CPU_CACHED_BYTES", 1)
    monkeypatch.setattr(points, "LEAST_BLOCK", 7)


def net(name="relu_inplace", n=N):
    case = CASES[name]
    return case.build(dtype=torch.float64), case.inputs(n, dtype=torch.float64)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def drawn(call):
    torch.manual_seed(0)
    np.random.seed(0)
    found = call()
    return found, (torch.rand(1), np.random.rand())


def options_of(name, x, extra=False):
    base = torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    return {
        "InputXGradient": {},
        "IntegratedGradients": {"n_steps": 6, "baselines": 0.3, "return_convergence_delta": True},
        "GradientShap": {"baselines": base, "n_samples": 4, "stdevs": 0.2, "return_convergence_delta": True},
    }[name]


def stacked(results):
    if isinstance(results[0], tuple):
        return tuple(stacked([r[i] for r in results]) for i in range(len(results[0])))
    return torch.stack(results, 1)


@pytest.mark.parametrize(("case", "engine"), [("relu_inplace", "auto"), ("relu_inplace", "autograd"), ("elu", "kernel"),
                                              ("lstm", "reference"), ("freezes_one", "kernel")])  # fmt: skip
@pytest.mark.parametrize("name", ["InputXGradient", "IntegratedGradients", "GradientShap"])
def test_all_outputs_are_captums_one_by_one(name, case, engine, small_blocks):
    model, (x,) = net(case)
    options = options_of(name, x)
    want = stacked([drawn(lambda: getattr(stock, name)(model).attribute(x, target=c, **options))[0] for c in range(3)])  # noqa: B023
    with gradkern.use(engine):
        method = getattr(ours, name)(model)
        same(drawn(lambda: method.attribute_all(x, **options))[0], want)
        got, after = drawn(lambda: method.attribute(x, target=1, **options))
    _, stock_after = drawn(lambda: getattr(stock, name)(model).attribute(x, target=1, **options))
    same(got, tuple(w[:, 1] for w in want) if isinstance(want, tuple) else want[:, 1])
    assert after == stock_after  # the random state, too


@pytest.mark.parametrize(
    "method", ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]
)
def test_integrated_gradients_methods(method, small_blocks):
    model, (x,) = net()
    for options in ({}, {"internal_batch_size": 9}, {"internal_batch_size": 2}):
        options = options | {"n_steps": 7, "method": method, "baselines": torch.ones_like(x), "target": [0, 2, 1, 1, 0]}
        same(ours.IntegratedGradients(model, engine="kernel").attribute(x, **options),
             stock.IntegratedGradients(model).attribute(x, **options))  # fmt: skip
    for multiply in (True, False):
        mine = ours.IntegratedGradients(model, multiply, engine="kernel")
        same(mine.attribute(x, target=1, method=method, n_steps=3),
             stock.IntegratedGradients(model, multiply).attribute(x, target=1, method=method, n_steps=3))  # fmt: skip


@pytest.mark.parametrize("name", ["InputXGradient", "IntegratedGradients", "GradientShap"])
def test_tuples_and_additional_arguments(name, small_blocks):
    model, (signal, vector) = net("two_inputs")
    both = {
        "IntegratedGradients": {"n_steps": 3, "baselines": (0.5, vector[:1])},
        "InputXGradient": {},
        "GradientShap": {"baselines": (signal[:2], vector[:2]), "n_samples": 3, "stdevs": (0.1, 0.2)},
    }[name]
    one = {k: v[0] if isinstance(v, tuple) else v for k, v in both.items()}
    for inputs, extra, options in (((signal, vector), None, both), (signal, vector, one), (signal, (vector,), one)):

        def call(package, target, inputs=inputs, extra=extra, options=options):
            return drawn(lambda: getattr(package, name)(model).attribute(
                inputs, target=target, additional_forward_args=extra, **options))[0]  # fmt: skip

        want = stacked([call(stock, c) for c in range(2)])
        same(call(ours, 1), call(stock, 1))
        got, _ = drawn(
            lambda inputs=inputs, extra=extra, options=options: getattr(ours, name)(model).attribute_all(
                inputs, additional_forward_args=extra, **options
            )
        )
        same(got, want)


@pytest.mark.parametrize("inner", ["Saliency", "InputXGradient", "IntegratedGradients", "DeepLift"])
@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel_of_all_outputs(inner, kind, small_blocks):
    model, (x,) = net("elu", 70)
    options = {"nt_type": kind, "nt_samples": 3, "nt_samples_batch_size": 2, "stdevs": 0.3}
    if inner == "IntegratedGradients":
        options["n_steps"] = 3
    targets = torch.arange(70) % 3

    def call(package, target):
        return drawn(lambda: package.NoiseTunnel(getattr(package, inner)(model)).attribute(x, target=target, **options))

    want, after = call(stock, targets)
    got, got_after = call(ours, targets)
    same(got, want)
    assert after == got_after
    every, _ = drawn(lambda: ours.NoiseTunnel(getattr(ours, inner)(model)).attribute_all(x, **options))
    same(every[torch.arange(70), targets], want)


def test_noise_of_several_inputs_and_their_deltas(small_blocks):
    model, inputs = net("two_inputs", 40)
    options = {"nt_samples": 3, "stdevs": (0.1, 0.4), "n_steps": 3, "return_convergence_delta": True}
    results = []
    for package in (stock, ours):
        results.append(
            drawn(lambda p=package: p.NoiseTunnel(p.IntegratedGradients(model)).attribute(inputs, target=1, **options))
        )
    same(results[1], results[0])
    (maps, delta), _ = drawn(lambda: ours.NoiseTunnel(ours.IntegratedGradients(model)).attribute_all(inputs, **options))
    same(tuple(m[:, 1] for m in maps), results[0][0][0])
    same(delta[:, 1].sort().values, results[0][0][1].sort().values)


@pytest.mark.parametrize("batch", [None, 5])
@pytest.mark.parametrize("sizes", [(1003,), (48,), (7, 33), (2, 1), (1,)], ids=str)
def test_copies_of_large_inputs_in_pieces(sizes, batch, monkeypatch):
    """Noise, copies and maps fit in the memory budget, whatever the number of copies; the numbers stay Captum's."""
    torch.manual_seed(0)
    weights = [torch.randn(size, 3, dtype=torch.float64) for size in sizes]
    model = Weighted(weights).eval()
    inputs = tuple(torch.randn(3, size, dtype=torch.float64) for size in sizes)
    options = {"nt_samples": 13, "nt_samples_batch_size": batch, "stdevs": 0.3}
    theirs = stock.NoiseTunnel(stock.InputXGradient(model))
    want = stacked([drawn(lambda: theirs.attribute(inputs, target=c, **options))[0] for c in range(3)])  # noqa: B023
    targets = [2, 0, 1]
    largest = []
    true = Noise.of
    monkeypatch.setattr(Noise, "of", lambda *a: largest.append(true(*a)) or largest[-1])
    monkeypatch.setattr(points, "LEAST_BLOCK", 1)
    row = 8 * sum(sizes)
    with gradkern.use(memory_budget=50 * row):
        tunnel = ours.NoiseTunnel(ours.InputXGradient(model, engine="kernel"))
        every, _ = drawn(lambda: tunnel.attribute_all(inputs, **options))
        one, _ = drawn(lambda: tunnel.attribute(inputs, target=targets, **options))
    same(every, want)
    same(one, tuple(w[torch.arange(3), targets] for w in want))
    assert max(sum(x.nbytes for x in piece) for piece in largest) <= 25 * row
    assert len(largest) > 6


class Weighted(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, *xs):
        return sum(
            (x.tanh() @ w for x, w in zip(xs[1:], list(self.weights)[1:], strict=True)), xs[0].sin() @ self.weights[0]
        )


def test_gradient_methods_take_targets_of_all_kinds():
    model, (x,) = net()
    ig = ours.IntegratedGradients(model)
    whole = ig.attribute_all(x, n_steps=3)
    same(ig.attribute_all(x, targets=[2, 0], n_steps=3), whole[:, [2, 0]])
    same(ig.attribute_all(x, targets=-1, n_steps=3), whole[:, [2]])
    own = torch.tensor([[0, 1], [1, 1], [2, 0], [0, 2], [1, 0]])
    same(ig.attribute_all(x, targets=own, n_steps=3), whole[torch.arange(N)[:, None], own])
    best, index = ig.attribute_all(x, targets=gradkern.TopK(2), n_steps=3)
    with torch.no_grad():
        assert torch.equal(index, model(x).topk(2).indices)
    same(best, whole[torch.arange(N)[:, None], index])
    with pytest.raises(ValueError, match="expected"):
        ig.attribute_all(x, targets=7)


def test_gradient_methods_of_outputs_with_several_axes():
    model, (x,) = net("softmax_axis")
    found = ours.IntegratedGradients(model).attribute_all(x, n_steps=3)
    assert found.shape == (N, 4, 4, *x.shape[1:])
    same(found[:, 1, 2], stock.IntegratedGradients(model).attribute(x, target=(1, 2), n_steps=3))


def test_functions_and_training_mode_go_one_by_one():
    model, (x,) = net()
    for name in ("InputXGradient", "IntegratedGradients", "GradientShap"):
        options = options_of(name, x)
        fn = lambda t: model(t)  # noqa: E731
        want = stacked([drawn(lambda: getattr(stock, name)(fn).attribute(x, target=c, **options))[0] for c in range(3)])  # noqa: B023
        same(drawn(lambda: getattr(ours, name)(fn).attribute_all(x, **options))[0], want)  # noqa: B023
    torch.manual_seed(0)
    drops = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)).double()
    x = torch.randn(N, 6, dtype=torch.float64)
    want = drawn(lambda: stock.IntegratedGradients(drops).attribute(x, target=1, n_steps=3))[0]
    same(drawn(lambda: ours.IntegratedGradients(drops).attribute(x, target=1, n_steps=3))[0], want)


@pytest.mark.parametrize("all_outputs", [False, True])
def test_memory_does_not_grow_with_steps(all_outputs, monkeypatch):
    """No call of the engine holds more gradients than a block, whatever the number of steps."""
    model, (x,) = net("cnn1d", 20)
    monkeypatch.setattr(chunks, "CPU_CACHED_BYTES", 3 << 19)
    largest = []
    true = points.Points.gradients

    def watched(self, rows, *args, **kwargs):
        found = true(self, rows, *args, **kwargs)
        largest.append(sum(f.nbytes for f in found))
        return found

    monkeypatch.setattr(points.Points, "gradients", watched)
    ig = ours.IntegratedGradients(model, engine="kernel")
    for steps in (5, 40):
        ig.attribute_all(x, n_steps=steps) if all_outputs else ig.attribute(x, target=1, n_steps=steps)
    assert len(largest) > 3
    assert max(largest) <= 1 << 19


def test_an_input_that_is_not_used_and_bad_targets_are_captums_errors():
    class First(nn.Module):
        def forward(self, a, b):
            return a * 2

    inputs = (torch.randn(N, 3), torch.randn(N, 3))
    model, (x,) = net()
    for name in ("InputXGradient", "IntegratedGradients"):
        with pytest.raises(RuntimeError, match="not have been used"):
            getattr(ours, name)(First()).attribute(inputs, target=0)
        for target in (7, None, (0, 1), [0, 1]):
            with pytest.raises(Exception) as want:
                getattr(stock, name)(model).attribute(x, target=target)
            with pytest.raises(type(want.value)) as got:
                getattr(ours, name)(model).attribute(x, target=target)
            assert str(got.value) == str(want.value)
    for bad in ({"n_steps": -1}, {"method": "simpson"}, {"baselines": torch.zeros(2, 2)}):
        with pytest.raises(AssertionError):
            ours.IntegratedGradients(model).attribute_all(x, **bad)


def test_gradients_with_respect_to_inputs_that_want_them():
    """Captum's attribution of an input that requires grad hangs on it by the factor in front; ours never does."""
    model, (x,) = net()
    x.requires_grad_()
    x.grad = torch.full_like(x, 3.0)
    for name in ("InputXGradient", "IntegratedGradients"):
        got, want = (getattr(p, name)(model).attribute(x, target=1) for p in (ours, stock))
        assert not got.requires_grad
        same(got, want.detach())
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert x.requires_grad
