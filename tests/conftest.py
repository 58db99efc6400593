"""Tests under ``gpu/`` are collected where there is a GPU (``make gpu`` runs them).

Every run draws other random numbers, each test its own whatever ran before it; a run that fails says how to repeat
them.  ``.ci/run`` has one seed a day.
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

EXPORTING = {"frontend", "dispatch", "gpu", "test_threads.py"}
torch.set_num_threads(1)  # before the fixtures of modules, too
SEED = int(os.environ.get("GRADKERN_SEED") or random.SystemRandom().randrange(1 << 31))


@pytest.fixture(autouse=True)
def fresh_numbers(request: pytest.FixtureRequest) -> None:
    seed = SEED ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """There is a process of tests per core.  A test that is about threads sets their number, which ends with it."""
    yield
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(f"GRADKERN_SEED={SEED} repeats this run's random numbers")


@pytest.fixture(autouse=True)
def one_export_per_architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except where capturing a network, or noticing that it has changed, is what is tested."""
    if not EXPORTING & set(request.path.relative_to(request.config.rootpath).parts):
        monkeypatch.setattr(to_program, "export", exports.remembered)


@pytest.fixture
def fresh() -> Iterator[None]:
    """No plan, pack or capture of another test, nor any that this one makes with other constants, after it."""
    gradkern.reset()
    yield
    gradkern.reset()


@pytest.fixture(autouse=True)
def no_kernel_differs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plain torch takes the place of kernels that differ, which would hide their faults from the tests."""
    if request.node.get_closest_marker("kernels_differ"):
        yield
        return
    refusals, refusal = [], confirmation._refusal
    monkeypatch.setattr(confirmation, "_refusal", lambda *args: refusals.append(refusal(*args)) or refusals[-1])
    yield
    assert not refusals


@pytest.fixture(autouse=True)
def kernels_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, so no test depends on what is faster on this machine: kernels run where there are any."""
    always = Timing(1, {"kernels": 1e-3, "loop": 2e-3})
    monkeypatch.setattr(ways, "measure", lambda *args: always)
