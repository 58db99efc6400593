"""Warnings of torch's own internals do not reach the user; those of the model do."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.frontend import capture
from gradkern.util.options import GradkernWarning
from tests.cases import CASES

pytestmark = pytest.mark.real_export


class Hidden(nn.Module):
    """Exporting it makes torch warn of weights that are assigned, and of its own deprecated checks."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def foreign(caught: list[warnings.WarningMessage]) -> list[str]:
    return [f"{w.filename}: {w.message}" for w in caught if not issubclass(w.category, GradkernWarning)]


@pytest.mark.parametrize("name", ["Hidden", "relu_inplace", "elu", "two_inputs", "softmax"])
@pytest.mark.parametrize("action", ["always", "default"])
def test_calls_warn_of_nothing_but_gradkerns_own(name: str, action: Any) -> None:
    if name == "Hidden":
        model, inputs = Hidden().eval(), (torch.randn(3, 6, 4),)
    else:
        model, inputs = CASES[name].build(), CASES[name].inputs(3)
    gradkern.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        gradkern.jacobian(model, inputs, engine="kernel")
        gradkern.jacobian(model, inputs, engine="autograd")
        gradkern.explain(model, inputs, show=False)
    assert not foreign(caught)


def test_warnings_of_the_model_and_of_other_threads_stay() -> None:
    class Warns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("the model's own", UserWarning, stacklevel=2)
            return x.square()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradkern.jacobian(Warns(), torch.randn(2, 3), engine="autograd")
    assert any("the model's own" in text for text in foreign(caught))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = warnings.showwarning
        with capture.LOCK, capture.quiet():
            warnings.warn("dropped", stacklevel=2)
            thread = threading.Thread(target=lambda: warnings.warn("from elsewhere", stacklevel=2))
            thread.start()
            thread.join()
        assert warnings.showwarning is before
    assert [str(w.message) for w in caught] == ["from elsewhere"]
