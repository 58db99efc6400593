"""Convolutions with large weights at few positions take all samples of a block at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkern
from gradkern.codegen import emitters
from tests.support import oracle

POOLED = nn.Sequential(
    nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(5, 17, (3, 2), stride=(2, 1), padding=(1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(204, 3),
)  # fmt: skip
GROUPED = nn.Sequential(
    nn.Conv1d(3, 34, 3, dilation=2), nn.ELU(), nn.Conv1d(34, 18, 5, groups=2, stride=2), nn.Tanh(), nn.Conv1d(18, 7, 2),
    nn.Flatten(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "shape"), [(POOLED, (2, 9, 7)), (GROUPED, (3, 15))], ids=["pooled", "groups and dilation"]
)
def test_layers_over_a_whole_block_equal_the_oracle(
    model: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emitters, "LARGE_WEIGHT_BYTES", 0)
    model = model.double().eval()
    x = torch.randn(11, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (want,) = oracle.jacobian(model, x)[1]
    got = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(got, want) <= 1e-12
    assert torch.equal(gradkern.jacobian(model, x[3:4], engine="kernel"), got[3:4])
