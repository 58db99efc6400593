"""The networks of the case table that need more than a row: the five measured ones, and small ones for one purpose."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------
# The five networks of the measured table


def cnn1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Flatten(), nn.Linear(1792, 64), nn.ReLU(), nn.Linear(64, 3),
    )  # fmt: skip


def cnn1d_strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv1d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(1792, 64), nn.ReLU(), nn.Linear(64, 3),
    )  # fmt: skip


class LeNet5(nn.Module):
    """LeNet-5 as people write it: modules for weights, functional calls for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, 28, 28] -> [N, 10]
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def decoder(features: int = 4, hidden: int = 24, channels: int = 8, side: int = 3) -> nn.Module:
    """The decoder of a variational autoencoder: ``[N, features] -> [N, 1, 4 * side, 4 * side]``."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, channels * side * side), nn.ReLU(),
        nn.Unflatten(1, (channels, side, side)),
        nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(channels // 2, 1, 4, stride=2, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def emulator(features: int = 3, hidden: int = 16, outputs: int = 60) -> nn.Module:
    """An emulator of a simulation: a few parameters in, many numbers out."""
    layers = [nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs)]
    return nn.Sequential(*layers)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(224, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def fcn() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 128, 8, padding="same"), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Conv1d(128, 256, 5, padding="same"), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Conv1d(256, 128, 3, padding="same"), nn.BatchNorm1d(128), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 5),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Small ones


class Residual1d(nn.Module):
    """A small 1-D ResNet with one module in the middle; the block's input fans out, in-place ReLU is reused."""

    def __init__(self, middle: nn.Module, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, channels, 5, padding=2, bias=False)
        self.bn0 = nn.BatchNorm1d(channels)
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.middle = middle
        self.conv2 = nn.Conv1d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(2 * channels)
        self.down = nn.Conv1d(channels, 2 * channels, 1, stride=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(2 * channels, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, L] -> [N, 4]
        x = self.relu(self.bn0(self.stem(x)))
        y = self.relu(self.bn1(self.conv1(x)) + x)
        y = self.middle(y)
        z = self.bn2(self.conv2(y))
        z += self.down(x)
        return self.fc(self.relu(z).mean(dim=-1))


class RunningLogMean(nn.Module):
    """A traceable module of ops that no form describes: the logarithm of a running mean of exponentials."""

    def forward(self, x: Tensor) -> Tensor:  # [N, C, L] -> [N, C, L]
        steps = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)  # [L]
        return x.logcumsumexp(-1) - steps.log()


class ClippedGradient(torch.autograd.Function):
    """The identity forward; backward halves what arrives: what torch.export drops without a word."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 0.5 * g


class CustomBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ClippedGradient.apply(x)


class SharedConv(nn.Module):
    """One convolution and one activation used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=1)
        self.act = nn.ReLU()
        self.fc = nn.Linear(3 * 12, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 12] -> [N, 2]
        for _ in range(3):
            x = self.act(self.conv(x))
        return self.fc(x.flatten(1))


class SkipsAll(nn.Module):
    """The input reaches the last layer by a second path, and the hidden value is read three times."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)
        self.fc2 = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 6] -> [N, 3]
        h = torch.tanh(self.fc1(x))
        h = h + torch.relu(self.fc2(h)) + h
        return self.out(h + x)


class TwoInputs(nn.Module):
    """A signal and a vector, joined by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.left = nn.Linear(4 * 10, 5)
        self.right = nn.Linear(3, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, signal: Tensor, vector: Tensor) -> Tensor:  # [N, 1, 10], [N, 3] -> [N, 2]
        h = self.left(F.relu(self.conv(signal)).flatten(1)) + self.right(vector)
        return self.out(F.relu(h))


class LstmNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 5, batch_first=True)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 7, 2] -> [N, 3]
        y, _ = self.lstm(x)
        return self.fc(y[:, -1])


class PerStep(nn.Module):
    """``[N, T, C]``: a class distribution at every second time step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1, stride=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, 8] -> [N, 4, 3]
        return self.fc(torch.sigmoid(self.conv(x)).transpose(1, 2))


class MixesSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x - x.mean(0))


class FreezesOne(nn.Module):
    """Computes another function for a single sample, which torch.export cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2.0 if x.shape[0] == 1 else self.fc(x)


class ValueBranch(nn.Module):
    """Control flow on values: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return torch.tanh(y) if float(y.detach().abs().sum()) >= 0 else y


class Attention(nn.Module):
    """Single-head attention written out, with LayerNorm and GELU, and a mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 5, 4] -> [N, 3]
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        a = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(4), dim=-1)
        return self.fc(F.gelu(x + a @ v).mean(1))


class HeadsInFront(nn.Module):
    """`nn.MultiheadAttention`, which puts sequences first and joins samples and heads, with its weights asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 5, 4] -> [N, 3]
        y, _ = self.attention(x, x.flip(1), x, need_weights=True)
        return self.fc((x + y).flatten(1))


class HeadsAsBatches(nn.Module):
    """Attention that joins its heads to a batch twice as long, and takes them apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.fc = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 5, 4] -> [N, 3]
        q, k, v = (torch.cat(part.split(2, -1)) for part in self.qkv(x).chunk(3, -1))  # [2·N, 5, 2]
        y = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        first, second = y[: x.shape[0]], y.split(x.shape[0])[1]
        return self.fc(self.out(torch.cat([first, second], -1)).flatten(1))


class SequenceFirst(nn.Module):
    """An encoder over ``[T, N, E]``: positions added, two layers, the mean over time or the last step."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.positions = nn.Parameter(torch.randn(5, 1, 4))
        self.fc, self.last = nn.Linear(4, 3), last

    def forward(self, x: Tensor) -> Tensor:  # [N, 5, 4] -> [N, 3]
        y = self.encoder(x.permute(1, 0, 2) + self.positions)
        return self.fc(y[-1] if self.last else y.mean(0))


class LstmSequenceFirst(nn.Module):
    """An LSTM as torch has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 5, bidirectional=True)
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 7, 2] -> [N, 3]
        y, _ = self.lstm(x.transpose(0, 1))
        return self.fc(torch.tanh(y).sum(0))


class AttendsToSamples(nn.Module):
    """Attention told that sequences come first, and given the samples first: a common bug."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0].flatten(1))


class SqueezeExcite(nn.Module):
    """Multiply of two branches, concatenation, a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.gate = nn.Linear(4, 4)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, 8] -> [N, 3]
        h = F.silu(self.conv(x))
        h = h * torch.sigmoid(self.gate(h.mean(-1))).unsqueeze(-1)
        return self.fc(torch.cat([h, x], dim=1)[:, :, 1:7].amax(-1))


def weight_normed() -> nn.Module:
    body = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 10, 3)
    )
    with torch.no_grad():
        body[0].parametrizations.weight.original0.uniform_(0.5, 2.0)
    return body


class Net(nn.Module):
    """A function of the module and its inputs, with a linear layer and attributes to use."""

    def __init__(self, fn: Callable[..., Tensor], width: int = 4, **attributes: object) -> None:
        super().__init__()
        self.fn = fn
        self.fc = nn.Linear(width, width)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.fn(self, *xs)


class Through(torch.autograd.Function):
    """A clamp with a straight-through gradient."""

    @staticmethod
    def forward(ctx, h: Tensor, limit: float) -> Tensor:
        return h.clamp(-limit, limit)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g, None
