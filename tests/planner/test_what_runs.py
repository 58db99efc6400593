"""What `explain` says of a step is what runs it: every call of a kernel, of ATen and of autograd is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gradkern.ir import graph
from gradkern.ir.program import View
from gradkern.planner.implementations import PER_OP, WALK
from gradkern.planner.plan import ForwardPlan, Plan, ProductPlan
from gradkern.runtime import executor, ops, reference
from tests.cases import CASES, TRACEABLE
from tests.support.case_runs import parts

N = 2


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """Calls of the backward passes: of kernels, of torch by program and step, and of the two ways for opaque steps."""
    counts: Counter[Any] = Counter()

    def counted(module: Any, name: str, what: Callable[..., Any]) -> None:
        real = getattr(module, name)

        def call(*args: Any) -> Any:
            counts[what(*args)] += 1
            return real(*args)

        monkeypatch.setattr(module, name, call)

    counted(ops, "chain_vjp", lambda *args: "kernel")
    counted(reference, "vjp_step", lambda program, i, *args: (program.key, i))
    counted(reference, "vjp_recurrent", lambda *args: WALK)
    counted(reference, "_by_autograd", lambda *args: PER_OP)
    return counts


def leaves(plan: Plan) -> Iterator[Plan]:
    """The plans that run: those on either side of a bottleneck, or of forward mode, in place of the whole."""
    match plan:
        case ForwardPlan():
            yield plan.inner
        case ProductPlan():
            yield from leaves(plan.before)
            yield from leaves(plan.after)
        case _:
            yield plan


@pytest.mark.parametrize("case", TRACEABLE, ids=repr)
def test_what_a_plan_says_is_what_runs(case, ran):
    _, inputs, program, params = parts(case.name, N)
    wrt = [k for k, x in enumerate(inputs) if x.is_floating_point()]
    executor.jacobian(program, params, inputs, wrt=wrt)  # compares with torch
    ran.clear()
    executor.jacobian(program, params, inputs, wrt=wrt)
    kernels, opaque = 0, Counter()
    for plan in leaves(executor.plan_for(program, program.outputs, inputs[wrt[0]].dtype)):
        run = plan.program if plan.native else plan.original  # without kernels, every position counts
        base = len(run.inputs)
        entered = wrt if base == len(inputs) else range(base)
        passed = graph.descendants(run, entered) & graph.ancestors(run, [run.output])  # a cotangent comes by here
        for row in plan.steps:
            if row.value not in passed:
                continue
            torchs = ran[run.key, row.value - base]
            if not isinstance(run.steps[row.value - base].form, View):
                assert torchs == (not row.implementation.chained), (row, torchs)
            opaque[row.implementation] += row.implementation in (WALK, PER_OP)
        used = [g for g in plan.groups if g.native and passed.intersection(base + i for i in g.steps)]
        kernels += len(used)
    assert ran["kernel"] == kernels
    assert {way: ran[way] for way in (WALK, PER_OP)} == {way: opaque[way] for way in (WALK, PER_OP)}


def test_the_cases_hold_every_way():
    """So that the test above is about all of them."""
    rows = [row for name in CASES if CASES[name].traceable for row in rows_of(name)]
    assert {row.implementation.name for row in rows} == {
        "view", "folded", "kernel", "walk", "aten, seeds folded", "autograd, per op",
    }  # fmt: skip


def rows_of(name: str):
    _, inputs, program, _ = parts(name, N)
    return executor.plan_for(program, program.outputs, inputs[0].dtype).steps
