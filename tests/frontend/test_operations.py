"""Every operation of the table: which are forms, and that the Jacobian is autograd's.

One network holds several operations, because most of a test's time would be capturing networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.ir.program import Opaque
from tests.support.operations import FORMS, SEQUENCE_FIRST, TORCHS, Operation

pytestmark = pytest.mark.real_export
_TOGETHER = 12  # operations of one network


class OperationsSideBySide(nn.Module):
    """Each operation on a linear layer's output; the results side by side."""

    def __init__(self, operations: Mapping[str, Operation]) -> None:
        super().__init__()
        self.operations = tuple(operations.values())
        shapes = dict.fromkeys(shape for shape, _ in self.operations)
        self.shapes = tuple(shapes)
        self.layers = nn.ModuleList(nn.Linear(4, math.prod(shape)) for shape in shapes)

    def each(self, x: Tensor) -> list[Tensor]:
        """One ``[N, numbers]`` per operation."""
        found = []
        for shape, f in self.operations:
            h = self.layers[self.shapes.index(shape)](x).view(-1, *shape)
            y = f(h)
            pieces = y if isinstance(y, list) else [y]
            found.append(torch.cat([piece.reshape(x.shape[0], -1) for piece in pieces], 1))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.each(x), 1)


def cases(families: Mapping[str, Mapping[str, Operation]]) -> list[object]:
    """Networks of a few operations of one family; all but one are slow."""
    found = []
    for family, operations in families.items():
        names = list(operations)
        for k in range(0, len(names), _TOGETHER):
            some = {name: operations[name] for name in names[k : k + _TOGETHER]}
            found.append(pytest.param(some, id=f"{family}{k // _TOGETHER}", marks=pytest.mark.slow if found else ()))
    return found


def checked(operations: Mapping[str, Operation]) -> list[str]:
    """The ops that are left to torch; compares the Jacobian of every operation with autograd's."""
    torch.manual_seed(0)
    model = OperationsSideBySide(operations).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    prepared = gradkern.prepare(model, x)
    assert prepared.program is not None, gradkern.explain(model, x, show=False)
    with torch.no_grad():
        widths = [y.shape[1] for y in model.each(x)]
    starts = [sum(widths[:k]) for k in range(len(widths))]
    some = {
        name: list(dict.fromkeys(start + k * (width - 1) // 3 for k in range(4)))  # distinct outputs of each operation
        for name, start, width in zip(operations, starts, widths, strict=True)
    }
    targets = [target for chosen in some.values() for target in chosen]
    got = gradkern.jacobian(model, x, targets, engine="kernel").flatten(2)
    want = gradkern.jacobian(model, x, targets, engine="autograd").flatten(2)
    sizes = [len(chosen) for chosen in some.values()]
    for name, ours, autograds in zip(some, got.split(sizes, 1), want.split(sizes, 1), strict=True):
        assert (ours - autograds).abs().max() < 1e-12 * autograds.abs().max().clamp_min(1e-3), name
    return [f"{step.op}: {step.form.reason}" for step in prepared.program.steps if isinstance(step.form, Opaque)]


@pytest.mark.parametrize("operations", cases(FORMS))
def test_operations_that_are_forms(operations: Mapping[str, Operation]) -> None:
    assert checked(operations) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_operations_with_the_samples_in_axis_one() -> None:
    checked(SEQUENCE_FIRST)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_operations_that_are_left_to_torch() -> None:
    names = " ".join(checked(TORCHS))
    missing = [
        op for op in ("sort", "topk", "cumprod", "median", "where", "grid_sampler") if f"aten.{op}." not in names
    ]
    assert not missing
