"""`gradkern.prepare`: a callable that gives `jacobian`'s numbers and looks at nothing but its inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkern
from gradkern.dispatch import batching, prepared, ways
from gradkern.frontend import capture
from gradkern.planner.timing import Timing
from tests.cases import CASES

pytestmark = pytest.mark.real_export
#: One chain; several groups; two inputs; an output of several axes; a bottleneck is in the last.
NETWORKS = ("mlp", "resnet1d_opaque", "two_inputs", "per_step")


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_prepared_results_are_those_of_jacobian(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(), case.inputs(5)
    given = inputs if len(inputs) > 1 else inputs[0]
    jac = gradkern.prepare(model, given)
    for n in (5, 1, 0):
        rows = tuple(x[:n] for x in inputs)
        rows = rows if len(inputs) > 1 else rows[0]
        want = gradkern.jacobian(model, rows, engine="kernel")
        for got, expected in zip(jac(rows), want, strict=True):
            assert torch.equal(got, expected)
    if name != "per_step":
        some = gradkern.prepare(model, given, [1, 0])
        assert all(map(torch.equal, some(given), gradkern.jacobian(model, given, [1, 0], engine="kernel")))


@pytest.mark.parametrize("wrt", [0, 1, [1], [1, 0]])
def test_inputs_to_differentiate(wrt: int | list[int]) -> None:
    model, inputs = CASES["two_inputs"].build(), CASES["two_inputs"].inputs(3)
    got, want = gradkern.prepare(model, inputs, wrt=wrt)(inputs), gradkern.jacobian(model, inputs, wrt=wrt)
    assert type(got) is type(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_prepared_call_does_not_look_at_the_model_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    jac = gradkern.prepare(model, x)
    assert str(jac) == str(jac.program)
    with torch.no_grad():
        model[0].weight.mul_(2)  # before the first call it still counts
    want = gradkern.jacobian(model, x)
    assert torch.equal(jac(x), want)
    monkeypatch.setattr(capture.GraphCache, "capture", None)
    monkeypatch.setattr(prepared, "whole_network", None)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model.train()
    assert torch.equal(jac(x), want)
    with torch.inference_mode():
        inside = jac(x)
    assert torch.equal(inside, want)
    assert not inside.is_inference()
    assert not jac(x.clone().requires_grad_()).requires_grad


def test_prepared_call_cuts_large_batches() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(301, 4)
    jac = gradkern.prepare(model, x, 1)
    with gradkern.use(memory_budget=1000):
        assert torch.equal(jac(x), gradkern.jacobian(model, x, 1, engine="kernel"))


def test_prepared_call_with_non_finite_weights_gives_torchs_jacobian() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(6, 4)
    jac = gradkern.prepare(model, x)
    with torch.no_grad():
        model[0].weight[1, 1] = torch.inf
    torch.testing.assert_close(jac(x), gradkern.jacobian(model, x, engine="autograd"), equal_nan=True)


def test_prepare_refuses_targets_and_inputs_that_do_not_fit() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    for targets in (gradkern.TopK(2), torch.zeros(6, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="the same outputs for all samples"):
            gradkern.prepare(model, x, targets)
    jac = gradkern.prepare(model, x)
    with pytest.raises(ValueError, match=r"shape \[6, 3\], expected \[N, 4\]"):
        jac(x[:, :3])
    with pytest.raises(TypeError, match="float64 on cpu, expected"):
        jac(x.double())
    with pytest.raises(TypeError, match="is list, expected a tensor"):
        jac([x.tolist()])
    with pytest.raises(ValueError, match="got 2 tensors, expected 1"):
        jac((x, x))


class Branching(nn.Module):
    """No Program describes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square() if float(x.sum()) > 0 else -x


def test_a_model_that_stays_on_autograd_is_called_as_well() -> None:
    model, x = Branching(), torch.randn(6, 4)
    with pytest.warns(gradkern.GradkernWarning, match="autograd"):
        jac = gradkern.prepare(model, x, [2, 0])
    assert jac.program is None
    assert "autograd" in str(jac)
    for sign in (1, -1):
        rows = sign * x.abs()
        assert torch.equal(jac(rows), gradkern.jacobian(model, rows, [2, 0], engine="autograd"))
    with pytest.raises(ValueError, match="the same outputs for all samples"):
        gradkern.prepare(model, x, gradkern.TopK(2))(x)


@pytest.mark.usefixtures("fresh")
def test_prepared_call_takes_autograd_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["resnet1d_opaque"]
    model, (x,) = case.build(), case.inputs(3)
    monkeypatch.setattr(ways, "measure", lambda *args: Timing(3, {"kernels": 2.0, "loop": 1.0}))
    monkeypatch.setattr(batching, "run", None)
    torch.testing.assert_close(gradkern.prepare(model, x)(x), gradkern.jacobian(model, x, engine="autograd"))


@pytest.mark.parametrize("engine", ["kernel", "autograd", "reference"])
def test_update_takes_the_model_as_it_is_now(engine: str) -> None:
    """Until then, weights that were packed stay as they were; other engines look at the model at every call."""
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(4, 5)
    jac = gradkern.prepare(model, x, engine=engine)
    before = jac(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    now = gradkern.jacobian(model, x, engine="autograd")
    torch.testing.assert_close(jac(x), before if engine == "kernel" else now)
    assert jac.update() is jac
    torch.testing.assert_close(jac(x), now)
    model[1] = nn.Tanh()
    torch.testing.assert_close(jac.update()(x), gradkern.jacobian(model, x, engine="autograd"))


def test_the_engine_is_that_of_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(4, 5)
    want = gradkern.jacobian(model, x, engine="kernel")
    jac = gradkern.prepare(model, x, engine="kernel")
    with gradkern.use("autograd"):
        assert torch.equal(jac(x), want)
        live = gradkern.prepare(model, x)
    assert live.program is None
    torch.testing.assert_close(live(x), want)
    with pytest.raises(ValueError, match="engine="):
        gradkern.prepare(model, x, engine="fast")
