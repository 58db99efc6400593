"""Memory that runs take, compared with its forecast: ``python -m tests.support.run_memory [NAME ...]``.

Every line is a process of its own.  Seen is the growth of the peak of its resident memory beyond what it had with all
modules loaded, the model made and the samples read.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradkern
from gradkern.data import plan
from gradkern.data.ranking import plan_importance
from gradkern.util.memory import Growth

from ..cases import CASES

ROOT = Path(__file__).parents[2]


class Cumulative(nn.Module):
    """Has an operation without a form."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(x, dim=-1)


class Branched(nn.Module):
    """Two blocks of a residual network of images."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.head = _conv(3), nn.Linear(32, classes)
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(32), nn.BatchNorm2d(32), nn.ReLU(), _conv(32)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """A transformer over the tokens of a sample."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def _conv(channels: int) -> nn.Module:
    return nn.Conv2d(channels, 32, 3, padding=1)


def _dense(features: int, hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def _decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (32, 7, 7)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Flatten(),
    )  # fmt: skip


def _without_form() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 16, 9, 2), nn.Tanh(), Cumulative(), nn.Flatten(), nn.Linear(16 * 124, 10))


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int


NETS = {
    "cnn1d": Net(CASES["cnn1d"].build, (1, 224), 20_000),
    "lenet5": Net(CASES["lenet5"].build, (1, 28, 28), 10_000),
    "wide": Net(lambda: _dense(100_000, 32, 4), (100_000,), 64),
    "classes": Net(lambda: _dense(784, 64, 1000), (784,), 500),
    "branched": Net(lambda: Branched(10), (3, 64, 64), 100),
    "transformer": Net(Tokens, (64, 32), 500),
    "lstm": Net(Recurrent, (64, 16), 1000),
    "decoder": Net(_decoder, (16,), 2000),
    "without_form": Net(_without_form, (1, 256), 2000),
}

#: What runs: the arguments of `gradkern.run`, or importance.
MODES: dict[str, dict[str, Any]] = {
    "run": {},
    "both": {"reductions": ["mean_abs", "variance"], "dtype": "float16"},
    "statistics": {"maps": False, "reductions": ["mean_abs"]},
    "importance": {},
}


def measure(name: str, mode: str, engine: str) -> tuple[int, int, str]:
    """Bytes that a run takes, bytes that are forecast, and the forecast in words, each in a process of its own."""
    seen, forecast = (_in_process(what, name, mode, engine) for what in ("run", "plan"))
    return int(seen), int(forecast.split(maxsplit=1)[0]), forecast.split(maxsplit=1)[1]


def _in_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.support.run_memory", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    return done.stdout.splitlines()[-1]


def _here(what: str, name: str, mode: str, engine: str) -> str:
    torch.manual_seed(0)
    gradkern.importance(_dense(4, 3, 2).eval(), torch.randn(8, 4), progress=False)  # loads all modules
    net = NETS[name]
    model, x = net.make().eval(), torch.randn(net.samples, *net.shape)
    options: dict[str, Any] = {"engine": engine, **MODES[mode]}
    if what == "plan":
        make = plan_importance if mode == "importance" else plan
        forecast = make(model, x, **options)
        return f"{forecast.memory_bytes} {forecast}"
    with tempfile.TemporaryDirectory() as folder, Growth() as growth:
        if mode == "importance":
            gradkern.importance(model, x, progress=False, **options)
        else:
            gradkern.run(model, x, Path(folder, "a.zarr"), progress=False, **options)
    return str(growth.peak)


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["run"], ["plan"]):
        print(_here(*arguments))
        return
    for name in arguments or NETS:
        for mode in MODES:
            for engine in ("kernel", "autograd"):
                seen, forecast, said = measure(name, mode, engine)
                mib = [amount / (1 << 20) for amount in (seen, forecast)]
                print(f"{name:13} {mode:11} {engine:9} {mib[0]:6.0f} seen {mib[1]:6.0f} forecast  "
                      f"{forecast / max(seen, 1):5.2f}  {said}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
