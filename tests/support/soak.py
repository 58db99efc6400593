"""A soak of dataset runs: random sources and options, kills, two runs on one store, full disks, damaged files.

    python -m tests.support.soak --minutes 10 [--seed 0]

Every round makes one store without a disturbance, and one that is disturbed in every way, then verified, repaired and
run to its end: both must hold the same bits.  Every tenth round continues a store of an earlier version.  Prints its
figures as JSON; the exit code is 1 after the first difference.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import gradkern
from gradkern.data import Busy, DiskFull, Mismatch, Results, repair, run, verify
from gradkern.data.runs import probe
from tests.support.old_stores import OPTIONS as OLD_OPTIONS
from tests.support.old_stores import STORES, problem
from tests.support.sources import MAKERS, X
from tests.support.stores import assert_same

FULL, BUSY, FAILED = 4, 6, 1
CONSTANT = ("targets/c.0", "chunks/c.0.0", "ids/c.0", "names/c.0")  # files of arrays that never change
PATIENCE = 180  # seconds: of computing, for a run that takes less than one; or without any, of one that hangs


class Difference(Exception):
    """A round that did not end as it must."""


def seconds_of(pid: int) -> float:
    """The processor time that a process of ours has taken."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Soak:
    def __init__(self, seed: int, folder: Path) -> None:
        self.rng, self.folder, self.figures = random.Random(seed), folder, Counter[str]()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        self.old_model, self.old_x = problem()
        for model, x in ((self.model, torch.tensor(X)), (self.old_model, self.old_x)):
            gradkern.prepare(model, x[:4])  # once: the runs are forks of this process
        self.mounted: Path | None = None

    # ---- processes

    def start(self, work: Callable[[], object]) -> int:
        """Do some work in a fork; gives the process number.  What goes wrong becomes its exit code."""
        pid = os.fork()
        if pid:
            return pid
        code = 0
        try:
            warnings.simplefilter("ignore")
            work()
        except DiskFull:
            code = FULL
        except Busy:
            code = BUSY
        except BaseException:
            traceback.print_exc()
            code = FAILED
        os._exit(code)

    def end(self, pid: int, *allowed: int) -> int:
        """The exit code; negative for a signal."""
        used, since = 0.0, time.monotonic()
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if (now := seconds_of(pid)) > used + 0.02:  # a busy machine may be slow; a run that waits for ever is not
                used, since = now, time.monotonic()
            if used > PATIENCE or time.monotonic() > since + PATIENCE:
                os.kill(pid, signal.SIGUSR1)  # prints where it is
                time.sleep(2)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Difference(f"a run was still at work after {used:.0f} s, or waits")
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code not in (0, *allowed):
            raise Difference(f"a run ended with {code}, expected 0 or {allowed}")
        self.figures["runs"] += 1
        return code

    def kill(self, pid: int, before: int, out: Path) -> None:
        if self.rng.random() < 0.7:  # while it works: after some more chunks
            self.wait_for_records(pid, out, self.rng.randint(1, 6))
        time.sleep(self.rng.uniform(0.0, 0.02) if self.rng.random() < 0.7 else self.rng.uniform(0.0, 0.5))
        os.kill(pid, signal.SIGKILL)
        if self.end(pid, -signal.SIGKILL, FULL) == -signal.SIGKILL:
            self.figures["kills"] += 1
            now = self.finished(out)
            self.figures["kills at work"] += before < now
            if now < before:
                raise Difference(f"{now} chunks are finished after a kill, and {before} were")

    def wait_for_records(self, pid: int, out: Path, count: int) -> None:
        """Until the ledger has changed so many times, or the process has ended."""
        ledger, seen = out / "chunks" / "finished", {0}
        while len(seen) <= count and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            seen.add(ledger.stat().st_mtime_ns if ledger.exists() else 0)
            time.sleep(0.002)

    def finished(self, out: Path) -> int:
        return len(Results.open(out).ledger.finished()) if (out / "zarr.json").exists() else 0

    # ---- disturbances

    def interrupted(self, work: Callable[..., object], out: Path) -> None:
        self.kill(self.start(work), self.finished(out), out)

    def two(self, work: Callable[..., object], out: Path) -> None:
        """Two runs at a time: on the same chunks, one of which is refused, or on shards of their own."""
        shards = self.rng.choice([[(0, 1), (0, 1)], [(0, 2), (1, 2)], [(0, 1), (1, 3)]])
        pids = [self.start(lambda shard=shard: work(shard=shard)) for shard in shards]
        if self.rng.random() < 0.3:
            os.kill(pids[0], signal.SIGKILL)
        codes = [self.end(pid, BUSY, FULL, -signal.SIGKILL) for pid in pids]
        self.figures["two runs at a time"] += 1
        self.figures["refused as busy"] += codes.count(BUSY)

    def full(self, work: Callable[..., object], out: Path) -> None:
        """A run on a disk that is full; then there is space again."""
        if self.mounted is None:
            return self.interrupted(work, out)
        ballast = self.mounted / "ballast"
        space = shutil.disk_usage(self.mounted).free
        ballast.write_bytes(b"0" * max(0, space - self.rng.choice([0, 8, 24, 64]) * 1024))
        if self.end(self.start(work), FULL) == FULL:
            self.figures["full disks"] += 1
        ballast.unlink()

    def damage(self, work: Callable[..., object], out: Path, source: object) -> None:
        """Damage one to three files; `verify` must find what matters, and `repair` fix it."""
        if not (out / "zarr.json").exists():
            return
        files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.suffix != ".partial" and p.name != "lock"]
        files = [p for p in files if "holders" not in p.parts]
        chosen = self.rng.sample(files, min(len(files), self.rng.randint(1, 3)))
        if out / "zarr.json" in chosen:  # which is restored from its copy: one of the two must be left
            chosen = [p for p in chosen if p.name != "created.json"]
        if out / "chunks/created.json" in chosen:  # nor is there another copy of the arrays that never change
            chosen = [p for p in chosen if f"{p.parent.name}/{p.name}" not in CONSTANT]
        for path in chosen:
            self.damage_one(path, out)
        verdict = verify(out)
        self.figures["found damaged"] += not verdict.ok
        while not verify(out).ok:
            pid = self.start(lambda: repair(out, self.model, source))
            if self.rng.random() < 0.3:
                time.sleep(self.rng.uniform(0.0, 0.4))
                os.kill(pid, signal.SIGKILL)
            if self.end(pid, -signal.SIGKILL) == 0 and not verify(out).ok:
                raise Difference(f"not repaired: {verify(out)}")
        self.figures["repaired"] += not verdict.ok

    def damage_one(self, path: Path, out: Path) -> None:
        content, kind = path.read_bytes(), self.rng.choice(["delete", "empty", "cut", "flip", "flip"])
        self.figures["damaged files"] += 1
        if kind == "delete" and path != out / "zarr.json":
            path.unlink()
        elif kind == "flip" and content:
            at = self.rng.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << self.rng.randrange(8))]) + content[at + 1 :])
        else:
            path.write_bytes(content[: len(content) // 2 if kind == "cut" else 0])

    # ---- rounds

    def options(self) -> dict[str, object]:
        rng = self.rng
        names = ["mean_abs", "mean", "variance", "max_abs", "ranks", "importance"]
        return {
            "method": rng.choice(["jacobian", "saliency", "input_x_gradient", "IntegratedGradients"]),
            "targets": rng.choice([None, [2, 0]]),
            "reductions": rng.sample(names, rng.randint(1, 4)),
            "chunk": rng.choice([1, 1, 2, 3, 5]),
            "dtype": rng.choice(["float32", "float32", "float16", "bfloat16", "float64"]),
            "compression": rng.choice(["none", "none", "zstd", "blosc"]),
            "top_features": rng.choice([0, 3]),
            "engine": rng.choice(["kernel", "auto"]),
            "ids": rng.choice([None, [f"sample {i}" for i in range(len(X))]]),
            "names": rng.choice([None, "abc"]) and list("abc"),
        }

    def round(self, number: int) -> None:
        folder = self.folder / str(number)
        (folder / "source").mkdir(parents=True)
        source, options = self.rng.choice(MAKERS)(folder / "source"), self.options()
        whole, out = folder / "whole.zarr", folder / "out.zarr"
        if self.rng.random() < 0.3 and self.mount(folder / "disk"):
            out = folder / "disk" / "out.zarr"

        def work(out: Path = out, shard: tuple[int, int] = (0, 1), way: str | None = None, **more: str) -> None:
            if way is not None:
                probe.faster_way = lambda *args: way  # in this fork
            run(self.model, source, out, shard=shard, threads=1, **options | more)

        self.end(self.start(lambda: work(whole)))
        for _ in range(self.rng.randint(2, 5)):
            disturb = self.rng.choice([self.interrupted, self.interrupted, self.two, self.full, None])
            if disturb is None:
                self.damage(work, out, source)
            else:
                disturb(work, out)
        self.end(self.start(work))
        if not verify(out).ok:
            raise Difference(str(verify(out)))
        ways = [Results.open(place).about["pinned"]["way"] for place in (out, whole)]
        if ways[0] != ways[1]:  # kernels and autograd were measured, and another one was faster this time
            self.figures["measured another way"] += 1
            shutil.rmtree(whole)
            engine = "auto" if ways[0] else "kernel"  # a store begun by a shard measures nothing
            self.end(self.start(lambda: work(whole, engine=engine, way=ways[0])))
        self.figures[f"way {ways[0]}"] += 1
        self.same(out, whole)
        self.unmount()
        shutil.rmtree(folder)
        self.figures["rounds"] += 1

    def same(self, out: Path, whole: Path) -> None:
        about = Results.open(out).about
        if not (about["finished"] and about["exact"]):
            raise Difference(f"{out}: finished {about['finished']}, {about.get('notes')}")
        assert_same(out, whole)
        self.figures["bytes compared"] += sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())

    def old_round(self) -> None:
        """A store of an earlier version is continued under kills."""
        out = self.folder / "old.zarr"
        shutil.copytree(STORES / "unfinished.zarr", out)

        def work() -> None:
            run(self.old_model, self.old_x, out, **OLD_OPTIONS)

        for _ in range(2):
            self.interrupted(work, out)
        self.end(self.start(work))
        verdict, found, expected = verify(out), Results.open(out), Results.open(STORES / "finished.zarr")
        if not verdict.ok or not found.about["finished"]:
            raise Difference(str(verdict))
        for name in ("attributions", "predictions"):
            a, b = (np.asarray(r.array(name)[...], dtype=float) for r in (found, expected))
            limit = 0.0 if found.about["exact"] else found.about["tolerance"] * np.abs(b).max()
            if not np.abs(a - b).max() <= limit:
                raise Difference(f"{name} of the earlier version")
        shutil.rmtree(out)
        self.figures["stores of an earlier version"] += 1

    # ---- a small disk

    def mount(self, folder: Path) -> bool:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode == 0:
            self.mounted = folder
        return self.mounted is not None

    def unmount(self) -> None:
        if self.mounted is not None:
            subprocess.run(["umount", "-l", str(self.mounted)], check=True)
            self.mounted = None


def main(minutes: float, seed: int) -> int:
    tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and stays taken where its holder was killed
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)  # no thread of OpenMP's may be alive when the process forks
    torch.manual_seed(0)
    begin, wrong = time.monotonic(), None
    with tempfile.TemporaryDirectory(prefix="gradkern-soak-", ignore_cleanup_errors=True) as folder:
        soak = Soak(seed, Path(folder))
        number = 0
        try:
            while time.monotonic() - begin < 60 * minutes:
                soak.old_round() if number % 10 == 9 else soak.round(number)
                number += 1
        except (Difference, AssertionError, Mismatch, ValueError) as error:
            traceback.print_exc()
            wrong = f"round {number}: {error}"
        finally:
            soak.unmount()
    figures = {"minutes": round((time.monotonic() - begin) / 60, 1), "seed": seed, **dict(sorted(soak.figures.items()))}
    print(json.dumps(figures | {"wrong": wrong}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(main(given.minutes, given.seed))
