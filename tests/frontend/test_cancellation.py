"""Results that are zero but for rounding: no two computations agree on them, and none of them is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.frontend.refusal import NoProgram
from gradkern.ir.program import Program, Scale
from tests.support.capturing import to_program, verify
from tests.support.modules import Net

pytestmark = pytest.mark.real_export
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def pooled(h: Tensor) -> Tensor:
    return nn.functional.max_pool1d(h.relu()[:, None], 2)[:, 0].repeat(1, 2)


#: The gradient of each is zero for equal weights (``net.equal``), or for any.
CANCELLING: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "softmax": lambda net, x: net.equal(net.fc(x).tanh()).softmax(1),
    "log_softmax": lambda net, x: net.equal(net.fc(x).tanh()).log_softmax(1),
    "layer norm": lambda net, x: nn.functional.layer_norm(net.equal(net.fc(x).tanh()), (4,)),
    "softmax over one": lambda net, x: net.fc(x)[:, :1].softmax(1) * 3 + net.fc(x).softmax(1).sum(1, keepdim=True),
    "difference": lambda net, x: (net.fc(x) * 3.3) * 1.7 - net.fc(x) * (3.3 * 1.7) + 10,
    "factor of nothing": lambda net, x: net.fc(x) * (net.fc(x).softmax(1).sum(1, keepdim=True) - 1) + 1,
    "pools": lambda net, x: net.equal(pooled(net.fc(x))).log_softmax(1),
}  # fmt: skip


def network(name: str, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    model = Net(CANCELLING[name], equal=nn.Linear(4, 4))
    with torch.no_grad():
        model.equal.weight.copy_(model.equal.weight[:1].expand(4, 4))
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", CANCELLING)
def test_rounding_is_no_mismatch(name: str) -> None:
    program = to_program(network(name), (torch.zeros(2, 4),))
    for dtype in DTYPES:
        model = network(name, dtype)
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(4, 4, dtype=dtype) if seed else torch.ones(4, 4, dtype=dtype)
            verify(program, model, (x,))


def scaled(program: Program, function: str, other: str) -> Program:
    steps = [
        dataclasses.replace(s, form=Scale(other)) if isinstance(s.form, Scale) and s.form.function == function else s
        for s in program.steps
    ]
    assert steps != list(program.steps)
    return dataclasses.replace(program, steps=tuple(steps))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "difference", "pools"])
def test_a_wrong_backward_among_cancelling_terms_is_caught(name: str) -> None:
    """The terms that cancel are up to a thousand times larger than what is wrong."""
    model = network(name)
    model.register_buffer("share", torch.tensor(1.0))
    model.fn = lambda net, x: CANCELLING[name](net, x) + net.share * net.fc(x).sigmoid()
    program = to_program(model, (torch.zeros(2, 4),))
    wrong = scaled(program, "sigmoid", "tanh")
    for dtype in DTYPES[:2]:
        for share in (1.0, 1e-2, 1e-3):
            model.to(dtype).share.fill_(share)
            x = torch.randn(4, 4, dtype=dtype)
            verify(program, model, (x,))
            with pytest.raises(NoProgram, match=r"its (output|gradient) is not"):
                verify(wrong, model, (x,))


def test_a_straight_through_gradient_among_cancelling_terms_is_caught() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            return 1.02 * g

    fn = CANCELLING["log_softmax"]
    plain, doubled = network("log_softmax"), network("log_softmax")
    plain.fn = lambda net, x: fn(net, x) + 0.01 * net.fc(x)
    doubled.fn = lambda net, x: fn(net, x) + 0.01 * Doubled.apply(net.fc(x))
    x = torch.randn(4, 4)
    with pytest.raises(NoProgram, match="its gradient is not"):
        verify(to_program(plain, (x,)), doubled, (x,))


def test_kernels_run_where_the_gradient_vanishes() -> None:
    model = network("log_softmax")
    assert gradkern.prepare(model, torch.ones(1, 4)).program is not None
    assert gradkern.jacobian(model, torch.ones(3, 4), engine="kernel").abs().max() < 1e-5
