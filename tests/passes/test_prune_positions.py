"""A program without the positions that its output does not depend on gives the same Jacobian."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import gradkern
from gradkern.ir.macs import forward_macs
from gradkern.ir.program import Product
from gradkern.passes import prune_positions
from gradkern.passes.prune_positions import Progression, covering, prune, union
from gradkern.runtime import reference
from tests.support import capturing, oracle
from tests.support.networks import NETWORKS, Chomp
from tests.support.random_programs import Network, programs


def macs(program) -> int:
    return sum(forward_macs(program, i) for i in range(len(program.steps)))


def last_step(*layers: nn.Module) -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(*layers), nn.Linear(layers[-1].out_channels, 3)

        def forward(self, x):
            return self.head(self.body(x)[..., -1])

    return Last().double().eval()


def causal(c: int, o: int, dilation: int) -> list[nn.Module]:
    return [nn.Conv1d(c, o, 3, padding=2 * dilation, dilation=dilation), Chomp(2 * dilation)]


def test_a_causal_network_needs_few_positions():
    model = NETWORKS["tcn"].full.build(dtype=torch.float64)
    program = capturing.to_program(model, NETWORKS["tcn"].full.inputs(2, dtype=torch.float64))
    found = prune(program)
    assert macs(found) < macs(program) / 5
    assert found.inputs == program.inputs
    assert found.output_shape == program.output_shape
    assert prune(found) is found
    x = torch.randn(2, 1, 784, dtype=torch.float64)
    got = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(got, oracle.jacobian(model, x)[1][0]) < 1e-12
    assert gradkern.explain(model, x, show=False).fused_share == 1.0


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv1d(2, 3, 5, stride=3, padding=1), nn.ReLU(), nn.Conv1d(3, 4, 3, stride=2)], (2, 50)),
        ([*causal(2, 3, 1), nn.Tanh(), *causal(3, 4, 2), nn.ReLU(), *causal(4, 4, 4)[:1]], (2, 30)),
        ([nn.Conv1d(2, 3, 4, padding=3), nn.BatchNorm1d(3), nn.GELU(), nn.Conv1d(3, 5, 1, stride=4)], (2, 33)),
        ([nn.Conv1d(2, 3, 3, padding=20, dilation=9), nn.ReLU(), nn.Conv1d(3, 4, 3, padding=9)], (2, 12)),
        ([nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=4, dilation=5, padding=5)], (2, 40)),
        ([nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.ReLU(), nn.Conv1d(4, 4, 3, dilation=3)], (2, 40)),
    ],
)
def test_last_position_of_convolutions(layers, shape):
    model = last_step(*layers)
    x = torch.randn(4, *shape, dtype=torch.float64)
    program = capturing.to_program(model, (x,))
    assert macs(prune(program)) <= macs(program)
    got = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(got, oracle.jacobian(model, x)[1][0]) < 1e-12


def test_weights_that_are_not_finite_spread_as_in_torch():
    model = last_step(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 4, 3, dilation=5))
    x = torch.randn(3, 2, 40, dtype=torch.float64)
    prepared = gradkern.prepare(model, x)
    assert prepared.program is not None
    program = prepared.program
    assert prune(program) is not program
    with torch.no_grad():
        model.body[0].weight[0, 0, 0] = torch.inf
    want = oracle.jacobian(model, x)[1][0]
    assert want.isnan().any()
    torch.testing.assert_close(gradkern.jacobian(model, x, engine="kernel"), want, equal_nan=True)


def test_images_narrow_along_both_axes():
    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3, dilation=(2, 1), padding=(2, 1))
            self.skip = nn.Conv2d(2, 4, 1)

        def forward(self, x):
            y = self.b(torch.tanh(self.a(x))) + self.skip(x)
            return y[:, :, 2, ::5].flatten(1)

    model, x = Corner().double().eval(), torch.randn(3, 2, 12, 16, dtype=torch.float64)
    program = capturing.to_program(model, (x,))
    assert macs(prune(program)) < macs(program) / 2
    got = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(got, oracle.jacobian(model, x)[1][0]) < 1e-12


def test_a_class_token_needs_one_row_of_the_last_attention():
    case = NETWORKS["vit"].full
    program = capturing.to_program(case.build(), case.inputs(2))
    found = prune(program)
    rows = [s.shape for s in found.steps if s.form == Product("matmul")]
    assert rows[-2:] == [(4, 1, 65), (4, 1, 16)]
    assert rows[:-2] == [(4, 65, 65), (4, 65, 16)] * 3
    assert macs(found) < 0.85 * macs(program)


def test_nothing_to_narrow_leaves_the_program_as_it_is():
    for name in ("inceptiontime", "resnet18", "eegnet", "mlstm_fcn"):
        small = NETWORKS[name].small
        program = capturing.to_program(small.build(), small.inputs(2))
        assert prune(program) == program


def test_progressions_cover_and_join_positions():
    assert covering([3, 7, 15]) == Progression(3, 4, 4)
    assert covering([5]) == Progression(5, 1, 1)
    assert union(Progression(0, 4, 3), Progression(2, 1, 1)) == Progression(0, 2, 5)
    assert union(Progression(9, 1, 1), Progression(3, 1, 1)) == Progression(3, 6, 2)
    assert Progression(4, 6, 3).within(Progression(1, 3, 9)) == Progression(1, 2, 3)


@settings(max_examples=max(1, int(os.environ.get("GRADKERN_FUZZ", 400)) // 2), deadline=None)
@given(programs(foreign=True))
def test_random_programs_narrow_exactly(network: Network):
    try:
        places = prune_positions.demands(network.program)
    except prune_positions.OnlyPadding:
        return
    small = prune_positions.PruningWriter(network.program, places).write()
    assert macs(small) <= 1.5 * macs(network.program) + 1000  # copies that cut
    params, inputs = network.params(), network.inputs(3)
    y, want = reference.jacobian(network.program, params, inputs)
    z, got = reference.jacobian(small, params, inputs)
    if not torch.isfinite(y).all():
        return
    torch.testing.assert_close(z, y, rtol=1e-10, atol=1e-10)
    for a, b in zip(got, want, strict=True):
        if torch.isfinite(b).all():
            scale = b.abs().max().clamp_min(1.0)
            torch.testing.assert_close(a / scale, b / scale, rtol=1e-9, atol=1e-9)
