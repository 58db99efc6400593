"""Local seeds: what they leave out is zero, whatever the layers between the input and the targets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradkern
from gradkern.codegen import local, lowering
from gradkern.planner.plan import ForwardPlan
from gradkern.runtime import executor, reference
from tests.support import capturing, oracle
from tests.support.capturing import bind
from tests.support.networks import BPNet
from tests.support.properties import FAST, FUZZ, agrees, questions
from tests.support.random_programs import programs

EXACT = 1e-10


@pytest.fixture
def always_local(monkeypatch, fresh):
    """However little it saves, as in networks much larger than these; a tile has few seeds."""
    make_local(monkeypatch, 3)


def make_local(monkeypatch, tile):
    monkeypatch.setattr(lowering, "MOST_LIVE_SHARE", 2.0)
    monkeypatch.setattr(lowering, "FEW_SEEDS", 1)
    monkeypatch.setattr(lowering, "seed_tile", lambda seeds, per_seed: min(seeds, tile))


@settings(FAST, max_examples=FUZZ or 200, derandomize=not FUZZ)
@given(questions(programs()), st.sampled_from([1, 2, 7]))
def test_random_programs_with_local_seeds_equal_the_reference(question, tile):
    with pytest.MonkeyPatch.context() as patch:
        make_local(patch, tile)
        gradkern.reset()
        agrees(*question)
    gradkern.reset()


def test_expanding_no_runs_gives_no_offsets():
    assert [offsets.tolist() for offsets in local.expand_runs([])] == [[], []]


class Row(nn.Module):
    """``layers`` in a row; ``skip`` adds the input of the second half to its result."""

    def __init__(self, *layers: nn.Module, skip: bool = False) -> None:
        super().__init__()
        self.layers, self.skip = nn.ModuleList(layers), skip

    def forward(self, x):
        middle = None
        for k, layer in enumerate(self.layers):
            if k == len(self.layers) // 2:
                middle = x
            x = layer(x)
        return (x + middle if self.skip else x).flatten(1)


class UNet(nn.Module):
    """Down and up again by nearest neighbours, with a concatenation on every level (as in U-Sleep)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1) for a, b in ((2, 3), (3, 5)))
        self.bottom = nn.Conv1d(5, 5, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1) for a, b in ((10, 4), (7, 3)))

    def forward(self, x):
        skips = []
        for conv in self.down:
            x = nn.functional.elu(conv(x))
            skips.append(x)
            x = nn.functional.max_pool1d(x, 2)
        x = torch.relu(self.bottom(x))
        for conv in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = torch.tanh(conv(torch.cat([x, skips.pop()], 1)))
        return x.flatten(1)


NETWORKS = {
    "dilated": (lambda: Row(nn.Conv1d(2, 5, 5, dilation=3), nn.ReLU(), nn.Conv1d(5, 3, 3, dilation=5, padding=5)), 60),
    "strided": (lambda: Row(nn.Conv1d(2, 5, 4, stride=3, padding=2), nn.ReLU(), nn.Conv1d(5, 3, 3, stride=2)), 60),
    "transposed": (
        lambda: Row(nn.Conv1d(2, 4, 5, stride=4), nn.ReLU(), nn.ConvTranspose1d(4, 3, 5, stride=3, padding=1)), 30
    ),
    "few_inputs": (
        lambda: Row(nn.Conv1d(2, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose1d(4, 3, 5, stride=3, padding=1)), 30
    ),
    "pools": (
        lambda: Row(nn.Conv1d(2, 18, 3), nn.ReLU(), nn.MaxPool1d(3, 2, 1), nn.Conv1d(18, 4, 2), nn.AvgPool1d(3, 2, 1)),
        50,
    ),
    "depthwise": (lambda: Row(nn.Conv1d(4, 4, 3, groups=4, dilation=2), nn.GELU(), nn.Conv1d(4, 6, 3, groups=2)), 40),
    "residual": (
        lambda: Row(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=2, dilation=2), nn.Softplus(), skip=True),
        40,
    ),
    "softmax": (lambda: Row(nn.Conv1d(2, 4, 3), nn.Softmax(1), nn.Conv1d(4, 3, 3), nn.Sigmoid()), 40),
    "everywhere": (lambda: Row(nn.Conv1d(2, 4, 3), nn.Softmax(2), nn.Conv1d(4, 3, 3)), 30),
    "unet": (UNet, 32),
    "bpnet": (lambda: BPNet(3, 3, 2, trim=5), 60),
    "image": (lambda: Row(nn.Conv2d(2, 17, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(17, 3, (2, 3))), 12),
    "image_up": (
        lambda: Row(nn.Conv2d(2, 4, 3, 2), nn.ELU(), nn.ConvTranspose2d(4, 2, 3, 2), nn.ZeroPad2d((1, -2, 2, 0))), 11
    ),
    "linear": (lambda: Row(nn.Flatten(), nn.Linear(80, 90), nn.ReLU(), nn.Linear(90, 150)), 40),
}  # fmt: skip


def parts(name, n):
    build, length = NETWORKS[name]
    torch.manual_seed(7)
    net = build().double().eval()
    channels = 4 if name in ("depthwise", "bpnet") else 2
    x = torch.randn(n, channels, *([length] * (2 if name.startswith("image") else 1)), dtype=torch.float64)
    program = capturing.to_program(net, (x,))
    return net, x, program, bind(program, net)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_local_seeds_equal_the_oracle(name, always_local):
    net, x, program, params = parts(name, 2)
    want = oracle.jacobian(net, x)[1][0]
    random = torch.Generator().manual_seed(1)
    shuffled = torch.randperm(program.outputs, generator=random)
    each = torch.randint(program.outputs, (2, 9), generator=random)
    for targets in (None, shuffled, each, shuffled[:1]):
        out = (
            torch.full((2, want.shape[1] if targets is None else targets.shape[-1], *x.shape[1:]), torch.nan).double(),
        )
        executor.jacobian(program, params, (x,), targets, out=out)
        picked = want if targets is None else oracle.pick(want, targets)
        assert oracle.relative_error(out[0], picked) <= EXACT
    plan = executor.plan_for(program, program.outputs, torch.float64)
    forward = isinstance(plan, ForwardPlan)
    assert forward == (name == "few_inputs")
    assert (not plan.local_seeds) == (name == "linear")
    assert (f"local {'tangents' if forward else 'seeds'}: " in str(plan)) == (name != "linear")


def test_a_small_field_is_local_and_explained():
    """No patch: a network whose seeds reach little takes it by itself, and says so."""
    _, _, program, _ = parts("dilated", 1)
    plan = executor.plan_for(program, program.outputs, torch.float64)
    (local,) = plan.local_seeds
    assert local.share < 0.6
    assert "local seeds: " in str(plan)
    whole = parts("linear", 1)[2]
    assert "local seeds" not in str(executor.plan_for(whole, whole.outputs, torch.float64))


@pytest.mark.parametrize("name", ["dilated", "unet", "image", "linear"])
def test_threads_share_the_seeds_of_one_sample(name):
    """Bit for bit, as tiles are cut where one thread cuts them, too."""
    _, x, program, params = parts(name, 3)
    for dtype in (torch.float32, torch.float64):
        cast = {k: p.to(dtype) for k, p in params.items()}
        for n in (1, 3):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(executor.jacobian(program, cast, (x[:n].to(dtype),))[1][0])
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


def test_slopes_that_are_not_finite_reach_everything(always_local):
    """0 · Inf is NaN in torch, also where no seed reaches."""
    net = Row(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 1, 1)).double()
    program = capturing.to_program(RootOf(net), (torch.randn(2, 1, 12, dtype=torch.float64),))
    params = bind(program, RootOf(net))
    x = torch.randn(3, 1, 12, dtype=torch.float64) + 3
    x[1, 0, 4:8] = 0
    want = reference.jacobian(program, params, (x,))[1][0]
    got = executor.jacobian(program, params, (x,))[1][0]
    assert want[1].isnan().any()
    assert not want[0].isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-10, atol=1e-12)


class RootOf(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(torch.sqrt(x))
