"""The full set of the seed question: 194109×1×224 -> 3 (``cnn1d``, random data), all-class gradients in one call.

gradkern and the best peer each run in a fresh process of their own.  Memory over the result is the highest resident
size during the first call, less what was resident before it (interpreter, libraries, model, inputs), less the
result.  So tracing, packing and all scratch of the call count; the tracer's own libraries, loaded beforehand with
another network, do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import accuracy, machine, measure, report
from benchmarks.baselines import PEERS, run
from benchmarks.problems import PROBLEMS
from benchmarks.run import RESULTS, ours, path_taken, positive, progress

NET = "cnn1d"
SAMPLES = 194109
MIB = 2**20
WANTED = 256.0
"""MiB over the result that a call may take."""

FAST = ("loop_classes", "grads_batched", "vmap_jacrev", "compiled", "captum")
EXAMPLES = """examples:
  python -m benchmarks.full_set                     about two minutes on two cores
  python -m benchmarks.full_set --samples 2000      a small set, to see that it works
  python -m benchmarks.full_set --threads 1 --calls 5
"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_set", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--samples", type=positive, default=SAMPLES, help=f"samples (default: {SAMPLES})")
    parser.add_argument("--threads", type=positive, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--calls", type=positive, default=3, help="timed calls after the first (default: 3)")
    parser.add_argument("--engine", choices=("kernel", "reference", "autograd", "auto"), default="kernel",
                        help="gradkern's engine (default: kernel)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/full_set-<threads>t.json)")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=positive, default=256, help=argparse.SUPPRESS)
    return parser.parse_args(words)


# ---------------------------------------------------------------------------------------------------------------
# The measured process


def resident() -> int:
    """Bytes of this process in memory now, shared libraries included."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak()  # no such file outside Linux: the peak so far is the nearest there is
    return pages * resource.getpagesize()


def reset_peak() -> bool:
    """Start the peak afresh; False where the system cannot (the peak so far then counts too)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """The largest `resident` since the start or since `reset_peak`, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if platform.system() == "Darwin" else highest * 1024


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One contender in this process: the first call with its memory, then timed calls on new samples."""
    torch.set_num_threads(options.threads)
    problem = PROBLEMS[NET]
    model = problem.model()
    generator = torch.Generator().manual_seed(11)
    small = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(12, 3)).eval()
    small_x = torch.randn(4, 1, 8)
    with measure.quiet():
        if options.child == report.OURS:
            runner = ours(model, options.engine)
            ours(small, options.engine)(small_x)  # loads the tracer's libraries, knows nothing of the measured net
        else:
            peer = PEERS[options.child]
            outputs = 3
            peer.make(small, outputs)(small_x, None)
            chunk = peer.make(model, outputs)

            def runner(x: torch.Tensor) -> torch.Tensor:
                return run(peer, chunk, x, options.batch, outputs)

        x = problem.fresh(options.samples, generator)
        before, exact = resident(), reset_peak()
        first, result = measure.timed(runner, x)
        over = peak() - before - result.nbytes
        rows = torch.linspace(0, options.samples - 1, min(256, options.samples)).long().unique()
        checked = accuracy.compare(model, x[rows], result[rows])
        times = []
        for _ in range(options.calls):
            del result
            torch.randn(x.shape, generator=generator, out=x)
            seconds, result = measure.timed(runner, x)
            times.append(seconds)
    traced = options.child == report.OURS and options.engine in ("kernel", "auto")
    seconds = statistics.median(times)
    return {
        "name": options.child,
        "batch": options.samples if options.child == report.OURS else options.batch,
        "first_call_seconds": first,
        "seconds": seconds,
        "calls": times,
        "samples_per_second": options.samples / seconds,
        "inputs_mib": x.nbytes / MIB,
        "result_mib": result.nbytes / MIB,
        "over_result_mib": over / MIB,
        "peak_reset": exact,
        "max_error": report.finite(checked.max_error),
        "share_disagreeing": checked.share_disagreeing,
        "wrong": checked.wrong,
        **(path_taken(model, x[:64]) if traced else {}),
    }


# ---------------------------------------------------------------------------------------------------------------
# The process that starts the others


def spawn(options: argparse.Namespace, name: str, batch: int) -> dict[str, Any]:
    """Run one contender in a fresh process and read its figures from the last line that it prints."""
    words = ["--child", name, "--batch", batch, "--engine", options.engine]
    words += ["--samples", options.samples, "--threads", options.threads, "--calls", options.calls]
    command = [sys.executable, "-m", "benchmarks.full_set", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"the process for {name} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def best_peer(options: argparse.Namespace, say: measure.Say) -> measure.Screened:
    """The best peer at its best batch size on this network, by a screening of the fast ones."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(20)
    most = min(2048, options.samples)
    rows = measure.screen(PROBLEMS[NET], PROBLEMS[NET].model(), most, 3, generator, 0.1, FAST, say)
    return next(iter(measure.best_of(rows).values()))


HEADER = ("", "batch", "first call", "warm call", "samples/s", "over the result", "max error")


def row(figures: dict[str, Any]) -> tuple[str, ...]:
    """One contender's line of the printed table."""
    return (
        report.title(figures["name"]),
        str(figures["batch"]),
        f"{figures['first_call_seconds']:.2f} s",
        f"{figures['seconds']:.2f} s",
        f"{figures['samples_per_second']:,.0f}",
        f"{figures['over_result_mib']:.0f} MiB",
        "inf" if figures["max_error"] is None else f"{figures['max_error']:.1e}",
    )


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    if options.child:
        print(json.dumps(child(options)))
        return 0
    say = progress()
    facts = machine.describe(options.threads)
    print(report.one_line(facts), flush=True)
    say("full set: gradkern")
    mine = spawn(options, report.OURS, options.samples)
    best = best_peer(options, say)
    say(f"full set: {PEERS[best.peer].title} in batches of {best.batch}")
    peer = spawn(options, best.peer, best.batch)
    print("", file=sys.stderr)
    ratio = peer["seconds"] / mine["seconds"]
    print(f"{NET}, {options.samples}×1×224 -> 3, {mine['inputs_mib']:.0f} MiB in, {mine['result_mib']:.0f} MiB out\n")
    print("\n".join(report.align([HEADER, row(mine), row(peer)])))
    within = mine["over_result_mib"] <= WANTED
    if "native_share" in mine:
        print(f"\ngradkern: {mine['native_share']:.0%} of the operations on its own kernels")
    print(f"\nratio {ratio:.2f}; memory over the result {'within' if within else 'ABOVE'} {WANTED:.0f} MiB")
    path = options.out or RESULTS / f"full_set-{options.threads}t.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "net": NET, "samples": options.samples, "gradkern": mine, "best_peer": peer,
               "ratio": ratio, "memory_wanted_mib": WANTED, "memory_met": within}  # fmt: skip
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(path)
    return 2 if mine["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
