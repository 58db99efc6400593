"""Where the buffers of a chain lie."""

from __future__ import annotations

import math
import random

import pytest
import torch

from gradkern.codegen import scratch
from gradkern.codegen.scratch import Buffer
from gradkern.ir.program import Contract
from gradkern.runtime import executor
from tests.support import capturing
from tests.support.networks import NETWORKS


def alive_together(a: Buffer, b: Buffer) -> bool:
    return a.first <= b.last and b.first <= a.last


def apart(a: Buffer, b: Buffer, copies: int = 1) -> bool:
    return a.base + a.elements * copies <= b.base or b.base + b.elements * copies <= a.base


@pytest.mark.parametrize("seed", range(20))
def test_buffers_that_live_together_lie_apart(seed):
    pick = random.Random(seed)
    buffers = []
    for _ in range(pick.randint(1, 40)):
        first = pick.randint(0, 30)
        buffers.append(Buffer(pick.randint(1, 500), first=first, last=first + pick.randint(0, 10)))
    height = scratch.stack(buffers)
    assert all(b.base % 16 == 0 and b.base >= 0 and b.base + b.elements <= height for b in buffers)
    for i, a in enumerate(buffers):
        for b in buffers[:i]:
            assert apart(a, b) or not alive_together(a, b)
    most = max(sum(scratch.round_up(b.elements) for b in buffers if b.first <= t <= b.last) for t in range(41))
    assert most <= height <= sum(scratch.round_up(b.elements) for b in buffers)


def test_tiles_of_seeds_keep_them_apart():
    grads = [Buffer(30, first=0, last=2), Buffer(50, first=2, last=3), Buffer(20, first=3, last=4, per_sample=True)]
    values = [Buffer(10), Buffer(10, per_sample=True)]
    sizes = scratch.stack_cotangents(grads)
    assert sizes == (32 + 64, 32)
    shared, sample = scratch.assign_places(values, grads, sizes, 5)
    assert shared == 5 * 96 + 16
    assert sample >= 5 * 32 + 16
    assert apart(grads[0], grads[1], 5)
    assert apart(values[0], grads[0], 5) and apart(values[0], grads[1], 5)
    assert grads[2].base >= shared and values[1].base >= shared and apart(values[1], grads[2], 5)


def test_scratch_of_a_deep_network_is_a_few_layers():
    """Cotangents of layers far apart share memory: twenty-four layers take about what two do."""
    model = NETWORKS["tcn"].full.build()
    program = capturing.to_program(model, NETWORKS["tcn"].full.inputs(2))
    p = executor.plan_for(program, 5, torch.float32)
    chain = p.chain(0, 5, (0,), True)
    sizes = [math.prod(s.shape) for s in program.steps if isinstance(s.form, Contract)]
    assert chain.seed_tile == 5
    assert len(sizes) > 15
    assert chain.sizes.shared < 2 * sum(sizes) + 5 * 5 * max(sizes) < 5 * sum(sizes)
