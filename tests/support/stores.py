"""What the tests of dataset runs share: stores of earlier versions, and the content of a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from gradkern.data import Results

STORES = Path(__file__).parents[1] / "data" / "stores"


OPTIONS = {"method": "jacobian", "reductions": ["mean_abs", "variance", "max_abs"], "top_features": 2}


def build() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 2, 3, padding="same"), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(10, 3))


def problem() -> tuple[nn.Module, torch.Tensor]:
    from safetensors.torch import load_file

    model = build().eval()
    model.load_state_dict(load_file(STORES / "net.safetensors"))
    return model, torch.from_numpy(np.load(STORES / "x.npy"))


def content(out: str | Path) -> dict[str, np.ndarray]:
    """Every array of a store, reductions included."""
    results = Results.open(out)
    names = [name for name, _ in results.group.arrays()]
    names += [f"reductions/{name}" for name, _ in results.group["reductions"].arrays()]
    return {name: np.asarray(results.array(name)[...]) for name in names}


def assert_same(a: str | Path, b: str | Path) -> None:
    first, second = content(a), content(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
