"""The rules of attribution methods on the CUDA kernels, run on the host: ReLUs that rectify, slopes that are given."""

from __future__ import annotations

import shutil
from unittest import mock

import pytest
import torch

from gradkern import attr, plan
from gradkern.attr import linear
from gradkern.attr.rulemethods import with_relu
from gradkern.device import lowering
from tests.cases import CASES
from tests.host_device import HostDevice, installed
from tests.traced import program_of

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++"),
    pytest.mark.filterwarnings("ignore"),
]

NAMES = ("residual", "maxpool1d_overlap_pad", "maxpool2d", "two_inputs", "bn_linear", "skips_all")


def every(method: str, name: str, device: HostDevice | None, samples: int = 3) -> torch.Tensor:
    """All outputs by the kernels of ``device``, or by plain torch."""
    case = CASES[name]
    model, inputs = case.build(dtype=torch.float64), case.inputs(samples, dtype=torch.float64)
    options = {"inputs": inputs if len(inputs) > 1 else inputs[0]}
    with torch.no_grad():
        if device is None:
            found = getattr(attr, method)(model, engine="reference").attribute_all(**options)
        else:
            with installed(device):
                found = getattr(attr, method)(model, engine="kernel").attribute_all(**options)
    return torch.cat([f.flatten(1) for f in (found if isinstance(found, tuple) else (found,))], 1)


@pytest.mark.parametrize(
    "name", ["residual", "maxpool1d_overlap_pad", "maxpool2d", "two_inputs", "bn_linear", "skips_all"]
)
@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution", "DeepLift", "LRP"])
def test_rules_as_the_reference(name: str, method: str) -> None:
    device = HostDevice(threads=32)
    found = every(method, name, device)
    assert device.launches > 0
    torch.testing.assert_close(found, every(method, name, None), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution"])
def test_rules_where_shared_memory_is_small(method: str) -> None:
    device = HostDevice(shared_bytes=1500, steps="kernel", threads=32)
    found = every(method, "maxpool2d", device)
    torch.testing.assert_close(found, every(method, "maxpool2d", None), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", ["guided_relu", "open_relu"])
def test_the_plan_keeps_them_in_one_chain(function: str) -> None:
    for name in ("cnn1d", "lenet5", "mlp"):
        made = plan.plan(with_relu(program_of(name), function), 3, machine=HostDevice().machine)
        assert made.whole
        assert made.native_share == 1.0


@pytest.mark.parametrize("method", ["GuidedBackprop", "DeepLift"])
def test_seeds_in_several_tiles(method: str) -> None:
    """Given slopes are read again for every tile of seeds, and rectified cotangents belong to theirs."""
    device = HostDevice(shared_bytes=4096, threads=32)
    tiles = []
    real = device.chain_vjp

    def noting(*args):
        tiles.append((args[10], args[11][0].shape[1] if args[11] else 0))
        return real(*args)

    device.chain_vjp = noting  # type: ignore[method-assign]
    found = every(method, "conv_output", device)
    assert any(tile < seeds for tile, seeds in tiles)
    torch.testing.assert_close(found, every(method, "conv_output", None), rtol=1e-10, atol=1e-10)
