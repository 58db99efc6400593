"""Forwards that write their own parameters before they read them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradkern
from gradkern import GradkernWarning
from gradkern.dispatch import ways
from gradkern.dispatch.ways import measure
from tests.support import oracle

pytestmark = pytest.mark.real_export


class Written(nn.Module):
    """A linear layer whose weight ``write`` changes, and returns as it is to be used."""

    def __init__(self, write: Callable[[Written, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("calls", torch.zeros(()))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.tanh(), self.write(self, x))


def renorm_data(net: Written, x: Tensor) -> Tensor:
    net.weight.data = torch.renorm(net.weight.data, p=2, dim=0, maxnorm=0.5)
    return net.weight


def renorm_copy(net: Written, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.weight.copy_(torch.renorm(net.weight, p=2, dim=0, maxnorm=0.5))
    return net.weight


def clamp_twice(net: Written, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.weight.clamp_(-0.5, 0.9).clamp_(max=0.3)
    return net.weight


def clamp_data(net: Written, x: Tensor) -> Tensor:
    before = net.weight.data
    net.weight.data.clamp_(-0.1, 0.1)
    return before


def keep_clamped(net: Written, x: Tensor) -> Tensor:
    clamped = net.weight.clamp(-0.1, 0.1)
    net.weight.data = clamped
    return clamped


def old_value(net: Written, x: Tensor) -> Tensor:
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.clamp_(-0.1, 0.1)
    return before.clamp(-0.1, 0.1) + net.weight


def count(net: Written, x: Tensor) -> Tensor:
    net.calls += 1
    return net.weight


CLEAR = (renorm_data, renorm_copy, clamp_twice, clamp_data, keep_clamped, old_value)


@pytest.mark.parametrize("write", CLEAR, ids=lambda write: write.__name__)
def test_parameter_that_a_forward_writes_is_read_as_written(write: Callable[[Written, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Written(write), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(2):  # the second time, of weights that no forward pass has seen
        want = oracle.jacobian(copy.deepcopy(net), x)[1][0]
        before = {name: value.clone() for name, value in net.state_dict().items()}
        assert gradkern.prepare(net, x).program is not None
        with torch.no_grad():
            net[0].weight.copy_(before["0.weight"])
        got = gradkern.jacobian(net, x, engine="kernel")
        assert oracle.relative_error(got, want) < 1e-12
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        with torch.no_grad():
            net[0].weight.copy_(torch.randn(5, 4))


def view_of_it(net: Written, x: Tensor) -> Tensor:
    view = net.weight.t()
    with torch.no_grad():
        net.weight.clamp_(-0.1, 0.1)
    return view.t()


def part_of_it(net: Written, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.weight[0].clamp_(-0.1, 0.1)
    return net.weight


def old_alias(net: Written, x: Tensor) -> Tensor:
    before = net.weight.data
    net.weight.data = before.clamp(-0.1, 0.1)
    return before + net.weight


def of_the_input(net: Written, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.weight.clamp_(max=x.max())
    return net.weight


def at_random(net: Written, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.weight.uniform_()
    return net.weight


@pytest.mark.parametrize(
    "write", [view_of_it, part_of_it, old_alias, of_the_input, at_random, count], ids=lambda write: write.__name__
)
def test_writes_that_cannot_be_followed_are_left_to_autograd(write: Callable[[Written, Tensor], Tensor]) -> None:
    net = Written(write).eval()
    with pytest.warns(GradkernWarning, match="in place|changes|random"):
        assert gradkern.prepare(net, torch.randn(6, 4)).program is None


class Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.rand(4))
        self.register_buffer("window", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.window = torch.exp(-self.width)
        return (x * self.window).square()


@pytest.mark.parametrize("way", ["loop", "measured"])
def test_a_buffer_that_a_forward_replaces_is_put_back(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Filter().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    assert gradkern.prepare(net, x).program is not None
    before = net.window
    if way == "measured":
        monkeypatch.setattr(ways, "measure", measure)
        gradkern.explain(net, x, show=False)
    else:
        with ways.pinned("loop"):
            gradkern.jacobian(net, x, engine="kernel")
    assert net.window is before
    assert torch.equal(copy.deepcopy(net).window, torch.ones(4))
