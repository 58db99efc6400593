"""A kernel that breaks the GPU for its process must fail its own test, and no other."""

from __future__ import annotations

import os
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """The kernels under test run, validated or not."""
    monkeypatch.setenv("GRADKERN_CUDA", "1")


@pytest.fixture(autouse=True)
def finished():
    """Errors of a kernel are told by a later call: wait for them here.  They last as long as the process, so it ends;
    beside others (pytest-xdist), another takes its place."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        if "PYTEST_XDIST_WORKER" in os.environ:
            print(f"the GPU is broken for this process: {first}", file=sys.__stderr__, flush=True)
            os._exit(1)
        pytest.exit(f"the GPU is broken for this process: {first}", returncode=1)
