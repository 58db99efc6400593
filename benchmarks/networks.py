"""Real networks: fused share, ratio to the best peer, and error, one line each.

The networks are `tests.support.networks`, in full size.  Where a network has very many outputs, everybody gets the
gradients of the same random few of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradkern
from benchmarks import accuracy, machine, measure, report
from benchmarks.baselines import PEERS
from benchmarks.measure import Contender
from gradkern.ir.macs import total_macs
from tests.support import oracle
from tests.support.networks import NETWORKS, Network

UNCOMPILED = ("loop_classes", "grads_batched", "vmap_jacrev")
RESULTS = Path(__file__).parent / "results"


class Picked(nn.Module):
    """The chosen outputs of a network, flat."""

    def __init__(self, net: nn.Module, targets: Tensor) -> None:
        super().__init__()
        self.net, self.targets = net, targets

    def forward(self, x: Tensor) -> Tensor:  # [N, *in] -> [N, S]
        return self.net(x).flatten(1)[:, self.targets]


@dataclass(frozen=True)
class Problem:
    """One network as `benchmarks.measure` wants it."""

    network: Network
    samples: int

    @property
    def name(self) -> str:
        return self.network.name

    def fresh(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(n, *self.network.full.shapes[0], generator=generator, dtype=dtype)


def outputs_of(network: Network, model: nn.Module) -> int:
    with torch.no_grad():
        return model(torch.zeros(1, *network.full.shapes[0])).numel()


def chosen(network: Network, model: nn.Module, generator: torch.Generator) -> Tensor:
    """The flat outputs that are asked for: all of them, or a random few in order."""
    outputs = outputs_of(network, model)
    if network.seeds is None:
        return torch.arange(outputs)
    return torch.randperm(outputs, generator=generator)[: network.seeds].sort().values


def whole_macs(model: nn.Module, x: Tensor, seeds: int) -> int:
    """Multiply-adds per sample of a forward and every seed's backward through all positions, as autograd does it."""
    prepared = gradkern.prepare(model, x)
    assert prepared.program is not None
    program = prepared.program
    return sum(total_macs(program, i, seeds) for i in range(len(program.steps)))


def places(network: Network, model: nn.Module, targets: Tensor) -> Tensor | list[tuple[int, ...]]:
    """Flat outputs as the public interface takes them: tuples where an output has several axes."""
    with torch.no_grad():
        shape = tuple(model(torch.zeros(1, *network.full.shapes[0])).shape[1:])
    if len(shape) == 1:
        return targets
    return [tuple(int(i) for i in place) for place in torch.stack(torch.unravel_index(targets, shape), 1)]


def measure_network(problem: Problem, rounds: int, seconds: float, compiled: bool, say: measure.Say) -> dict[str, Any]:
    network = problem.network
    generator = torch.Generator().manual_seed(20)
    model = network.full.build().requires_grad_(False)
    targets = chosen(network, model, generator)
    picked = Picked(model, targets)
    asked = None if network.seeds is None else places(network, model, targets)

    def ours(x: Tensor, out: Tensor | None = None) -> Tensor:
        return gradkern.jacobian(model, x, targets=asked, engine="kernel", out=out)

    say(f"{network.name}: first call")
    with measure.quiet():
        first, _ = measure.timed(ours, problem.fresh(problem.samples, generator))
        plan = gradkern.explain(model, problem.fresh(1, generator), targets=asked, show=False)
    screening = measure.screen(problem, picked, problem.samples, len(targets), generator, seconds, UNCOMPILED, say)  # type: ignore[arg-type]
    if compiled:  # at the full batch alone: every batch size is compiled anew, which takes about a minute
        say(f"{network.name}: compiling")
        peer = PEERS["compiled"]
        screening.append(
            measure.screen_peer(peer, problem, picked, len(targets), problem.samples, generator, seconds)  # type: ignore[arg-type]
        )
    finalists = measure.finalists(screening)
    rivals = [measure.contender(row, picked, len(targets)) for row in finalists]
    mine = Contender(report.OURS, report.OURS, problem.samples, ours)
    last = measure.duel([mine, *rivals], problem, problem.samples, len(targets), rounds, generator, say)  # type: ignore[arg-type]
    say(f"{network.name}: accuracy")
    few = 2 if len(targets) > 16 else 8
    x, result = (t[:few] for t in last[f"{mine.name}@{mine.batch}"])
    best = min(rivals, key=lambda r: measure.paired_ratio(r.seconds, mine.seconds)["median"])
    return {
        "net": network.name,
        "samples": problem.samples,
        "seeds": len(targets),
        "outputs": outputs_of(network, model),
        "macs": sum(s.macs for s in plan.steps),
        "peer_macs": whole_macs(model, x, len(targets)),
        "fused_share": plan.fused_share,
        "native_share": plan.native_share,
        "ratio": measure.paired_ratio(best.seconds, mine.seconds),
        "floor": network.floor,
        "best_peer": best.title,
        "batch": best.batch,
        "us": statistics.median(mine.seconds) / problem.samples * 1e6,
        "peer_us": statistics.median(best.seconds) / problem.samples * 1e6,
        "first_call_ms": first * 1e3,
        **errors(model, picked, x, result, asked),
        "screening": [asdict(row) for row in screening],
    }


def errors(
    model: nn.Module, picked: nn.Module, x: Tensor, result: Tensor, asked: Tensor | list[tuple[int, ...]] | None
) -> dict[str, Any]:
    """The float32 ``result`` of the duel, and a float64 call on the same samples, against float64 autograd."""
    want = oracle.jacobian(picked, x)[1][0]
    checked = accuracy.compare(picked, x, result, want)
    exact = gradkern.jacobian(copy.deepcopy(model).double(), x.double(), targets=asked, engine="kernel")
    return {
        "error": asdict(checked) | {"max_error": report.finite(checked.max_error)},
        "float64_error": float(accuracy.errors(exact, want).max()),
    }


HEAD = (
    "network", "N", "seeds", "fused", "own", "µs/sample", "best peer", "µs", "ratio", "floor",
    "error f64", "error f32", "kinks", "first ms",
)  # fmt: skip


EXPLAINED = (
    "error: largest relative difference to float64 autograd, of a float64 call, and of a float32 call on samples clear "
    "of every\nkink (–: none is).  kinks: samples on another side of a ReLU or pool in float32 (either is right)."
)


def row(r: dict[str, Any]) -> tuple[str, ...]:
    return (
        r["net"], str(r["samples"]), str(r["seeds"]),
        f"{100 * r['fused_share']:.0f} %", f"{100 * r['native_share']:.0f} %",
        f"{r['us']:.0f}", f"{r['best_peer']}, {r['batch']}", f"{r['peer_us']:.0f}", f"{r['ratio']['median']:.2f}",
        f"{r['floor']:g}", f"{r['float64_error']:.0e}",
        "–" if r["error"]["share_near_kink"] == 1 else f"{r['error']['max_error']:.0e}",
        f"{100 * r['error']['share_disagreeing']:.0f} %", f"{r['first_call_ms']:.0f}",
    )  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = [HEAD, *map(row, results)]
    widths = [max(len(r[k]) for r in rows) for k in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def bound_memory(share: float = 0.75) -> None:
    """An allocation beyond this share of the machine's memory fails: a peer that wants more is a finding, while the
    kernel's killer would end the benchmark."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_DATA, (int(share * total), resource.RLIM_INFINITY))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NET",
                        help=f"networks to measure: {', '.join(NETWORKS)} (default: all)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of the duel (default: 15)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time per peer and batch size in the screening")
    parser.add_argument("--compiled", action="store_true", help="also a compiled vmap(jacrev), at the full N")
    parser.add_argument("--quick", action="store_true", help="2 samples, 1 round: shows that it works")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/networks.json)")
    options = parser.parse_args(words)
    options.out = options.out or RESULTS / ("quick-networks.json" if options.quick else "networks.json")
    torch.set_num_threads(options.threads)
    bound_memory()
    print(report.one_line(machine.describe(options.threads)), flush=True)

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}"[:118], end="", file=sys.stderr, flush=True)

    results = []
    for name in options.nets:
        network = NETWORKS[name]
        problem = Problem(network, 2 if options.quick else network.samples)
        rounds, seconds = (1, 0.01) if options.quick else (options.rounds, options.seconds)
        results.append(measure_network(problem, rounds, seconds, options.compiled, say))
        print(table(results[-1:]) if name == options.nets[0] else table(results).splitlines()[-1], flush=True)
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(
            json.dumps({"machine": machine.describe(options.threads), "networks": results}, indent=1)
        )
    print(f"\n{table(results)}\n\n{options.out}")
    print(EXPLAINED)
    wrong = [r["net"] for r in results if r["error"]["wrong"] or r["float64_error"] > 1e-10]
    if wrong:
        print(f"WRONG: gradkern disagrees with float64 on {', '.join(wrong)}", file=sys.stderr)
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
