"""Plans: which way each step goes, groups and their order, shares, what is printed, what is remembered."""

from __future__ import annotations

import pytest
import torch

from gradkern.codegen.lowering import lower_units
from gradkern.codegen.machine import Device, NoKernels
from gradkern.ir.program import (
    Call,
    Contract,
    Dense,
    Opaque,
    Param,
    Product,
    Program,
    Scale,
    Select,
    Step,
    Sum,
    Value,
    View,
    Windows,
)
from gradkern.planner import groups, implementations, plan
from gradkern.runtime import executor, ops
from tests.cases import BENCH, TRACEABLE
from tests.support.case_runs import program_of
from tests.support.programs import conv, linear, norm
from tests.support.programs import program as make

CONV = conv()
CUMSUM = Opaque(Call("aten.cumsum.default", (Value(1), 2)), "a running sum has no form")


def split() -> Program:
    """conv → cumsum (torch) → relu → + conv → linear."""
    return make(
        Step(CONV, (0,), (4, 8), "aten.conv1d.default", "body.0"),
        Step(CUMSUM, (1,), (4, 8), "aten.cumsum.default", "body.1"),
        Step(Scale("relu"), (2,), (4, 8)),
        Step(Sum(), (3, 1), (4, 8)),
        Step(View(), (4,), (32,)),
        Step(Contract(Dense(), Param("f")), (5,), (3,), "aten.linear.default", "head"),
    )


def test_a_network_of_kernels_is_one_group():
    p = executor.plan_for(make(Step(CONV, (0,), (4, 8)), Step(Scale("relu"), (1,), (4, 8))), 5)
    assert p.single_chain
    assert p.native_share == p.fused_share == 1.0
    assert {s.group for s in p.steps} == {0}


@pytest.mark.parametrize("case", BENCH, ids=repr)
def test_the_measured_networks_are_whole(case):
    p = executor.plan_for(program_of(case.name), program_of(case.name).outputs)
    assert p.single_chain
    assert p.native_share == 1.0


def test_the_plan_splits_around_what_torch_does():
    p = executor.plan_for(split(), 3)
    assert [g.native for g in p.groups] == [True, False, True]
    assert [g.steps for g in p.groups] == [(0,), (1,), (2, 3, 4, 5)]
    assert [g.live_in for g in p.groups] == [(0,), (1,), (1, 2)]
    assert [g.live_out for g in p.groups] == [(1,), (2,), (6,)]
    assert not p.single_chain
    row = p.steps[1]
    assert row.path == "autograd, per op"
    assert row.why == "aten.cumsum.default: a running sum has no form"
    assert (row.module, row.macs > 0) == ("body.1", True)
    assert p.native_share == p.fused_share < 1.0
    # (conv 4·8·12, relu and sum 32 each, linear 96) against the opaque step's elements, each forward and 3 seeds.
    native, opaque = 384 + 32 + 32 + 96, p.steps[1].macs // 4
    assert p.native_share == pytest.approx(native / (native + opaque))


def test_measured_costs_of_opaque_steps_replace_the_guess():
    p = executor.plan_for(split(), 3).explained({1: 10_000}, None)
    assert p.steps[1].macs == 40_000
    assert p.fused_share < 0.06


@pytest.mark.parametrize("case", TRACEABLE, ids=repr)
def test_groups_are_in_order_and_complete(case):
    """Every value crosses from an earlier group to a later one, and every step belongs to exactly one group."""
    p = executor.plan_for(program_of(case.name), 3)
    if isinstance(p, plan.ForwardPlan):
        p = p.inner
    if isinstance(p, plan.ProductPlan):
        p = p.whole
    program = p.program
    base = len(program.inputs)
    assert sorted(i for g in p.groups for i in g.steps) == list(range(len(program.steps)))
    known = set(range(base))
    for g in p.groups:
        assert set(g.live_in) <= known
        inside = {base + i for i in g.steps}
        assert set(g.live_out) <= inside
        known |= set(g.live_out)
    assert program.output in known
    assert 0.0 <= p.native_share <= p.fused_share <= 1.0


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (make(Step(Product("matmul"), (0, 0), (2, 2, 4, 4)), inputs=((2, 2, 4, 4),)), "more than 3 axes"),
        (make(Step(Select(Windows((8,), (1,), ((0, 0),), (1,)), "split"), (0,), (4, 1))), "ties share"),
        (make(Step(Scale("made_up"), (0,), (4, 8))), "the function made_up has no kernel"),
        (make(Step(Scale("relu"), (0,), (2, 2, 2, 2)), inputs=((2, 2, 2, 2),)), "more than 3 axes"),
        (make(Step(Scale("relu"), (0,), (70_000,)), inputs=((70_000,),)), "more than 65535 channels"),
        (make(Step(Scale("relu"), (0,), (0, 3)), inputs=((0, 3),)), "empty values"),
        (
            make(Step(Select(Windows((400,), (1,), ((0, 0),), (1,))), (0,), (1, 101)), inputs=((1, 500),)),
            "more than 256 taps",
        ),
    ],
)
def test_steps_without_a_kernel_name_the_reason(program, why):
    (row,) = executor.plan_for(program, 2).steps
    assert row.path == "aten, seeds folded"
    assert why in row.why
    assert executor.plan_for(program, 2).fused_share == 1.0
    assert executor.plan_for(program, 2).native_share == (0.0 if row.macs else 1.0)  # of no work all is done


def test_dtypes_without_kernels():
    p = executor.plan_for(split(), 3, torch.bfloat16)
    assert not any(g.native for g in p.groups)
    assert "float32 and float64, not bfloat16" in p.steps[0].why


def test_without_the_extension():
    p = plan.plan(split(), 3, machine=NoKernels())
    assert not any(g.native for g in p.groups)
    assert p.steps[0].why.startswith("the compiled extension is missing")


def test_plan_prints_as_a_table():
    text = str(executor.plan_for(split(), 3))
    lines = text.splitlines()
    assert lines[0].split() == ["value", "layer", "form", "shape", "path", "MMAC"]
    assert max(map(len, lines)) <= 200
    assert len([line for line in lines if line.startswith("v")]) == 1 + len(split().steps) + 1
    assert "v2 (body.1): aten.cumsum.default: a running sum has no form" in lines
    assert lines[-1].startswith("3 seeds, 3 groups, fused ")
    assert "1 group, fused 100.0 %" in str(executor.plan_for(make(Step(CONV, (0,), (4, 8))), 1))


def test_folded_steps_say_so():
    program = make(
        Step(CONV, (0,), (4, 8)),
        Step(Scale("relu"), (1,), (4, 8)),
        Step(Select(Windows((2,), (2,), ((0, 0),), (1,))), (2,), (4, 4)),
    )
    assert [s.path.split()[0] for s in executor.plan_for(program, 1).steps] == ["kernel", "kernel", "folded"]


def test_plans_are_values():
    machine = ops.machine()
    assert plan.plan(split(), 3, machine=machine) == plan.plan(split(), 3, machine=machine)
    assert executor.plan_for(split(), 3) is executor.plan_for(split(), 3)
    assert plan.plan(split(), 3, machine=machine) != plan.plan(split(), 4, machine=machine)
    assert repr(executor.plan_for(split(), 3)).startswith("<Plan: 3 seeds, 3 groups, fused ")


@pytest.mark.parametrize("kib", [3, 6, 227])
def test_a_chain_is_lowered_once(kib, monkeypatch):
    """Whether a chain fits a block of a GPU shows when it is lowered: the plan keeps what it lowered to see that."""
    lowered = []

    def counted(*args, **kwargs):
        chain = lower_units(*args, **kwargs)
        lowered.append(
            (tuple(args[1].outputs), tuple(unit.steps for unit in args[1].units), args[4:], tuple(kwargs.items()))
        )
        return chain

    monkeypatch.setattr(groups, "lower_units", counted)
    p = plan.plan(program_of("maxpool2d"), 3, machine=Device("cuda", 16, shared_bytes=kib << 10))
    assert p.single_chain == (kib == 227)
    before = len(lowered)
    for k, group in enumerate(p.groups):
        if group.native:
            onehot = group.live_out == (p.program.output,)
            assert p.chain(k, 3, group.live_in, onehot) is p.chain(k, 3, group.live_in, onehot)
    assert len(lowered) == before == len(set(lowered)) > 0


def test_reasons_of_every_implementation_that_does_not_take_a_step():
    """The table has a line for each; what nobody would expect to take the step is not listed."""
    call = Call("aten.gru.input", (Value(0), Value(0), (), False, 1, 0.0, False, False, True), index=0)
    program = make(Step(Opaque(call, "its state is given"), (0,), (4, 8), "aten.gru.input", "rnn"))
    (row,) = executor.plan_for(program, 2).steps
    assert row.implementation is implementations.PER_OP
    assert row.refusals == (
        "aten.gru.input: its state is given",
        "a recurrent layer with a state or with dropout of its own",
    )
    assert [line for line in str(executor.plan_for(program, 2)).splitlines() if line.startswith("v1 (")] == [
        f"v1 (rnn): {reason}" for reason in row.refusals
    ]
    (view,) = executor.plan_for(make(Step(View(), (0,), (32,))), 2).steps
    assert (view.path, view.refusals, view.why) == ("view", (), "")


@pytest.mark.parametrize(
    ("positions", "function", "outputs", "chains"),
    [(12, "gelu", 4, 2), (12, "relu", 4, 1), (1, "gelu", 4, 1), (100, "gelu", 4, 1), (12, "gelu", 600, 1)],
)
def test_wide_layers_over_few_positions_run_between_chains(positions, function, outputs, chains):
    """A chain would read their weights for every sample.  It keeps those of whose cotangents it skips zeros, and all of
    them if most of the work is elsewhere."""
    tokens = positions, 520
    made = make(
        Step(norm(1), (0,), tokens), Step(linear(), (1,), tokens), Step(norm(1), (2,), tokens),
        Step(Scale(function), (3,), tokens), Step(View(), (4,), (positions * 520,)),
        Step(linear("head"), (5,), (outputs,)), inputs=(tokens,),
    )  # fmt: skip
    assert sum(group.native for group in executor.plan_for(made, 4).groups) == chains
