"""All-class input gradients on a GPU: gradkern against what torch, Captum and JAX offer, in one run.

    python -m benchmarks.gpu [--seconds 300] [--out results] [--nets cnn1d mlp] [--precisions highest high]

Every contender handles the full set, in chunks of the size that suits it best.  Times are CUDA events around whole
calls, medians after warm-up, over several input sets that together are larger than L2.  TF32 is pinned for both
sides.  Needed operations are those of `benchmarks.operations`; ceilings are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

import gradkern
from benchmarks import gpu_jax, machine, operations
from benchmarks.baselines import captum_saliency, deliver, loop_classes, replicated
from benchmarks.measure import quiet
from gradkern import device, ops
from tests import oracle
from tests.cases import CASES, Case

SAMPLES = {"cnn1d": 194109, "cnn1d_strided": 194109, "lenet5": 60000, "mlp": 194109, "fcn": 8192, "vgg11": 1024}
CHUNKS = (2048, 16384, 131072, 1 << 30)
CHECKED = 256
LIMIT = 24 << 30  # bytes of results and copies that a peer's chunk may take
Chunk = Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class Row:
    """One contender on one network at one precision."""

    net: str
    precision: str
    name: str
    chunk: int
    ms: float | None
    note: str = ""
    error: float | None = None  # worst relative error of outputs' gradients, samples with a flipped pattern left out
    flipped: float | None = None  # share of those samples


def pin(precision: str) -> None:
    """TF32 for everybody or for nobody."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.allow_tf32 = precision != "highest"
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def compiled(model: nn.Module, outputs: int) -> Chunk:
    """`vmap(jacrev)` through `torch.compile` with CUDA graphs."""
    torch._dynamo.reset()
    jacobian = torch.compile(vmap(jacrev(lambda x: model(x[None])[0])), mode="reduce-overhead", dynamic=False)

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return deliver(jacobian(x), out)

    return chunk


def compiled_folded(model: nn.Module, outputs: int) -> Chunk:
    """Forward and one backward of the classes folded into the batch, captured as one CUDA graph per chunk size."""
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
    plain = replicated(model, outputs)

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        n = x.shape[0]
        if n not in graphs:
            static = x.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    plain(static, None)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = plain(static, None)
            graphs[n] = graph, static, found
        graph, static, found = graphs[n]
        static.copy_(x)
        graph.replay()
        return deliver(found, out)

    return chunk


def vmapped(model: nn.Module, outputs: int) -> Chunk:
    """`vmap(jacrev)`."""
    jacobian = vmap(jacrev(lambda x: model(x[None])[0]))
    return lambda x, out: deliver(jacobian(x), out)


def vgg11() -> nn.Module:
    """VGG-11 for images of 32 × 32: layers that no chain holds."""
    layers: list[nn.Module] = []
    width = 3
    for out, pools in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * pools]
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


NETS = {name: CASES[name] for name in SAMPLES if name in CASES} | {"vgg11": Case("vgg11", vgg11, ((3, 32, 32),))}
LAYERED = ("fcn", "vgg11")  # networks with layers of their own, which the step kernel or ATen runs


def ours(model: nn.Module, outputs: int) -> Chunk:
    """The public call."""

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        found = gradkern.jacobian(model, x, engine="kernel", out=out)
        return found if out is None else out

    return chunk


@contextmanager
def arithmetic(precision: str, math: int) -> Iterator[None]:
    """Another arithmetic for a precision, as long as this lasts."""
    with mock.patch.dict(device.MATH, {precision: math}):
        ops._machine.cache_clear()
        try:
            yield
        finally:
            ops._machine.cache_clear()


def steps(who: str) -> Callable[[nn.Module, int], Chunk]:
    """The public call with the step kernel, or ATen, for every layer that fits no chain."""

    def make(model: nn.Module, outputs: int) -> Chunk:
        def chunk(x: Tensor, out: Tensor | None) -> Tensor:
            with mock.patch.dict(os.environ, {device.STEPS_VARIABLE: who}):
                return ours(model, outputs)(x, out)

        return chunk

    return make


def multiplied(precision: str, math: int) -> Callable[[nn.Module, int], Chunk]:
    """The public call with another arithmetic than the precision has by default."""

    def make(model: nn.Module, outputs: int) -> Chunk:
        def chunk(x: Tensor, out: Tensor | None) -> Tensor:
            with arithmetic(precision, math):
                return ours(model, outputs)(x, out)

        return chunk

    return make


# What decides open questions: by name, the networks and precisions that each is asked for.
QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gradkern, step kernel": (LAYERED, ("highest", "high", "medium")),
    "gradkern, ATen layers": (LAYERED, ("highest", "high", "medium")),
    "gradkern, 3 × TF32": (tuple(NETS), ("highest",)),
    "gradkern, 1 × TF32": (tuple(NETS), ("high",)),
}
CONTENDERS: dict[str, Callable[[nn.Module, int], Chunk]] = {
    "gradkern": ours,
    "gradkern, step kernel": steps("kernel"),
    "gradkern, ATen layers": steps("aten"),
    "gradkern, 3 × TF32": multiplied("highest", device.TF32X3),
    "gradkern, 1 × TF32": multiplied("high", device.TF32),
    "class loop": loop_classes,
    "seeds folded": replicated,
    "folded, CUDA graph": compiled_folded,
    "vmap(jacrev)": vmapped,
    "compiled, CUDA graph": compiled,
    "Captum per class": captum_saliency,
    "JAX": gpu_jax.chunk,
}


def whole(chunk: Chunk, x: Tensor, size: int, outputs: int) -> Tensor:
    """The whole set in chunks; a ragged last one overlaps its neighbour, so that every chunk has one size."""
    n = x.shape[0]
    if size >= n:
        return chunk(x, None)
    out = x.new_empty(n, outputs, *x.shape[1:])
    for start in range(0, n, size):
        start = min(start, n - size)
        chunk(x[start : start + size], out[start : start + size])
    return out


def timed(run: Callable[[Tensor], Tensor], sets: list[Tensor], seconds: float) -> float:
    """Median milliseconds of a call."""
    begun = time.perf_counter()
    for i in range(2):
        run(sets[i % len(sets)])
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (len(times) < 30 and time.perf_counter() - begun < seconds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = run(sets[len(times) % len(sets)])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        del result
        if len(times) >= 3 and time.perf_counter() - begun > seconds:
            break
    return statistics.median(times)


def accuracy(model: nn.Module, x: Tensor, found: Tensor) -> tuple[float, float]:
    """Worst relative error among samples whose pattern agrees with float64, and the share of the others."""
    _, (want,) = oracle.jacobian(model, x)
    gap = (found.double().reshape(want.shape) - want).flatten(1).abs().amax(1)
    gap /= want.flatten(1).abs().amax(1).clamp_min(1e-30)
    flipped = gap > 1e-2 if torch.get_float32_matmul_precision() != "highest" else gap > 1e-4
    kept = gap[~flipped]
    return float(kept.max()) if len(kept) else float("nan"), float(flipped.double().mean())


def contend(
    net: str,
    precision: str,
    name: str,
    model: nn.Module,
    sets: list[Tensor],
    outputs: int,
    seconds: float,
    until: float,
) -> Row:
    """A contender at its best chunk size."""
    n, best = sets[0].shape[0], Row(net, precision, name, 0, None)
    per_sample = sets[0][0].numel() * outputs * 4
    own = name.startswith("gradkern")
    for size in [n] if own else sorted({min(c, n) for c in CHUNKS}):
        if time.perf_counter() > until:
            best.note += " (out of time)"
            break
        if not own and size * per_sample * 8 > LIMIT:
            break
        try:
            with quiet():
                chunk = CONTENDERS[name](model, outputs)
                ms = timed(lambda x, c=chunk, s=size: whole(c, x, s, outputs), sets, seconds)
                few = sets[0][: max(CHECKED, size if name.startswith(("compiled", "folded")) else CHECKED)][:size]
                found = chunk(few, None)[:CHECKED].clone()
        except Exception as error:
            best.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:140] if str(error) else ''}"
            torch.cuda.empty_cache()
            continue
        if best.ms is None or ms < best.ms:
            best.error, best.flipped = accuracy(model, few[:CHECKED], found)
            best.ms, best.chunk = ms, size
        elif ms > 2 * best.ms:
            break
    return best


def ceilings() -> dict[str, float]:
    """What this GPU does: GB/s of a large copy (read and written), TFLOP/s of an fp32 matrix product without TF32."""
    pin("highest")
    a, b = torch.randn(8192, 8192, device="cuda"), torch.randn(8192, 8192, device="cuda")
    big, other = (
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
    )
    product = timed(lambda _: a @ b, [a], 2.0)
    copy = timed(lambda _: other.copy_(big), [a], 1.0)
    return {"copy_gb_s": 2 * big.nbytes / copy / 1e6, "fp32_tflop_s": 2 * 8192**3 / product / 1e9}


def report(rows: list[Row], found: dict[str, Any], counts: dict[str, operations.Operations]) -> list[str]:
    lines = [f"copy {found['copy_gb_s']:.0f} GB/s, fp32 product {found['fp32_tflop_s']:.1f} TFLOP/s"]
    head = f"{'net':14}{'precision':10}{'contender':22}{'chunk':>8}{'ms':>10}{'TFLOP/s':>9}{'GB/s':>7}{'roof':>6}"
    lines.append(head + f"{'best peer/it':>13}{'error':>10}{'flipped':>9}")
    for row in rows:
        if row.ms is None:
            lines.append(f"{row.net:14}{row.precision:10}{row.name:22}{'':8}{'-':>10}  {row.note}")
            continue
        n, count = SAMPLES[row.net], counts[row.net]
        size = torch.Size(NETS[row.net].shapes[0]).numel() * 4
        moved, work = n * size * (1 + count.outputs), n * count.needed
        floor = max(moved / found["copy_gb_s"] / 1e6, work / found["fp32_tflop_s"] / 1e9)
        peers = [
            r.ms
            for r in rows
            if (r.net, r.precision) == (row.net, row.precision) and not r.name.startswith("gradkern") and r.ms
        ]
        ratio = min(peers) / row.ms if peers else float("nan")
        lines.append(
            f"{row.net:14}{row.precision:10}{row.name:22}{row.chunk:8}{row.ms:10.2f}{work / row.ms / 1e9:9.1f}"
            f"{moved / row.ms / 1e6:7.0f}{floor / row.ms:6.0%}{ratio:13.2f}{row.error:10.1e}{row.flipped:9.2%}"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="wall-clock budget of the whole run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--nets", nargs="+", choices=list(SAMPLES), default=list(SAMPLES))
    parser.add_argument("--precisions", nargs="+", choices=("highest", "high", "medium"), default=["highest", "high"])
    parser.add_argument("--share", type=float, default=1.0, help="share of the full sets, for a quick look")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no GPU is visible to torch.")
    begun, rows, counts = time.perf_counter(), [], {}
    found = ceilings()
    args.out.mkdir(parents=True, exist_ok=True)
    work = [(net, precision) for precision in args.precisions for net in args.nets]
    names = list(CONTENDERS)
    for done, (net, precision) in enumerate(work):
        pin(precision)
        SAMPLES[net] = max(CHECKED, int(SAMPLES[net] * args.share)) if precision == args.precisions[0] else SAMPLES[net]
        model = NETS[net].build().cuda().requires_grad_(False)
        if net not in counts:
            twin = NETS[net].build(dtype=torch.float64)
            counts[net] = operations.count(twin, torch.randn(8, *NETS[net].shapes[0], dtype=torch.float64))
        generator = torch.Generator("cuda").manual_seed(done)
        shape = (SAMPLES[net], *NETS[net].shapes[0])
        sets = [torch.randn(shape, generator=generator, device="cuda") for _ in range(3)]
        left = args.seconds - (time.perf_counter() - begun)
        slice_ = max(left, 0.0) / (len(work) - done)
        wanted = [n for n in names if n not in QUESTIONS or (net in QUESTIONS[n][0] and precision in QUESTIONS[n][1])]
        for i, name in enumerate(wanted):
            now = time.perf_counter()
            until = now + (slice_ - (now - begun - (args.seconds - left))) / (len(wanted) - i)
            row = contend(net, precision, name, model, sets, counts[net].outputs, min(2.0, slice_ / 20), until)
            rows.append(row)
            print(f"{time.perf_counter() - begun:6.0f} s  {row}", flush=True)
            torch.cuda.empty_cache()
        del sets
        save(args.out, rows, found, counts)
    print("\n".join(report(rows, found, counts)), flush=True)
    return 0


def save(folder: Path, rows: list[Row], found: dict[str, float], counts: dict[str, operations.Operations]) -> None:
    """After every network, so that a run that is cut short leaves what it has."""
    properties = torch.cuda.get_device_properties(0)
    about = machine.describe(torch.get_num_threads()) | {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    content = {
        "machine": about,
        "ceilings": found,
        "samples": SAMPLES,
        "operations": {net: {"needed": c.needed, "dense": c.dense} for net, c in counts.items()},
        "rows": [row.__dict__ for row in rows],
    }
    (folder / "gpu.json").write_text(json.dumps(content, indent=1))
    (folder / "gpu.txt").write_text("\n".join(report(rows, found, counts)) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
