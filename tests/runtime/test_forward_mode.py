"""Forward mode gives the Jacobian of reverse mode, for every form, for all of a network or one side of a cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradkern
from gradkern.ir.macs import forward_macs, tangent_macs
from gradkern.passes import direction
from gradkern.passes.phases import without_zeros
from gradkern.planner.plan import ForwardPlan
from gradkern.runtime import executor, reference
from gradkern.runtime.parameters import bind
from tests.cases import TRACEABLE
from tests.support import capturing, oracle
from tests.support.case_runs import EXACT, exact, parts, run
from tests.support.modules import decoder
from tests.support.properties import FAST, FUZZ, agrees, questions
from tests.support.random_programs import programs


@settings(FAST, max_examples=FUZZ or 150, derandomize=not FUZZ)
@given(questions(programs()), st.sampled_from([0, 1, 1.25]))
def test_random_programs_in_forward_mode_equal_the_reference(question, cut_worthwhile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direction, "FORWARD_WORTHWHILE", 0)
        patch.setattr(direction, "CUT_WORTHWHILE", cut_worthwhile)
        gradkern.reset()
        agrees(*question)
    gradkern.reset()


@pytest.mark.parametrize("name", [case.name for case in TRACEABLE if not case.opaque])
def test_every_case_in_forward_mode_equals_the_oracle(name, forward_everywhere):
    _, inputs, program, params = parts(name, 3)
    y, jacobians = run(program, params, inputs)
    want_y, want = exact(name, 3)
    assert oracle.relative_error(y, want_y) <= EXACT
    assert oracle.largest_error(jacobians, want) <= EXACT


@pytest.mark.parametrize("name", ["decoder", "emulator"])
def test_few_inputs_and_many_outputs(name):
    _, inputs, program, params = parts(name, 3)
    plan = executor.plan_for(program, program.outputs, torch.float64)
    assert isinstance(plan, ForwardPlan)
    assert plan.native
    assert not plan.single_chain
    assert f"forward mode from {inputs[0].shape[1]} inputs: " in str(plan)
    assert f"(reverse mode from {program.outputs} outputs: " in str(plan)
    (want,) = exact(name, 3)[1]
    for targets in (None, torch.arange(program.outputs), torch.randint(program.outputs, (3, 40))):
        _, (got,) = run(program, params, inputs, targets)
        assert oracle.relative_error(got, want if targets is None else oracle.pick(want, targets)) <= EXACT
    few = torch.tensor([program.outputs - 1])
    assert not isinstance(executor.plan_for(program, 1, torch.float64), ForwardPlan)
    assert oracle.largest_error(run(program, params, inputs, few)[1], [oracle.pick(want, few)]) <= EXACT


def test_every_public_call_takes_forward_mode():
    model, x = decoder().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    (want,) = oracle.jacobian(model, (x,))[1]
    shaped = want.view(3, 1, 12, 12, 4)
    assert oracle.relative_error(gradkern.jacobian(model, x, engine="kernel"), shaped) <= EXACT
    assert oracle.relative_error(gradkern.prepare(model, x)(x), shaped) <= EXACT
    pieces = list(gradkern.iter_jacobian(model, x, chunk=2, engine="kernel"))
    assert oracle.relative_error(torch.cat(pieces), shaped) <= EXACT


def test_tangents_of_a_sample_alone_and_in_a_batch_are_bit_equal():
    _, inputs, program, params = parts("decoder", 5)
    _, (together,) = run(program, params, inputs)
    for n in range(5):
        assert torch.equal(run(program, params, [x[n : n + 1] for x in inputs])[1][0][0], together[n])


@pytest.mark.parametrize(("first", "low"), [(nn.ReLU(), -1.0), (nn.Identity(), 0.0)])
def test_a_derivative_that_is_not_finite_is_as_in_torch(first, low):
    """0 · Inf is NaN, and forward mode has zeros in other places: torch's relu drops an infinite cotangent."""
    wide = nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 50)
    model = nn.Sequential(nn.Linear(2, 3), first, Root(), *wide).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        model[0].bias.zero_()
    x = torch.tensor([[1.0, 1.0], [low, 3.0], [2.0, 1.0], [2.0, low]], dtype=torch.float64)  # two are roots of 0
    program = capturing.to_program(model, (x,))
    assert isinstance(executor.plan_for(program, 50, torch.float64), ForwardPlan)
    _, (got,) = run(program, capturing.bind(program, model), (x,))
    (want,) = oracle.jacobian(model, (x,))[1]
    assert want.isfinite().flatten(1).all(1).tolist() == [True, low < 0, True, low < 0]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.allclose(got, want, equal_nan=True)


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def test_steps_without_a_rule_keep_reverse_mode(forward_everywhere):
    program = parts("lstm", 2)[2]
    plan = executor.plan_for(program, program.outputs, torch.float64)
    assert not isinstance(plan, ForwardPlan)
    assert "(forward mode: v" in str(plan)
    assert "it has no forward rule)" in str(plan)


def test_inputs_that_are_not_differentiated_have_no_tangents():
    program = parts("two_inputs", 3)[2]
    made = executor.plan_for(program, 500, torch.float64, wrt=(1,))
    assert made.direction.tangents == 3
    assert executor.plan_for(program, 500, torch.float64, wrt=(0, 1)) is executor.plan_for(program, 500, torch.float64)


@pytest.mark.parametrize("name", ["decoder", "emulator", "conv2d_uneven", "maxpool2d", "lenet5"])
def test_counts_are_those_of_what_runs(name, forward_everywhere):
    program = parts(name, 2)[2]
    forward = executor.plan_for(program, program.outputs, torch.float64)
    inner = forward.transposed.program
    runs = sum(forward_macs(inner, i) for i in range(len(inner.steps)))
    counted = sum(tangent_macs(program, i) for i in range(len(program.steps)))
    assert counted / 1.25 <= runs <= 1.25 * counted


def test_memory_of_a_sample_is_not_that_of_reverse_mode():
    program = parts("decoder", 2)[2]
    plan = executor.plan_for(program, program.outputs, torch.float64)
    values = sum(map(math.prod, program.shapes))
    assert plan.bytes_per_sample <= 8 * (3 * values + 3 * program.outputs * 4)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "more"),
    [((4,), (2,), (1,), (0,)), ((3,), (2,), (0,), (1,)), ((2,), (3,), (0,), (0,)), ((5, 3), (3, 2), (1, 2), (2, 1)),
     ((1, 4), (1, 2), (0, 0), (0, 0))],
)  # fmt: skip
def test_transposed_convolutions_by_phases(kernel, stride, padding, more):
    make = nn.ConvTranspose1d if len(kernel) == 1 else nn.ConvTranspose2d
    model = make(3, 2, kernel, stride=stride, padding=padding, output_padding=more).double()
    x = torch.randn(2, 3, *(4, 5)[: len(kernel)], dtype=torch.float64)
    program = capturing.to_program(model, (x,))
    phased = without_zeros(program, [program.output])
    assert sum(forward_macs(phased, i) for i in range(2)) < sum(forward_macs(program, i) for i in range(2))
    values = reference.forward(phased, bind(phased, capturing.bind(program, model)), [x])
    torch.testing.assert_close(values[program.output], model(x))
