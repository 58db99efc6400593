"""Property-based: random Programs, weights, batches and targets; the engine against the reference in float64.

Nothing is traced here, so hundreds of networks take seconds; `test_random_networks` goes from modules to the oracle.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkern
from gradkern.codegen import emitters, scratch
from gradkern.runtime import executor, reference
from tests.support.properties import FAST, FUZZ, agrees, questions
from tests.support.random_programs import programs


@settings(FAST, max_examples=FUZZ or 500, derandomize=not FUZZ)
@given(questions(programs()))
def test_random_programs_of_kernels(question):
    agrees(*question)


@settings(FAST, max_examples=FUZZ // 4 or 120, derandomize=not FUZZ)
@given(questions(programs(foreign=True)))
def test_random_programs_that_the_plan_splits(question):
    agrees(*question)


@settings(FAST, max_examples=120)
@given(
    questions(programs()),
    st.sampled_from([1, 256 << 10]),
    st.sampled_from([1, 512 << 10]),
    st.sampled_from([0, 24 << 10]),
)
def test_random_programs_in_little_scratch(question, seed_bytes, block_bytes, l1_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "SEED_BYTES", seed_bytes)
        patch.setattr(scratch, "BLOCK_BYTES", block_bytes)
        patch.setattr(emitters, "L1_BYTES", l1_bytes)
        gradkern.reset()
        agrees(*question)


@settings(FAST, max_examples=80)
@given(questions(programs()))
def test_random_programs_in_float32(question):
    """Against float64 at the same numbers, on samples whose activation pattern is that of float64."""
    net, n, targets, wrt, seed, _ = question
    params, inputs = net.params(seed, torch.float32), net.inputs(n, seed + 1, torch.float32)
    with torch.no_grad():
        _, found = executor.jacobian(net.program, params, inputs, targets, wrt)
    wide = {k: v.double() for k, v in params.items()}
    xs = [x.double() for x in inputs]
    _, want = reference.jacobian(net.program, wide, xs, targets, wrt)
    _, plain = reference.jacobian(net.program, params, inputs, targets, wrt)
    for got, right, torch_own in zip(found, want, plain, strict=True):
        scale = max(float(right.abs().max()) if right.numel() else 0.0, 1e-2)
        for m in range(n):
            mine, theirs = ((j[m].double() - right[m]).abs().max() / scale for j in (got, torch_own))
            # torch's own float32 says how badly conditioned this sample is (and whether its pattern flips).
            assert mine <= max(1e-5, 20 * theirs), (m, float(mine), float(theirs))
