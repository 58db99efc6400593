"""What a call of few samples takes, what it costs in addition to its kernel, and what the first call of a network
costs.

The first table has µs per call for 1, 8 and 64 samples: of the callable that `gradkern.prepare` returns, of
`gradkern.jacobian`, and of what torch and JAX (if it is installed) offer; all of them take turns.

The second is about one sample.  ``above``: the median over calls, less the time spent in the compiled op in the same
call.  ``handle``: the same for the callable that `gradkern.prepare` returns.  ``capture``: what `gradkern.prepare`
takes for a fresh network in a process that has captured one before; ``cold``: the same in a new process, imports aside.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev

import gradkern
from benchmarks import baselines, gpu_jax, machine, measure, report
from benchmarks.baselines import Chunk
from benchmarks.measure import Say
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.run import RESULTS, positive, progress
from gradkern.runtime import ops
from tests.cases import CASES

SAMPLES = (1, 8, 64)
OTHERS = ("decoder", "emulator")  # few inputs and many outputs; among the cases of the tests
ABOVE_GOAL, HANDLE_GOAL, CAPTURE_GOAL = 80e-6, 40e-6, 0.5  # seconds
WARM_UP = 3  # rounds
JAX = importlib.util.find_spec("jax") is not None
COLD = """
import time, torch, gradkern
from benchmarks.problems import PROBLEMS
problem = PROBLEMS[{name!r}]
model, x = problem.model(), problem.fresh(4, torch.Generator().manual_seed(0))
begin = time.perf_counter()
assert gradkern.prepare(model, x).program is not None
print(time.perf_counter() - begin)
"""


def problems() -> list[Problem]:
    few = [Problem(name, 64, 8, 8, 1.0, "few inputs, many outputs") for name in OTHERS if name in CASES]
    return [*PROBLEMS.values(), *few]


def ways(problem: Problem, n: int, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Everything that gives the Jacobian of ``n`` samples, by name."""
    model = problem.model()
    x = problem.fresh(n, torch.Generator().manual_seed(22))
    with torch.no_grad():
        outputs = model(x)[0].numel()
    made: dict[str, Callable[[Tensor], Tensor]] = {}

    def add(name: str, make: Callable[[nn.Module, int], Chunk]) -> None:
        with contextlib.suppress(Exception), measure.quiet():  # a peer that cannot do this network has no column
            chunk = make(model, outputs)
            chunk(x, None)
            made[name] = lambda x: chunk(x, None)

    add("class loop", baselines.loop_classes)
    add("is_grads_batched", baselines.grads_batched)
    for name, transform in (("jacrev", jacrev), ("jacfwd", jacfwd)):
        plain = partial(baselines.vmap_jacrev, transform=transform)
        add(f"vmap({name})", plain)
        if compiled:
            add(f"compiled {name}", lambda model, outputs, plain=plain: torch.compile(plain(model, outputs)))  # type: ignore[misc]
        if JAX:
            add(f"JAX {name}", partial(gpu_jax.chunk, transform=name))
    jac = gradkern.prepare(model, x)
    assert jac is not None
    return {"handle": jac, "jacobian": partial(gradkern.jacobian, model), **made}


def microseconds(problem: Problem, n: int, rounds: int, compiled: bool) -> dict[str, float]:
    """Median µs of a call of each way, which take turns."""
    calls, generator = ways(problem, n, compiled), torch.Generator().manual_seed(23)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with measure.quiet():
        for number in range(rounds + WARM_UP):
            x = problem.fresh(n, generator)
            for name, call in calls.items():
                seconds, _ = measure.timed(call, x)
                if number >= WARM_UP:
                    taken[name].append(seconds)
    return {name: 1e6 * statistics.median(times) for name, times in taken.items()}


def table_of_calls(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    cells: list[tuple[str, ...]] = [("net", "samples", *names)]
    for row in rows:
        times = (f"{row['us'][name]:.0f}" if name in row["us"] else "-" for name in names)
        cells.append((row["net"], str(row["samples"]), *times))
    return "\n".join(report.align(cells))


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
            for call, beside in ((partial(gradkern.jacobian, model, engine="kernel"), above), (jac, handle)):
                clock.seconds = 0.0
                begin = time.perf_counter()
                call(x)
                seconds = time.perf_counter() - begin
                beside.append(seconds - clock.seconds)
                if beside is above:
                    total.append(seconds)
                    inside.append(clock.seconds)
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
        "--compiled", action="store_true", help="torch.compile's forms too, about a minute for each size"
    )
    parser.add_argument("--quick", action="store_true", help="few calls: shows that it works")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/small_calls.json)")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    if options.compiled:  # one code object for all networks and sizes
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    facts = machine.describe(options.threads)
    print(report.one_line(facts), flush=True)
    say, nets = progress(), problems()
    if options.nets:
        nets = [net for net in nets if net.name in options.nets]
    calls: list[dict[str, Any]] = []
    for problem in nets:
        for n in SAMPLES:
            say(f"calls: {problem.name}, {n}")
            us = microseconds(problem, n, 2 if options.quick else 100, options.compiled)
            calls.append({"net": problem.name, "samples": n, "us": us})
    print("", file=sys.stderr)
    print(f"\nµs per call\n{table_of_calls(calls)}\n")
    if not JAX:
        print("JAX is not installed, so it is left out.\n")
    rows = measured([p.name for p in nets if p.name in PROBLEMS], options.quick, say)
    print("", file=sys.stderr)
    print(f"\none sample\n{table(rows)}\n")
    path = options.out or RESULTS / ("quick-small_calls.json" if options.quick else "small_calls.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "calls": calls, "small_calls": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
