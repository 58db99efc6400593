"""The plain executor against the oracle and against autograd, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradkern.ir.functions import FUNCTIONS, RECTIFYING
from gradkern.ir.program import Call, Value
from gradkern.runtime import reference
from tests.cases import BENCH, CASES, SMALL
from tests.support import oracle
from tests.support.capturing import bind, to_program
from tests.support.case import Case
from tests.support.case_runs import lowered
from tests.support.functions import ARGUMENTS, ORIGINALS

CHECKED = tuple(c for c in SMALL if c.traceable)


@pytest.mark.parametrize("case", CHECKED, ids=lambda c: c.name)
def test_float64_jacobian(case: Case) -> None:
    model, program = lowered(case.name)
    inputs = case.inputs(4, seed=5, dtype=torch.float64)
    y, jacs = reference.jacobian(program, bind(program, model), inputs)
    want_y, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(y, want_y) < 1e-10
    for got, right, shape in zip(jacs, want, case.shapes, strict=True):
        assert got.shape == (4, program.outputs, *shape)
        assert oracle.relative_error(got, right) < 1e-10


@pytest.mark.parametrize("case", BENCH, ids=lambda c: c.name)
def test_float32_jacobian_of_the_measured_networks(case: Case) -> None:
    model, inputs = case.build(), case.inputs(4)
    program = to_program(model, inputs)
    _, (got,) = reference.jacobian(program, bind(program, model), inputs)
    _, (want,) = oracle.jacobian(model, inputs)
    assert got.dtype == torch.float32
    assert oracle.disagreeing(got, want, 1e-4) <= 0.25  # a pattern that flipped: at most one sample


@pytest.mark.parametrize("name", ["residual", "lstm", "two_inputs", "conv_output", "scalar_output"])
def test_reference_targets_equal_the_oracle(name: str) -> None:
    case = CASES[name]
    model, program = lowered(name)
    inputs = case.inputs(3, dtype=torch.float64)
    params = bind(program, model)
    _, want = oracle.jacobian(model, inputs)
    shared = torch.tensor([program.outputs - 1, 0])
    own = torch.randint(program.outputs, (3, 4), generator=torch.Generator().manual_seed(0))
    for targets in (shared, own):
        _, got = reference.jacobian(program, params, inputs, targets)
        for g, w in zip(got, want, strict=True):
            assert oracle.relative_error(g, oracle.pick(w, targets)) < 1e-10


def test_reference_of_some_inputs() -> None:
    case = CASES["two_inputs"]
    model, program = lowered("two_inputs")
    inputs = case.inputs(3, dtype=torch.float64)
    params = bind(program, model)
    both = reference.jacobian(program, params, inputs)[1]
    (second,) = reference.jacobian(program, params, inputs, wrt=(1,))[1]
    assert torch.equal(second, both[1])


def test_an_input_that_nothing_reads_has_zero_gradient() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2

    inputs = (torch.randn(2, 3), torch.randn(2, 5))
    program = to_program(First(), inputs)
    _, (one, other) = reference.jacobian(program, {}, inputs)
    assert torch.equal(one, 2 * torch.eye(3).expand(2, 3, 3))
    assert torch.equal(other, torch.zeros(2, 3, 5))


@pytest.mark.parametrize("name", ["cnn1d", "lstm", "resnet1d_opaque", "conv1d_same_even", "adaptive2d_uneven"])
def test_empty_batch_and_no_seeds(name: str) -> None:
    case = CASES[name]
    model, program = lowered(name)
    params = bind(program, model)
    empty = tuple(torch.zeros(0, *s, dtype=torch.float64) for s in case.shapes)
    if name != "lstm":  # torch's LSTM refuses an empty batch
        y, (jac,) = reference.jacobian(program, params, empty)
        assert y.shape == (0, *program.output_shape)
        assert jac.shape == (0, program.outputs, *case.shapes[0])
    none = torch.zeros(0, dtype=torch.long)
    _, (jac,) = reference.jacobian(program, params, case.inputs(2, dtype=torch.float64), none)
    assert jac.shape == (2, 0, *case.shapes[0])


@pytest.mark.parametrize("case", [c for c in CHECKED if "2d" not in c.name], ids=lambda c: c.name)
def test_every_step_against_autograd(case: Case) -> None:
    """`vjp_step` is autograd through `forward_step`, for random cotangents of two seeds."""
    model, program = lowered(case.name)
    params = bind(program, model)
    values = reference.forward(program, params, case.inputs(2, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    for i, step in enumerate(program.steps):
        out = values[len(program.inputs) + i]
        if not out.is_floating_point():
            continue
        g = torch.randn(2, 2, *step.shape, generator=generator, dtype=torch.float64)
        args = [values[v].detach().requires_grad_(values[v].is_floating_point()) for v in step.inputs]
        y = reference.forward_step(program, i, args, params)
        with torch.no_grad():
            got = reference.vjp_step(program, i, [a.detach() for a in args], out, g, params)
        assert len(got) == len(step.inputs)
        for seed in range(2):
            moving = [a for a in args if a.requires_grad]
            want = torch.autograd.grad(y, moving, g[:, seed], retain_graph=True, allow_unused=True)
            found = [part for a, part in zip(args, got, strict=True) if a.requires_grad]
            for a, part, right in zip(moving, found, want, strict=True):
                assert part.shape == (2, 2, *a.shape[1:])
                right = torch.zeros_like(a) if right is None else right
                assert torch.allclose(part[:, seed], right, rtol=1e-10, atol=1e-12), f"step {i}: {step}"


# ---------------------------------------------------------------------------------------------------------------
# Elementwise functions

POINTS = (0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.3, -0.4, 1.5, 5.0, -20.0, 20.0, math.nan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [f for f in FUNCTIONS if f not in RECTIFYING])  # those are no derivatives
def test_functions_at_kinks_and_nan(name: str, dtype: torch.dtype) -> None:
    params = ARGUMENTS.get(name, ())
    function, original = FUNCTIONS[name], ORIGINALS[name]
    positive = name in ("log", "log1p", "sqrt", "rsqrt")
    points = [p for p in POINTS if not positive or not p < 0]
    if name in ("hardsigmoid", "negative_part"):
        points.remove(math.nan)  # torch's vector and scalar loops disagree there; the original here is a difference
    # At NaN torch's vector and scalar loops disagree for some functions: the first of many are in the vector loop.
    many = torch.tensor(points * 16, dtype=dtype, requires_grad=True)
    y = original(many, *params)
    (want,) = torch.autograd.grad(y.sum(), many)
    x, y, want = (z.detach()[: len(points)] for z in (many, y, want))
    with torch.no_grad():
        got_y = function.f(x, *params)
        got = function.df(x, got_y, *params).to(dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}
    assert got_y.dtype == dtype
    assert torch.allclose(got_y, y.detach(), equal_nan=True, **tolerance)
    if name in ("relu", "hardtanh"):  # masks: NaN passes the cotangent on in a ReLU alone, as torch has it
        assert torch.equal(torch.where(got.bool(), 1.0, 0.0).to(dtype), want)
    assert torch.allclose(got, want, equal_nan=True, **tolerance), (points, got, want)


def test_masks_stop_what_is_not_finite() -> None:
    """A dead unit passes exactly nothing on, even of an infinite cotangent."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.tensor([[math.inf, 1.0]]))
    x = torch.tensor([[-1.0, 1.0], [-2.0, 3.0]])
    program = to_program(model, (x,))
    _, (jac,) = reference.jacobian(program, bind(program, model), (x,))
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(model(leaf).sum(), leaf)
    assert torch.equal(jac[:, 0].isnan(), want.isnan())
    assert torch.equal(jac[:, 0, 1], want[:, 1])


# ---------------------------------------------------------------------------------------------------------------
# Ties, NaN, dtypes


@pytest.mark.parametrize("name", ["maxpool1d", "maxpool1d_overlap_pad", "maxpool1d_ceil", "maxpool2d_mixed"])
@pytest.mark.parametrize("fill", ["ties", "nan", "minus_inf"])
def test_max_pool_at_ties_and_nan(name: str, fill: str) -> None:
    _, program = lowered(name)
    i = next(i for i, s in enumerate(program.steps) if type(s.form).__name__ == "Select")
    shape = program.shape(program.steps[i].inputs[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (3, *shape), generator=generator).double()
    if fill != "ties":
        x[torch.rand(x.shape, generator=generator) < 0.3] = math.nan if fill == "nan" else -math.inf
    leaf = x.clone().requires_grad_()
    y = reference.forward_step(program, i, [leaf], {})
    g = torch.randn(3, 1, *y.shape[1:], generator=generator, dtype=torch.float64)
    (want,) = torch.autograd.grad(y, leaf, g[:, 0])
    (got,) = reference.vjp_step(program, i, [x], y.detach(), g, {})
    assert torch.equal(got[:, 0], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    case = CASES["bn_after_pool"]
    model, inputs = case.build(dtype=dtype), case.inputs(3, dtype=dtype)
    program = to_program(model, inputs)
    y, (jac,) = reference.jacobian(program, bind(program, model), inputs)
    _, (want,) = oracle.jacobian(model, inputs)
    assert y.dtype == jac.dtype == dtype
    assert oracle.relative_error(jac.double(), want) < 0.1


@pytest.mark.parametrize("op", ["cumsum", "sinh", "logsumexp", "round"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_small_opaque_steps_fold_their_seeds_and_large_ones_loop(
    op: str, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"cumsum": (1,), "logsumexp": ((1,),)}.get(op, ())
    shape = (5,) if op == "logsumexp" else (3, 5)
    call = Call(f"aten.{op}.default", (Value(0), *args))
    x, g = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, seeds, *shape, dtype=torch.float64)
    out = getattr(torch, op)(x, *args)
    calls = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or real(*a, **k))
    results = []
    for most, expected in ((1 << 16, 1), (1, seeds)):
        monkeypatch.setattr(reference, "MOST_FOLDED", most)
        calls.clear()
        results += reference._opaque_back(call, (0,), [x], out, g, {})
        assert len(calls) == expected
    folded, looped = results
    leaf = x.clone().requires_grad_()
    y = getattr(torch, op)(leaf, *args)
    want = torch.stack([real(y, leaf, g[:, s], retain_graph=True)[0] for s in range(seeds)], 1)
    for got in (folded, looped):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


def test_lstm_in_float32() -> None:
    """The fused CPU kernel of float32 is another one than float64's."""
    case = CASES["lstm"]
    model, inputs = case.build(), case.inputs(3)
    program = to_program(model, inputs)
    for _ in range(2):
        _, (got,) = reference.jacobian(program, bind(program, model), inputs)
        assert oracle.relative_error(got, oracle.jacobian(model, inputs)[1][0]) < 1e-5


def test_nothing_is_written_to() -> None:
    case = CASES["residual"]
    model, program = lowered("residual")
    inputs = case.inputs(2, dtype=torch.float64)
    params = {k: v.clone() for k, v in bind(program, model).items()}
    kept = [x.clone() for x in inputs]
    reference.jacobian(program, params, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    assert all(torch.equal(params[k], v) for k, v in bind(program, model).items())
