"""A network in forward mode that is two chains: calls that go straight to them give what they give step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import gradkern
from gradkern.passes import direction
from gradkern.runtime import executor, forward_mode, ops, reference
from gradkern.runtime.call_plan import ForwardCallPlan, call_plan_for
from gradkern.runtime.parameters import leading
from gradkern.runtime.whole_forward import WholeForward
from gradkern.runtime.whole_network import whole_network
from tests.cases import TRACEABLE
from tests.support import oracle
from tests.support.case_runs import EXACT, exact, parts
from tests.support.modules import decoder, emulator
from tests.support.properties import FAST, FUZZ, questions
from tests.support.random_programs import programs

POISON = 1e30


def whole_of(program, params, inputs, targets=None, wrt=None):
    """The kernels of a Program whose live tensors are all of its ``params``."""
    wrt = tuple(range(len(inputs))) if wrt is None else wrt
    seeds = program.outputs if targets is None else len(targets)
    return whole_network(program, params, inputs, targets, (seeds,), wrt)


def equals_the_oracle(name: str) -> bool:
    """Whether a case is two chains; then its results are exact, and those of its steps to the bit."""
    _, inputs, program, params = parts(name, 3)
    whole = whole_of(program, params, inputs)
    if not isinstance(whole, WholeForward):
        return False
    got = whole(whole.packed(params), inputs)
    assert oracle.largest_error(got, exact(name, 3)[1]) <= EXACT
    with torch.no_grad():
        by_steps = executor.jacobian(program, params, inputs)[1]
    assert all(torch.equal(a, b) for a, b in zip(got, by_steps, strict=True))
    return True


@pytest.mark.parametrize("name", ["decoder", "emulator", "mlp", "softmax", "scalar_output", "two_inputs", "maxpool1d"])
def test_two_chains_equal_the_oracle(name: str, forward_everywhere: None) -> None:
    assert equals_the_oracle(name)


@pytest.mark.slow
def test_every_case_of_two_chains_equals_the_oracle(forward_everywhere: None) -> None:
    served = [case.name for case in TRACEABLE if not case.opaque and equals_the_oracle(case.name)]
    assert len(served) >= 100


@settings(FAST, max_examples=FUZZ or 60, derandomize=not FUZZ)
@given(questions(programs()))
def test_random_programs_equal_the_reference(question) -> None:
    net, n, targets, wrt, seed, _ = question
    program, params, inputs = net.program, net.params(seed), net.inputs(n, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direction, "FORWARD_WORTHWHILE", 0)
        gradkern.reset()
        if targets is None or targets.dim() == 1:
            whole = whole_of(program, params, inputs, targets, wrt)
            if isinstance(whole, WholeForward):
                want = reference.jacobian(program, params, inputs, whole.targets, wrt)[1]
                assert oracle.largest_error(whole(whole.packed(params), inputs), want) <= EXACT
    gradkern.reset()


def test_all_calls_of_a_decoder_agree() -> None:
    model, x = decoder().double().eval(), torch.randn(70, 4, dtype=torch.float64)
    (want,) = oracle.jacobian(model, (x,))[1]
    jac = gradkern.prepare(model, x)
    got = [jac(x), *(gradkern.jacobian(model, x, engine="kernel") for _ in range(3))]
    out = torch.full((70, 1, 12, 12, 4, 2), POISON, dtype=torch.float64)[..., 0]
    gradkern.jacobian(model, x, engine="kernel", out=out)  # through the steps, since this memory is not contiguous
    assert oracle.relative_error(out, want.view(out.shape)) <= EXACT
    filled = torch.full((70, 1, 12, 12, 4), POISON, dtype=torch.float64)
    got.append(gradkern.jacobian(model, x, engine="kernel", out=filled))
    assert all(torch.equal(g, out) for g in got)
    with gradkern.use(memory_budget=200_000):  # in parts
        assert torch.equal(jac(x), out)
    assert jac(x[:0]).shape == (0, 1, 12, 12, 4)


def test_new_weights_count_except_in_a_prepared_call() -> None:
    model, x = emulator().double().eval(), torch.randn(5, 3, dtype=torch.float64)
    jac = gradkern.prepare(model, x)
    before = jac(x)
    assert torch.equal(gradkern.jacobian(model, x, engine="kernel"), before)
    for k in (0, 2, 4):  # the first affects the values, the last only the transpose
        with torch.no_grad():
            model[k].weight[0].mul_(1.5)
        got = gradkern.jacobian(model, x, engine="kernel")
        assert oracle.relative_error(got, oracle.jacobian(model, (x,))[1][0]) <= EXACT
    assert torch.equal(jac(x), before)
    assert torch.equal(jac.update()(x), got)


def test_a_derivative_that_is_not_finite_is_computed_as_torch_does(forward_everywhere: None) -> None:
    """The derivative of a square root at 0 is infinite."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.sqrt(torch.abs(self.first(x))))

    model, x = Root().double().eval(), torch.randn(9, 3, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight[2], model.first.bias[2] = 0, 0
    want = oracle.jacobian(model, (x,))[1][0]
    assert want.isnan().any()
    jac = gradkern.prepare(model, x)
    for got in (jac(x), gradkern.jacobian(model, x, engine="kernel")):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_a_weight_that_is_not_finite_takes_no_kernels() -> None:
    _, inputs, program, params = parts("emulator", 3)
    whole = whole_of(program, params, inputs)
    assert isinstance(whole, WholeForward)
    name = next(iter(params))
    broken = dict(params) | {name: torch.full_like(params[name], torch.inf)}
    assert whole.packed(params) is not None
    assert whole.packed(broken) is None
    assert whole.repeat(broken, inputs) is None


def test_a_repeated_call_runs_only_with_the_same_weights() -> None:
    _, inputs, program, params = parts("decoder", 3)
    whole = whole_of(program, params, inputs)
    assert whole.repeat(params, inputs) is None  # nothing is packed yet
    got = whole(whole.packed(params), inputs)
    assert all(torch.equal(a, b) for a, b in zip(whole.repeat(params, inputs), got, strict=True))
    other = {name: p.clone() for name, p in params.items()}
    next(iter(other.values())).flatten()[0] += 1
    assert whole.repeat(other, inputs) is None


def test_only_forward_mode_is_computed_so() -> None:
    _, inputs, program, params = parts("emulator", 3)
    assert isinstance(call_plan_for(program, program.outputs, leading(inputs), (0,)), ForwardCallPlan)
    assert not isinstance(whole_of(program, params, inputs, torch.tensor([1])), WholeForward)


# ---------------------------------------------------------------------------------------------------------------
# The op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1,), (7,), (8,), (3, 1, 17), (2, 30)])
@pytest.mark.parametrize("targets", [None, torch.tensor([4, 0, 4]), torch.randint(130, (6, 70))])
def test_transposed_rows(dtype, sizes, targets) -> None:
    n, outputs = 6, 130
    rows = torch.randn(n, sum(sizes), outputs, dtype=dtype)
    rows[2, -1, 5], rows[4, 0, -1] = torch.nan, -torch.inf
    index = torch.arange(outputs) if targets is None else targets
    index = index.expand(n, -1)
    out = [torch.full((n, index.shape[1], size), POISON, dtype=dtype) for size in sizes]
    finite = forward_mode.write_transposed(rows, targets, out)
    assert finite.tolist() == [True, True, False, True, False, True]
    want = torch.stack([rows[i][:, index[i]].T for i in range(n)]).split(sizes, dim=2)
    for got, expected in zip(out, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_strided_results_are_filled_too() -> None:
    rows, wide = torch.randn(3, 4, 5), torch.full((3, 5, 8), POISON)
    assert forward_mode.write_transposed(rows, None, [wide[:, :, ::2]]).all()
    assert torch.equal(wide[:, :, ::2], rows.transpose(1, 2))
    assert (wide[:, :, 1::2] == POISON).all()


def op_arguments(**change):
    given = {"rows": torch.randn(3, 4, 5), "targets": None, "out": [torch.zeros(3, 5, 4)]}
    given |= {"finite": torch.zeros(3, dtype=torch.bool)} | change
    return tuple(given.values())


def test_opcheck() -> None:
    ops.extension()
    torch.library.opcheck(torch.ops.gradkern.write_transposed.default, op_arguments())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.randn(3, 5, 4).transpose(1, 2)}, r"tangents must be contiguous \[N, D, C\]"),
        ({"rows": torch.randn(3, 4, 5).half()}, "float32 or float64, got Half"),
        ({"out": []}, r"expected results \[N, S, ...\]"),
        ({"out": [torch.zeros(3, 5, 3)]}, "4 tangents for results of 3 elements"),
        ({"out": [torch.zeros(3, 5, 4, dtype=torch.float64)]}, "results must be contiguous Float"),
        ({"out": [torch.zeros(3, 4, 4)]}, "5 outputs for results of 4 seeds"),
        ({"finite": torch.zeros(2, dtype=torch.bool)}, r"finite must be contiguous Bool \[3\], got Bool \[2\]"),
        ({"targets": torch.arange(4)}, r"targets must be contiguous Long \[5\] or \[3, 5\], got Long \[4\]"),
        ({"targets": torch.tensor([0, 1, 2, 3, 5])}, "target 5 is out of range for 5 outputs"),
        ({"targets": torch.tensor([0, 1, 2, 3, -1])}, "target -1 is out of range for 5 outputs"),
    ],
)
def test_malformed_arguments_are_refused(change, message) -> None:
    ops.extension()
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.gradkern.write_transposed(*op_arguments(**change))
