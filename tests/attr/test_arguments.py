"""Captum's additional_forward_args of every kind, and indices into embeddings, on the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from captum import attr as stock
from torch import Tensor, nn

import gradkern
from gradkern import attr as ours
from gradkern.attr.layer.split import LayerView

N, F, L = 6, 5, 7


@pytest.fixture(autouse=True)
def on_kernels() -> Iterator[None]:
    with gradkern.use("kernel"):
        yield


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(F, 4), nn.Linear(4, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float | None = 1.0, act: Any = "tanh", ids: Any = None
    ) -> Tensor:
        if mask is not None:
            x = x * mask
        act = getattr(torch, act) if isinstance(act, str) else act
        y = self.second(act(self.first(x)))
        y = y if scale is None else y * scale
        return y if ids is None else y * (1 + ids[:, None])


class Words(nn.Module):
    """Logits from ids, and from a number per sample where it is given."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.requires_grad_(not frozen)

    def forward(self, ids: Tensor, mask: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
        h = self.hidden(self.embedding(ids)).tanh()
        if mask is not None:
            h = h.masked_fill(~mask.unsqueeze(-1), 0.0)
        y = self.out(h.sum(1))
        return y if offset is None else y * offset


def square(x: Tensor) -> Tensor:
    return x * x


def samples() -> tuple[Masked, Tensor]:
    torch.manual_seed(0)
    return Masked().double().eval(), torch.randn(N, F, dtype=torch.float64)


ARGUMENTS: dict[str, Callable[[], Any]] = {
    "None": lambda: (None,),
    "scalar tensor": lambda: torch.tensor(2),
    "mask without samples": lambda: torch.tensor([True, False, True, True, False]),
    "uint8 mask without samples": lambda: torch.tensor([1, 0, 1, 1, 0], dtype=torch.uint8),
    "bool mask": lambda: torch.rand(N, F) > 0.4,
    "integers": lambda: torch.randint(0, 3, (N, F)),
    "number": lambda: (None, 2.5),
    "int": lambda: (torch.rand(N, F) > 0.4, 3),
    "None after a mask": lambda: (torch.rand(N, F) > 0.4, None),
    "string": lambda: (None, None, "sigmoid"),
    "function": lambda: (None, None, square),
    "torch's function": lambda: (None, 2, torch.relu),
    "rows after the rest": lambda: (None, 2.0, "tanh", torch.randint(0, 5, (N,))),
    "uint8 rows": lambda: (torch.ones(F), 2.0, "tanh", torch.randint(0, 5, (N,), dtype=torch.uint8)),
}
METHODS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 5},
    "GuidedBackprop": {},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "error:.*autograd:gradkern.GradkernWarning")
@pytest.mark.filterwarnings("error:.*Captum:gradkern.GradkernWarning")
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("method", METHODS)
def test_arguments_of_every_kind(method: str, name: str) -> None:
    model, x = samples()
    extra, options = ARGUMENTS[name](), METHODS[method]
    got = getattr(ours, method)(model).attribute(x, target=1, additional_forward_args=extra, **options)
    by_all = getattr(ours, method)(model).attribute_all(x, additional_forward_args=extra, **options)
    torch.testing.assert_close(by_all[:, 1], got)
    given = extra if isinstance(extra, tuple) else (extra,)

    def closed(*inputs: Tensor) -> Tensor:
        copies = len(inputs[0]) // N
        return model(*inputs, *(a.repeat(copies, *(1,) * (a.dim() - 1)) if is_rows(a) else a for a in given))

    if method != "GuidedBackprop":  # Captum's works on modules, and repeats a tensor that has no row per sample
        want = getattr(stock, method)(closed).attribute(x, target=1, **options)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def is_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and len(x) == N


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_of_arguments_are_guarded() -> None:
    model, x = samples()
    for extra in ((None, 2.0), (None, 3.0), (None, 2.0, "sigmoid"), (torch.ones(F), 2.0), (torch.zeros(F), 2.0)):
        got = ours.Saliency(model).attribute(x, target=1, additional_forward_args=extra)
        want = stock.Saliency(model).attribute(x, target=1, additional_forward_args=extra)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_noise_and_references_take_the_arguments_along() -> None:
    model, x = samples()
    extra = (torch.rand(F, dtype=torch.float64), 2.0, square, torch.randint(0, 5, (N,)))
    for inner in (ours.Saliency(model), ours.IntegratedGradients(model)):
        torch.manual_seed(0)
        got = ours.NoiseTunnel(inner).attribute_all(x, nt_samples=3, additional_forward_args=extra)
        assert got.shape == (N, 3, F)
        torch.manual_seed(0)
        fresh = type(inner)(lambda t, ids: model(t, *extra[:3], ids))
        want = ours.NoiseTunnel(fresh).attribute_all(x, nt_samples=3, additional_forward_args=extra[3])
        torch.testing.assert_close(got, want)
    baselines = torch.randn(3, F, dtype=torch.float64)
    maps, delta = ours.DeepLiftShap(model).attribute_all(
        x, baselines=baselines, additional_forward_args=extra, return_convergence_delta=True
    )
    assert maps.shape == (N, 3, F)
    assert float(delta.abs().max()) < 1e-8


# ---------------------------------------------------------------------------------------------------------------
# Embeddings


@pytest.fixture
def gradients_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every call of the engine behind a layer."""
    run: list[int] = []
    plain = LayerView.gradients
    monkeypatch.setattr(LayerView, "gradients", lambda *a: run.append(1) or plain(*a))
    return run


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["ids", "mask", "offset", "to the input of the next layer"])
def test_layer_integrated_gradients_start_at_an_embedding(kind: str, frozen: bool, gradients_run: list[int]) -> None:
    torch.manual_seed(0)
    model = Words(frozen).double().eval()
    ids = torch.randint(0, 20, (N, L))
    extra = {"mask": torch.rand(N, L) > 0.3, "offset": (None, torch.rand(N, 1, dtype=torch.float64))}.get(kind)
    to_input = kind.startswith("to the")
    layer = model.hidden if to_input else model.embedding
    options: dict[str, Any] = {"baselines": torch.zeros_like(ids), "n_steps": 6, "additional_forward_args": extra}
    options |= {"attribute_to_layer_input": to_input, "return_convergence_delta": True}
    want = stock.LayerIntegratedGradients(model, layer).attribute(ids, target=1, **options)
    got = ours.LayerIntegratedGradients(model, layer).attribute(ids, target=1, **options)
    assert gradients_run
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    by_all, delta = ours.LayerIntegratedGradients(model, layer).attribute_all(ids, **options)
    torch.testing.assert_close((by_all[:, 1], delta[:, 1]), got)
    for name in ("LayerGradientXActivation", "LayerGradCam"):
        one = getattr(stock, name)(model, layer).attribute(ids, target=2, additional_forward_args=extra)
        also = getattr(ours, name)(model, layer).attribute(ids, target=2, additional_forward_args=extra)
        torch.testing.assert_close(also, one, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_backward_behind_the_embedding_that_is_not_its_own_stays_with_captum(gradients_run: list[int]) -> None:
    class Lies(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * 7

    class Strange(Words):
        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            return self.out(self.hidden(Lies.apply(self.embedding(ids))).sum(1))

    model, ids = Strange().double().eval(), torch.randint(0, 20, (N, L))
    options = {"baselines": torch.zeros_like(ids), "target": 1, "n_steps": 4}
    got = ours.LayerIntegratedGradients(model, model.embedding).attribute(ids, **options)
    torch.testing.assert_close(got, stock.LayerIntegratedGradients(model, model.embedding).attribute(ids, **options))
    assert not gradients_run


# ---------------------------------------------------------------------------------------------------------------
# Functions and wrappers


WRAPPED: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "IntegratedGradients": {"n_steps": 4},
    "DeepLift": {},
    "LRP": {},
    "GuidedBackprop": {},
    "Deconvolution": {},
    "GradientShap": {"baselines": torch.zeros(1, F, dtype=torch.float64)},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "error::gradkern.GradkernWarning")
@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
@pytest.mark.parametrize("name", [*WRAPPED, "layers"])
def test_wrapped_models_in_all_methods(name: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(F, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(N, F, dtype=torch.float64)
    if name == "layers":
        for kind in ("LayerIntegratedGradients", "LayerConductance", "LayerGradientXActivation", "InternalInfluence"):
            want = getattr(stock, kind)(model, model[1]).attribute(x, target=1)
            for method in (getattr(ours, kind), lambda *a, kind=kind: ours_from(getattr(stock, kind)(*a))):
                torch.testing.assert_close(method(wrap(model), model[1]).attribute(x, target=1), want)
        return
    results = []
    for fn in (model, wrap(model)):
        for method in (getattr(ours, name)(fn), ours_from(getattr(stock, name)(fn))):
            torch.manual_seed(0)
            np.random.seed(0)
            results.append(method.attribute(x, target=1, **WRAPPED[name]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def ours_from(attribution: Any) -> Any:
    return gradkern.accelerate(attribution)


@pytest.mark.filterwarnings("ignore::UserWarning", "error::gradkern.GradkernWarning")
def test_functions_in_captums_methods() -> None:
    model, x = samples()

    def fn(t: Tensor, scale: float = 1.0) -> Tensor:
        return model(t) * scale

    for name, options in (("Saliency", {}), ("IntegratedGradients", {"n_steps": 4}), ("InputXGradient", {})):
        for extra in (None, 3.0):
            want = getattr(stock, name)(fn).attribute(x, target=1, additional_forward_args=extra, **options)
            got = getattr(ours, name)(fn).attribute(x, target=1, additional_forward_args=extra, **options)
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["GradientShap", "DeepLiftShap"])
def test_methods_over_baselines_take_them_second(name: str) -> None:
    model = nn.Sequential(nn.Linear(F, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x, base = torch.randn(2, N, F, dtype=torch.float64)

    def drawn(targets: Any = None) -> Any:
        torch.manual_seed(0)
        np.random.seed(0)
        return getattr(ours, name)(model).attribute_all(x, base, targets=targets)

    whole, (best, index) = drawn(), drawn(gradkern.TopK(2))
    torch.testing.assert_close(best, whole[torch.arange(N)[:, None], index])
    torch.testing.assert_close(drawn([2, 0]), whole[:, [2, 0]])
    with pytest.raises(TypeError, match="averages over them"):
        getattr(ours, name)(model).attribute_all(x)
