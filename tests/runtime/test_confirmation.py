"""The first results of a plan's kernels are compared with torch's own; plain torch takes the place of those that
differ."""

from __future__ import annotations

import threading
import warnings

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.passes import direction
from gradkern.runtime import confirmation, executor, ops, reference
from gradkern.util.options import GradkernWarning
from tests.support import capturing, oracle

pytestmark = [pytest.mark.kernels_differ, pytest.mark.usefixtures("fresh")]


def net(width: int = 3) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, width)).eval(), torch.randn(5, 6)


def partly_nan() -> tuple[nn.Module, Tensor]:
    """A network and samples whose Jacobians are NaN near the first position only."""
    x = torch.randn(5, 1, 8)
    x[:, 0, 0] = float("nan")
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten()).eval(), x


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that leave some numbers of every sample wrong, as a wrong fold would."""
    right = ops.chain_vjp

    def wrong(*args):
        values = right(*args)
        for result in args[-1]:
            result.view(result.shape[0], -1)[:, 0] += 1.0
        return values

    monkeypatch.setattr(ops, "chain_vjp", wrong)


@pytest.mark.parametrize("way", ["reverse", "forward", "cut"])
def test_plain_torch_takes_the_place_of_kernels_that_differ(broken, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    model, x = net()
    if way == "forward":
        model, x = net(200)
    elif way == "cut":
        model, x = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 9)).eval(), torch.randn(5, 6)
        monkeypatch.setattr(direction, "CUT_WORTHWHILE", 0)
    with pytest.warns(GradkernWarning, match="first results are not torch's own"):
        got = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(got, oracle.jacobian(model, [x])[1][0]) < 1e-5
    again = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(again, oracle.jacobian(model, [x])[1][0]) < 1e-5
    prepared = gradkern.prepare(model, x)
    assert oracle.relative_error(prepared(x), oracle.jacobian(model, [x])[1][0]) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [slice(None), slice(0, 1)], ids=["everywhere", "in one number of every sample"])
def test_kernels_that_give_no_finite_number_differ(monkeypatch: pytest.MonkeyPatch, bad: float, where: slice) -> None:
    model, x = net()
    right = ops.chain_vjp

    def wrong(*args):
        values = right(*args)
        for result in args[-1]:
            result.view(result.shape[0], -1)[:, where] = bad
        return values

    monkeypatch.setattr(ops, "chain_vjp", wrong)
    with pytest.warns(GradkernWarning, match="first results are not torch's own"):
        got = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(got, oracle.jacobian(model, [x])[1][0]) < 1e-5


def test_kernels_that_hide_a_nan_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's own gradients are NaN, a finite number is as wrong as NaN elsewhere."""
    model, x = partly_nan()
    right = ops.chain_vjp

    def wrong(*args):
        values = right(*args)
        for result in args[-1]:
            result.nan_to_num_()
        return values

    monkeypatch.setattr(ops, "chain_vjp", wrong)
    with pytest.warns(GradkernWarning, match="first results are not torch's own"):
        got = gradkern.jacobian(model, x, engine="kernel")
    assert torch.equal(got.isnan(), oracle.jacobian(model, [x])[1][0].isnan())


def test_equal_numbers_that_are_not_finite_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finite numbers beside them are compared, and settle it."""
    model, x = partly_nan()
    want = oracle.jacobian(model, x)[1][0]
    assert want.isnan().any()
    assert want.isfinite().any()
    program = capturing.to_program(model, (x,))
    params = dict(capturing.bind(program, model))
    with torch.no_grad():
        got = executor.jacobian(program, params, [x])[1][0]
    assert oracle.relative_error(got, want) < 1e-5
    calls: list[int] = []
    plain = reference.jacobian
    monkeypatch.setattr(reference, "jacobian", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    with torch.no_grad():
        executor.jacobian(program, params, [x])
    assert not calls


def test_numbers_too_large_for_the_dtype_are_no_difference() -> None:
    """Float64 holds them, and torch's own float32 does not either."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval(), torch.randn(5, 6)
    with torch.no_grad():
        model[0].weight.mul_(1e25)
        model[1].weight.mul_(1e25)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradkernWarning)
        got = gradkern.jacobian(model, x, engine="kernel")
    assert not got.isfinite().all()
    assert oracle.jacobian(model, x)[1][0].isfinite().all()


def test_confirmed_plan_is_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    program = capturing.to_program(model, (x,))
    params = dict(capturing.bind(program, model))
    calls: list[int] = []
    plain = reference.jacobian
    monkeypatch.setattr(reference, "jacobian", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    with torch.no_grad():
        executor.jacobian(program, params, [torch.full_like(x, float("nan"))])
        assert calls  # which settles nothing
        calls.clear()
        executor.jacobian(program, params, [x])
        assert calls
        calls.clear()
        executor.jacobian(program, params, [x])
    assert not calls


def test_results_of_two_threads_are_both_compared(broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a thread compares, the results that another thread gets by the same plan are not trusted yet."""
    model, x = net()
    program = capturing.to_program(model, (x,))
    params = dict(capturing.bind(program, model))
    others: list[Tensor] = []

    def call() -> Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return executor.jacobian(program, params, [x])[1][0]

    right = confirmation._error

    def error(*args):
        if not others:
            others.append(x)
            thread = threading.Thread(target=lambda: others.append(call()))
            thread.start()
            thread.join()
        return right(*args)

    monkeypatch.setattr(confirmation, "_error", error)
    want = oracle.jacobian(model, [x])[1][0]
    for got in (call(), others[1]):
        assert oracle.relative_error(got, want) < 1e-5


def test_a_first_call_takes_few_samples_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = net()
    rows, right = [], ops.chain_vjp
    monkeypatch.setattr(ops, "chain_vjp", lambda *args: rows.append(len(args[0][0])) or right(*args))
    gradkern.jacobian(model, torch.randn(1000, 6), engine="kernel")
    assert 1000 < sum(rows) <= 1000 + 32


def test_samples_without_a_gradient_are_moved(broken) -> None:
    """Zeros are equal whatever the kernels do with other numbers."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.zeros(4, 6)
    with torch.no_grad():
        model[0].bias.fill_(-1e-3)
    with pytest.warns(GradkernWarning, match="first results are not torch's own"):
        gradkern.jacobian(model, x, engine="kernel")


@pytest.mark.parametrize("n", [1, 2, 5])
def test_forward_values_that_differ_are_left_to_torch(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    model, x = net()
    program = capturing.to_program(model, (x,))
    params = dict(capturing.bind(program, model))
    right = ops.chain_forward
    monkeypatch.setattr(ops, "chain_forward", lambda *args: [value + 1.0 for value in right(*args)])
    with torch.no_grad(), pytest.warns(GradkernWarning, match="first results are not torch's own"):
        assert executor.forward_values(program, params, [x[:n]], [program.output]) == {}


def test_samples_and_outputs_of_one_number() -> None:
    model, x = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1), nn.Tanh(), nn.Flatten(0)).eval(), torch.randn(5)
    got = gradkern.jacobian(model, x, engine="kernel")  # [N]
    assert oracle.relative_error(got[:, None], oracle.jacobian(model, [x])[1][0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_that_cancel_are_no_difference(dtype: torch.dtype) -> None:
    """The mean of a softmax is constant, so its gradient is rounding alone; the other inputs stay as they are."""

    def model(x: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        return torch.softmax(table[ids] + x.where(keep, 0.0), 1).mean(1, keepdim=True)

    table = torch.randn(5, 12, dtype=dtype)
    inputs = torch.randn(4, 12, dtype=dtype), torch.arange(4), torch.rand(4, 12) > 0.3
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*first results are not torch's own")
        got = gradkern.jacobian(model, inputs, wrt=0, engine="kernel")
    assert float(got.abs().max()) < 1e-6


def test_transpose_that_differs_is_replaced_by_torch(broken) -> None:
    """DeepLift's multipliers are a transpose, whose slopes are tensors."""
    model, x = net()
    with pytest.warns(GradkernWarning, match="first results are not torch's own"):
        got = gradkern.attr.DeepLift(model).attribute(x, target=1)
    want = captum.attr.DeepLift(model).attribute(x, target=1)
    assert oracle.relative_error(got.detach(), want.detach()) < 1e-5
