"""A run on a local Ray cluster of two workers, one of which is killed in the middle; for tests/data/test_ray.py.

    python -m tests.support.ray_run OUT ALONE

ALONE becomes the store of a run without Ray.  Prints as JSON how many chunks were finished when the worker was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray
import torch

from gradkern.data import Results, run
from gradkern.data.ray import run_on_ray
from tests.support.kill_runs import OPTIONS, problem

killed: dict[str, int] = {}


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def descends(pid: int) -> bool:
    """Is this a process of ours?"""
    while pid > 1:
        pid = parent(pid)
        if pid == os.getpid():
            return True
    return False


def workers() -> list[int]:
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::") and b"MapWorker" in title and descends(int(folder.name)):
                pids.append(int(folder.name))
    return sorted(pids)


def kill_one(out: str) -> None:
    """Once some chunks are finished: SIGKILL to one of the two workers."""
    while True:
        time.sleep(0.05)
        done = len(Results.open(out).ledger.finished()) if os.path.exists(out) else 0
        if done >= 10 and len(at_work := workers()) == 2:
            os.kill(at_work[0], signal.SIGKILL)
            killed.update(pid=at_work[0], finished=done)
            return


def main(out: str, alone: str) -> None:
    torch.set_num_threads(1)
    model, x = problem()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    threading.Thread(target=kill_one, args=(out,), daemon=True).start()
    results = run_on_ray(model, x, out, workers=2, **OPTIONS)
    run(model, x, alone, threads=1, **OPTIONS)  # here, with the same instructions
    print(json.dumps({**killed, "done": results.finished_chunks, "chunks": results.chunks}))


if __name__ == "__main__":
    main(*sys.argv[1:])
