"""The stores in tests/data/stores, which an earlier version wrote, and the run that they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

STORES = Path(__file__).parents[1] / "data" / "stores"
OPTIONS = {"method": "jacobian", "reductions": ["mean_abs", "variance", "max_abs"], "top_features": 2}


def build() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 2, 3, padding="same"), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(10, 3))


def problem() -> tuple[nn.Module, torch.Tensor]:
    from safetensors.torch import load_file

    model = build().eval()
    model.load_state_dict(load_file(STORES / "net.safetensors"))
    return model, torch.from_numpy(np.load(STORES / "x.npy"))
