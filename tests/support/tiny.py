"""A tiny network and its samples, for tests of dataset runs in which the network does not matter."""

from __future__ import annotations

import functools

import torch
from torch import nn

SHAPE = (6,)


@functools.cache  # a network that is the same object is captured once
def net(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def samples(count: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
