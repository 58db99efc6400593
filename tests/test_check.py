"""`gradkern.check`: the comparison with live autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkern
from gradkern import api
from tests.cases import net


def test_check_of_a_right_jacobian_reports_small_errors():
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


def test_check_of_a_wrong_jacobian_reports_the_error(monkeypatch):
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


@pytest.mark.parametrize("engine", ["kernel", "reference", "autograd"])
def test_check_of_one_input_and_engine(engine, monkeypatch):
    asked = []

    def jacobian(*args, **options):
        asked.append((options["wrt"], options["engine"]))
        return real(*args, **options)

    real = api.jacobian
    monkeypatch.setattr(api, "jacobian", jacobian)
    model, inputs = net("two_inputs", dtype=torch.float32)
    result = gradkern.check(model, inputs, wrt=1, engine=engine)
    assert asked == [((1,), engine)]
    assert result.worst < 1e-5
    assert "float64" in result.against


def test_check_leaves_integers_out():
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, ids, x):
            return self.last(torch.tanh(x) * self.table(ids))

    assert gradkern.check(Embeds().eval(), (torch.tensor([0, 6, 3]), torch.randn(3, 4)), wrt=1).worst < 1e-5
