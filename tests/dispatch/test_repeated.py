"""Calls that repeat an earlier one go straight to the kernel, and notice every change that a first call would."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import gradkern
from gradkern.dispatch import repeated
from gradkern.dispatch.ways import pinned

pytestmark = pytest.mark.real_export


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each earlier call that is asked for its kernel: whether it ran."""
    runs: list[bool] = []
    real = repeated.EarlierCall.again

    def again(call: repeated.EarlierCall, fn: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
        result = real(call, fn, x)
        runs.append(result is not None)
        return result

    monkeypatch.setattr(repeated.EarlierCall, "again", again)
    return runs


def model_of(features: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def samples(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 6, dtype=torch.float64)


def agrees(model: nn.Module, x: torch.Tensor, targets: int | None = None) -> None:
    got = gradkern.jacobian(model, x, targets, engine="kernel")
    torch.testing.assert_close(got, gradkern.jacobian(model, x, targets, engine="autograd"))


def test_the_second_call_is_repeated(taken: list[bool]) -> None:
    model = model_of()
    for targets in (None, 1, -1):
        agrees(model, samples(), targets)
        assert not taken
        agrees(model, samples(), targets)
        agrees(model, samples().requires_grad_(), targets)
        assert taken == [True, True]
        taken.clear()


def halve(model: nn.Sequential) -> None:
    model[0].weight.data.mul_(0.5)


def replace_layer(model: nn.Sequential) -> None:
    model[1] = nn.Tanh()


def hook(model: nn.Sequential) -> None:
    model[1].register_forward_hook(lambda module, inputs, y: 3 * y)


def not_finite(model: nn.Sequential) -> None:
    model[0].weight.data[0, 0] = float("nan")


def insert_layer(model: nn.Sequential) -> None:
    model.insert(1, nn.BatchNorm1d(8, dtype=torch.float64).eval())


@pytest.mark.parametrize("change", [halve, replace_layer, hook, insert_layer])
def test_a_change_of_the_model_is_noticed(change: Callable[[nn.Sequential], None], taken: list[bool]) -> None:
    model = model_of()
    agrees(model, samples())
    agrees(model, samples())
    change(model)
    agrees(model, samples())
    agrees(model, samples())
    assert taken.count(True) >= 2


def test_weights_that_are_not_finite_need_torch(taken: list[bool]) -> None:
    model = model_of()
    for change in (None, not_finite):
        if change:
            change(model)
        x = samples()
        got = gradkern.jacobian(model, x, engine="kernel")
        torch.testing.assert_close(got, gradkern.jacobian(model, x, engine="autograd"), equal_nan=True)
    assert taken == [False]


def test_a_hook_on_all_modules_is_noticed(taken: list[bool]) -> None:
    model = model_of()
    agrees(model, samples())
    handle = register_module_forward_hook(lambda module, inputs, y: 2 * y if isinstance(module, nn.ReLU) else None)
    try:
        agrees(model, samples())
    finally:
        handle.remove()
    assert not taken


def test_other_inputs_are_other_calls(taken: list[bool]) -> None:
    model, x = model_of(), samples()
    agrees(model, x)
    for other in (samples(3), x[0:1], torch._neg_view(x), x.t().contiguous().t()):
        agrees(model, other)
    assert taken == [True]  # the last, whose numbers are only laid out otherwise
    for wrong in (x.to_sparse(), x[0], x.float(), x.long(), x.numpy(), [x, x]):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            gradkern.jacobian(model, wrong, engine="kernel")  # type: ignore[call-overload]


def test_a_pinned_way_is_taken(taken: list[bool]) -> None:
    model = model_of()
    agrees(model, samples())
    with pinned("loop"):
        agrees(model, samples())
    assert not taken


def test_modes_and_a_reset_are_noticed(taken: list[bool]) -> None:
    model = model_of()
    agrees(model, samples())
    with torch.inference_mode():
        x = samples()
        got = gradkern.jacobian(model, x, engine="kernel")
    torch.testing.assert_close(got, gradkern.jacobian(model, x.clone(), engine="autograd"))
    gradkern.reset()
    agrees(model, samples())
    assert not taken


def test_pieces_are_repeated(taken: list[bool]) -> None:
    model, x = model_of(), samples(6)
    gradkern.prepare(model, x)
    got = torch.cat(list(gradkern.iter_jacobian(model, x, chunk=2, engine="kernel")))
    torch.testing.assert_close(got, gradkern.jacobian(model, x, engine="autograd"))
    agrees(model, x[:2])
    assert taken == [True]


def test_a_model_is_not_kept_alive() -> None:
    model = model_of()
    agrees(model, samples())
    agrees(model, samples())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
