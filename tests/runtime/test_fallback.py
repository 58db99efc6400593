"""Where no kernel may run although the plan has some, it is said: one warning per reason, and by `explain`."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.ir.program import Given, Step, Sum
from gradkern.runtime import executor, reference
from gradkern.runtime.parameters import KernelsUnavailable
from tests.support.programs import classifier, dense, program

pytestmark = pytest.mark.usefixtures("fresh")
NOT_FINITE, OTHER_DTYPE = "NaN or infinite", "some weights are torch.float64"


def weights(bad: float | None = None) -> dict[str, Tensor]:
    made = {
        "w.weight": torch.randn(4, 1, 3), "w.bias": torch.randn(4), "f.weight": torch.randn(3, 32),
        "f.bias": torch.randn(3), "w5x4": torch.randn(5, 4),
    }  # fmt: skip
    if bad is not None:
        for tensor in made.values():
            tensor.view(-1)[0] = bad
    return made


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, gradkern.GradkernWarning)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_fall_back_to_torch(bad: float):
    """Warned of once; the values are the reference's, and finite weights are run by kernels again."""
    p, x = classifier(), torch.randn(2, 1, 8)
    params = weights(bad)
    with pytest.warns(gradkern.GradkernWarning, match=NOT_FINITE):
        _, (got,) = executor.jacobian(p, params, [x])
    _, (want,) = reference.jacobian(p, params, [x], torch.arange(3), (0,))
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        executor.jacobian(p, weights(bad), [x])
        executor.jacobian(p, weights(), [x])
    assert messages(caught) == []


def test_weights_of_another_dtype_fall_back_to_torch():
    p, x = classifier(), torch.randn(2, 1, 8)
    params = {name: w.double() for name, w in weights().items()}
    with pytest.warns(gradkern.GradkernWarning, match=OTHER_DTYPE), pytest.raises(RuntimeError):
        executor.jacobian(p, params, [x])  # torch itself refuses them


def test_value_of_another_dtype_falls_back_to_torch():
    p = program(Step(Sum(), (0, 1), (4, 8)), inputs=((4, 8), (4, 8)))
    inputs = [torch.randn(2, 4, 8), torch.randn(2, 4, 8, dtype=torch.float64)]
    with pytest.warns(gradkern.GradkernWarning, match=r"value v1 is torch\.float64"):
        executor.jacobian(p, {}, inputs)


def test_forward_values_fall_back_to_torch():
    p, x = classifier(), torch.randn(2, 1, 8)
    assert set(executor.forward_values(p, weights(), [x], [1])) == {1}
    with pytest.warns(gradkern.GradkernWarning, match=NOT_FINITE):
        assert executor.forward_values(p, weights(math.nan), [x], [1]) == {}


def test_transposes_fall_back_to_torch():
    p = program(dense(5, 4, 0), Step(Given(), (2, 1), (5,)), inputs=((4,), (5,)))
    values, out = [torch.randn(2, 4), torch.randn(2, 5)], [torch.empty(2, 5, 4)]
    executor.transpose(p, weights(), values, torch.arange(5), (0,), out)
    with (
        pytest.warns(gradkern.GradkernWarning, match=NOT_FINITE),
        pytest.raises(KernelsUnavailable, match=NOT_FINITE),
    ):
        executor.transpose(p, weights(math.inf), values, torch.arange(5), (0,), out)


def test_explain_names_the_weights_that_keep_kernels_out():
    """For the weights that the model has now; the plan itself stays as it is."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(2, 4)
    assert gradkern.explain(model, x, show=False).native_share == 1
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    found = gradkern.explain(model, x, show=False)
    assert found.native_share == 0 and found.fused_share == 1
    assert {s.path for s in found.steps} == {"aten, seeds folded"}
    assert all(NOT_FINITE in s.why for s in found.steps)
    assert str(found).count(NOT_FINITE) == 1
