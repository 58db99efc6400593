"""What float32 loses: no more than torch does, where a sum is long or a function saturates."""

from __future__ import annotations

import pytest
import torch

from gradkern.ir.program import Contract, Dense, LowRank, Param, Program, Scale, Step
from gradkern.runtime import executor, reference


@pytest.mark.parametrize("shape", [(288,), (3, 288), (2, 3, 288), (2, 288, 3), (288, 5)], ids=str)
@pytest.mark.parametrize("function", ["softmax", "normalize"])
def test_sums_of_many_terms_round_no_worse_than_torchs(shape: tuple[int, ...], function: str) -> None:
    axis = shape.index(288)
    program = Program((shape,), (Step(LowRank(function, axis, (1e-5,) * (function == "normalize")), (0,), shape),), 1)
    x = torch.randn(100, *shape) * 5 + 20  # a few entries dominate a softmax; the others are lost beside a running sum
    with torch.no_grad():
        got = executor.jacobian(program, {}, (x,), torch.arange(1))[0].double()
        want, plain = (reference.forward(program, {}, (z,))[1].double() for z in (x.double(), x))
    largest = want.abs().argmax(axis + 1, keepdim=True)
    mine, theirs = (((y / want - 1).gather(axis + 1, largest)).square().mean().sqrt() for y in (got, plain))
    assert mine < max(1.5e-7, 1.5 * float(theirs))


@pytest.mark.parametrize(("function", "end"), [("tanh", 9.0), ("sigmoid", 17.0)])
def test_slopes_of_saturated_functions_round_no_worse_than_torchs(function: str, end: float) -> None:
    """``1 - y`` of a ``y`` that is rounded to float would be off by the whole slope."""
    steps = Step(Scale(function), (0,), (64,)), Step(Contract(Dense(), Param("w")), (1,), (1,))
    program, x = Program(((64,),), steps, 2), torch.linspace(-end, end, 64).unsqueeze(0)
    with torch.no_grad():
        (got,) = executor.jacobian(program, {"w": torch.ones(1, 64)}, (x,))[1]
    z = x.double().requires_grad_()
    (want,) = torch.autograd.grad((torch.tanh(z) if function == "tanh" else torch.sigmoid(z)).sum(), z)
    torch.testing.assert_close(got[:, 0].double(), want, rtol=1e-6, atol=0)
