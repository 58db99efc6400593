"""Kills dataset runs at random moments, for tests/data/test_resume.py.  A process of its own, which forks.

    python -m tests.support.kill_runs OUT KILLS SEED

It traces the network once; then every run is a fork of this process, killed with SIGKILL after a random time, until
KILLS runs were killed while they worked; then the run is let to its end.  Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback

import torch

import gradkern
from gradkern.data import Results, run
from tests.cases import CASES

SAMPLES, CHUNK = 1920, 4
OPTIONS = {"reductions": ["mean_abs", "variance", "max_abs", "importance"], "top_features": 2, "chunk": CHUNK}


def problem() -> tuple[torch.nn.Module, torch.Tensor]:
    case = CASES["cnn1d_strided"]
    return case.build(), case.inputs(SAMPLES)[0]


def child(model: torch.nn.Module, x: torch.Tensor, out: str) -> int:
    """One run in a fork; gives the process number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run(model, x, out, **OPTIONS)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def count(out: str) -> int:
    """How many chunks are finished."""
    return len(Results.open(out).ledger.finished()) if os.path.exists(out) else 0


def wait_for(out: str, chunks: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and count(out) < chunks:
        time.sleep(0.002)


def main(out: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # no thread of OpenMP's may be alive when the process forks
    model, x = problem()
    gradkern.prepare(model, x)
    gradkern.jacobian(model, x[:CHUNK], engine="kernel")
    rng = random.Random(seed)
    killed, finished = 0, []
    while killed < kills:
        pid = child(model, x, out)
        if rng.random() < 0.75:  # while it works: some chunks further than the last one got
            wait_for(out, (finished or [0])[-1] + rng.randint(1, 8))
            time.sleep(rng.uniform(0.0, 0.02))
        else:  # at any moment, while it starts too
            time.sleep(rng.uniform(0.0, 0.2))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"run ended with status {status} before it was killed: after {killed} kills")
        killed += 1
        finished.append(count(out))
    _, status = os.waitpid(child(model, x, out), 0)
    print(json.dumps({"killed": killed, "finished": finished, "status": status}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
