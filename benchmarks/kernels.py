"""The kernels one by one: forward and multi-seed backward of a layer, or of a few, compared with torch's own backward.

For every step, shape and instruction set: time, needed operations and bytes, the share of the roof (the lower one of
the matrix product's rate and the memory's, both measured in the same run), and torch's loop over seeds and
`is_grads_batched` at their best batch size.  Operations on cotangents that are zero are not needed, and not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, operations, report
from benchmarks.run import RESULTS, positive
from gradkern import kernels
from gradkern.kernels import Chain, Layer
from gradkern.runtime import ops

EXAMPLES = """examples:
  python -m benchmarks.kernels                            every step, small and large, on the best instruction set
  python -m benchmarks.kernels --isa avx512 avx2          on two; torch is capped to the same set where it can be
  python -m benchmarks.kernels --steps conv2d chain --seeds 1 10 100 --samples 64
  python -m benchmarks.kernels --quick                    tiny, to see that everything works
"""
# What keeps torch, MKL and oneDNN from using more than a set that gradkern is capped to.
CAPS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "AVX", "ONEDNN_MAX_CPU_ISA": "AVX"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
TORCH_BATCHES = (8, 32, 128)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / shape[-1] ** 0.5


#: Layers and the shape of a sample, for a width: channels, or features of a linear layer in eights.
STEPS: dict[str, Callable[[int], tuple[list[Layer], tuple[int, ...]]]] = {
    "linear": lambda c: ([kernels.linear(_random(8 * c, 8 * c), _random(8 * c))], (8 * c,)),
    "conv1d": lambda c: ([kernels.conv1d(_random(c, c, 5), _random(c), padding=2)], (c, 128)),
    "conv2d": lambda c: ([kernels.conv2d(_random(c, c, 3, 3), _random(c), padding=1)], (c, 16, 16)),
    "relu": lambda c: ([kernels.relu()], (c, 16, 16)),
    "max_pool2d": lambda c: ([kernels.max_pool2d(2)], (c, 16, 16)),
    "avg_pool2d": lambda c: ([kernels.avg_pool2d(2)], (c, 16, 16)),
    "chain": lambda c: (
        [
            *(kernels.conv2d(_random(c, 3, 3, 3), _random(c), padding=1), kernels.relu(), kernels.max_pool2d(2)),
            *(kernels.conv2d(_random(c, c, 3, 3), _random(c), padding=1), kernels.relu(), kernels.max_pool2d(2)),
        ],
        (3, 16, 16),
    ),
}


@dataclass(frozen=True)
class Row:
    """One step on one instruction set; µs, operations and bytes of a sample with all its seeds."""

    step: str
    isa: str
    width: int
    seeds: int
    samples: int
    us: float
    operations: float
    bytes: int
    gflops: float
    share: float  # the share of the roof
    torch_us: float
    torch_way: str
    ratio: float


@dataclass(frozen=True)
class Peak:
    """GFLOP/s of torch's float32 matrix product, and GB/s of a copy in memory."""

    gflops: float
    gbytes: float

    def roof(self, operations: float, moved: float) -> float:
        """The shortest time of so many operations and bytes, in µs."""
        return max(operations / self.gflops, moved / self.gbytes) / 1e3


def best(call: Callable[[], Any], seconds: float) -> float:
    """The shortest of calls that fill so many seconds (at least three); in seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def peak(seconds: float) -> Peak:
    size, numbers = 1024, 1 << 24
    a, b, product = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    source, target = torch.ones(numbers), torch.ones(numbers)
    flops = 2 * size**3 / best(lambda: torch.mm(a, b, out=product), seconds)
    return Peak(flops / 1e9, 8 * numbers / best(lambda: target.copy_(source), seconds) / 1e9)


def by_loop(chain: Chain, x: Tensor, cotangents: Tensor) -> list[Tensor]:
    """One forward pass, one backward pass per seed."""
    x = x.detach().requires_grad_()
    y, seeds = chain.forward(x), cotangents.shape[1]
    return [torch.autograd.grad(y, x, cotangents[:, s], retain_graph=s + 1 < seeds)[0] for s in range(seeds)]


def by_batch(chain: Chain, x: Tensor, cotangents: Tensor) -> Sequence[Tensor]:
    """One forward pass, one backward pass through `vmap`."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(chain.forward(x), x, cotangents.transpose(0, 1), is_grads_batched=True)


def needed(chain: Chain, seeds: int, samples: int = 8) -> float:
    """Operations of a sample with ``seeds`` dense seeds, less those on cotangents that are zero."""
    if not chain.operations:
        return 0.0
    x = torch.randn(samples, *chain.input_shape, dtype=torch.float64)
    counted = operations.count(lambda v: chain.forward(v).flatten(1), x, onehot=False)
    return counted.forward + seeds * counted.backward_needed


def measure(step: str, width: int, seeds: int, samples: int, rounds: int, roof: Peak) -> Row:
    """gradkern and torch in turn, each on the same samples; medians of ``rounds``."""
    layers, shape = STEPS[step](width)
    chain = Chain(layers, shape)
    x, cotangents = torch.randn(samples, *shape), torch.randn(samples, seeds, *chain.output_shape)
    out = torch.empty(samples, seeds, *shape)

    def in_batches(way: Callable[..., Any], size: int) -> Callable[[], None]:
        def call() -> None:
            for a in range(0, samples, size):
                way(chain, x[a : a + size], cotangents[a : a + size])

        return call

    ways: dict[str, Callable[[], Any]] = {"gradkern": lambda: chain(x, cotangents, out=out)}
    for name, way in (("loop", by_loop), ("is_grads_batched", by_batch)):
        ways |= {f"{name} @ {size}": in_batches(way, size) for size in {min(b, samples): 0 for b in TORCH_BATCHES}}
    screened = {name: best(call, 0.0) for name, call in ways.items()}
    peer = min((name for name in ways if name != "gradkern"), key=screened.__getitem__)
    times: dict[str, list[float]] = {"gradkern": [], peer: []}
    for _ in range(rounds):
        for name, taken in times.items():
            taken.append(best(ways[name], 0.0))
    ratio = statistics.median(p / o for p, o in zip(times[peer], times["gradkern"], strict=True))
    us, torch_us = (statistics.median(t) / samples * 1e6 for t in (times["gradkern"], times[peer]))
    work, moved = needed(chain, seeds), chain.bytes_moved(seeds)
    isa = ops.machine().isa
    share = roof.roof(work, moved) / us
    return Row(step, isa, width, seeds, samples, us, work, moved, work / us / 1e3, share, torch_us, peer, ratio)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP",
                        help=f"{', '.join(STEPS)} (default: all)")  # fmt: skip
    parser.add_argument("--widths", nargs="+", type=positive, default=[16, 64], metavar="C",
                        help="channels; a linear layer has 8 C features (default: 16 64)")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=positive, default=[10], metavar="S", help="seeds (default: 10)")
    parser.add_argument("--samples", type=positive, default=128, help="samples of a call (default: 128)")
    parser.add_argument("--isa", nargs="+", default=[], metavar="ISA",
                        help="instruction sets, such as avx512 avx2 avx portable (default: the best one)")  # fmt: skip
    parser.add_argument("--threads", type=positive, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--rounds", type=positive, default=7, help="interleaved rounds (default: 7)")
    parser.add_argument("--quick", action="store_true", help="one width, few samples, one round")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json",
                        help="the JSON file; the picture lies beside it (default: benchmarks/results/kernels.json)"
                        )  # fmt: skip
    chosen = parser.parse_args(words)
    if chosen.quick:
        chosen.widths, chosen.samples, chosen.rounds = chosen.widths[:1], min(chosen.samples, 8), 1
    return chosen


def on_each(isas: Sequence[str], words: Sequence[str]) -> list[dict[str, Any]]:
    """The results of this command in a process per instruction set, which is chosen once per process."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for isa in isas:
            path = Path(folder, f"{isa}.json")
            command = [sys.executable, "-m", "benchmarks.kernels", *words, "--out", str(path)]
            environment = os.environ | CAPS.get(isa, {}) | {"GRADKERN_ISA": isa}
            if subprocess.run(command, env=environment).returncode:
                raise SystemExit(f"python -m benchmarks.kernels: no figures for {isa}; its message is above")
            runs.append(json.loads(path.read_text()))
    return runs


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("step", "isa", "width", "seeds", "µs/sample", "kflop needed", "kB", "GFLOP/s", "of the roof",
              "torch µs", "its best way", "ratio")]  # fmt: skip
    for r in rows:
        lines.append((
            r["step"], r["isa"], str(r["width"]), str(r["seeds"]), f"{r['us']:.2f}", f"{r['operations'] / 1e3:.1f}",
            f"{r['bytes'] / 1e3:.1f}", f"{r['gflops']:.1f}", f"{r['share']:.0%}", f"{r['torch_us']:.2f}",
            r["torch_way"], f"{r['ratio']:.2f}",
        ))  # fmt: skip
    return "\n".join(report.align(lines))


def picture(path: Path, facts: dict[str, Any], peaks: dict[str, dict[str, float]], rows: list[dict[str, Any]]) -> None:
    """The roofline: GFLOP/s over operations per byte, a line and points per instruction set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5.2), dpi=120)
    counted = [r for r in rows if r["operations"]]
    at = [r["operations"] / r["bytes"] for r in counted] or [1.0]
    span = torch.logspace(-1, torch.tensor(max(at) * 4).log10().item(), 100).tolist()
    for i, (isa, p) in enumerate(peaks.items()):
        axis.plot(span, [min(p["gflops"], x * p["gbytes"]) for x in span], color=f"C{i}", label=f"{isa}: roof")
        for r in (r for r in counted if r["isa"] == isa):
            x = r["operations"] / r["bytes"]
            axis.plot(x, r["gflops"], "o", color=f"C{i}")
            axis.annotate(f" {r['step']} {r['width']}×{r['seeds']}", (x, r["gflops"]), fontsize=7)
            axis.plot(x, r["operations"] / r["torch_us"] / 1e3, "x", color=f"C{i}", alpha=0.6)
    axis.set(xscale="log", yscale="log", xlabel="needed operations per byte", ylabel="GFLOP/s")
    axis.set_title(f"Kernels (dots) and torch (crosses): {machine.one_line(facts)}", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    options = arguments(words)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    facts = machine.describe(options.threads)
    if options.isa:
        others = [w for w in words if w not in ("--isa", *options.isa)]
        runs = on_each(options.isa, others)
        rows = [r for run in runs for r in run["results"]]
        peaks = {isa: run["settings"]["peaks"][isa] for isa, run in zip(options.isa, runs, strict=True)}
    else:
        print(report.one_line(facts), flush=True)
        roof, rows = peak(0.0 if options.quick else 0.5), []
        for step in options.steps:
            for width in options.widths:
                for seeds in options.seeds:
                    row = measure(step, width, seeds, options.samples, options.rounds, roof)
                    rows.append(asdict(row))
        peaks = {ops.machine().isa: asdict(roof)}
        print(table(rows), flush=True)
        for isa, p in peaks.items():
            print(f"{isa}: a matrix product {p['gflops']:.0f} GFLOP/s, a copy {p['gbytes']:.0f} GB/s")
    settings = {"rounds": options.rounds, "samples": options.samples, "quick": options.quick, "peaks": peaks}
    report.write_json(options.out, facts, settings, rows)
    picture(options.out.with_suffix(".png"), facts, peaks, rows)
    print(f"{options.out}\n{options.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
