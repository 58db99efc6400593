"""All-class input gradients on a GPU: gradkern against what torch, Captum and JAX offer, in one run.

    python -m benchmarks.gpu [--seconds 300] [--out results] [--nets cnn1d mlp] [--precisions highest high]
    python -m benchmarks.gpu --device cpu --share 0.0001        whether the program itself works, without a GPU

Every contender handles the full set, in chunks of the size that suits it best.  Times are CUDA events around whole
calls, medians after warm-up, over several input sets that together are larger than L2.  TF32 is pinned for both
sides.  Needed operations are those of `benchmarks.operations`; ceilings are measured in the same run.  gradkern's own
rows come first, on every network, so that a run that is cut short has them.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

import gradkern
from benchmarks import jax_peer, machine, operations
from benchmarks.baselines import captum_saliency, deliver, loop_classes, replicated
from benchmarks.measure import quiet
from tests.cases import CASES, Case
from tests.support import oracle

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
    """TF32 for all contenders or for none.  (After ``matmul.allow_tf32``, torch would not tell "medium" any more.)"""
    torch.set_float32_matmul_precision(precision)
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
                got = plain(static, None)
            graphs[n] = graph, static, got
        graph, static, got = graphs[n]
        static.copy_(x)
        graph.replay()
        return deliver(got, out)

    return chunk


def vmapped(model: nn.Module, outputs: int) -> Chunk:
    """`vmap(jacrev)`."""
    jacobian = vmap(jacrev(lambda x: model(x[None])[0]))
    return lambda x, out: deliver(jacobian(x), out)


def vgg11() -> nn.Module:
    """VGG-11 for images of 32 × 32: layers that fit no chain."""
    layers: list[nn.Module] = []
    width = 3
    for out, pools in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * pools]
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


NETS = {name: CASES[name] for name in SAMPLES if name in CASES} | {"vgg11": Case("vgg11", vgg11, ((3, 32, 32),))}


def ours(model: nn.Module, outputs: int) -> Chunk:
    """The public call."""

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        got = gradkern.jacobian(model, x, engine="kernel", out=out)
        return got if out is None else out

    return chunk


def ours_folded(model: nn.Module, outputs: int) -> Chunk:
    """The public call without gradkern's own kernels: torch's, with all seeds folded into the batch."""

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        got = gradkern.jacobian(model, x, engine="reference", out=out)
        return got if out is None else out

    return chunk


CONTENDERS: dict[str, Callable[[nn.Module, int], Chunk]] = {
    "gradkern": ours,
    "gradkern, folded": ours_folded,
    "class loop": loop_classes,
    "seeds folded": replicated,
    "folded, CUDA graph": compiled_folded,
    "vmap(jacrev)": vmapped,
    "compiled, CUDA graph": compiled,
    "Captum per class": captum_saliency,
    "JAX": jax_peer.chunk,
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
    begun, clock = time.perf_counter(), on_gpu if sets[0].is_cuda else on_cpu
    for i in range(2):
        run(sets[i % len(sets)])
    times: list[float] = []
    while len(times) < 3 or (len(times) < 30 and time.perf_counter() - begun < seconds):
        times.append(clock(lambda: run(sets[len(times) % len(sets)])))
    return statistics.median(times)


def on_gpu(call: Callable[[], Tensor]) -> float:
    """Milliseconds between two events around a call."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def on_cpu(call: Callable[[], Tensor]) -> float:
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def accuracy(model: nn.Module, x: Tensor, got: Tensor) -> tuple[float, float]:
    """Worst relative error among samples whose pattern agrees with float64, and the share of the others."""
    _, (want,) = oracle.jacobian(model, x)
    gap = oracle.sample_errors(got.reshape(want.shape), want)
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
                got = chunk(few, None)[:CHECKED].clone()
        except Exception as error:
            best.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:140] if str(error) else ''}"
            emptied()
            continue
        if best.ms is None or ms < best.ms:
            best.error, best.flipped = accuracy(model, few[:CHECKED], got)
            best.ms, best.chunk = ms, size
        elif ms > 2 * best.ms:
            break
    return best


class Broken(Exception):
    """The GPU takes no more work from this process: a kernel reached beyond its memory, or hung."""


def emptied() -> None:
    """Give memory back.  Raises `Broken` where an error of the GPU outlives the call that made it."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise Broken(str(error).strip().splitlines()[0]) from error


def ceilings(where: torch.device) -> dict[str, float]:
    """What this GPU does: GB/s of a large copy (read and written), TFLOP/s of an fp32 matrix product without TF32."""
    pin("highest")
    side, size = (8192, 1 << 30) if where.type == "cuda" else (512, 1 << 24)
    a, b = (torch.randn(side, side, device=where) for _ in range(2))
    big, other = (torch.empty(size, dtype=torch.uint8, device=where) for _ in range(2))
    product = timed(lambda _: a @ b, [a], 2.0)
    copy = timed(lambda _: other.copy_(big), [a], 1.0)
    return {"copy_gb_s": 2 * big.nbytes / copy / 1e6, "fp32_tflop_s": 2 * side**3 / product / 1e9}


def peers_of(row: Row, rows: list[Row]) -> list[Row]:
    same = [r for r in rows if (r.net, r.precision) == (row.net, row.precision) and r.ms]
    return [r for r in same if not r.name.startswith("gradkern")]


def floor_of(
    net: str, measured: dict[str, Any], counts: dict[str, operations.Operations]
) -> tuple[float, float, float]:
    """Bytes moved, operations needed, and the milliseconds that the ceilings allow for them."""
    n, size = SAMPLES[net], torch.Size(NETS[net].shapes[0]).numel() * 4
    moved, work = n * size * (1 + counts[net].outputs), n * counts[net].needed
    return moved, work, max(moved / measured["copy_gb_s"] / 1e6, work / measured["fp32_tflop_s"] / 1e9)


def report(rows: list[Row], measured: dict[str, Any], counts: dict[str, operations.Operations]) -> list[str]:
    """Every row."""
    lines = [f"copy {measured['copy_gb_s']:.0f} GB/s, fp32 product {measured['fp32_tflop_s']:.1f} TFLOP/s"]
    head = f"{'net':14}{'precision':10}{'contender':22}{'chunk':>8}{'ms':>10}{'TFLOP/s':>9}{'GB/s':>7}{'roof':>6}"
    lines.append(head + f"{'best peer/it':>13}{'error':>10}{'flipped':>9}")
    for row in sorted(rows, key=lambda r: (list(SAMPLES).index(r.net), r.precision)):
        if row.ms is None:
            lines.append(f"{row.net:14}{row.precision:10}{row.name:22}{'':8}{'-':>10}  {row.note}")
            continue
        moved, work, floor = floor_of(row.net, measured, counts)
        peers = [r.ms for r in peers_of(row, rows) if r.ms]
        ratio = min(peers) / row.ms if peers else math.nan
        lines.append(
            f"{row.net:14}{row.precision:10}{row.name:22}{row.chunk:8}{row.ms:10.2f}{work / row.ms / 1e9:9.1f}"
            f"{moved / row.ms / 1e6:7.0f}{floor / row.ms:6.0%}{ratio:13.2f}{row.error:10.1e}{row.flipped:9.2%}"
        )
    return lines


def digest(rows: list[Row], measured: dict[str, Any], counts: dict[str, operations.Operations]) -> list[str]:
    """One line per network and precision: the public call and its best peer."""
    lines = [f"{'net':14}{'precision':10}{'gradkern ms':>12}{'roof':>6}{'error':>10}{'x peer':>8}  best peer"]
    for row in rows:
        if row.name != "gradkern":
            continue
        if row.ms is None:
            lines.append(f"{row.net:14}{row.precision:10}{'-':>12}  {row.note}")
            continue
        best = min(peers_of(row, rows), key=lambda r: r.ms or math.inf, default=None)
        peer = f"{best.ms / row.ms:8.2f}  {best.name}, {best.ms:.2f} ms" if best and best.ms else f"{'-':>8}  none ran"
        roof = floor_of(row.net, measured, counts)[2] / row.ms
        lines.append(f"{row.net:14}{row.precision:10}{row.ms:12.2f}{roof:6.0%}{row.error:10.1e}{peer}")
    return lines


class Run:
    """All contenders on all networks, within a budget of wall-clock seconds."""

    def __init__(self, seconds: float, out: Path, where: torch.device, share: float):
        self.begun, self.seconds, self.out, self.where = time.perf_counter(), seconds, out, where
        self.rows: list[Row] = []
        self.counts: dict[str, operations.Operations] = {}
        self.measured = ceilings(where)
        for net in SAMPLES:
            SAMPLES[net] = max(CHECKED if where.type == "cuda" else 8, int(SAMPLES[net] * share))

    def passed(self) -> float:
        return time.perf_counter() - self.begun

    def visit(self, net: str, precision: str, names: list[str], visits_left: int) -> None:
        """Some contenders on one network at one precision, within their part of what is left of the budget."""
        pin(precision)
        if net not in self.counts:
            twin = NETS[net].build(dtype=torch.float64)
            self.counts[net] = operations.count(twin, torch.randn(8, *NETS[net].shapes[0], dtype=torch.float64))
        model = NETS[net].build().to(self.where).requires_grad_(False)
        generator = torch.Generator(self.where).manual_seed(0)
        shape = (SAMPLES[net], *NETS[net].shapes[0])
        sets = [torch.randn(shape, generator=generator, device=self.where) for _ in range(3)]
        part = max(self.seconds - self.passed(), 0.0) / visits_left
        end = time.perf_counter() + part
        for i, name in enumerate(names):
            now = time.perf_counter()
            until, outputs = now + (end - now) / (len(names) - i), self.counts[net].outputs
            self.rows.append(Row(net, precision, name, 0, None, "broke off"))
            self.rows[-1] = contend(net, precision, name, model, sets, outputs, min(2.0, part / 20), until)
            print(f"{self.passed():6.0f} s  {self.rows[-1]}", flush=True)
            emptied()
        save(self.out, self.rows, self.measured, self.counts, self.where)

    def close(self) -> None:
        if self.rows:
            save(self.out, self.rows, self.measured, self.counts, self.where)
            print((self.out / "gpu.txt").read_text(), flush=True)


def stopped(*_: Any) -> None:
    raise SystemExit("benchmarks.gpu: stopped from outside")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="wall-clock budget of the whole run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--nets", nargs="+", choices=list(SAMPLES), default=list(SAMPLES))
    parser.add_argument("--precisions", nargs="+", choices=("highest", "high", "medium"), default=["highest", "high"])
    parser.add_argument(
        "--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="these contenders"
    )
    parser.add_argument("--share", type=float, default=1.0, help="share of the full sets, for a quick look")
    parser.add_argument("--device", default="cuda", help="cpu: to see whether the program itself works")
    args = parser.parse_args()
    where = torch.device(args.device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no GPU is visible to torch.")
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stopped)
    own = [n for n in args.only if n.startswith("gradkern")]
    peers = [n for n in args.only if n not in own]
    work = [(names, n, p) for names in (own, peers) if names for p in args.precisions for n in args.nets]
    run = Run(args.seconds, args.out, where, args.share)
    try:
        for done, (names, net, precision) in enumerate(work):
            run.visit(net, precision, names, len(work) - done)
    except Broken as error:
        print(f"benchmarks.gpu: stopped, the GPU is broken for this process: {error}", flush=True)
        return 1
    finally:
        run.close()
    return 0


def save(
    folder: Path,
    rows: list[Row],
    measured: dict[str, float],
    counts: dict[str, operations.Operations],
    where: torch.device,
) -> None:
    """After every network, so that a run that is cut short leaves what it has."""
    about = machine.describe(torch.get_num_threads())
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        about |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    content = {
        "machine": about,
        "ceilings": measured,
        "samples": SAMPLES,
        "operations": {net: {"needed": c.needed, "dense": c.dense} for net, c in counts.items()},
        "rows": [row.__dict__ for row in rows],
    }
    (folder / "gpu.json").write_text(json.dumps(content, indent=1))
    lines = [*report(rows, measured, counts), "", *digest(rows, measured, counts)]
    (folder / "gpu.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
