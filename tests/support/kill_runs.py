"""Kills dataset runs at random moments, for tests/data/test_resume.py.

Every run is a fork of this process that is killed with SIGKILL after a random time.  Once enough runs were killed while
they worked, a last run goes to its end.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch

import gradkern
from gradkern.data import run
from gradkern.data.store.durable import DurableStore
from gradkern.data.store.ledger import Ledger
from tests.cases import CASES
from tests.support import forks

SAMPLES, CHUNK = 1920, 4
OPTIONS = {"reductions": ["mean_abs", "variance", "max_abs", "importance"], "top_features": 2, "chunk": CHUNK}


def problem(samples: int = SAMPLES) -> tuple[torch.nn.Module, torch.Tensor]:
    case = CASES["cnn1d_strided"]
    return case.build(), case.inputs(samples)[0]


def count(out: str) -> int:
    """How many chunks are finished."""
    path = Path(out) / "chunks/c.0.0"  # [K, 2]
    return len(Ledger(DurableStore(Path(out)), path.stat().st_size // 16).finished()) if path.exists() else 0


def wait_for(out: str, chunks: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and count(out) < chunks:
        time.sleep(0.005)


def kill_runs(out: str, samples: int, kills: int, seed: int) -> dict[str, Any]:
    """Returns the number of killed runs, the finished chunks after each, how many of them were killed before there was
    a store, and the exit code of the last run."""
    model, x = problem(samples)
    gradkern.prepare(model, x)
    gradkern.jacobian(model, x[:CHUNK], engine="kernel")
    rng = random.Random(seed)
    killed, unmade, finished = 0, 0, []
    while killed < kills:
        pid = forks.start(lambda: run(model, x, out, **OPTIONS))
        if rng.random() < 0.75:  # while it works: some chunks further than the last one got
            wait_for(out, (finished or [0])[-1] + rng.randint(1, 8))
            time.sleep(rng.uniform(0.0, 0.02))
        else:  # at any moment, while it starts too
            time.sleep(rng.uniform(0.0, 0.2))
        os.kill(pid, signal.SIGKILL)
        assert forks.end(pid) == -signal.SIGKILL, f"a run ended before it was killed, after {killed} kills"
        killed, unmade = killed + 1, unmade + (not Path(out).exists())
        finished.append(count(out))
    status = forks.end(forks.start(lambda: run(model, x, out, **OPTIONS)))
    return {"killed": killed, "finished": finished, "unmade": unmade, "status": status}
