"""Networks that fit no single chain: chains beside ATen, on the host, against the oracle."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradkern.ir.program import Contract, Dense, Param, Program, Scale, Step
from gradkern.planner import plan
from gradkern.runtime import executor
from gradkern.util import options
from tests.cases import CASES
from tests.support import capturing, oracle
from tests.support.host_device import HostDevice, installed
from tests.support.pieces import NETS, settle, vgg, wide_mlp
from tests.support.properties import FAST, FUZZ, agrees, questions
from tests.support.random_programs import programs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++")]
SMALL = 1024  # bytes of shared memory: some chains, and some contractions by ATen


def solve(model: nn.Module, x: Tensor, device: HostDevice, targets: Tensor | None = None):
    with torch.no_grad(), installed(device):
        program = capturing.to_program(model, (x,))
        params = capturing.bind(program, model)
        y, (got,) = executor.jacobian(program, params, [x], targets)
        return y, got, executor.plan_for(program, got.shape[1], x.dtype)


@pytest.mark.parametrize("kib", [0.25, 1, 3])
@pytest.mark.parametrize("name", NETS)
def test_networks_in_pieces_on_the_host_equal_the_oracle(name: str, kib: float) -> None:
    """Shared memory so small that contractions go to ATen, alone or beside chains."""
    make, shape = NETS[name]
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(7)
    model = settle(make().double(), generator)
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    device = HostDevice(shared_bytes=int(kib * 1024), threads=32)
    y, got, used = solve(model, x, device)
    want_y, (want,) = oracle.jacobian(model, x)
    assert oracle.relative_error(y, want_y) < 1e-12
    assert oracle.relative_error(got, want) < 1e-11
    assert not used.single_chain
    assert (device.launches > 0) == (used.native_share > 0)
    if kib >= 1:
        assert used.native_share > 0


@pytest.mark.parametrize("name", ["cnn1d_strided", "maxpool2d", "residual", "shared_conv", "two_inputs"])
def test_cases_in_pieces(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(dtype=torch.float64), case.inputs(2, dtype=torch.float64)
    device = HostDevice(shared_bytes=SMALL, threads=32)
    with torch.no_grad(), installed(device):
        program = capturing.to_program(model, inputs)
        y, got = executor.jacobian(program, capturing.bind(program, model), inputs)
    want_y, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(y, want_y) < 1e-12
    for f, w in zip(got, want, strict=True):
        assert oracle.relative_error(f, w) < 1e-11


def test_targets_of_each_sample() -> None:
    model = settle(vgg().double(), torch.Generator().manual_seed(1))
    x = torch.randn(3, 1, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    targets = torch.tensor([[0, 3], [2, 2], [1, 0]])
    _, got, _ = solve(model, x, HostDevice(shared_bytes=SMALL), targets)
    _, (want,) = oracle.jacobian(model, x)
    assert oracle.relative_error(got, oracle.pick(want, targets)) < 1e-11


def test_weights_that_are_not_finite_go_by_reference() -> None:
    model = settle(wide_mlp().double(), torch.Generator().manual_seed(1))
    model[0].weight[3, 4] = float("inf")
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    device = HostDevice()
    solve(model, x, device)
    assert device.launches == 0


def test_nan_inputs_pass_masks_as_torch_has_it() -> None:
    model = settle(vgg().double(), torch.Generator().manual_seed(1))
    x = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[1, 0, 4, 4] = float("nan")
    y, got, _ = solve(model, x, HostDevice(shared_bytes=SMALL))
    want_y, (want,) = oracle.jacobian(model, x)
    assert torch.equal(torch.isnan(y), torch.isnan(want_y))
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_large_weights_leave_their_chain() -> None:
    """A chain would read them for a few samples at a time."""
    machine = HostDevice().machine
    for width, whole in ((256, True), (1024, False)):
        hidden = [Step(Contract(Dense(), Param(f"w{i}")), (2 * i,), (width,)) for i in range(2)]
        relus = [Step(Scale("relu"), (2 * i + 1,), (width,)) for i in range(2)]
        steps = (hidden[0], relus[0], hidden[1], relus[1], Step(Contract(Dense(), Param("h")), (4,), (5,)))
        program = Program(((width,),), steps, 5)
        made = plan.plan(program, 5, machine=machine)
        assert made.single_chain == whole
        assert any("million weights" in s.why for s in made.steps) != whole
        if not whole:
            assert [made.steps[i].path for i in (0, 2, 4)] == ["aten, seeds folded"] * 2 + ["kernel cuda"]


def test_new_weights_of_a_network_in_pieces_are_packed_again() -> None:
    model = settle(vgg().double(), torch.Generator().manual_seed(1))
    x = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    device = HostDevice(shared_bytes=3072, threads=32)
    for layer in (0, 2, 5, 9, 11):
        model[layer].weight.data[0].mul_(-2)
        _, got, used = solve(model, x, device)
        assert not used.single_chain
        _, (want,) = oracle.jacobian(model, x)
        assert oracle.relative_error(got, want) < 1e-11


def test_memory_budget_of_a_gpu_is_a_sixteenth_of_its_memory(monkeypatch) -> None:
    """A sixteenth of its memory, unless the caller chose."""
    known = type("Properties", (), {"total_memory": 160 << 30})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    assert options.memory_budget() == options.memory_budget(torch.device("cpu")) == 512 << 20
    assert options.memory_budget(torch.device("cuda", 0)) == 10 << 30
    with options.use(memory_budget=5):
        assert options.memory_budget(torch.device("cuda", 0)) == 5


@settings(FAST, max_examples=FUZZ or 50, derandomize=not FUZZ)
@given(questions(programs()), st.sampled_from([256, 512, 1024, 4096, 1 << 17]))
def test_random_programs_on_a_device(question, shared):
    """Chains and ATen mixed as it comes."""
    with installed(HostDevice(shared_bytes=shared, threads=32, blocks=1)):
        agrees(*question)
