"""The two questions that gradkern was begun for, each with its goal and the best peer.

How long do the gradients of all three classes take for 194,109 series of 224 numbers?  (`benchmarks.full_set`: one
call of each contender in a process of its own.)  And how long does the 784×10 Jacobian of LeNet-5 take for one image,
once the network is known?
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import accuracy, full_set, machine, measure, report
from benchmarks.baselines import PEERS
from benchmarks.measure import Contender, Say
from benchmarks.problems import PROBLEMS
from benchmarks.run import RESULTS, ours, positive, progress

QUICK_PEERS = ("loop_classes", "grads_batched")


@dataclass(frozen=True)
class Answer:
    """One question's figures, in seconds."""

    question: str
    seconds: float
    goal: float
    peer: str
    peer_seconds: float
    wrong: int  # samples that disagree with float64 away from every kink

    @property
    def met(self) -> bool:
        return self.seconds <= self.goal


def whole_set(options: argparse.Namespace, say: Say) -> Answer:
    """All samples in one call; its goal is seconds, where the loop over samples and classes takes many minutes."""
    words = ["--samples", options.samples, "--threads", options.threads, "--calls", 1 if options.quick else 3]
    chosen = full_set.arguments([str(word) for word in words])
    say("whole set: gradkern")
    mine = full_set.spawn(chosen, report.OURS, chosen.samples)
    usual = measure.Screened("loop_classes", min(256, chosen.samples), None)
    best = usual if options.quick else full_set.best_peer(chosen, say)
    say(f"whole set: {PEERS[best.peer].title} in batches of {best.batch}")
    peer = full_set.spawn(chosen, best.peer, best.batch)
    question = f"{full_set.NET}, 3 classes × 224 features of {chosen.samples:,} samples"
    title = f"{PEERS[best.peer].title} at {best.batch}"
    return Answer(question, mine["seconds"], 10.0, title, peer["seconds"], mine["wrong"])


def one_image(options: argparse.Namespace, say: Say) -> Answer:
    """A warm call on one image that has not been seen before; its goal is a millisecond."""
    torch.set_num_threads(options.threads)
    problem, outputs = PROBLEMS["lenet5"], 10
    model, generator = problem.model(), torch.Generator().manual_seed(20)
    peers = QUICK_PEERS if options.quick else tuple(PEERS)
    screening = measure.screen(problem, model, 1, outputs, generator, 0.01 if options.quick else 0.3, peers, say)
    rivals = [measure.contender(row, model, outputs) for row in measure.finalists(screening)]
    mine = Contender(report.OURS, report.OURS, 1, ours(model, "kernel"))
    rounds = 3 if options.quick else options.rounds
    last = measure.duel([mine, *rivals], problem, 1, outputs, rounds, generator, say)
    checked = accuracy.compare(model, *last[f"{mine.name}@{mine.batch}"])
    best = min(rivals, key=lambda rival: statistics.median(rival.seconds))
    times = (statistics.median(contender.seconds) for contender in (mine, best))
    return Answer("lenet5, the 784×10 Jacobian of one image", next(times), 1e-3, best.title, next(times), checked.wrong)


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def table(answers: Sequence[Answer]) -> str:
    rows: list[tuple[str, ...]] = [("question", "gradkern", "goal", "", "best peer", "its time", "ratio")]
    for a in answers:
        verdict = "met" if a.met else "MISSED"
        times = duration(a.seconds), duration(a.goal), verdict, a.peer, duration(a.peer_seconds)
        rows.append((a.question, *times, f"{a.peer_seconds / a.seconds:.1f}"))
    return "\n".join(report.align(rows))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.questions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=positive, help=f"of the whole set (default: {full_set.SAMPLES}; quick: 2000)")
    parser.add_argument("--threads", type=positive, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--rounds", type=positive, default=101, help="interleaved calls on one image (default: 101)")
    parser.add_argument("--quick", action="store_true", help="a small set, 3 rounds: shows that it works")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/questions.json)")
    options = parser.parse_args(words)
    options.samples = options.samples or (2000 if options.quick else full_set.SAMPLES)
    facts = machine.describe(options.threads)
    print(report.one_line(facts), flush=True)
    say = progress()
    answers = [whole_set(options, say), one_image(options, say)]
    print("", file=sys.stderr)
    print(f"\n{table(answers)}\n")
    path = options.out or RESULTS / ("quick-questions.json" if options.quick else "questions.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "answers": [asdict(a) | {"met": a.met} for a in answers]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(path)
    return 2 if any(a.wrong for a in answers) else 0


if __name__ == "__main__":
    raise SystemExit(main())
