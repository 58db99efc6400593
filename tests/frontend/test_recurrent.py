"""Recurrent layers are captured at a cost that does not grow with the number of time steps."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch._decomp import decompositions

import gradkern
from gradkern.util.torch_compat import recurrent_shapes_only

pytestmark = pytest.mark.real_export
CELLS = {"gru_cell": nn.GRU, "lstm_cell": nn.LSTM}


class LastStepOfTwoDirections(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layer, self.head = kind(3, 4, batch_first=True, **options), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("cell", CELLS)
def test_capture_does_not_walk_through_time(cell):
    """Two layers of two directions, whatever the length: one step of each, wherever shapes are asked for."""
    steps = []
    real = getattr(decompositions, cell)
    with mock.patch.object(decompositions, cell, lambda *args, **more: steps.append(1) or real(*args, **more)):
        model = LastStepOfTwoDirections(CELLS[cell], num_layers=2, bidirectional=True).double().eval()
        x = torch.randn(3, 50, 3, dtype=torch.float64)
        got = gradkern.jacobian(model, x, engine="kernel")
    assert 0 < len(steps) < 50
    want = torch.autograd.functional.jacobian(lambda z: model(z).sum(0), x).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_other_traces_of_recurrent_layers_are_torchs_own():
    """The shortcut holds inside the context only, and for fake tensors only."""
    layer = nn.GRU(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    weights = [w.detach() for w in layer.parameters()]
    arguments = (x, torch.zeros(1, 2, 4, dtype=torch.float64), weights, True, 1, 0.0, False, False, False)
    want = layer(x)[0]
    with recurrent_shapes_only():
        torch.testing.assert_close(decompositions.gru_impl(*arguments)[0], want)
    torch.testing.assert_close(decompositions.gru_impl(*arguments)[0], want)
    inside = torch.export.export(layer, (x,), strict=False).run_decompositions()
    torch.testing.assert_close(inside.module()(x)[0], want)
