"""What a call with few samples takes, what it costs in addition to its kernel, and what the first call of a network
costs.

The first table has µs per call for 1, 8 and 64 samples: of the callable that `gradkern.prepare` returns, of
`gradkern.jacobian`, and of what torch and JAX (if it is installed) offer; all of them take turns.  JAX needs an
environment of its own: `make calls` makes it, and measures everything.

The second is about one sample.  ``kernel``: the median time that calls of the prepared callable spend in the compiled
op.  ``handle``: what else they take.  ``above``: what a call of `gradkern.jacobian` takes beyond the kernel of the
prepared call just before it, since its own op also looks whether the weights have changed.  ``capture``: what
`gradkern.prepare` takes for a fresh network in a process that has captured one before; ``cold``: the same in a new
process, imports aside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import gradkern
from benchmarks import call_table, machine, report
from benchmarks.measure import Say
from benchmarks.problems import PROBLEMS
from benchmarks.run import RESULTS, positive, progress
from gradkern.runtime import ops

ABOVE_GOAL, HANDLE_GOAL, CAPTURE_GOAL = 80e-6, 40e-6, 0.5  # seconds
COLD = """
import time, torch, gradkern
from benchmarks.problems import PROBLEMS
problem = PROBLEMS[{name!r}]
model, x = problem.model(), problem.fresh(4, torch.Generator().manual_seed(0))
begin = time.perf_counter()
assert gradkern.prepare(model, x).program is not None
print(time.perf_counter() - begin)
"""


@dataclass(frozen=True)
class SmallCall:
    """One network's figures, in seconds."""

    net: str
    call: float
    kernel: float
    above: float
    handle: float
    capture: float
    cold: float


class _Clock:
    """Stands in for the compiled op and adds up the time spent in it."""

    def __init__(self, real: Any) -> None:
        self.real, self.seconds = real, 0.0

    def __call__(self, *args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.real(*args)
        finally:
            self.seconds += time.perf_counter() - begin


def small_call(name: str, calls: int, captures: int) -> SmallCall:
    """Measure one network."""
    problem, generator = PROBLEMS[name], torch.Generator().manual_seed(21)
    model = problem.model()
    jac = gradkern.prepare(model, problem.fresh(4, generator))
    assert jac is not None
    clock = ops.chain_vjp = _Clock(ops.chain_vjp)  # type: ignore[assignment]
    total, inside, above, handle = [], [], [], []
    try:
        for _ in range(calls):
            x = problem.fresh(1, generator)
            clock.seconds = 0.0
            begin = time.perf_counter()
            jac(x)
            between = time.perf_counter()
            gradkern.jacobian(model, x, engine="kernel")
            seconds = time.perf_counter() - between
            handle.append(between - begin - clock.seconds)
            inside.append(clock.seconds)
            total.append(seconds)
            above.append(seconds - clock.seconds)
    finally:
        ops.chain_vjp = clock.real
    taken = [_seconds_to_prepare(name, generator) for _ in range(captures)]
    done = subprocess.run([sys.executable, "-c", COLD.format(name=name)], capture_output=True, text=True, check=True)
    medians = (statistics.median(times) for times in (total, inside, above, handle, taken))
    return SmallCall(name, *medians, float(done.stdout))


def _seconds_to_prepare(name: str, generator: torch.Generator) -> float:
    model, x = PROBLEMS[name].model(), PROBLEMS[name].fresh(4, generator)
    begin = time.perf_counter()
    gradkern.prepare(model, x)
    return time.perf_counter() - begin


def table(rows: Sequence[SmallCall]) -> str:
    head = ("net", "one sample", "kernel", "above", f"goal {ABOVE_GOAL * 1e6:.0f} µs")
    head += ("handle", f"goal {HANDLE_GOAL * 1e6:.0f} µs", "capture", "goal", "cold")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        call, kernel, above, handle = (f"{t * 1e6:.0f} µs" for t in (row.call, row.kernel, row.above, row.handle))
        met = (row.above <= ABOVE_GOAL, row.handle <= HANDLE_GOAL, row.capture <= CAPTURE_GOAL)
        fast, bare, captured = ("met" if goal else "MISSED" for goal in met)
        cells.append(
            (row.net, call, kernel, above, fast, handle, bare, f"{row.capture:.2f} s", captured, f"{row.cold:.2f} s")
        )
    return "\n".join(report.align(cells))


def measured(names: Sequence[str], quick: bool, say: Say) -> list[SmallCall]:
    rows = []
    for name in names:
        say(f"small calls: {name}")
        rows.append(small_call(name, 20 if quick else 1000, 1 if quick else 5))
    return rows


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_calls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=positive, default=1, help="threads (default: 1)")
    parser.add_argument("--nets", nargs="+", metavar="NET", help="networks (default: all)")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile's forms too, up to a minute for each size of a network"
    )
    parser.add_argument("--quick", action="store_true", help="few calls: shows that it works")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/small_calls.json)")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    if options.compiled:  # one code object for all networks and sizes
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    facts = machine.describe(options.threads)
    if call_table.JAX and hasattr(os, "sched_setaffinity"):  # XLA uses all cores that the process may run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    print(report.one_line(facts), flush=True)
    say = progress()
    path = options.out or RESULTS / ("quick-small_calls.json" if options.quick else "small_calls.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": facts, "calls": [], "small_calls": []}
    nets = [problem for problem in call_table.problems() if not options.nets or problem.name in options.nets]
    found: list[call_table.Row] = []
    for problem in nets:
        for row in call_table.rows(problem, 2 if options.quick else 100, options.compiled, say):
            found.append(row)
            content["calls"].append(asdict(row))
            _write(path, content)  # a stopped run keeps what it has
    print("", file=sys.stderr)
    print(f"\nµs per call\n{call_table.table(found)}\n")
    if not call_table.JAX:
        print("JAX is not installed, so it is left out.\n")
    rows = measured([p.name for p in nets if p.name in PROBLEMS], options.quick, say)
    print("", file=sys.stderr)
    print(f"\none sample\n{table(rows)}\n")
    content["small_calls"] = [asdict(row) for row in rows]
    _write(path, content)
    print(path)
    return 0


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
