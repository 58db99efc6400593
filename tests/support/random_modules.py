"""Random networks of modules, to be captured: convolutions, linear layers, sequences, batch axes in other places.

``pick(low, high)`` makes every choice, so a network is that of a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.support.case import closed, randomise_norm

Pick = Callable[[int, int], int]
ACTIVATIONS = (nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.Hardtanh)
MOST = 600  # numbers of a sample


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:  # [N, *] -> the same
        return x + self.inner(x)


class Gated(nn.Module):
    """The product of two branches."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * torch.sigmoid(self.right(x))


class Joined(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, *] -> [N, branches · C, *]
        return torch.cat([branch(x) for branch in self.branches], 1)


class BatchSecond(nn.Module):
    """Layers that see the batch as axis 1, as sequence models have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:  # [N, T, F] -> [N, T, *]
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class States(nn.Module):
    """All states of a recurrent layer."""

    def __init__(self, inner: nn.RNNBase) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x, x, x, need_weights=False)[0]


class Grower:
    def __init__(self, pick: Pick) -> None:
        self.pick = pick

    def choose(self, options: Sequence):
        return options[self.pick(0, len(options) - 1)]

    def activation(self) -> nn.Module:
        return self.choose(ACTIVATIONS)()

    # ---- convolutions

    def convolution(self, dims: int, channels: int, outputs: int | None = None) -> nn.Module:
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
        each = lambda low, high: tuple(self.pick(low, high) for _ in range(dims))  # noqa: E731
        groups = 1 if outputs else self.choose([g for g in (1, 1, 2, channels) if channels % g == 0])
        wanted = outputs or groups * self.pick(1, 3)
        kernel, dilation, bias = each(1, 4), each(1, 2), bool(self.pick(0, 1))
        if outputs or self.pick(0, 1):
            return conv(channels, wanted, kernel, padding="same", dilation=dilation, groups=groups, bias=bias)
        stride, padding = each(1, 3), each(0, 2)
        if self.pick(0, 4) == 0:
            transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
            return transposed(channels, wanted, kernel, stride, groups=groups, bias=bias)
        return conv(channels, wanted, kernel, stride, padding, dilation, groups, bias)

    def pool(self, dims: int) -> nn.Module:
        ceil, kernel = bool(self.pick(0, 1)), self.pick(1, 3)
        stride, padding = self.pick(1, 3), self.pick(0, kernel // 2)
        match self.pick(0, 3):
            case 0 | 1:
                dilation = self.pick(1, 2)
                return (nn.MaxPool1d, nn.MaxPool2d)[dims - 1](kernel, stride, padding, dilation, ceil_mode=ceil)
            case 2:
                return (nn.AvgPool1d, nn.AvgPool2d)[dims - 1](kernel, stride, padding, ceil, bool(self.pick(0, 1)))
        return (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[dims - 1](self.pick(1, 5))

    def spatial_layer(self, dims: int, channels: int) -> nn.Module:
        same = lambda: self.convolution(dims, channels, channels)  # noqa: E731
        match self.pick(0, 13):
            case 0 | 1 | 2:
                return self.convolution(dims, channels)
            case 3 | 4 | 5:
                return self.activation()
            case 6 | 7:
                return self.pool(dims)
            case 8:
                return (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1](channels, affine=bool(self.pick(0, 1)))
            case 9:
                return Residual(nn.Sequential(same(), self.activation()))
            case 10:
                return Joined(same(), nn.Sequential(same(), self.activation()))
            case 11:
                return Gated(same(), same())
            case 12:
                return nn.GroupNorm(self.choose([g for g in (1, 2, channels) if channels % g == 0]), channels)
        return self.choose([nn.Dropout(0.5), nn.Upsample(scale_factor=2), nn.Softmax(1)])

    # ---- sequences and rows

    def row_layer(self, shape: tuple[int, ...]) -> nn.Module:
        """For ``[N, F]`` and ``[N, T, F]``."""
        width = shape[-1]
        match self.pick(0, 6 if len(shape) == 2 else 4):
            case 0 | 1:
                return nn.Linear(width, self.pick(1, 20))
            case 2:
                return self.activation()
            case 3:
                return Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), self.activation()))
            case 4:
                return self.choose([nn.LayerNorm(width), nn.Softmax(-1)])
            case 5:
                heads = self.choose([h for h in (1, 2, 3) if width % h == 0])
                return Attention(width, heads)
        kind = self.choose([nn.LSTM, nn.GRU, nn.RNN])
        inner = lambda first: States(kind(width, self.pick(1, 6), batch_first=first))  # noqa: E731
        return BatchSecond(inner(False)) if self.pick(0, 1) else inner(True)

    # ---- networks

    def grow(self) -> tuple[nn.Module, tuple[int, ...]]:
        """A network in float64, and the shape of its samples; layers that do not fit are left out."""
        torch.manual_seed(self.pick(0, 1 << 16))
        dims = self.pick(0, 3)
        if dims in (1, 2):
            shape = (self.pick(1, 4), *(self.pick(5, 14) for _ in range(dims)))
            make = lambda x: self.spatial_layer(dims, x.shape[1])  # noqa: E731
        else:
            shape = (self.pick(1, 12),) if dims == 0 else (self.pick(1, 7), self.pick(1, 6))
            make = lambda x: self.row_layer(tuple(x.shape[1:]))  # noqa: E731
        body, x = nn.Sequential().eval(), torch.zeros(2, *shape)
        for _ in range(self.pick(1, 6)):
            layer = make(x).eval()
            randomise_norm(layer)
            try:
                with torch.no_grad():
                    y = layer(x)
                    layer(x[:1])
            except (RuntimeError, ValueError):  # a window larger than what is left, a norm of one value per group
                continue
            if y.numel() and y[0].numel() <= MOST and bool(y.isfinite().all()):  # a pool of padding alone gives -inf
                body.append(layer)
                x = y
        tail = self.choose([[], [], [nn.Softmax(1)], [nn.LogSoftmax(1)], [nn.ReLU(), nn.Linear(3, 2)]])
        outputs = 3 if len(tail) == 2 else self.pick(1, 12)
        return nn.Sequential(*closed(body, shape, outputs), *tail).double().eval(), shape


@dataclass(frozen=True)
class Question:
    """What is asked of a network."""

    n: int
    dtype: torch.dtype
    targets: Tensor | None
    chunk: int | None
    threads: int
    budget: int  # bytes

    @classmethod
    def of(cls, pick: Pick, outputs: int) -> Question:
        n = pick(1, 9)
        generator = torch.Generator().manual_seed(pick(0, 1 << 20))
        shared = torch.randperm(outputs, generator=generator)[: pick(1, 5)]
        each = torch.randint(outputs, (n, 2), generator=generator)
        return cls(
            n,
            (torch.float64, torch.float64, torch.float32)[pick(0, 2)],
            (None, shared, each)[pick(0, 2)],
            (None, 1, 2, 4)[pick(0, 3)],
            (1, 1, 2, 3)[pick(0, 3)],
            (128 << 20, 1 << 16)[pick(0, 1)],
        )
