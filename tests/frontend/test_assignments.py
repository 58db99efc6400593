"""Assignments to slices: the Jacobian is autograd's, and no step is left to torch where a form says it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.ir.program import Opaque

pytestmark = pytest.mark.real_export


class AssignsToLinear(nn.Module):
    """``assign(y, x)`` for a linear layer's ``y``."""

    def __init__(self, assign: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.assign = assign

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).clone()
        self.assign(y, x)
        return y.tanh()


def column(y: Tensor, x: Tensor) -> None:
    y[:, 0] = x[:, 1]


def last_column(y: Tensor, x: Tensor) -> None:
    y[..., -1] = x[..., 0]


def columns(y: Tensor, x: Tensor) -> None:
    y[:, 1:3] = x[:, 2:]


def every_other_column(y: Tensor, x: Tensor) -> None:
    y[:, ::2] = 2 * x[:, 2:]


def spread(y: Tensor, x: Tensor) -> None:
    y[:, 1:] = x[:, :1]


def everything(y: Tensor, x: Tensor) -> None:
    y[:] = x


def in_place(y: Tensor, x: Tensor) -> None:
    y[:, 2:] *= 3
    y[:, 0] *= x[:, 1]


def constant(y: Tensor, x: Tensor) -> None:
    y[:, 0] = 1.0


def of_another_dtype(y: Tensor, x: Tensor) -> None:
    y[:, 0] = x.float()[:, 1]


def where_positive(y: Tensor, x: Tensor) -> None:
    y[x > 0] = 0.0


FORMS = (column, last_column, columns, every_other_column, spread, everything, in_place)
TORCHS = (constant, of_another_dtype, where_positive)


@pytest.mark.parametrize("assign", [*FORMS, *TORCHS], ids=lambda assign: assign.__name__)
def test_jacobian_through_an_assignment_is_autograds(assign: Callable[[Tensor, Tensor], None]) -> None:
    model, x = AssignsToLinear(assign).double().eval(), torch.randn(5, 4, dtype=torch.float64)
    prepared = gradkern.prepare(model, x)
    assert prepared.program is not None
    program = prepared.program
    if assign in FORMS:
        assert not any(isinstance(step.form, Opaque) for step in program.steps)
    got = gradkern.jacobian(model, x, engine="kernel")
    torch.testing.assert_close(got, gradkern.jacobian(model, x, engine="autograd"), rtol=1e-12, atol=1e-12)


def test_an_assignment_to_a_sample_mixes_samples() -> None:
    def sample(y: Tensor, x: Tensor) -> None:
        y[0] = 0.0

    model = AssignsToLinear(sample).eval()
    with pytest.warns(gradkern.GradkernWarning, match=r"mixes samples.*test_assignments\.py:\d+"):
        assert gradkern.prepare(model, torch.randn(5, 4)).program is None
