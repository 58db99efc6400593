"""What the engine keeps and takes: packed weights, plans and chains, scratch, the memory budget."""

from __future__ import annotations

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradkern
from gradkern.codegen import scratch
from gradkern.ir.program import (
    Call,
    Contract,
    Dense,
    Derived,
    Opaque,
    Param,
    Positions,
    Program,
    Scale,
    Step,
    Value,
    View,
    Windows,
)
from gradkern.planner.plan import ForwardPlan
from gradkern.runtime import call_plan, executor, ops, parameters, reference, whole_chain
from gradkern.runtime.parameters import Packed
from gradkern.runtime.whole_network import whole_network
from gradkern.util import options
from gradkern.util.chunks import stepwise_bytes
from tests.support import oracle
from tests.support.case_runs import EXACT, exact, parts, run
from tests.support.programs import dense


@pytest.mark.parametrize("name", ["bn_after_conv", "decoder"])  # in reverse mode, and in forward mode
def test_packed_weights_follow_every_edit(name):
    _, inputs, program, params = parts(name, 3)
    plan = executor.plan_for(program, program.outputs, torch.float64)
    assert isinstance(plan, ForwardPlan) == (name == "decoder")
    params = {k: v.clone(memory_format=torch.contiguous_format) for k, v in params.items()}
    for name in list(params):
        with torch.no_grad():
            params[name].view(-1)[-1] += 0.5  # in place: no identity, no version tells
        _, jacobians = run(program, params, inputs)
        want = reference.jacobian(program, params, inputs)[1]
        assert oracle.largest_error(jacobians, want) <= EXACT


def test_packed_weights_of_a_content_are_for_its_names():
    a, b = torch.randn(2, 4, 4, dtype=torch.float64)
    swapped = Program(((4,),), (dense(4, 4, 0, "a"), Step(Scale("relu"), (1,), (4,)), dense(4, 4, 2, "b")), 3)
    x = (torch.randn(3, 4, dtype=torch.float64),)
    for first, second in ((a, b), (b, a), (a, a)):
        both = {"a4x4": first, "b4x4": second}
        assert oracle.largest_error(run(swapped, both, x)[1], reference.jacobian(swapped, both, x)[1]) <= EXACT


def test_live_tensors_are_not_taken_for_those_derived_from_them(fresh):
    """`WholeChain` knows the live tensors only: here those of one model are what another derives from its own."""
    minus = Derived("-w", Call("aten.neg.default", (Param("w"),)))
    steps = (dense(4, 4, 0, "v"), Step(Scale("tanh"), (1,), (4,)), Step(Contract(Dense(), Param("-w")), (2,), (2,)))
    program = Program(((4,),), steps, 3, (minus,))
    first = {"v4x4": torch.randn(4, 4, dtype=torch.float64)}
    x, w = (torch.randn(3, 4, dtype=torch.float64),), torch.randn(2, 4, dtype=torch.float64)
    for live in (w, -w):
        chain = whole_network(program, parameters.bind(program, {"w": live, **first}), x, None, (2,), (0,))
        packed = chain.packed({"w": live, **first})
        for other in (live, -live):
            params = parameters.bind(program, {"w": other, **first})
            want = reference.jacobian(program, params, x)[1]
            assert oracle.largest_error(run(program, params, x)[1], want) <= EXACT
            if other is live:
                assert oracle.largest_error(chain(packed, x), want) <= EXACT


def test_plans_that_share_a_plan_keep_their_weights_apart(fresh):
    """The bytes of one plan's weights, in order, may be those of another's by other names."""
    ops.extension()  # where the hash is
    first, second = (SimpleNamespace(packed_names=names, live_names=names) for names in (("a", "b"), ("b", "a")))
    x, y, shared = torch.ones(2), torch.zeros(2), SimpleNamespace()
    one, other = {"a": x, "b": y}, {"a": y, "b": x}
    weights, others = parameters.PlanWeights(first, one, x), parameters.PlanWeights(second, other, x)
    assert weights.content == others.content
    assert weights.of_plan(shared, one).content != others.of_plan(shared, other).content


class Count:
    """How often weights are packed."""

    def __init__(self, monkeypatch):
        self.packs, plain = [], Packed

        def packed(chain, params, like):
            self.packs.append(chain)
            return plain(chain, params, like)

        monkeypatch.setattr(parameters, "Packed", packed)

    def since(self) -> int:
        self.packs, packs = [], self.packs
        return len(packs)


def scaled(params, factor):
    return {k: v * factor for k, v in params.items()}


def test_packs_are_few_and_small(monkeypatch, fresh):
    monkeypatch.setattr(parameters, "MOST_CONTENTS", 3)
    _, inputs, program, params = parts("bn_linear", 1)
    for factor in range(1, 8):
        run(program, scaled(params, factor), inputs)
        assert len(parameters.weight_cache.entries) <= 3
    count = Count(monkeypatch)
    for factor in (7, 6, 5, 4):
        run(program, scaled(params, factor), inputs)
    assert count.since() == 1  # the latest three were there
    monkeypatch.setitem(parameters.MOST_BYTES, "cpu", 1)
    run(program, params, inputs)
    assert len(parameters.weight_cache.entries) == 1  # the one in use always stays
    run(program, params, inputs)
    assert count.since() == 1


def many_chains(links: int) -> Program:
    """``links`` times a linear layer, a kernel's, and a running sum, which is torch's."""
    steps = []
    for k in range(links):
        steps.append(Step(Contract(Dense(), Param(f"w{k}")), (2 * k,), (6,)))
        steps.append(Step(Opaque(Call("aten.cumsum.default", (Value(2 * k + 1), 1)), "no form"), (2 * k + 1,), (6,)))
    return Program(((6,),), tuple(steps), 2 * links)


def test_networks_of_many_chains_are_packed_once(monkeypatch, fresh):
    """However many chains, however small the room, and however many chunks there are of a call."""
    program = many_chains(20)
    params = {f"w{k}": torch.randn(6, 6, dtype=torch.float64) / 3 for k in range(20)}
    count = Count(monkeypatch)
    monkeypatch.setitem(parameters.MOST_BYTES, "cpu", 1)
    for seed in range(4):
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        y, (jac,) = executor.jacobian(program, params, (x,))
        want_y, (want,) = reference.jacobian(program, params, (x,))
        torch.testing.assert_close(y, want_y)
        torch.testing.assert_close(jac, want)
    assert len(count.packs) == len(set(map(id, count.packs))) == 2 * 20  # forward, and with the backward
    params = scaled(params, 2)  # an optimizer's step
    executor.jacobian(program, params, (x,))
    assert len(count.packs) == 2 * 2 * 20
    assert len(parameters.weight_cache.entries) == 1


def test_all_ways_to_call_a_network_share_its_packs(monkeypatch, fresh):
    """With weights that are derived from others (a batch norm's), and in chunks or into the caller's memory, too."""
    model, inputs = parts("bn_linear", 5)[:2]
    monkeypatch.setitem(parameters.MOST_BYTES, "cpu", 1)
    with gradkern.use("kernel"):
        want = gradkern.jacobian(model, *inputs)
        count = Count(monkeypatch)
        for _ in range(2):
            out = torch.empty_like(want)
            gradkern.jacobian(model, *inputs, out=out)
            assert torch.equal(out, want)
            assert torch.equal(gradkern.jacobian(model, *inputs), want)
            assert torch.equal(torch.cat(list(gradkern.iter_jacobian(model, *inputs, chunk=2))), want)
    assert count.since() == 0


def test_plans_that_are_too_large_together_take_turns(monkeypatch, fresh):
    count = Count(monkeypatch)
    first, second = parts("bn_linear", 1)[1:], parts("residual", 1)[1:]

    def both():
        for inputs, program, params in (first, second):
            run(program, params, inputs)

    both()
    both()
    assert count.since() == len(parameters.weight_cache.entries) == 2
    monkeypatch.setitem(parameters.MOST_BYTES, "cpu", max(e.nbytes for e in parameters.weight_cache.entries.values()))
    both()
    assert count.since() == 0  # room is looked for where something is packed
    run(first[1], scaled(first[2], 2), first[0])
    both()
    assert count.since() == 3
    assert len(parameters.weight_cache.entries) == 1


def test_a_plan_that_is_gone_leaves_no_pack_to_its_successor(monkeypatch, fresh):
    """Two plans may get one id, one after the other: not while the packs of the first are kept."""
    _, inputs, program, params = parts("bn_linear", 1)
    run(program, params, inputs)
    (entry,) = parameters.weight_cache.entries.values()
    gone = weakref.ref(entry.plan)
    for table in (call_plan._plans, call_plan._call_plans):
        monkeypatch.setattr(table, "most", 1)
    run(program, params, inputs, torch.zeros(3, dtype=torch.int64))  # another plan takes its place there
    del entry
    gc.collect()
    assert gone() is not None
    gradkern.reset()
    gc.collect()
    assert gone() is None


def test_plans_are_forgotten(monkeypatch, fresh):
    for table in (call_plan._plans, call_plan._call_plans):
        monkeypatch.setattr(table, "most", 4)
    _, inputs, program, params = parts("bn_linear", 2)
    for s in range(1, 9):
        targets = torch.zeros(s, dtype=torch.int64)
        want = oracle.pick(exact("bn_linear", 2)[1][0], targets)
        assert oracle.largest_error(run(program, params, inputs, targets)[1], [want]) <= EXACT
    assert len(call_plan._plans) <= 4
    assert len(call_plan._call_plans) <= 4


def test_weights_that_are_not_finite_stay_within_the_budget(monkeypatch):
    """Then the reference takes over, a part of the batch at a time."""
    _, (x,), program, params = parts("maxpool1d", 32)
    name = next(s.form.weight.name for s in program.steps if isinstance(s.form, Contract))
    params = {k: v.clone() for k, v in params.items()}
    params[name].view(-1)[0] = math.inf
    want = reference.jacobian(program, params, (x,))
    seen = []
    plain = reference.jacobian
    monkeypatch.setattr(
        reference, "jacobian", lambda p, b, xs, *a, **k: (seen.append(xs[0].shape[0]), plain(p, b, xs, *a, **k))[1]
    )
    monkeypatch.setattr(options, "DEFAULT_MEMORY_BUDGET", 8 * stepwise_bytes(program.shapes, program.outputs, 8))
    y, (jac,) = run(program, params, (x,))
    assert max(seen) <= 8
    assert sum(seen) == 32
    torch.testing.assert_close(y, want[0], equal_nan=True)
    torch.testing.assert_close(jac, want[1][0], equal_nan=True)


def test_values_inside_of_groups_take_no_memory():
    """Kernels keep them in their scratch, so a batch is cut only for the values between groups."""
    relu, cumsum = Step(Scale("relu"), (1,), (900,)), Call("aten.cumsum.default", (Value(3), 1))
    between = Step(Opaque(cumsum, "no form"), (3,), (5,))
    program = Program(((6,),), (dense(900, 6, 0), relu, dense(5, 900, 2), between, dense(7, 5, 4)), 5)
    plan = executor.plan_for(program, 2, torch.float64)
    assert [g.native for g in plan.groups] == [True, False, True]
    assert plan.bytes_per_sample == stepwise_bytes([(6,), (5,), (5,), (7,)], 2, 8)


def test_scratch_of_large_layers_is_one_samples():
    """Blocks and tiles of seeds shrink before the scratch of a thread grows."""

    def conv(i: int, o: int, source: int, size: int) -> Step:
        return Step(
            Contract(Windows((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), Param(f"w{o}")), (source,), (o, size, size)
        )

    size = 200
    mean = Contract(Positions((((0, (1 / size,) * size),),) * 2))
    tanh, mean = Step(Scale("tanh"), (1,), (32, size, size)), Step(mean, (3,), (16, 1, 1))
    head = (Step(View(), (4,), (16,)), dense(30, 16, 5))
    steps = (conv(3, 32, 0, size), tanh, conv(32, 16, 2, size), mean, *head)
    program = Program(((3, size, size),), steps, 6)
    p = executor.plan_for(program, 16, torch.float32)  # no more seeds than the mean has numbers
    assert p.single_chain
    found, single = (p.chain(0, seeds, (0,), True) for seeds in (16, 1))
    assert found.seed_tile < 6
    assert found.scratch <= max(scratch.SCRATCH_BYTES, single.scratch)
    assert found.sizes.block < 4


def test_outputs_count_against_the_memory_budget(monkeypatch):
    """One seed of very many outputs: what is allocated beside the result is the outputs, so the batch is cut.

    One part's outputs are gone before the next part's are made.
    """
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3000)).eval()
    x = torch.randn(20_000, 4)
    kept, sizes, plain = [], [], whole_chain.run_chain

    def watched(*args):
        assert all(y() is None for y in kept)
        (y,) = plain(*args)
        kept.append(weakref.ref(y))
        sizes.append(y.nbytes)
        return [y]

    monkeypatch.setattr(whole_chain, "run_chain", watched)
    with gradkern.use(memory_budget=32 << 20):
        out = gradkern.jacobian(model, x, 7, engine="kernel")
    assert sum(sizes) == 20_000 * 3000 * 4
    assert max(sizes) <= 32 << 20
    index = torch.tensor([0, 9_999, 19_999])
    assert oracle.relative_error(out[index], oracle.jacobian(model, x[index])[1][0][:, 7:8]) < 1e-5
