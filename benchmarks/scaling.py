"""How the engine's rate depends on the number of samples, of classes and of threads, and what statistics alone cost.

`cnn1d` in every part: samples per second of its Jacobians from N = 1,000 to 1,000,000 (in pieces, which are dropped);
microseconds per sample and class from 1 to 100 classes; the rate on 1, 2, 4 … threads; and a run over a data set that
stores the mean |J| alone, beside the engine on the same samples, in turn.  CPU seconds where threads are one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradkern
from benchmarks import machine, report
from benchmarks.problems import PROBLEMS
from benchmarks.run import RESULTS, positive
from gradkern.dispatch.prepared import Prepared

EXAMPLES = """examples:
  python -m benchmarks.scaling                       everything, about four minutes
  python -m benchmarks.scaling --parts statistics --nets cnn1d lenet5 mlp --threads 1
  python -m benchmarks.scaling --quick               tiny, to see that everything works
"""
CLASSES = (1, 3, 10, 30, 100)
Rows = list[dict[str, Any]]


def seconds(call: Callable[[], object]) -> float:
    """Of the CPU on one thread, of the clock on several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    call()
    return clock() - begin


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each call, interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return {name: statistics.median(t) for name, t in taken.items()}


def by_samples(options: argparse.Namespace) -> Rows:
    problem, rows = PROBLEMS["cnn1d"], []
    net, some = problem.model(), problem.fresh(min(options.most, 10_000), torch.Generator().manual_seed(1))
    for n in (n for n in (64, 1_000, 10_000, 100_000, 1_000_000) if n <= options.most):
        x = some.repeat(-(-n // len(some)), *[1] * (some.dim() - 1))[:n]

        def call(x: Tensor = x) -> None:
            for _ in gradkern.iter_jacobian(net, x, chunk=4096, engine="kernel"):
                pass

        call(x[:4096])
        took = statistics.median(seconds(call) for _ in range(1 if n > 100_000 else options.rounds))
        rows.append({"N": n, "samples/s": n / took})
    return rows


def by_classes(options: argparse.Namespace) -> Rows:
    problem, rows = PROBLEMS["cnn1d"], []
    x = problem.fresh(64 if options.quick else 2048, torch.Generator().manual_seed(1))
    calls: dict[str, Callable[[], object]] = {}
    for classes in CLASSES:
        torch.manual_seed(0)
        net = problem.model()
        assert isinstance(net, nn.Sequential)
        net[-1] = nn.Linear(64, classes).requires_grad_(False)
        prepared = gradkern.prepare(net, x)
        assert prepared is not None
        calls[str(classes)] = lambda prepared=prepared: prepared(x)
    for name, took in in_turn(calls, options.rounds).items():
        us = took / len(x) * 1e6
        rows.append({"classes": int(name), "µs/sample": us, "µs/(sample, class)": us / int(name)})
    return rows


def by_threads(options: argparse.Namespace) -> Rows:
    problem, rows, before = PROBLEMS["cnn1d"], [], torch.get_num_threads()
    x = problem.fresh(64 if options.quick else 4096, torch.Generator().manual_seed(1))
    prepared = gradkern.prepare(problem.model(), x)
    assert prepared is not None
    threads = 1
    while threads <= machine.cores():
        torch.set_num_threads(threads)
        prepared(x)
        took = []
        for _ in range(options.rounds):
            begin = time.perf_counter()
            prepared(x)
            took.append(time.perf_counter() - begin)
        rows.append({"threads": threads, "samples/s": len(x) / statistics.median(took)})
        threads *= 2
    torch.set_num_threads(before)
    return rows


def statistics_alone(options: argparse.Namespace) -> Rows:
    """µs of a further sample: of 3 n samples less those of n, so that what a run costs at its start is left out."""
    rows: Rows = []
    for name in options.nets:
        problem = PROBLEMS[name]
        net, n = problem.model(), problem.quick if options.quick else options.samples
        x = problem.fresh(3 * n, torch.Generator().manual_seed(1))
        prepared = gradkern.prepare(net, x)
        assert prepared is not None

        def engine(x: Tensor, call: Prepared = prepared) -> None:
            for a in range(0, len(x), 1024):
                call(x[a : a + 1024])

        def run(x: Tensor, net: nn.Module = net) -> None:
            with tempfile.TemporaryDirectory() as folder:
                gradkern.run(net, x, f"{folder}/a.zarr", "jacobian", maps=False, reductions=["mean_abs"],
                             engine="kernel", progress=False)  # fmt: skip

        calls = {f"{way.__name__} {k}": partial(way, x[: k * n]) for k in (1, 3) for way in (engine, run)}
        took = in_turn(calls, options.rounds)
        us = {way: (took[f"{way} 3"] - took[f"{way} 1"]) / (2 * n) * 1e6 for way in ("engine", "run")}
        rows.append({"net": name, "N": n, "engine µs": us["engine"], "mean |J| µs": us["run"],
                     "share": us["engine"] / us["run"]})  # fmt: skip
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "samples": by_samples, "classes": by_classes, "threads": by_threads, "statistics": statistics_alone,
}  # fmt: skip


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"{', '.join(PARTS)} (default: all)")  # fmt: skip
    parser.add_argument("--nets", nargs="+", choices=PROBLEMS, default=["cnn1d", "lenet5", "mlp"], metavar="NET",
                        help="for statistics (default: cnn1d lenet5 mlp)")  # fmt: skip
    parser.add_argument("--threads", type=positive, default=1, help="threads (default: 1)")
    parser.add_argument("--rounds", type=positive, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--most", type=positive, default=1_000_000, help="the largest N (default: 1,000,000)")
    parser.add_argument("--samples", type=positive, default=8192, help="N for statistics (default: 8192)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json", help="the JSON file")
    chosen = parser.parse_args(words)
    if chosen.quick:
        chosen.rounds, chosen.most = 1, 64
    return chosen


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    torch.set_num_threads(options.threads)
    facts = machine.describe(options.threads)
    print(report.one_line(facts), flush=True)
    results: Rows = []
    for part in options.parts:
        rows = PARTS[part](options)
        results += [{"part": part, **row} for row in rows]
        cells = [tuple(f"{v:,.3g}" if isinstance(v, float) and v < 1e3 else f"{v:,.0f}" if isinstance(v, (int, float))
                       else v for v in row.values()) for row in rows]  # fmt: skip
        print("\n" + "\n".join(report.align([tuple(rows[0]), *cells])), flush=True)
        report.write_json(options.out, facts, {"rounds": options.rounds, "quick": options.quick}, results)
    print(f"\n{options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
