"""The first results of a GPU's kernels are compared with torch's own; kernels that differ are refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from gradkern.runtime import executor
from gradkern.runtime.confirmation import KernelsDiffer
from tests.support import capturing, oracle
from tests.support.host_device import HostDevice, installed

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++"),
    pytest.mark.kernels_differ,
    pytest.mark.usefixtures("fresh"),
]


class Broken(HostDevice):
    """Kernels that leave some numbers of every sample wrong, as a compiler's mistake would."""

    broken = True

    def chain_vjp(self, *args):
        values = super().chain_vjp(*args)
        for result in args[-1]:
            if self.broken:
                result.view(result.shape[0], -1)[:, :2] += 1.0
        return values


def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(5, 6)


@pytest.fixture(scope="module")
def program():
    model, x = net()
    found = capturing.to_program(model, (x,))
    return found, dict(capturing.bind(found, model))


@pytest.mark.parametrize("targets", [None, torch.tensor([2, 0]), torch.tensor([[0], [1], [2], [1], [0]])])
def test_kernels_that_differ_are_refused(program, targets) -> None:
    model, x = net()
    with torch.no_grad(), installed(Broken(threads=32)) as device:
        with pytest.raises(KernelsDiffer, match="GRADKERN_CUDA=0"):
            executor.jacobian(*program, [x], targets)
        with pytest.raises(KernelsDiffer):
            executor.jacobian(*program, [x], targets)  # and again
        device.broken = False
        _, (got,) = executor.jacobian(*program, [x], targets)
        device.broken = True  # what has been confirmed is not looked at again
        executor.jacobian(*program, [x], targets)
    if targets is None:
        assert oracle.relative_error(got, oracle.jacobian(model, [x])[1][0]) < 1e-6


def test_results_that_are_nan_settle_nothing() -> None:
    """The slopes of tanh are NaN at NaN, so that nothing is finite: the next call is compared."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), net()[1]
    found = capturing.to_program(model, (x,))
    params = dict(capturing.bind(found, model))
    with torch.no_grad(), installed(Broken(threads=32)):
        executor.jacobian(found, params, [torch.full_like(x, float("nan"))])
        with pytest.raises(KernelsDiffer):
            executor.jacobian(found, params, [x])


def test_finite_gradients_at_nan_are_compared(program) -> None:
    """Those of a ReLU are zero there, though the outputs are NaN."""
    with torch.no_grad(), installed(Broken(threads=32)), pytest.raises(KernelsDiffer):
        executor.jacobian(*program, [torch.full_like(net()[1], float("nan"))])


def test_a_forward_pass_alone(program) -> None:
    class WrongForward(HostDevice):
        def chain_forward(self, *args):
            return [value + 1.0 for value in super().chain_forward(*args)]

    found, params = program
    with torch.no_grad(), installed(WrongForward(threads=32)), pytest.raises(KernelsDiffer):
        executor.forward_values(found, params, [net()[1]], [found.output])


def test_equal_maxima_are_no_difference() -> None:
    """Rounding decides between equal maxima, for every sample of a constant image: both ways are right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, 2)).eval()
    x = torch.ones(4, 1, 8)
    found = capturing.to_program(model, (x,))
    params = dict(capturing.bind(found, model))

    class OtherMaxima(HostDevice):
        def chain_vjp(self, inputs, *args):
            tilted = [t + 1e-6 * torch.arange(8.0) * (t.std() < 1e-3) for t in inputs]
            return super().chain_vjp(tilted, *args)

    with torch.no_grad(), installed(OtherMaxima(threads=32)):
        executor.jacobian(found, params, [x])


def test_a_target_that_names_no_output_gives_nan() -> None:
    """Calls check their targets on the host; a kernel that gets another one writes nothing outside its memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)).eval()
    x = net()[1]
    found = capturing.to_program(model, (x,))
    params = dict(capturing.bind(found, model))
    with torch.no_grad(), installed(HostDevice(threads=32)):
        _, (want,) = executor.jacobian(found, params, [x], torch.tensor([0, 2]))
        for bad in (3, 1 << 40, -1):
            _, (got,) = executor.jacobian(found, params, [x], torch.tensor([0, bad]))
            assert torch.equal(got[:, 0], want[:, 0])
            assert got[:, 1].isnan().all()
