"""References per sample: the mean over them, their seeds, hypothetical contributions, and what is refused."""

from __future__ import annotations

from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradkern
import gradkern.attr as ours
from gradkern.attr import DeepLift, DeepLiftShap, GradientShap, IntegratedGradients
from gradkern.attr.references import hypothetical, seed_of
from gradkern.ir.program import Contract, View
from gradkern.runtime import ops, reference
from gradkern.util.options import BadValue

N, R, LENGTH = 4, 5, 12


class Branching(nn.Module):
    """A forward pass that no Program describes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if float(x.sum()) > -1e9 else self.net(-x)


def small_net() -> nn.Sequential:
    """A net for which Captum's rules are complete."""
    torch.manual_seed(0)
    convs = nn.Conv1d(4, 6, 5, padding=2), nn.ReLU(), nn.Conv1d(6, 4, 3), nn.Tanh()
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(4 * (LENGTH - 2), 3)).double().eval()


def sequences(n: int = N, seed: int = 0) -> Tensor:
    letters = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (n, LENGTH)))
    return nn.functional.one_hot(letters, 4).mT.double()


def shuffle(inputs: Tensor, n: int = 20, random_state: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(0 if random_state is None else random_state)
    return torch.stack([inputs[..., torch.randperm(inputs.shape[-1], generator=g)] for _ in range(n)], 1)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return small_net()


@pytest.fixture(scope="module")
def multipliers(net: nn.Module) -> Tensor:
    """Captum's, ``[N, R, C, *in]``."""
    x, refs = sequences(), shuffle(sequences(), R)
    method = captum.attr.DeepLift(net)
    with pytest.warns(UserWarning):
        rows = [
            method.attribute(x, refs[:, r], target=c, custom_attribution_func=lambda m, a, b: m)
            for r in range(R)
            for c in range(3)
        ]
    return torch.stack(rows, 1).unflatten(1, (R, 3)).detach()


@pytest.mark.parametrize("kind", [DeepLift, DeepLiftShap])
@pytest.mark.parametrize("engine", ["kernel", "reference", "autograd"])
@pytest.mark.filterwarnings("ignore")
def test_mean_over_references_of_each_sample(kind: Any, engine: Any, net: nn.Module, multipliers: Tensor) -> None:
    x, refs = sequences(), shuffle(sequences(), R)
    mean = ((x[:, None] - refs)[:, :, None] * multipliers).mean(1)
    letters = (multipliers - (multipliers * refs[:, :, None]).sum(3, keepdim=True)).mean(1)
    method = kind(net, engine=engine)

    every, deltas = method.attribute_all(x, refs, return_convergence_delta=True)
    torch.testing.assert_close(every, mean)
    assert deltas.shape == (N * R, 3)
    assert float(deltas.abs().max()) < 1e-12
    torch.testing.assert_close(method.attribute_all(x, refs, hypothetical=True), letters)
    torch.testing.assert_close(method.attribute_all(x, refs, custom_attribution_func=hypothetical), letters)

    one, deltas = method.attribute(x, refs, target=2, return_convergence_delta=True)
    torch.testing.assert_close(one, mean[:, 2])
    assert deltas.shape == (N * R,)
    rows = torch.tensor([2, 0, 1, 1])
    torch.testing.assert_close(
        method.attribute(x, refs, target=rows, hypothetical=True), letters[torch.arange(N), rows]
    )


@pytest.mark.filterwarnings("ignore")
def test_model_without_a_program(multipliers: Tensor) -> None:
    x, refs = sequences(), shuffle(sequences(), R)
    mean = ((x[:, None] - refs)[:, :, None] * multipliers).mean(1)
    torch.testing.assert_close(DeepLiftShap(Branching(small_net())).attribute_all(x, refs), mean)


def test_hypothetical_times_the_input_is_complete(net: nn.Module) -> None:
    x, refs = sequences(), shuffle(sequences(), R)
    maps = DeepLiftShap(net, engine="kernel").attribute_all(x, refs, hypothetical=True) * x[:, None]
    with torch.no_grad():
        change = net(x) - net(refs.flatten(0, 1)).view(N, R, 3).mean(1)
    torch.testing.assert_close(maps.sum((2, 3)), change)


def test_shared_references_and_one_baseline_have_letters_too(net: nn.Module) -> None:
    x, shared = sequences(), sequences(R, seed=5)
    own = shared.expand(N, R, 4, LENGTH)
    shap = DeepLiftShap(net, engine="kernel")
    for wanted in ({}, {"hypothetical": True}):
        torch.testing.assert_close(shap.attribute_all(x, shared, **wanted), shap.attribute_all(x, own, **wanted))
        first = DeepLift(net, engine="kernel").attribute_all(x, shared[:1], **wanted)
        torch.testing.assert_close(first, DeepLift(net, engine="kernel").attribute_all(x, own[:, :1], **wanted))


def test_draws_depend_on_seed_and_number_alone(net: nn.Module) -> None:
    x, method = sequences(), DeepLift(net, engine="kernel")
    whole = method.attribute_all(x, shuffle, n_references=R, random_state=7)
    with gradkern.use(memory_budget=1):
        assert torch.equal(whole, method.attribute_all(x, shuffle, n_references=np.int64(R), random_state=np.int64(7)))
    assert torch.equal(whole[:2], method.attribute_all(x[:2], shuffle, n_references=R, random_state=7))
    drawn = torch.cat([shuffle(x[i : i + 1], R, seed_of(7, i)) for i in range(N)])
    assert torch.equal(whole, method.attribute_all(x, drawn))
    assert not torch.equal(whole, method.attribute_all(x, shuffle, n_references=R, random_state=8))
    assert len({seed_of(s, i) for s in range(30) for i in range(30)}) == 900


def test_more_arguments_and_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.control = small_net(), nn.Linear(3, 3).double()

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.net(x).tanh() * self.control(z)

    torch.manual_seed(1)
    model, x, z = Two().eval(), sequences(), torch.randn(N, 3, dtype=torch.float64)
    refs = shuffle(x, R)
    got = DeepLiftShap(model, engine="kernel").attribute_all(x, refs, additional_forward_args=z)
    change = model(x, z) - model(refs.flatten(0, 1), z.repeat_interleave(R, 0)).view(N, R, 3).mean(1)
    torch.testing.assert_close(got.sum((2, 3)), change.detach())
    zs = torch.randn(N, R, 3, dtype=torch.float64)
    parts = DeepLiftShap(model, engine="kernel").attribute_all((x, z), (refs, zs))
    change = model(x, z) - model(refs.flatten(0, 1), zs.flatten(0, 1)).view(N, R, 3).mean(1)
    torch.testing.assert_close(parts[0].sum((2, 3)) + parts[1].sum(2), change.detach())


def test_what_is_detached_is_constant_over_all_references() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).tanh() * self.net(x).detach().sigmoid()

    model, x = Gate().eval(), sequences()
    refs = shuffle(x, R)
    with pytest.warns(UserWarning, match="constant"):
        mean = DeepLiftShap(model).attribute_all(x, refs)
    each = [DeepLift(model).attribute_all(x, refs[:, r]) for r in range(R)]
    torch.testing.assert_close(mean, torch.stack(each).mean(0))


def test_gradient_shap_draws_from_the_samples_own(net: nn.Module) -> None:
    x, draws = sequences(), 8
    refs = shuffle(x, R)
    np.random.seed(3)
    which = np.random.choice(R, (draws, N))
    want = torch.zeros_like(x)
    for row in which:
        places = torch.from_numpy(np.random.uniform(0.0, 1.0, N)).view(N, 1, 1)
        start = refs[torch.arange(N), row]
        points = (places * x + (1 - places) * start).requires_grad_()
        want += torch.autograd.grad(net(points)[:, 1].sum(), points)[0] * (x - start) / draws
    method = GradientShap(net, engine="kernel")
    np.random.seed(3)
    got, deltas = method.attribute(x, refs, n_samples=draws, target=1, return_convergence_delta=True)
    torch.testing.assert_close(got, want)
    assert deltas.shape == (N * draws,)
    np.random.seed(3)
    every, deltas = method.attribute_all(x, refs, n_samples=draws, return_convergence_delta=True)
    torch.testing.assert_close(every[:, 1], want)
    assert deltas.shape == (N * draws, 3)
    np.random.seed(3)
    letters, top = method.attribute_all(x, refs, n_samples=draws, targets=gradkern.TopK(3), hypothetical=True)
    torch.testing.assert_close((letters * x[:, None]).sum((2, 3)), every.sum((2, 3)).gather(1, top))


def test_references_of_a_wrong_shape_are_refused(net: nn.Module) -> None:
    x = sequences()
    method = DeepLiftShap(net)
    for bad in (shuffle(x, R)[:2], shuffle(x, R)[..., 1:], shuffle(x, R)[:, :0]):
        with pytest.raises(BadValue, match=r"expected references per sample \[N, R, \*in\] = \[4, R, 4, 12\]"):
            method.attribute_all(x, bad)
    with pytest.raises(BadValue, match="the function returned"):
        method.attribute_all(x, lambda inputs, n, random_state: shuffle(inputs, n + 1))
    with pytest.raises(BadValue, match="n_references: got 0"):
        method.attribute_all(x, shuffle, n_references=0)
    with pytest.raises(TypeError, match="random_state: got 'a'"):
        method.attribute_all(x, shuffle, random_state="a")
    with pytest.raises(BadValue, match="only one of them"):
        method.attribute_all(x, shuffle, hypothetical=True, custom_attribution_func=hypothetical)
    flat = nn.Sequential(nn.Linear(6, 2))
    with pytest.raises(BadValue, match="one-hot sequences"):
        DeepLift(flat).attribute_all(torch.randn(3, 6), torch.randn(3, 2, 6), hypothetical=True)
    with pytest.raises(TypeError):
        IntegratedGradients(net).attribute_all(x, hypothetical=True)


class Residual(nn.Module):
    """A sum of branches, from which a linear head takes its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x).relu()
        trunk: Tensor = stem + self.conv(stem).relu()
        return self.head(trunk.mean(2))


def test_chunks_share_the_hash_of_the_weights_and_deltas_repeat_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Residual().eval(), sequences().float()
    refs = sequences(N * R, seed=1).float().view(N, R, 4, LENGTH)
    hashes, steps = [], []
    hashed, stepped = ops.content_hash, reference.forward_step
    monkeypatch.setattr(ops, "content_hash", lambda tensors: (hashes.append(1), hashed(tensors))[1])
    monkeypatch.setattr(
        reference, "forward_step", lambda p, i, *rest: (steps.append(p.steps[i].form), stepped(p, i, *rest))[1]
    )

    def attributed() -> tuple[Tensor, Tensor, int]:
        hashes.clear()
        maps, delta = DeepLift(net, engine="kernel").attribute(x, refs, 1, return_convergence_delta=True)
        return maps, delta, len(hashes)

    attributed()  # captures
    steps.clear()
    maps, delta, once = attributed()
    assert steps and all(isinstance(form, (Contract, View)) for form in steps)  # the mean and the head, by torch
    assert float(delta.abs().max()) < 1e-5
    with gradkern.use(memory_budget=40_000):
        steps.clear()
        in_chunks, _, times = attributed()
    assert len(steps) > 4 * once
    assert times == once
    torch.testing.assert_close(in_chunks, maps)


class Weighted(nn.Module):
    """Two inputs of one number per sample."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * x.relu() + 2 * (y - 1.5).relu()


@pytest.mark.parametrize("method", [DeepLift, DeepLiftShap])
def test_samples_of_one_number_each_have_deltas(method: Any) -> None:
    rows = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0])
    start = tuple(torch.zeros(3 if method is DeepLiftShap else 1) for _ in rows)
    maps, delta = method(Weighted()).attribute(rows, start, return_convergence_delta=True)
    torch.testing.assert_close(maps, (torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])))
    assert not delta.any()


@pytest.mark.parametrize("engine", ["kernel", "reference"])
def test_an_output_without_axes_has_deltas(engine: Any) -> None:
    """``[N]``, as of a regression."""
    head = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1), nn.Flatten(0)).eval()
    x, start = torch.randn(3, 4), torch.randn(2, 4)
    for method, options in ((ours.DeepLift, {}), (ours.DeepLiftShap, {"baselines": start}), (ours.LRP, {})):
        for call in ("attribute", "attribute_all"):
            maps, delta = getattr(method(head, engine=engine), call)(x, return_convergence_delta=True, **options)
            assert maps.shape == x.shape
            assert delta.shape == (3 * len(options.get("baselines", [0])),)
