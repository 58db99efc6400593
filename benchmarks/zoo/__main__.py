"""The command: every network in a process of its own, results to a folder, a section of docs/zoo.md per machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.zoo import stubs, table

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("torch/mlp", "torch/cnn1d")
ORDER = 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--limit", type=float, default=600, help="seconds of processor time per network")
    parser.add_argument("--seconds", type=float, default=2, help="of timing, per network and batch size")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "zoo-results", help="one file per network")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "zoo.json", help="results of all machines")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md")
    parser.add_argument("--quick", action="store_true", help="two networks of torch alone, in a few seconds")
    parser.add_argument("--again", action="store_true", help="measure also what has a result")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the page from what has a result")
    parser.add_argument("--busy", action="store_true", help="note that the machine had other work")
    parser.add_argument("--chosen", default="drawn at random", help="for the page: how the networks were chosen")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    stubs.install()
    if options.one:
        return one(options.one, options.threads[0], options.seconds)
    listed = list(QUICK) if options.quick else names()
    random.Random(ORDER).shuffle(listed)  # so a run that is stopped has measured a sample of them
    options.out.mkdir(parents=True, exist_ok=True)
    for name in (n for n in listed if options.only in n and not options.report):
        for threads in options.threads:
            file = options.out / f"{name.replace('/', '--')}--{threads}.json"
            if options.again or not file.exists():
                found = run(name, threads, options) | {"commit": machine.commit()}
                file.write_text(json.dumps(found, indent=1) + "\n")
            print(table.line(json.loads(file.read_text())), flush=True)
    about = machine.describe(max(options.threads)) | {"busy": options.busy, "packages": versions()}
    about |= {"networks": len(listed), "chosen": options.chosen}
    results = [json.loads(f.read_text()) for f in sorted(options.out.glob("*.json"))]
    published = [*others(options.json, about), {"machine": about, "results": results}]
    options.json.write_text(json.dumps(published, indent=1) + "\n")
    options.page.write_text(table.page([(m["machine"], m["results"]) for m in published]))


def others(published: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """What was published of other machines."""
    if not published.exists():
        return []
    return [m for m in json.loads(published.read_text()) if any(m["machine"][k] != about[k] for k in ("cpu", "isa"))]


def names() -> list[str]:
    from benchmarks.zoo.networks import names as listed

    return listed()


def versions() -> dict[str, str]:
    from benchmarks.zoo.networks import FAMILIES

    published = {"segmentation": "segmentation-models-pytorch"}  # where it is no name of a family
    return {package: machine.version(published.get(package, package)) for package in FAMILIES}


def run(name: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """One network in a process of its own; its result, or what went wrong."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.zoo", "--one", name, "--threads", str(threads)]
    command += ["--seconds", str(options.seconds)]
    failed = {"name": name, "threads": threads}
    seconds = round(options.limit)
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1)),
    )  # fmt: skip
    printed = done.stdout.strip().splitlines()
    if done.returncode == -signal.SIGXCPU and not printed:
        return failed | {"failed": f"took longer than {seconds} s of processor time"}
    if done.returncode not in (0, -signal.SIGXCPU):
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return failed | {"failed": (lines or [f"exit code {done.returncode}"])[-1][:300]}
    result: dict[str, Any] = json.loads(printed[-1])  # at the time limit: of the batch sizes that were measured
    return result


def one(name: str, threads: int, seconds: float) -> None:
    """In the process of one network: print its result so far, a line after each batch size."""
    from benchmarks.zoo.network import measured

    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):
        for found in measured(name, threads, seconds):
            print(json.dumps(found), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
