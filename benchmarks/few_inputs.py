"""Few inputs and many outputs: forward mode against `vmap(jacfwd)`, plain and through `torch.compile`.

The networks are a decoder, from 8 numbers to 28 × 28 pixels, and an emulator, from 6 parameters to 1000 numbers.
``handle`` is the callable that `gradkern.prepare` returns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import jacfwd, vmap

import gradkern
from benchmarks import machine, measure, report
from benchmarks.measure import Contender, Runner, Say
from benchmarks.run import RESULTS, ours, positive, progress
from tests.support import oracle
from tests.support.modules import decoder, emulator


@dataclass(frozen=True)
class Problem:
    """A network, its number of inputs, and how many times faster than the plain and the compiled peer it should be."""

    name: str
    make: Callable[[], nn.Module]
    features: int
    goals: tuple[float, float | None]

    def model(self) -> nn.Module:
        """The network in eval mode, its output flat."""
        torch.manual_seed(20)
        return nn.Sequential(self.make(), nn.Flatten()).eval().requires_grad_(False)

    def fresh(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(n, self.features, generator=generator, dtype=dtype)


PROBLEMS = (
    Problem("decoder", lambda: decoder(8, hidden=256, channels=64, side=7), 8, (5.0, 2.0)),
    Problem("emulator", lambda: emulator(6, hidden=128, outputs=1000), 6, (3.0, None)),
)


@dataclass(frozen=True)
class Row:
    """One network's figures: milliseconds of a call, ratios to it, and the planner's multiply-adds of a sample."""

    net: str
    samples: int
    forward_macs: int
    reverse_macs: int
    call: float
    handle: float
    plain: float
    compiled: float
    plain_ratio: float
    compiled_ratio: float
    goals: tuple[float, float | None]
    error: float  # the relative error of a float64 call


def delivered(jacobian: Callable[[Tensor], Tensor]) -> Runner:
    """Everybody's result is in the same piece of memory."""
    return lambda x, out=None: jacobian(x) if out is None else out.copy_(jacobian(x))


def measured(problem: Problem, samples: int, rounds: int, say: Say) -> Row:
    generator = torch.Generator().manual_seed(20)
    model = problem.model()
    x = problem.fresh(samples, generator)
    say(f"{problem.name}: first calls")
    with measure.quiet():
        plan = gradkern.explain(model, x, engine="kernel", show=False)
        handle = gradkern.prepare(model, x)
    assert isinstance(plan, gradkern.Plan) and plan.direction is not None and handle is not None
    forward = vmap(jacfwd(lambda x: model(x[None])[0]))
    runners = {
        "call": ours(model, "kernel"),
        "handle": delivered(handle),
        "plain": delivered(forward),
        "compiled": delivered(torch.compile(forward, dynamic=False)),
    }
    contenders = [Contender(name, name, samples, runner) for name, runner in runners.items()]
    outputs = plan.program.outputs
    measure.duel(contenders, problem, samples, outputs, rounds, generator, say)  # type: ignore[arg-type]
    seconds = {c.name: c.seconds for c in contenders}
    ratios = (measure.paired_ratio(seconds[peer], seconds["call"])["median"] for peer in ("plain", "compiled"))
    wide, exact = model.double(), x[:2].double()
    error = oracle.relative_error(gradkern.jacobian(wide, exact, engine="kernel"), forward(exact))
    counts = plan.direction.whole
    assert counts.forward_macs is not None
    times = (1e3 * statistics.median(seconds[name]) for name in runners)
    return Row(problem.name, samples, counts.forward_macs, counts.reverse_macs, *times, *ratios, problem.goals, error)


def table(rows: Sequence[Row]) -> str:
    head = (
        "net",
        "N",
        "MMAC forward",
        "reverse",
        "call",
        "handle",
        "vmap(jacfwd)",
        "ratio",
        "goal",
        "compiled",
        "ratio",
    )
    cells: list[tuple[str, ...]] = [(*head, "goal", "error f64")]
    for r in rows:
        plain, compiled = ("–" if goal is None else f"{goal:g}" for goal in r.goals)
        counts = f"{r.forward_macs / 1e6:.3g}", f"{r.reverse_macs / 1e6:.3g}"
        times = [f"{ms:.2f} ms" for ms in (r.call, r.handle, r.plain, r.compiled)]
        peers = times[2], f"{r.plain_ratio:.1f}", plain, times[3], f"{r.compiled_ratio:.1f}", compiled
        cells.append((r.net, str(r.samples), *counts, *times[:2], *peers, f"{r.error:.0e}"))
    return "\n".join(report.align(cells))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_inputs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=positive, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--samples", type=positive, default=32, help="samples of a call (default: 32)")
    parser.add_argument("--rounds", type=positive, default=51, help="interleaved rounds (default: 51)")
    parser.add_argument("--quick", action="store_true", help="2 samples, 2 rounds: shows that it works")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/few_inputs.json)")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    facts = machine.describe(options.threads)
    print(report.one_line(facts), flush=True)
    samples, rounds = (2, 2) if options.quick else (options.samples, options.rounds)
    rows = [measured(problem, samples, rounds, progress()) for problem in PROBLEMS]
    print("", file=sys.stderr)
    print(f"\n{table(rows)}\n")
    path = options.out or RESULTS / ("quick-few_inputs.json" if options.quick else "few_inputs.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "few_inputs": [asdict(row) for row in rows]}, indent=1) + "\n")
    print(path)
    return 2 if any(row.error > 1e-10 for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
