"""Tests under ``gpu/`` are collected where there is a GPU (``make gpu`` runs them)."""

import pytest
import torch

from gradkern import plan

collect_ignore_glob = [] if torch.cuda.is_available() else ["gpu/*"]


@pytest.fixture
def fresh_plans():
    """No plan or chain of other constants, neither before nor after."""
    plan._chains.clear()
    plan._plans.clear()
    yield
    plan._chains.clear()
    plan._plans.clear()
