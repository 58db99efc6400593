"""Property-based: random Programs, weights, batches and targets; the engine against the reference in float64.

Nothing is traced here, so hundreds of networks take seconds; `test_random_networks` goes from modules to the oracle.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkern
from gradkern.codegen import emitters, scratch
from tests.support.properties import FAST, FUZZ, agrees, agrees_in_float32, questions
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
    agrees_in_float32(*question[:5])
