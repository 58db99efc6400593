"""How close the kernels come to the machine: the share of torch's own matrix product, each network with its goal.

The share is the rate on the operations that are really needed (`benchmarks.operations`) over the rate of a product of
two float32 matrices of 1024×1024, which takes turns with gradkern and the best peers in the same rounds.  Every
instruction set runs in a process of its own, where `GRADKERN_ISA` caps gradkern and the libraries' own variables
cap torch, so matrix product and peers use the same set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradkern
from benchmarks import machine, measure, networks, operations, report
from benchmarks.measure import Contender
from benchmarks.problems import PROBLEMS
from benchmarks.run import RESULTS, positive, progress
from gradkern.runtime import ops
from tests.support.networks import NETWORKS

SIZE = 1024  # rows and columns of the matrices
SAMPLES = 512  # the most samples of a call; with more, only the peers take longer
PEERS = ("loop_classes", "grads_batched", "vmap_jacrev")
CAPS = {  # environment variables that cap torch's own kernels, oneDNN and MKL
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


@dataclass(frozen=True)
class Goal:
    """Of one network: shares of the matrix product by instruction set, and a ratio to the best peer."""

    avx2: float | None = None
    avx512: float | None = None
    ratio: float | None = None

    def share(self, isa: str) -> float | None:
        return {"avx2": self.avx2, "avx512": self.avx512}.get(isa)


GOALS = {
    "cnn1d": Goal(0.55, 0.80),
    "lenet5": Goal(0.45, 0.65),
    "cnn1d_strided": Goal(0.55, 0.80),
    "mlp": Goal(0.75),
    "fcn": Goal(0.75),
    "inceptiontime": Goal(0.75, 0.75),
    "resnet1d": Goal(0.75, 0.75),
    "vgg11": Goal(ratio=2.2),
    "resnet18": Goal(ratio=2.2),
}


@dataclass(frozen=True)
class Subject:
    """A network as `benchmarks.measure` wants it, and the outputs that are asked for (None: all)."""

    name: str
    model: nn.Module
    targets: list[int] | None
    shape: tuple[int, ...]
    samples: int

    def fresh(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(n, *self.shape, generator=generator, dtype=dtype)


def subject(name: str, generator: torch.Generator) -> tuple[Subject, nn.Module]:
    """A network, and the model of the outputs that are asked for, as peers get it."""
    if name in PROBLEMS:
        problem = PROBLEMS[name]
        model = problem.model()
        return Subject(name, model, None, problem.shape, problem.samples), model
    network = NETWORKS[name]
    model = network.full.build().requires_grad_(False)
    targets = networks.chosen(network, model, generator)
    asked = None if network.seeds is None else targets.tolist()
    return Subject(name, model, asked, network.full.shapes[0], network.samples), networks.Picked(model, targets)


def measure_net(name: str, isa: str, options: argparse.Namespace, say: measure.Say) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(20)
    what, picked = subject(name, generator)
    samples = min(8 if options.quick else SAMPLES, what.samples)
    say(f"{name}: operations")
    with measure.quiet():
        needs = operations.count(picked.double(), what.fresh(min(8, samples), generator, torch.float64))
        picked.float()
    seconds = 0.01 if options.quick else 0.05
    screening = measure.screen(what, picked, samples, needs.outputs, generator, seconds, PEERS, say)  # type: ignore[arg-type]
    rivals = [measure.contender(row, picked, needs.outputs) for row in measure.finalists(screening)]

    def ours(x: Tensor, out: Tensor | None = None) -> Tensor:
        return gradkern.jacobian(what.model, x, targets=what.targets, engine="kernel", out=out)

    mine = Contender(report.OURS, report.OURS, samples, ours)
    left, right, product = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE), torch.empty(SIZE, SIZE)
    gemm = Contender("gemm", "matrix product", 1, lambda x, out=None: torch.mm(left, right, out=product))
    measure.duel([mine, gemm, *rivals], what, samples, needs.outputs, options.rounds, generator, say)  # type: ignore[arg-type]
    goal = GOALS[name]
    us = statistics.median(mine.seconds) / samples * 1e6
    gflops = statistics.median(2e-9 * SIZE**3 / s for s in gemm.seconds)
    share = measure.paired_ratio(gemm.seconds, mine.seconds)["median"] * needs.needed * samples / (2 * SIZE**3)
    best = min(rivals, key=lambda r: measure.paired_ratio(r.seconds, mine.seconds)["median"])
    ratio = measure.paired_ratio(best.seconds, mine.seconds)
    met = [have >= want for have, want in ((share, goal.share(isa)), (ratio["median"], goal.ratio)) if want is not None]
    return {
        "net": name, "isa": isa, "samples": samples, "outputs": needs.outputs, "us": us,
        "mflop_needed": needs.needed / 1e6, "gemm_gflops": gflops, "share": share, "goal": goal.share(isa),
        "ratio": ratio, "ratio_goal": goal.ratio, "best_peer": best.title, "batch": best.batch,
        "met": all(met) if met else None,
    }  # fmt: skip


HEAD = ("network", "µs/sample", "MFLOP needed", "GEMM GFLOP/s", "share", "goal", "ratio", "goal", "best peer", "")


def row(r: dict[str, Any]) -> tuple[str, ...]:
    return (
        r["net"], f"{r['us']:.3g}", f"{r['mflop_needed']:.3g}", f"{r['gemm_gflops']:.0f}", f"{100 * r['share']:.0f} %",
        "–" if r["goal"] is None else f"{100 * r['goal']:.0f} %", f"{r['ratio']['median']:.2f}",
        "–" if r["ratio_goal"] is None else f"{r['ratio_goal']:g}", f"{r['best_peer']}, {r['batch']}",
        {None: "", True: "met", False: "MISSED"}[r["met"]],
    )  # fmt: skip


def child(isa: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The networks on one instruction set, in a process that is capped to it."""
    words = ["--child", "--nets", *options.nets, "--threads", options.threads, "--rounds", options.rounds]
    command = [sys.executable, "-m", "benchmarks.ceilings", *map(str, words), *(["--quick"] if options.quick else [])]
    env = os.environ | {"GRADKERN_ISA": isa} | CAPS.get(isa, {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"the process for {isa} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ceilings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    extension = ops.extension()
    if extension is None:
        parser.error("the compiled extension is missing, and there is nothing to measure without it: make build")
    best = extension.isa()
    parser.add_argument("--nets", nargs="+", choices=GOALS, default=list(GOALS), metavar="NET",
                        help=f"networks to measure: {', '.join(GOALS)} (default: all)")  # fmt: skip
    parser.add_argument("--isas", nargs="+", default=[i for i in ("avx2", best) if i in extension.isas()],
                        help="instruction sets (default: avx2, if there is one, and the machine's best)")  # fmt: skip
    parser.add_argument("--threads", type=positive, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--rounds", type=positive, default=15, help="interleaved rounds (default: 15)")
    parser.add_argument("--quick", action="store_true", help="few samples, 1 round: shows that it works")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/ceilings-<threads>t.json)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    options.rounds = 1 if options.quick else options.rounds
    if options.child:
        print(json.dumps([measure_net(name, best, options, progress()) for name in options.nets]))
        return 0
    facts = machine.describe(options.threads)
    print(report.one_line(facts), flush=True)
    results: list[dict[str, Any]] = []
    path = options.out or RESULTS / ("quick-ceilings.json" if options.quick else f"ceilings-{options.threads}t.json")
    for isa in dict.fromkeys(options.isas):
        results += (rows := child(isa, options))
        print("\n" + "\n".join([isa, *report.align([HEAD, *map(row, rows)])]), flush=True)
        report.write_json(path, facts, {"rounds": options.rounds, "quick": options.quick}, results)
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
