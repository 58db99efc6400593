"""Networks that fit no single chain on a GPU with little shared memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with norms, and a strided way around it."""

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.way = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.own = nn.Identity() if stride == 1 and inside == out else self.way

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.a(x)) + self.own(x))


def resnet() -> nn.Module:
    head = [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*head, Block(6, 6, 1), Block(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def vgg() -> nn.Module:
    first = [nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(8 * 4, 10), nn.ReLU(), nn.Linear(10, 4))


def wide_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3)
    )


def flattened() -> nn.Module:
    """A linear layer that reads a ReLU through a flatten."""
    return nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12, 9), nn.ReLU(), nn.Linear(9, 2))


class Skip(nn.Module):
    """A ReLU with several readers, one of them the output: only the last cotangent may be masked."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return torch.relu(self.b(x) + x) + self.c(x)


NETS = {
    "resnet": (resnet, (2, 9, 10)),
    "vgg": (vgg, (1, 9, 8)),  # 9 rows: the pool leaves one out
    "wide_mlp": (wide_mlp, (20,)),
    "flattened": (flattened, (2, 14)),
    "skip": (Skip, (2, 8)),
}


def settle(model: nn.Module, generator: torch.Generator) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator))
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
            with torch.no_grad():
                m.weight.copy_(torch.randn(m.weight.shape, generator=generator))
    return model.eval().requires_grad_(False)
