"""`gradkern.kernels`: every layer, alone and in a chain, against torch in float64; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradkern import kernels
from gradkern.kernels import Chain


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CHAINS = {
    "linear": ([kernels.linear(random(10, 20), random(10))], (20,)),
    "conv1d": ([kernels.conv1d(random(8, 4, 3), random(8), padding=1, stride=2, dilation=2)], (4, 32)),
    "conv2d": ([kernels.conv2d(random(8, 2, 3, 3), padding=(1, 0), groups=2)], (4, 9, 9)),
    "relu": ([kernels.relu()], (4, 9)),
    "max_pool1d": ([kernels.max_pool1d(3, 2, 1)], (4, 9)),
    "max_pool2d": ([kernels.max_pool2d((2, 3))], (4, 9, 9)),
    "avg_pool1d": ([kernels.avg_pool1d(3, 2, 1)], (4, 9)),
    "avg_pool2d": ([kernels.avg_pool2d(2)], (4, 9, 9)),
    "several": (
        [kernels.conv2d(random(8, 3, 3, 3), random(8), padding=1), kernels.relu(), kernels.max_pool2d(2),
         kernels.flatten(), kernels.linear(random(5, 128), random(5))], (3, 8, 8),
    ),
}  # fmt: skip


def gradients(chain: Chain, x: Tensor, cotangents: Tensor) -> Tensor:
    """By torch, in float64: ``[N, S, *in]``."""
    leaf = x.double().requires_grad_()
    y = chain.forward(leaf)
    rows = [torch.autograd.grad(y, leaf, g.double(), retain_graph=True)[0] for g in cotangents.unbind(1)]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("name", CHAINS)
def test_single_layer_calls_equal_torch(name: str) -> None:
    chain = Chain(*CHAINS[name])
    x, cotangents = random(3, *chain.input_shape), random(3, 4, *chain.output_shape)
    y, got = chain(x, cotangents)
    torch.testing.assert_close(y.double(), chain.forward(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), gradients(chain, x, cotangents), rtol=1e-5, atol=1e-5)
    outputs = chain.program.outputs
    eye = torch.eye(outputs).view(1, outputs, *chain.output_shape).expand(3, -1, *chain.output_shape)
    out = torch.empty(3, outputs, *chain.input_shape)
    _, jacobian = chain(x, out=out)
    assert jacobian is out
    torch.testing.assert_close(out.double(), gradients(chain, x, eye), rtol=1e-5, atol=1e-5)


def test_single_layer_calls_in_float64_and_their_counts() -> None:
    chain = Chain(*CHAINS["several"], dtype=torch.float64)
    x, cotangents = random(3, 3, 8, 8).double(), random(3, 2, 5).double()
    torch.testing.assert_close(chain(x, cotangents)[1], gradients(chain, x, cotangents), rtol=1e-10, atol=1e-10)
    assert chain.operations == 2 * (8 * 8 * 8 * 27 + 128 * 5)
    assert chain.bytes_moved(2) == 3 * (192 + 5) * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Chain([], (3,)), "expected at least one"),
        (lambda: Chain([kernels.relu(), kernels.linear(random(3, 4))], (5,)), r"number 1, linear, got .* \[5\]"),
        (lambda: Chain([kernels.conv2d(random(3, 4, 3, 3))], (4, 2, 2)), "number 0, conv2d, got"),
        (lambda: Chain([kernels.relu()], (3,))(random(2, 4)), r"x: got \[2, 4\], expected \[N, 3\]"),
        (lambda: Chain([kernels.relu()], (3,))(random(2, 3), random(2, 4)), r"expected \[N, S, 3\]"),
        (lambda: Chain([kernels.relu()], (3,))(random(2, 3), random(3, 1, 3)), "a row for each of 2 samples"),
        (lambda: Chain([kernels.relu()], (3,))(random(2, 3), out=random(2, 2, 3)), r"contiguous \[2, 3, 3\]"),
        (lambda: Chain([kernels.relu()], (3,))(random(2, 3).double()), "got torch.float64 on cpu"),
        (lambda: kernels.linear([[1.0]]), "got list, expected tensors"),  # type: ignore[arg-type]
    ],
)
def test_errors_say_what_was_expected(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
