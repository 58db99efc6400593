"""The direction: the choice is minimal under the cost model, and the result is the same."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradkern
from gradkern.ir.macs import forward_macs
from gradkern.ir.program import Contract, Dense, Param, Program, Scale, Step, Sum
from gradkern.passes import direction
from gradkern.runtime import executor
from tests.support import capturing, oracle
from tests.support.capturing import bind
from tests.support.networks import NETWORKS


def test_a_network_without_a_multiplication_to_save(capsys):
    gradkern.explain(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).eval(), torch.randn(3, 4))
    assert "seeds start at" in capsys.readouterr().out


@st.composite
def programs(draw):
    """Linear layers, functions and sums over earlier values of equal width, wired at random."""
    inputs = (draw(st.integers(1, 30)),)
    shapes, steps = [inputs], []
    for k in range(draw(st.integers(1, 9))):
        v = draw(st.integers(max(0, len(shapes) - 3), len(shapes) - 1))
        kind = draw(st.sampled_from(["dense", "dense", "relu", "sum"]))
        if kind == "dense":
            shape = (draw(st.integers(1, 40)),)
            steps.append(Step(Contract(Dense(), Param(f"w{k}")), (v,), shape))
        elif kind == "relu":
            shape = shapes[v]
            steps.append(Step(Scale("relu"), (v,), shape))
        else:
            shape = shapes[v]
            other = draw(st.sampled_from([u for u, s in enumerate(shapes) if s == shape]))
            steps.append(Step(Sum(), (v, other), shape))
        shapes.append(shape)
    return Program((inputs,), tuple(steps), len(steps))


def crosses_all(program, value):
    """By the definition: without ``value``, no path leads from an input to the output."""
    base = len(program.inputs)

    def reaches(v):
        if v == value:
            return False
        return v < base or any(reaches(u) for u in program.steps[v - base].inputs)

    return not reaches(program.output)


def plain_cost(program, seeds, value):
    """Multiply-adds by the definition: how many cotangents or tangents cross each step between two values.

    One-hot seeds and tangents are rows and columns of a linear layer, which costs nothing.
    """
    base = len(program.inputs)

    def leads(v, to):
        return v == to or any(leads(base + i, to) for i, s in enumerate(program.steps) if v in s.inputs)

    def layer(i):
        return isinstance(program.steps[i].form, Contract)

    def part(start, end, seeds):
        steps = [
            i for i in range(len(program.steps)) if leads(base + i, end) and (not start or not leads(base + i, start))
        ]
        macs = sum(forward_macs(program, i) for i in steps)
        rows = forward_macs(program, end - base) if layer(end - base) else 0
        readers = [i for i, s in enumerate(program.steps) for v in s.inputs if v == start]
        columns = forward_macs(program, readers[0]) if len(readers) == 1 and layer(readers[0]) else 0
        back, ahead = seeds * (macs - rows), math.prod(program.shape(start)) * (macs - columns)
        return ahead if 0 < back >= direction.FORWARD_WORTHWHILE * ahead else back

    if value is None:
        return part(0, program.output, seeds)
    width = math.prod(program.shape(value))
    product = seeds * width * math.prod(program.inputs[0])
    return part(0, value, width) + part(value, program.output, seeds) + product


@settings(max_examples=300, deadline=None)
@given(programs(), st.integers(1, 60))
def test_chosen_cut_has_the_least_multiplications(program, seeds):
    found = direction.choose(program, seeds, (0,))
    base = len(program.inputs)
    widest = max(seeds, math.prod(program.inputs[0]))  # a value as wide as both ends is no cut
    places = [v for v in range(base, program.output) if crosses_all(program, v)]
    places = [v for v in places if math.prod(program.shape(v)) < widest]
    best = min(plain_cost(program, seeds, v) for v in [None, *places])
    plain = plain_cost(program, seeds, None)
    assert found.whole.cost == plain
    assert (found.cut is None) == (plain < direction.CUT_WORTHWHILE * best or best == plain)
    if found.cut is not None:
        assert found.cut.value in places
        assert found.cut.cost == plain_cost(program, seeds, found.cut.value) == best < plain


@pytest.mark.parametrize("per_sample", [False, True])
def test_bottleneck_seeding_changes_no_result(per_sample):
    case = NETWORKS["basset"].small
    model, inputs = case.build(dtype=torch.float64), case.inputs(3, dtype=torch.float64)
    program = capturing.to_program(model, inputs)
    assert executor.plan_for(program, program.outputs, torch.float64).bottleneck is not None
    targets = torch.arange(program.outputs).flip(0)
    if per_sample:
        targets = torch.stack([targets.roll(k) for k in range(3)])
    _, (got,) = executor.jacobian(program, bind(program, model), inputs, targets)
    _, (want,) = oracle.jacobian(model, inputs)
    assert oracle.relative_error(got, oracle.pick(want, targets)) <= 1e-10


def test_explain_shows_the_cut():
    torch.manual_seed(0)
    sizes = (300, 200, 8, 200, 60)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    found = gradkern.explain(nn.Sequential(*layers).eval(), torch.randn(2, 300), show=False)
    assert found.direction.cut.width == 8
    assert "seeds start at" in str(found)
    assert "times fewer" in str(found)


def test_narrow_outputs_have_no_cut():
    case = NETWORKS["lenet5"].small
    program = capturing.to_program(case.build(), case.inputs(2))
    assert executor.plan_for(program, program.outputs).bottleneck is None


@pytest.mark.parametrize("function", ["guided_relu", "open_relu"])
def test_no_cut_where_the_backward_is_not_linear(function):
    """A guided ReLU keeps the positive part of a cotangent, so Jacobians of the two halves must not be multiplied."""

    def network(f):
        first, *others = (Contract(Dense(), Param(name)) for name in "abcd")
        forms = [first, Scale(f), *others]
        shapes = ((400,), (400,), (400,), (6,), (200,))
        steps = [Step(form, (k,), shape) for k, (form, shape) in enumerate(zip(forms, shapes, strict=True))]
        return Program(((300,),), tuple(steps), 5)

    assert direction.choose(network("relu"), 200, (0,)).cut is not None
    assert direction.choose(network(function), 200, (0,)).cut is None
