"""The benchmark: all-class input gradients by gradkern, and by every peer at its best batch size, in one run."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradkern
from benchmarks import accuracy, machine, measure, operations, report
from benchmarks.baselines import PEERS
from benchmarks.measure import Contender, Runner, Say
from benchmarks.problems import PROBLEMS, Problem, batch_sizes

RESULTS = Path(__file__).parent / "results"

EXAMPLES = """examples:
  python -m benchmarks                              all networks, about ten minutes on two cores
  python -m benchmarks --nets cnn1d lenet5          two of them
  python -m benchmarks --quick                      tiny sizes, to see that everything works
  python -m benchmarks --threads 1 --rounds 31      one thread, more rounds in the duel
  python -m benchmarks --peers loop_classes --check only against the class loop; exit status 1 below a floor

The floors are measured against the best of all peers with two threads; other settings print them all the same.
"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--nets", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NET",
                        help=f"networks to measure: {', '.join(PROBLEMS)} (default: all)")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=f"peers to measure against: {', '.join(PEERS)} (default: all)")  # fmt: skip
    parser.add_argument("--threads", type=positive, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--rounds", type=positive, default=15, help="interleaved rounds of the duel (default: 15)")
    parser.add_argument("--samples", type=positive, help="N for every network (default: 2048, and 128 for fcn)")
    parser.add_argument("--engine", choices=("kernel", "reference", "autograd", "auto"), default="kernel",
                        help="gradkern's engine (default: kernel)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny N, 3 rounds: shows that it works, measures nothing")
    parser.add_argument("--out", type=Path, help="the JSON file; the picture lies next to it "
                        "(default: benchmarks/results/<cpu>-<threads>t.json, or quick.json)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a ratio is below its floor")
    chosen = parser.parse_args(words)
    if chosen.quick:
        chosen.rounds = min(chosen.rounds, 3)
    return chosen


def positive(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected a number from 1 up")
    return value


def progress() -> Say:
    """One line on stderr that says what is going on; overwritten on a terminal, every stage's first on a file."""
    terminal = sys.stderr.isatty()
    start = time.monotonic()
    stage = ""

    def say(text: str) -> None:
        nonlocal stage
        clock = f"[{int(time.monotonic() - start) // 60}:{int(time.monotonic() - start) % 60:02}]"
        if terminal:
            print(f"\r\033[K{clock} {text}"[:118], end="", file=sys.stderr, flush=True)
        elif text.split(",")[0] != stage:
            print(f"{clock} {text.split(',')[0]}", file=sys.stderr, flush=True)
        stage = text.split(",")[0]

    return say


def ours(model: nn.Module, engine: str) -> Runner:
    """gradkern, the whole set in one call."""

    def runner(x: Tensor, out: Tensor | None = None) -> Tensor:
        return gradkern.jacobian(model, x, engine=engine, out=out)

    return runner


def path_taken(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What `gradkern.explain` says of this call: a figure that autograd gave must not pass for a kernel's."""
    with measure.quiet():
        plan = gradkern.explain(model, x, show=False)
    return {"fused_share": plan.fused_share, "native_share": plan.native_share, "explain": str(plan).splitlines()}


def start_up(engine: str) -> float:
    """Seconds of the first call of the process, on a network of one layer: what the tracer's own start costs."""
    with measure.quiet():
        return measure.timed(ours(nn.Linear(4, 3).eval(), engine), torch.randn(4, 4))[0]


def measure_net(problem: Problem, options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Everything about one network, ready for the JSON."""
    samples = options.samples or (problem.quick if options.quick else problem.samples)
    generator = torch.Generator().manual_seed(20)
    model = problem.model()
    say(f"{problem.name}: operations")
    pattern_samples = min(64, problem.checked, samples)
    with measure.quiet():
        needs = operations.count(problem.model().double(), problem.fresh(pattern_samples, generator, torch.float64))
    runner = ours(model, options.engine)
    say(f"{problem.name}: first call")
    with measure.quiet():
        first, _ = measure.timed(runner, problem.fresh(samples, generator))
    path = path_taken(model, problem.fresh(samples, generator)) if options.engine in ("kernel", "auto") else {}

    seconds = 0.01 if options.quick else 0.12
    screening = measure.screen(
        problem, model, samples, needs.outputs, generator, seconds, tuple(options.peers), say
    )  # fmt: skip
    finalists = measure.finalists(screening)
    for batch in batch_sizes(samples):
        say(f"{problem.name}: gradkern, {batch} samples")
        us = measure.screen_one(lambda x, out: runner(x), problem, batch, generator, seconds)
        screening.append(measure.Screened(report.OURS, batch, us))

    mine = Contender(report.OURS, report.OURS, samples, runner)
    rivals = [measure.contender(row, model, needs.outputs) for row in finalists]
    last = measure.duel([mine, *rivals], problem, samples, needs.outputs, options.rounds, generator, say)
    fresh = measure.fresh(runner, problem, samples, options.rounds, generator)
    say(f"{problem.name}: accuracy")
    result = assemble(problem, model, samples, needs, screening, mine, rivals, last)
    result[report.OURS] |= {"first_call_ms": first * 1e3, "fresh_result_us": fresh / samples * 1e6} | path
    return result


def assemble(
    problem: Problem, model: nn.Module, samples: int, needs: operations.Operations,
    screening: list[measure.Screened], mine: Contender, rivals: list[Contender],
    last: dict[str, tuple[Tensor, Tensor]],
) -> dict[str, Any]:  # fmt: skip
    """One network's entry of the JSON."""
    entries = [entry(c, problem, model, samples, needs, last) for c in rivals]
    for row, rival in zip(entries, rivals, strict=True):
        row["ratio"] = measure.paired_ratio(rival.seconds, mine.seconds)
    best = min(entries, key=lambda row: row["ratio"]["median"])  # the one that is hardest to beat, round by round
    peers_best = {k: {"batch": r.batch, "us": r.us} for k, r in measure.best_of(screening).items() if k in PEERS}
    return {
        "net": problem.name,
        "what": problem.what,
        "samples": samples,
        "outputs": needs.outputs,
        "mflop": {"needed": needs.needed / 1e6, "dense": needs.dense / 1e6, "forward": needs.forward / 1e6},
        report.OURS: entry(mine, problem, model, samples, needs, last),
        "best_peer": best,
        "ratio": best["ratio"],
        "floor": problem.floor,
        "floor_met": best["ratio"]["median"] >= problem.floor,
        "rivals": entries,
        "peers_best": peers_best,
        "screening": [asdict(row) for row in screening],
    }


def entry(
    c: Contender, problem: Problem, model: nn.Module, samples: int, needs: operations.Operations,
    last: dict[str, tuple[Tensor, Tensor]],
) -> dict[str, Any]:  # fmt: skip
    """One contender's figures from the duel, its last result held against float64."""
    x, result = last[f"{c.name}@{c.batch}"]
    rows = torch.linspace(0, samples - 1, min(problem.checked, samples)).long().unique()
    checked = asdict(accuracy.compare(model, x[rows], result[rows]))
    us = statistics.median(c.seconds) / samples * 1e6
    return {
        "name": c.name,
        "title": c.title,
        "batch": c.batch,
        "us": us,
        "samples_per_second": 1e6 / us,
        "gflops_needed": needs.needed / us / 1e3,
        "gflops_dense": needs.dense / us / 1e3,
        "seconds": c.seconds,
        "accuracy": checked | {"max_error": report.finite(checked["max_error"])},
    }


def destination(options: argparse.Namespace, facts: dict[str, Any]) -> Path:
    if options.out:
        return options.out
    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {facts['isa']}".lower()).strip("-")
    return RESULTS / ("quick.json" if options.quick else f"{slug}-{options.threads}t.json")


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    torch.set_num_threads(options.threads)
    facts = machine.describe(options.threads)
    print(report.one_line(facts), flush=True)
    say = progress()
    settings = {"rounds": options.rounds, "engine": options.engine, "quick": options.quick, "dtype": "float32",
                "start_up_ms": start_up(options.engine) * 1e3}  # fmt: skip
    results = []
    path = destination(options, facts)
    for name in options.nets:
        results.append(measure_net(PROBLEMS[name], options, say))
        report.write_json(path, facts, settings, results)  # after every network: a stopped run keeps what it has
    say("picture")
    report.picture(path.with_suffix(".png"), facts, results)
    print("", file=sys.stderr)
    print(f"\nEvery peer at its best batch size (screening):\n\n{report.peer_table(results)}\n")
    print(f"gradkern ({options.engine}) against the best peers, {options.rounds} interleaved rounds, paired medians; "
          f"GFLOP/s on the operations really needed:\n\n{report.table(results)}\n")  # fmt: skip
    print(f"{path}\n{path.with_suffix('.png')}")
    wrong = [r["net"] for r in results if r[report.OURS]["accuracy"]["wrong"]]
    if wrong:
        print(f"WRONG: gradkern disagrees with float64 away from every kink on {', '.join(wrong)}", file=sys.stderr)
        return 2
    return int(options.check and not all(r["floor_met"] for r in results))
