"""Local seeds: what they leave out is zero, whatever the layers between the input and the targets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradkern
from gradkern.codegen import lowering
from gradkern.runtime import executor, reference
from tests.support import capturing, oracle
from tests.support.capturing import bind
from tests.support.networks import BPNet
from tests.support.properties import FAST, FUZZ, agrees, questions
from tests.support.random_programs import programs

EXACT = 1e-10


@pytest.fixture
def always_local(monkeypatch, fresh_plans):
    """However little it saves, as in networks much larger than these; a tile has few seeds."""
    monkeypatch.setattr(lowering, "WORTHWHILE", 2.0)
    monkeypatch.setattr(lowering, "seed_tile", lambda seeds, per_seed: min(seeds, 3))


@settings(FAST, max_examples=FUZZ or 250, derandomize=not FUZZ)
@given(questions(programs()), st.sampled_from([1, 2, 7]))
def test_random_programs(question, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "WORTHWHILE", 2.0)
        patch.setattr(lowering, "seed_tile", lambda seeds, per_seed: min(seeds, tile))
        gradkern.reset()
        agrees(*question)
    gradkern.reset()
