"""What the engine keeps and takes: packed weights, plans and chains, scratch, the memory budget."""

from __future__ import annotations

import copy
import math
import weakref

import torch
from torch import nn

import gradkern
from gradkern.codegen import scratch
from gradkern.ir.program import Contract, Param, Positions, Program, Scale, Step, View, Windows
from gradkern.planner import plan
from gradkern.runtime import executor, reference
from gradkern.util import options
from tests import oracle
from tests.runtime.test_executor_corners import dense
from tests.traced import EXACT, exact, parts, run, worst


def test_packed_weights_follow_every_edit():
    _, inputs, program, params = parts("bn_after_conv", 3)
    params = {k: v.clone() for k, v in params.items()}
    for name in list(params):
        with torch.no_grad():
            params[name].view(-1)[-1] += 0.5  # in place: no identity, no version tells
        _, jacobians = run(program, params, inputs)
        want = reference.jacobian(program, params, inputs)[1]
        assert worst(jacobians, want) <= EXACT
    a, b = torch.randn(2, 4, 4, dtype=torch.float64)
    swapped = Program(((4,),), (dense(4, 4, 0, "a"), Step(Scale("relu"), (1,), (4,)), dense(4, 4, 2, "b")), 3)
    x = (torch.randn(3, 4, dtype=torch.float64),)
    for first, second in ((a, b), (b, a), (a, a)):
        both = {"a4x4": first, "b4x4": second}
        assert worst(run(swapped, both, x)[1], reference.jacobian(swapped, both, x)[1]) <= EXACT


def test_packs_are_few_and_small():
    packs = executor.Packs(keep=3, most=1 << 20)
    _, _, program, params = parts("bn_linear", 1)
    p = plan.cached_plan(program, program.outputs, torch.float64)
    c = plan.chain_of(p, 0, program.outputs, (0,), True)
    for scale in range(1, 8):
        packs.get(c, {k: v * scale for k, v in params.items()}, torch.empty(0, dtype=torch.float64))
        assert len(packs.found) <= 3
    packs.most = 1
    packs.get(c, params, torch.empty(0, dtype=torch.float64))
    assert len(packs.found) == 1  # the one in use always stays


def test_a_chain_that_is_gone_leaves_no_pack_to_its_successor():
    """Two chains may get one id, one after the other."""
    packs = executor.Packs()
    _, _, program, params = parts("bn_linear", 1)
    p = plan.cached_plan(program, 2, torch.float64)
    first = packs.get(plan.chain_of(p, 0, 2, (0,), True), params, torch.empty(0, dtype=torch.float64))
    (key,) = packs.found
    other = copy.copy(first.chain)
    packs.found[(id(other), key[1])] = packs.found.pop(key)
    assert packs.get(other, params, torch.empty(0, dtype=torch.float64)).chain is other


def test_plans_are_forgotten(monkeypatch, fresh_plans):
    monkeypatch.setattr(plan, "_KEEP", 4)
    _, inputs, program, params = parts("bn_linear", 2)
    for s in range(1, 9):
        targets = torch.zeros(s, dtype=torch.int64)
        assert (
            worst(run(program, params, inputs, targets)[1], [oracle.pick(exact("bn_linear", 2)[1][0], targets)])
            <= EXACT
        )
    assert len(plan._plans) <= 4
    assert len(plan._chains) <= 4


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
        reference, "jacobian", lambda p, b, xs, *a: (seen.append(xs[0].shape[0]), plain(p, b, xs, *a))[1]
    )
    monkeypatch.setattr(options, "DEFAULT_MEMORY_BUDGET", 8 * executor.need(program, program.outputs, torch.float64))
    y, (jac,) = run(program, params, (x,))
    assert max(seen) <= 8
    assert sum(seen) == 32
    torch.testing.assert_close(y, want[0], equal_nan=True)
    torch.testing.assert_close(jac, want[1][0], equal_nan=True)


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
    p = plan.plan(program, 30, torch.float32)
    assert p.whole
    found, single = (plan.chain_of(p, 0, seeds, (0,), True) for seeds in (30, 1))
    assert found.seed_tile < 6
    assert found.scratch <= max(scratch.SCRATCH_BYTES, single.scratch)
    assert found.sizes.block < 4


def test_outputs_count_against_the_memory_budget(monkeypatch):
    """One seed of very many outputs: what is allocated beside the result is the outputs, so the batch is cut.

    One part's outputs are gone before the next part's are made.
    """
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3000)).eval()
    x = torch.randn(20_000, 4)
    kept, sizes, plain = [], [], executor.jacobian

    def watched(*args, **kwargs):
        assert all(y() is None for y in kept)
        y, jacobians = plain(*args, **kwargs)
        kept.append(weakref.ref(y))
        sizes.append(y.nbytes)
        return y, jacobians

    monkeypatch.setattr(executor, "jacobian", watched)
    with gradkern.use(memory_budget=32 << 20):
        out = gradkern.jacobian(model, x, 7, engine="kernel")
    assert sum(sizes) == 20_000 * 3000 * 4
    assert max(sizes) <= 32 << 20
    index = torch.tensor([0, 9_999, 19_999])
    assert oracle.relative_error(out[index], oracle.jacobian(model, x[index])[1][0][:, 7:8]) < 1e-5
