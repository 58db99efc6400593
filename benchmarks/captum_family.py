"""Every attribution method against stock Captum: all classes in one call, one target, and memory on a long path.

``python -m benchmarks.captum_family`` writes ``results/captum-<threads>t.json``.  Stock Captum is called once per
class, at its best batch size of those tried; both sides take turns on samples that neither has seen before.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from captum import attr as stock
from torch import Tensor, nn

import gradkern
from benchmarks import machine
from benchmarks.run import RESULTS, positive, progress
from gradkern import attr as ours
from tests.cases import CASES
from tests.support.case import randomise_norm

BATCHES = (16, 64, 256)  # at which stock Captum is tried
PATH_MEMORY = 256 << 20  # bytes that 50 steps on 20,000 samples may take in addition to the result


@dataclass(frozen=True)
class Method:
    """A method, its options for an input batch, and whether it explains a layer (with a name per network)."""

    name: str
    options: Callable[[Tensor], dict[str, Any]] = lambda x: {}
    layer: bool = False
    input_floor: float = 6.0
    tunnel: str = ""


def _zeros(x: Tensor) -> dict[str, Any]:
    return {"baselines": torch.zeros_like(x[:1])}


def _some(x: Tensor) -> dict[str, Any]:
    return {"baselines": torch.randn(4, *x.shape[1:], generator=torch.Generator().manual_seed(7))}


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("Saliency"),
        Method("InputXGradient"),
        Method("IntegratedGradients", lambda x: {"n_steps": 50}),
        Method("GradientShap", lambda x: _some(x) | {"n_samples": 5}),
        Method("NoiseTunnel", lambda x: {"nt_samples": 10, "stdevs": 0.1}, tunnel="Saliency"),
        Method("GuidedBackprop"),
        Method("Deconvolution"),
        Method("DeepLift", _zeros),
        Method("DeepLiftShap", _some),
        Method("LRP"),
        Method("GuidedGradCam", layer=True),
        Method("LayerGradCam", layer=True, input_floor=0.0),
        Method("LayerGradientXActivation", layer=True, input_floor=0.0),
        Method("LayerIntegratedGradients", lambda x: {"n_steps": 20}, layer=True, input_floor=0.0),
        Method("InternalInfluence", lambda x: {"n_steps": 20}, layer=True, input_floor=0.0),
        Method("LayerConductance", lambda x: {"n_steps": 20}, layer=True, input_floor=0.0),
    )
}


class ModularCnn(nn.Module):
    """`cnn1d` and `lenet5` of modules only, each used once, as Captum's hooks need them."""

    def __init__(self, layers: Sequence[nn.Module], head: Sequence[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def cnn1d() -> nn.Module:
    layers = [nn.Conv1d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)]
    layers += [nn.Conv1d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)]
    return ModularCnn(layers, [nn.Linear(1792, 64), nn.ReLU(), nn.Linear(64, 3)])


def lenet5() -> nn.Module:
    layers = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return ModularCnn(layers, head)


class Inception(nn.Module):
    """One module of InceptionTime (arXiv:1909.04939): a bottleneck, three widths, a pooled path, joined."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(channels, filters, 1, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(filters, filters, k, padding="same", bias=False) for k in (39, 19, 9))
        self.pool = nn.MaxPool1d(3, 1, 1)
        self.point = nn.Conv1d(channels, filters, 1, bias=False)
        self.bn = nn.BatchNorm1d(4 * filters)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        z = self.bottleneck(x)
        return self.relu(self.bn(torch.cat([*(c(z) for c in self.convs), self.point(self.pool(x))], 1)))


class InceptionTime(nn.Module):
    """Three inception modules with a residual connection over them, average pool, linear."""

    def __init__(self, classes: int = 5, filters: int = 16) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Inception(1 if i == 0 else 4 * filters, filters) for i in range(3)))
        self.short = nn.Sequential(nn.Conv1d(1, 4 * filters, 1, bias=False), nn.BatchNorm1d(4 * filters))
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4 * filters, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, L] -> [N, classes]
        return self.fc(self.relu(self.blocks(x) + self.short(x)).mean(-1))


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    layer: str
    samples: int


NETS: dict[str, Net] = {
    "cnn1d": Net(cnn1d, (1, 224), 3, "features.3", 512),
    "lenet5": Net(lenet5, (1, 28, 28), 10, "features.3", 256),
    "inceptiontime": Net(InceptionTime, (1, 128), 5, "blocks.1", 32),
}


def build(net: Net) -> nn.Module:
    torch.manual_seed(0)
    model = net.make()
    for module in model.modules():
        randomise_norm(module)
    return model.eval().requires_grad_(False)


@dataclass
class Row:
    """One method on one network.  Times in µs per sample; ratios of medians of interleaved rounds."""

    net: str
    method: str
    all_stock: float | None = None
    all_batch: int | None = None
    all_ours: float | None = None
    all_ratio: float | None = None
    one_stock: float | None = None
    one_ours: float | None = None
    one_ratio: float | None = None
    difference: float | None = None  # largest, to stock, relative to the largest attribution
    floor: float = 0.0
    note: str = ""


def explainer(package: Any, method: Method, model: nn.Module, net: Net) -> Any:
    cls = getattr(package, method.name)
    if method.tunnel:
        return cls(getattr(package, method.tunnel)(model))
    return cls(model, model.get_submodule(net.layer)) if method.layer else cls(model)


def per_class(explain: Any, x: Tensor, options: dict[str, Any], batch: int, classes: int) -> list[Tensor]:
    """Stock Captum, called once per class on pieces of ``batch`` samples."""
    pieces = []
    for a in range(0, x.shape[0], batch):
        part = x[a : a + batch]
        pieces.append(torch.stack([explain.attribute(part, target=c, **options).detach() for c in range(classes)], 1))
    return pieces


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(net_name: str, method: Method, rounds: int, samples: int | None, say: Callable[[str], None]) -> Row:
    net = NETS[net_name]
    model = build(net)
    row = Row(net_name, method.name, floor=0.0 if net_name == "inceptiontime" else method.input_floor)
    n = samples or net.samples
    generator = torch.Generator().manual_seed(1)

    def fresh(count: int) -> Tensor:
        return torch.randn(count, *net.shape, generator=generator)

    options = method.options(fresh(1))
    theirs, mine = explainer(stock, method, model, net), explainer(ours, method, model, net)
    gradkern.prepare(model, fresh(4))
    mine.attribute_all(fresh(8), **options)
    mine.attribute(fresh(8), target=0, **options)
    try:
        theirs.attribute(fresh(2), target=0, **options)
    except Exception as error:
        row.note = f"stock: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    if not row.note:
        _compare_all(row, net, n, fresh, options, theirs, mine, rounds)
        _compare_one(row, n, fresh, options, theirs, mine, rounds)
    else:
        row.all_ours = min(seconds(lambda: mine.attribute_all(fresh(n), **options)) for _ in range(rounds)) / n * 1e6
    say(f"{net_name}: {method.name}")
    return row


def _compare_all(row: Row, net: Net, n: int, fresh: Any, options: Any, theirs: Any, mine: Any, rounds: int) -> None:
    sizes = [b for b in BATCHES if b <= n] or [n]
    quick = {}
    for b in sizes:
        x = fresh(b)
        quick[b] = min(seconds(lambda: per_class(theirs, x, options, b, net.classes)) for _ in range(2)) / b  # noqa: B023
    row.all_batch = min(quick, key=quick.get)  # type: ignore[arg-type]
    a, b = [], []
    for _ in range(rounds):
        x = fresh(n)
        a.append(seconds(lambda: per_class(theirs, x, options, row.all_batch, net.classes)))  # noqa: B023
        b.append(seconds(lambda: mine.attribute_all(x, **options)))  # noqa: B023
    row.all_stock, row.all_ours = (statistics.median(t) / n * 1e6 for t in (a, b))
    row.all_ratio = statistics.median(s / o for s, o in zip(a, b, strict=True))


def _compare_one(row: Row, n: int, fresh: Any, options: Any, theirs: Any, mine: Any, rounds: int) -> None:
    count = min(n, 64)
    a, b = [], []
    for _ in range(3 * rounds):
        x = fresh(count)
        a.append(seconds(lambda: theirs.attribute(x, target=1, **options)))  # noqa: B023
        b.append(seconds(lambda: mine.attribute(x, target=1, **options)))  # noqa: B023
    row.one_stock, row.one_ours = (statistics.median(t) / count * 1e6 for t in (a, b))
    row.one_ratio = statistics.median(s / o for s, o in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Memory


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes by which the process grew at most (Linux: the peak is reset first)."""
    growth: list[int] = []
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield growth
    growth.append(_status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def long_path(samples: int, all_outputs: bool) -> dict[str, Any]:
    """IntegratedGradients, 50 steps, on ``samples`` of `cnn1d`: time, and memory in addition to input and result."""
    model = CASES["cnn1d"].build().requires_grad_(False)
    x = torch.randn(samples, 1, 224)
    mine = ours.IntegratedGradients(model)
    gradkern.prepare(model, x[:4])
    mine.attribute(x[:256], target=0)
    mine.attribute_all(x[:256])
    with peak_memory() as peak:
        begin = time.perf_counter()
        result = mine.attribute_all(x) if all_outputs else mine.attribute(x, target=1)
        took = time.perf_counter() - begin
    size = result.numel() * 4
    few = x[:256]
    theirs = stock.IntegratedGradients(model)
    stock_seconds = min(
        seconds(lambda: [theirs.attribute(few[a : a + 16], target=1) for a in range(0, len(few), 16)]) for _ in range(3)
    )
    stock_us = stock_seconds / len(few) * 1e6 * (3 if all_outputs else 1)
    return {
        "samples": samples,
        "all_outputs": all_outputs,
        "seconds": took,
        "bytes_over_result": max(0, peak[0] - size),
        "limit": PATH_MEMORY,
        "us": took / samples * 1e6,
        "stock_us": stock_us,
        "ratio": stock_us / (took / samples * 1e6),
    }


# ---------------------------------------------------------------------------------------------------------------
# The command


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.captum_family", description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--samples", type=positive, help="samples per call (default: 512, 256, 32)")
    parser.add_argument("--path", type=positive, default=20000, help="samples of the long path (default: 20,000)")
    parser.add_argument("--no-path", action="store_true", help="leave the long path out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(words)
    if chosen.quick:
        chosen.rounds, chosen.samples, chosen.path = 1, 8, 64
    return chosen


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| network | method | stock, all classes | gradkern | ratio | stock, one target | gradkern | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r.net, r.method, _us(r.all_stock), _us(r.all_ours), _x(r.all_ratio)]
        cells += [_us(r.one_stock), _us(r.one_ours), _x(r.one_ratio)]
        lines.append("| " + " | ".join(cells) + " |" + (f" {r.note}" if r.note else ""))
    return "\n".join(lines)


def _us(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}"


def _x(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}×"


def main(words: Sequence[str] | None = None) -> int:
    chosen = arguments(words)
    torch.set_num_threads(chosen.threads)
    say = progress()
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # First, while the process has no memory to use again.
        paths = [] if chosen.no_path else [long_path(chosen.path, every) for every in (False, True)]
        for net in chosen.nets:
            for name in chosen.methods:
                rows.append(measure(net, METHODS[name], chosen.rounds, chosen.samples, say))
    print(table(rows))
    for p in paths:
        what = "all classes" if p["all_outputs"] else "one target"
        print(
            f"IntegratedGradients, 50 steps, {p['samples']} samples, {what}: {p['seconds']:.1f} s, "
            f"{p['bytes_over_result'] / 2**20:.0f} MiB over the result, {p['ratio']:.1f}× stock"
        )
    out = chosen.out or RESULTS / ("captum-quick.json" if chosen.quick else f"captum-{chosen.threads}t.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine.describe(chosen.threads), "rows": [asdict(r) for r in rows], "paths": paths}
    out.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
