"""Fixtures of all tests; tests/README.md says what they replace, and how a test gets the real thing.

Tests under ``gpu/`` are collected where there is a GPU (``make gpu`` runs them).
"""

import os
import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import gradkern
from gradkern.dispatch import ways
from gradkern.frontend import to_program
from gradkern.planner.timing import Timing
from gradkern.runtime import confirmation
from tests.support import exports

collect_ignore_glob = [] if torch.cuda.is_available() else ["gpu/*"]

torch.set_num_threads(1)  # before the fixtures of modules, too
SEED = int(os.environ.get("GRADKERN_SEED") or random.SystemRandom().randrange(1 << 31))


@pytest.fixture(autouse=True)
def fresh_numbers(request: pytest.FixtureRequest) -> None:
    """Every run draws other random numbers, and each test its own, whatever ran before it."""
    seed = SEED ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """There is a process of tests per core.  A test that is about threads sets their number, which ends with it."""
    yield
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """A run that fails says how to repeat its random numbers."""
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(f"GRADKERN_SEED={SEED} repeats this run's random numbers")


@pytest.fixture(autouse=True)
def remembered_exports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each architecture is exported once per process, unless a test is marked ``real_export``."""
    if not request.node.get_closest_marker("real_export"):
        monkeypatch.setattr(to_program, "export", exports.remembered)


@pytest.fixture
def fresh() -> Iterator[None]:
    """No plan, pack or capture of another test, nor any that this one makes with other constants, after it."""
    gradkern.reset()
    yield
    gradkern.reset()


@pytest.fixture(autouse=True)
def no_kernel_differs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test fails if a kernel's first results are not torch's own, unless it is marked ``kernels_differ``.

    In a user's call plain torch takes the place of such kernels, which would hide their faults from the tests.
    """
    refusals, refusal = [], confirmation.refusal
    monkeypatch.setattr(confirmation, "refusal", lambda *args: refusals.append(refusal(*args)) or refusals[-1])
    yield
    assert not refusals or request.node.get_closest_marker("kernels_differ")


@pytest.fixture(autouse=True)
def kernels_win(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, so that no test depends on what is faster on this machine: kernels run where there are any.

    A test that is marked ``measured_ways`` measures them.
    """
    if not request.node.get_closest_marker("measured_ways"):
        always = Timing(1, {"kernels": 1e-3, "loop": 2e-3})
        monkeypatch.setattr(ways, "measure", lambda *args: always)
