"""An input that the output does not depend on is an error, whatever the parameters, the engine and the call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern import attr

pytestmark = [pytest.mark.real_export, pytest.mark.filterwarnings("ignore::UserWarning")]


class CutOff(nn.Module):
    """``how``: in which way the output loses its input."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(3, 2), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.fc(x.detach())
        if self.how == "no_grad":
            with torch.no_grad():
                x = x * 2
            return self.fc(x)
        if self.how == "comparison":
            return self.fc((x > 0).to(x.dtype))
        return self.fc(torch.zeros_like(x))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x) + y.detach().sum(1, keepdim=True)


def model_and_inputs(how: str, frozen: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = (Unused() if how == "second" else CutOff(how)).double().eval().requires_grad_(not frozen)
    return model, tuple(torch.randn(4, 3, dtype=torch.float64) for _ in range(2 if how == "second" else 1))


CALLS: dict[str, Callable[..., object]] = {
    "jacobian": lambda m, xs, e: gradkern.jacobian(m, xs, engine=e),
    "function": lambda m, xs, e: gradkern.jacobian(lambda *t: m(*t) * 2, xs, engine=e),
    "Saliency": lambda m, xs, e: attr.Saliency(m, engine=e).attribute(xs, target=1),
    "Saliency, all": lambda m, xs, e: attr.Saliency(m, engine=e).attribute_all(xs),
    "IntegratedGradients": lambda m, xs, e: attr.IntegratedGradients(m, engine=e).attribute(xs, target=1),
    "IntegratedGradients, all": lambda m, xs, e: attr.IntegratedGradients(m, engine=e).attribute_all(xs),
    "GuidedBackprop": lambda m, xs, e: attr.GuidedBackprop(m, engine=e).attribute(xs, target=1),
    "DeepLift": lambda m, xs, e: attr.DeepLift(m, engine=e).attribute(xs, target=1),
    "DeepLift, all": lambda m, xs, e: attr.DeepLift(m, engine=e).attribute_all(xs),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["detach", "no_grad", "comparison", "zeros", "second"])
@pytest.mark.parametrize("engine", ["kernel", "reference", "autograd", "auto"])
def test_jacobian_of_an_unused_input_is_an_error(engine: str, how: str, frozen: bool) -> None:
    model, inputs = model_and_inputs(how, frozen)
    number = len(inputs) - 1
    with pytest.raises(ValueError, match=f"input {number} appears to not have been used"):
        gradkern.jacobian(model, inputs, engine=engine)
    if how == "second":
        gradkern.jacobian(model, inputs, wrt=0, engine=engine)
    if engine == "autograd":
        with pytest.raises(ValueError, match="not have been used"):
            gradkern.jacobian(model, inputs, create_graph=True)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["detach", "second"])
@pytest.mark.parametrize("engine", ["kernel", "auto"])
@pytest.mark.parametrize("call", CALLS)
def test_every_public_call_with_an_unused_input_is_an_error(call: str, engine: str, how: str, frozen: bool) -> None:
    model, inputs = model_and_inputs(how, frozen)
    with pytest.raises(RuntimeError, match="not have been used"):  # the type of torch's and Captum's own error
        CALLS[call](model, inputs, engine)


def test_a_prepared_model_that_is_cut_off_says_so_when_it_is_differentiated() -> None:
    model, (x,) = model_and_inputs("detach", frozen=False)
    assert gradkern.prepare(model, x).program is not None
    with pytest.raises(ValueError, match="not have been used"):
        gradkern.jacobian(model, x)


def test_an_output_that_does_not_depend_on_the_input_is_zeros() -> None:
    """The rule is about the whole output: one target of several may be constant."""

    def fn(x: Tensor) -> Tensor:
        return torch.cat([x * 2, torch.ones_like(x)], dim=1)

    x = torch.randn(4, 3)
    for engine in ("kernel", "autograd"):
        assert not gradkern.jacobian(fn, x, 4, engine=engine).any()
