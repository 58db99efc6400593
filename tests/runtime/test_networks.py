"""Real networks: every one against the float64 oracle, on kernels, and how much of each is fused."""

from functools import cache

import pytest
import torch

from gradkern.runtime import executor, reference
from tests.support import capturing, oracle
from tests.support.capturing import bind
from tests.support.networks import NETWORKS

FUSED = [
    "fcn", "inceptiontime", "resnet1d", "tcn", "eegnet", "deep4", "shallow", "bpnet", "basset", "vgg11", "resnet18",
]  # fmt: skip


@cache
def lowered(name):
    case = NETWORKS[name].small
    model, inputs = case.build(dtype=torch.float64), case.inputs(2, dtype=torch.float64)
    program = capturing.to_program(model, inputs)
    capturing.verify(program, model, inputs)
    return model, inputs, program


@pytest.mark.parametrize("name", NETWORKS)
def test_small_network_is_exact(name):
    model, inputs, program = lowered(name)
    params = bind(program, model)
    targets = torch.arange(program.outputs)
    if program.outputs > 12:
        targets = torch.randperm(program.outputs, generator=torch.Generator().manual_seed(0))[:12]
    want = oracle.jacobian(Picked(model, targets), inputs)[1]
    for run in (executor.jacobian, reference.jacobian):
        got = run(program, params, inputs, targets)[1]
        assert oracle.largest_error(got, want) <= 1e-10


class Picked(torch.nn.Module):
    def __init__(self, net, targets):
        super().__init__()
        self.net, self.targets = net, targets

    def forward(self, x):
        return self.net(x).flatten(1)[:, self.targets]


@pytest.mark.parametrize("name", FUSED)
def test_everything_is_fused(name):
    _, _, program = lowered(name)
    found = executor.plan_for(program, 3, torch.float32)  # no more than the narrowest value holds
    assert found.fused_share == 1.0
    assert found.native_share == 1.0
    assert found.single_chain, str(found)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(FUSED)))
def test_nothing_is_left_to_autograd(name):
    _, _, program = lowered(name)
    assert executor.plan_for(program, 4, torch.float32).fused_share == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eegnet", "shallow", "deep4", "bpnet", "inceptiontime", "tcn"])
def test_full_size_is_exact(name):
    case = NETWORKS[name].full
    model, inputs = case.build(dtype=torch.float64), case.inputs(1, dtype=torch.float64)
    program = capturing.to_program(model, inputs)
    targets = torch.randperm(program.outputs, generator=torch.Generator().manual_seed(1))[:3]
    (want,) = oracle.jacobian(Picked(model, targets), inputs)[1]
    (got,) = executor.jacobian(program, bind(program, model), inputs, targets)[1]
    assert oracle.relative_error(got, want) <= 1e-10
