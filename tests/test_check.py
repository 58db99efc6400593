"""`gradkern.check`: the comparison with live autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkern
from tests.cases import net


def test_check():
    model, (x,) = net(dtype=torch.float32)
    result = gradkern.check(model, x)
    assert result.outputs == ("0", "1", "2")
    assert result.samples == 5
    assert result.worst < 1e-5
    assert "float64" in str(result)
    assert len(str(result).splitlines()) == 5
    assert gradkern.check(model, x, [2, 0]).outputs == ("2", "0")
    assert gradkern.check(model, x, gradkern.TopK(1)).worst < 1e-5
    deep, (z,) = net("softmax_axis", dtype=torch.float32)
    assert gradkern.check(deep, z, [(1, 2)]).outputs == ("(1, 2)",)
    assert gradkern.check(deep, z).worst < 1e-5


def test_check_sees_an_error(monkeypatch):
    from gradkern import api

    model, (x,) = net(dtype=torch.float32)
    real = api.jacobian
    wrong = torch.tensor([1.0, 1.01, 1.0])[:, None, None]
    monkeypatch.setattr(api, "jacobian", lambda *a, **k: tuple(j * wrong for j in real(*a, **k)))
    result = gradkern.check(model, x)
    assert result.relative[0] < 1e-5 < 5e-3 < result.relative[1]
    assert result.off_share[1] == 1.0


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_check_without_a_float64_copy():
    class Own(nn.Module):
        def forward(self, x):
            return x @ torch.ones(4, 2)  # float32 whatever the model is

    result = gradkern.check(Own(), torch.randn(3, 4))
    assert "float32" in result.against
    assert result.worst == 0.0
