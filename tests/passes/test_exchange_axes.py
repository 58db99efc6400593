"""A program with rows and columns exchanged around windows along rows gives the same Jacobian."""

from __future__ import annotations

import os
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import gradkern
from gradkern.ir.program import Contract, Index, Program, Windows
from gradkern.passes import exchange_axes as module
from gradkern.passes.exchange_axes import exchange_axes, has_long_rows
from gradkern.runtime import reference
from tests.support import capturing, oracle
from tests.support.random_programs import Network, programs


def time_along_rows(*middle: nn.Module) -> nn.Module:
    """``[N, 1, 30, 3]``, 30 steps of 3 electrodes, to two outputs."""
    body = [
        nn.Conv2d(1, 4, (9, 1), padding="same"),
        nn.BatchNorm2d(4),
        *map(deepcopy, middle),
        nn.Flatten(),
        nn.LazyLinear(2),
    ]
    model = nn.Sequential(*body).eval()
    model(torch.randn(1, 1, 30, 3))
    return model.double()


class Skips(nn.Module):
    """A sum with a value that was not exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(4, 4, (1, 3), padding="same"), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [N, 4, 30, 3]
        return torch.relu(self.conv(x) + self.point(x)) + x


def long_rows(program: Program) -> int:
    return sum(has_long_rows(program, step) for step in program.steps)


NETWORKS = {
    "electrodes joined": (nn.Conv2d(4, 6, (1, 3), groups=2, bias=False), nn.ELU(), nn.AvgPool2d((4, 1), (3, 1))),
    "pooled along rows": (nn.ReLU(), nn.MaxPool2d((4, 1), (2, 1), padding=(1, 0)), nn.Tanh()),
    "windows over both": (nn.ReLU(), nn.Conv2d(4, 3, 3, stride=(2, 1)), nn.MaxPool2d((3, 1))),
    "pooled over both": (nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
    "a sum": (Skips(),),
    "softmax along rows": (nn.Softmax(2),),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_windows_along_rows_are_exchanged(name: str) -> None:
    model, x = time_along_rows(*NETWORKS[name]), torch.randn(3, 1, 30, 3, dtype=torch.float64)
    program = capturing.to_program(model, (x,))
    assert long_rows(program) == 1
    assert long_rows(exchange_axes(program)) == 0
    assert exchange_axes(program).output_shape == program.output_shape
    got = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(got, oracle.jacobian(model, x)[1][0]) < 1e-12


def test_joined_electrodes_are_exchanged_without_copies_inside() -> None:
    model, x = time_along_rows(*NETWORKS["electrodes joined"]), torch.randn(2, 1, 30, 3, dtype=torch.float64)
    exchanged = exchange_axes(capturing.to_program(model, (x,)))
    assert [type(s.form) for s in exchanged.steps].count(Index) == 1  # the input
    maps = [step.form.map for step in exchanged.steps if isinstance(step.form, Contract)]
    assert [w.kernel for w in maps if isinstance(w, Windows)] == [(1, 9), (3, 1)]


def test_axes_of_other_networks_stay_as_they_are() -> None:
    for layer, shape in (
        (nn.Conv2d(1, 4, (1, 9)), (1, 3, 30)),
        (nn.Conv2d(16, 4, (9, 1)), (16, 30, 3)),  # its channels are neighbours
        (nn.Conv2d(1, 4, (9, 1)), (1, 30, 1)),  # rows without columns are neighbours
        (nn.Conv2d(1, 4, (9, 1)), (1, 9, 30)),  # a filter over all rows, as over electrodes, does not slide
    ):
        program = capturing.to_program(nn.Sequential(layer, nn.ReLU()).eval(), (torch.randn(2, *shape),))
        assert exchange_axes(program) is program


@settings(max_examples=max(1, int(os.environ.get("GRADKERN_FUZZ", 400)) // 4), deadline=None)
@given(programs(foreign=True))
def test_random_programs_stay_the_same(network: Network) -> None:
    with pytest.MonkeyPatch.context() as patch:  # windows of the generator are short
        patch.setattr(module, "LONG", 2)
        patch.setattr(module, "FEW_NUMBERS", 100)
        exchanged = module.AxisExchange(network.program).write()
    if exchanged == network.program:
        return
    params, inputs = network.params(), network.inputs(2)
    want, got = (reference.jacobian(p, params, inputs) for p in (network.program, exchanged))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
