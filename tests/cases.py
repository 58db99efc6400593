"""One table of networks and shapes, shared by the tests and the benchmarks.

`CASES` holds every network by name.  ``case.build()`` gives it in eval mode with seeded weights and *random*
batch-norm statistics (fresh ones, 0 and 1, would hide a wrong fold), ``case.inputs(n)`` gives seeded samples.

* `BENCH` are the five networks of the measured table.
* ``case.opaque`` says that at least one step has no form, so that torch differentiates it.
* ``case.traceable`` is False where a Program must be refused (hidden backward, mixed samples, ...), so that the
  whole network runs on autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A network and the per-sample shapes of its inputs."""

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    bench: bool = False
    opaque: bool = False
    traceable: bool = True

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in eval mode, its weights and its batch-norm statistics drawn from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            for module in model.modules():
                randomise_norm(module)
        return model.to(dtype).eval()

    def inputs(self, n: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """``n`` seeded standard-normal samples: one tensor ``[n, *shape]`` per input."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(n, *s, generator=generator, dtype=torch.float64).to(dtype) for s in self.shapes)

    def __repr__(self) -> str:
        return f"Case({self.name})"


def randomise_norm(module: nn.Module) -> None:
    """Give a normalisation layer statistics and factors such as training leaves behind."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        module.running_mean.normal_(0.0, 0.5)
        module.running_var.uniform_(0.4, 2.0)
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
        with torch.no_grad():
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0.0, 0.3)


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
# Building blocks of the small networks


class Fn(nn.Module):
    """A function as a module, so that it can stand in a `Sequential`."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(*args)


Recipe = tuple[Callable[[], nn.Module], Shape]


def seq1d(*middle: Callable[[], nn.Module], length: int = 16) -> Recipe:
    """Input ``[2, length]`` -> conv to 4 channels -> ``middle`` -> flatten -> linear to 3; it finds its own width."""
    shape = (2, length)
    return lambda: closed(nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), *[m() for m in middle]), shape), shape


def seq2d(*middle: Callable[[], nn.Module], size: Shape = (9, 8)) -> Recipe:
    """Input ``[2, *size]`` -> conv to 4 channels -> ``middle`` -> flatten -> linear to 3."""
    shape = (2, *size)
    return lambda: closed(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *[m() for m in middle]), shape), shape


def closed(body: nn.Sequential, shape: Shape, outputs: int = 3) -> nn.Module:
    """``body``, flattened, and a linear layer of the width that it gives for samples of ``shape``."""
    with torch.no_grad():
        width = body.eval()(torch.zeros(2, *shape)).flatten(1).shape[1]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(width, outputs))


def lazily(cls: Callable[..., nn.Module], *args: object, **kwargs: object) -> Callable[[], nn.Module]:
    return lambda: cls(*args, **kwargs)


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


class CumulativeMean(nn.Module):
    """A traceable module of ops that no form describes: the running mean along the signal."""

    def forward(self, x: Tensor) -> Tensor:  # [N, C, L] -> [N, C, L]
        steps = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)  # [L]
        return x.cumsum(-1) / steps


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
    """Another function for a single sample, which torch.export cannot see."""

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


# ---------------------------------------------------------------------------------------------------------------
# The table

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": lambda x: x * torch.sigmoid(x),
    "mish": F.mish,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.5),
    "square": lambda x: x * x,
    "cube": lambda x: x**3,
    "clamp": lambda x: x.clamp(-0.5, 0.4),
    "safe_log": lambda x: torch.log(torch.clamp(x * x, min=1e-6)),
    "exp": lambda x: torch.exp(-x),
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.1),
    "rsqrt": lambda x: torch.rsqrt(x.square() + 0.1),
    "reciprocal": lambda x: 1 / (2 + torch.sin(x)),
    "erf": torch.erf,
    "cos": torch.cos,
}


def _small() -> list[Case]:
    lz, relu = lazily, lazily(nn.ReLU)
    recipes: dict[str, Recipe] = {
        # convolutions
        "conv1d_valid": seq1d(relu, lz(nn.Conv1d, 4, 5, 3), relu),
        "conv1d_stride_pad": seq1d(relu, lz(nn.Conv1d, 4, 5, 5, stride=3, padding=1), relu),
        "conv1d_same_even": seq1d(relu, lz(nn.Conv1d, 4, 5, 4, padding="same"), relu),
        "conv1d_same_dilated_even": seq1d(relu, lz(nn.Conv1d, 4, 5, 4, padding="same", dilation=3), relu),
        "conv1d_dilated": seq1d(relu, lz(nn.Conv1d, 4, 5, 3, dilation=2, padding=2, stride=2), relu),
        "conv1d_groups": seq1d(relu, lz(nn.Conv1d, 4, 6, 3, groups=2), relu),
        "conv1d_depthwise": seq1d(relu, lz(nn.Conv1d, 4, 8, 3, groups=4, bias=False, padding=1), relu),
        "conv1d_nobias": seq1d(relu, lz(nn.Conv1d, 4, 5, 3, bias=False), relu),
        "conv1d_pad_over_kernel": seq1d(relu, lz(nn.Conv1d, 4, 5, 2, padding=3), relu),
        "conv1d_wide_stride": seq1d(relu, lz(nn.Conv1d, 4, 5, 2, stride=5), relu),
        "conv1d_long_kernel": seq1d(relu, lz(nn.Conv1d, 4, 3, 39, padding=19), relu, length=24),
        "conv1d_circular": seq1d(relu, lz(nn.Conv1d, 4, 5, 3, padding=1, padding_mode="circular"), relu),
        "conv2d_valid": seq2d(relu, lz(nn.Conv2d, 4, 5, 3), relu),
        "conv2d_uneven": seq2d(relu, lz(nn.Conv2d, 4, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), relu),
        "conv2d_same_even": seq2d(relu, lz(nn.Conv2d, 4, 5, (4, 3), padding="same"), relu),
        "conv2d_depthwise": seq2d(relu, lz(nn.Conv2d, 4, 4, (1, 5), groups=4, bias=False), lz(nn.Conv2d, 4, 6, 1)),
        # activations
        "relu_inplace": seq1d(lz(nn.ReLU, inplace=True), lz(nn.Conv1d, 4, 4, 3), lz(nn.ReLU, inplace=True)),
        "leaky_relu": seq1d(lz(nn.LeakyReLU, 0.2), lz(nn.Conv1d, 4, 4, 3), lz(nn.LeakyReLU, 0.01, inplace=True)),
        "elu": seq1d(lz(nn.ELU), lz(nn.Conv1d, 4, 4, 3), lz(nn.ELU, 0.7, inplace=True)),
        "tanh": seq1d(lz(nn.Tanh), lz(nn.Conv1d, 4, 4, 3), lz(Fn, torch.tanh)),
        "sigmoid": seq1d(lz(nn.Sigmoid), lz(nn.Conv1d, 4, 4, 3), lz(Fn, torch.sigmoid)),
        "affine": seq1d(lz(Fn, lambda x: -(2.0 - 0.5 * x) / 3.0 + 1), relu, lz(Fn, lambda x: 1 - x), lz(Fn, torch.neg)),
        **{f"act_{name}": seq1d(lz(Fn, f), lz(nn.Conv1d, 4, 4, 3), lz(Fn, f)) for name, f in FUNCTIONS.items()},
        "prelu": seq1d(lz(nn.PReLU), lz(nn.Conv1d, 4, 5, 3), lz(nn.PReLU, 5, 0.3)),
        # max pools
        "maxpool1d": seq1d(relu, lz(nn.MaxPool1d, 2), lz(nn.Conv1d, 4, 4, 3), relu),
        "maxpool1d_overlap_pad": seq1d(lz(nn.MaxPool1d, 3, stride=2, padding=1), lz(nn.Tanh)),
        "maxpool1d_ceil": seq1d(relu, lz(nn.MaxPool1d, 3, stride=3, ceil_mode=True), lz(nn.ELU), length=17),
        "maxpool1d_dilated": seq1d(lz(nn.MaxPool1d, 3, stride=1, dilation=2), relu),
        "maxpool2d": seq2d(relu, lz(nn.MaxPool2d, 2), lz(nn.Conv2d, 4, 4, 2), relu),
        "maxpool2d_mixed": seq2d(lz(nn.MaxPool2d, (3, 2), stride=(2, 3), padding=(1, 0), ceil_mode=True), relu),
        "maxpool2d_overlap": seq2d(lz(nn.MaxPool2d, 3, stride=1, padding=1, dilation=1), lz(nn.Tanh)),
        # average pools and means
        "avgpool1d": seq1d(relu, lz(nn.AvgPool1d, 3, stride=2), relu),
        "avgpool1d_pad_count": seq1d(relu, lz(nn.AvgPool1d, 4, stride=3, padding=2, ceil_mode=True), relu),
        "avgpool1d_pad_exclude": seq1d(
            relu, lz(nn.AvgPool1d, 4, stride=3, padding=2, ceil_mode=True, count_include_pad=False), lz(nn.Tanh)
        ),
        "avgpool2d": seq2d(relu, lz(nn.AvgPool2d, (2, 3), stride=(2, 1), padding=(1, 1)), relu),
        "avgpool2d_ceil_exclude": seq2d(
            relu, lz(nn.AvgPool2d, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), lz(nn.Tanh)
        ),
        "avgpool2d_divisor": seq2d(relu, lz(nn.AvgPool2d, 2, divisor_override=3), relu),
        "adaptive1d_one": seq1d(relu, lz(nn.AdaptiveAvgPool1d, 1), lz(nn.Tanh)),
        "adaptive1d_uneven": seq1d(relu, lz(nn.AdaptiveAvgPool1d, 5), lz(nn.Tanh)),
        "adaptive2d_uneven": seq2d(relu, lz(nn.AdaptiveAvgPool2d, (4, 3)), lz(nn.Tanh)),
        "adaptive2d_none": seq2d(relu, lz(nn.AdaptiveAvgPool2d, (None, 2)), lz(nn.Tanh)),
        "adaptive2d_grows": seq2d(relu, lz(nn.AdaptiveAvgPool2d, (11, 1)), lz(nn.Tanh)),
        "mean_last": seq1d(relu, lz(Fn, lambda x: x.mean(-1)), lz(nn.Tanh)),
        "mean_keepdim": seq1d(relu, lz(Fn, lambda x: x.mean(2, keepdim=True)), lz(nn.Tanh)),
        "mean_both": seq2d(relu, lz(Fn, lambda x: x.mean((2, 3))), lz(nn.Tanh)),
        "mean_rows": seq2d(relu, lz(Fn, lambda x: x.mean(2)), lz(nn.Tanh)),
        "mean_columns_keepdim": seq2d(relu, lz(Fn, lambda x: x.mean(-1, keepdim=True)), lz(nn.Tanh)),
        "mean_channels": seq1d(relu, lz(Fn, lambda x: x.mean(1)), lz(nn.Tanh)),
        # views
        "view_channels": seq1d(relu, lz(Fn, lambda x: x.view(x.size(0), 8, 8)), lz(nn.Conv1d, 8, 3, 3), relu),
        "reshape_to_2d": seq1d(relu, lz(Fn, lambda x: x.reshape(-1, 1, 4, 16)), lz(nn.Conv2d, 1, 3, (4, 3)), relu),
        "squeeze": seq2d(
            relu, lz(nn.Conv2d, 4, 5, (9, 1)), lz(Fn, lambda x: x.squeeze(2)), lz(nn.Conv1d, 5, 3, 3), relu
        ),
        "unsqueeze_unflatten": seq1d(
            lz(Fn, lambda x: x.unsqueeze(1)), lz(nn.Conv2d, 1, 2, 3), relu, lz(nn.Unflatten, 3, (2, 7))
        ),
        "flatten_tail": seq2d(relu, lz(nn.Flatten, 2), lz(nn.Conv1d, 4, 3, 5, stride=3), relu),
        # copies
        "transpose": seq1d(relu, lz(Fn, lambda x: x.transpose(1, 2)), lz(nn.Linear, 4, 5), lz(nn.Tanh)),
        "permute_back": seq1d(
            lz(Fn, lambda x: x.permute(0, 2, 1)), lz(nn.LayerNorm, 4), lz(Fn, lambda x: x.mT), lz(nn.Conv1d, 4, 3, 3)
        ),
        "permute_2d": seq2d(relu, lz(Fn, lambda x: x.permute(0, 3, 1, 2)), lz(nn.Conv2d, 8, 3, 2), relu),
        "channels_last_2d": seq2d(relu, lz(Fn, lambda x: x.permute(0, 2, 3, 1)), lz(nn.Linear, 4, 3), lz(nn.GELU)),
        "slice": seq1d(relu, lz(Fn, lambda x: x[:, 1:3, 2:-3:2]), lz(nn.Conv1d, 2, 3, 2), relu),
        "chomp": seq1d(relu, lz(nn.Conv1d, 4, 4, 3, padding=4, dilation=2), lz(Fn, lambda x: x[..., :-4]), relu),
        "select": seq1d(relu, lz(Fn, lambda x: x[:, :, -1])),
        "flip_roll": seq1d(relu, lz(Fn, lambda x: x.flip(2).roll(3, 2)), lz(nn.Conv1d, 4, 3, 3), relu),
        "split": seq1d(relu, lz(Fn, lambda x: torch.cat([p * k for k, p in enumerate(x.split(3, 2), 1)], 2)), relu),
        "chunk_gate": seq1d(lz(nn.Conv1d, 4, 6, 3), lz(Fn, lambda x: F.glu(x, 1)), lz(nn.Conv1d, 3, 3, 3)),
        "stack": seq1d(relu, lz(Fn, lambda x: torch.stack([x, x * 2, torch.tanh(x)], 1)), lz(nn.Conv2d, 3, 2, 3)),
        "cat_channels": seq1d(
            lz(Fn, lambda x: torch.cat([x, F.max_pool1d(x, 3, 1, 1)], 1)), lz(nn.BatchNorm1d, 8), relu
        ),
        "cat_twice": seq1d(relu, lz(Fn, lambda x: torch.cat([x, x], 2)), lz(nn.Conv1d, 4, 3, 5), relu),
        "pad_constant": seq1d(relu, lz(nn.ConstantPad1d, (2, 1), 0.0), lz(nn.Conv1d, 4, 3, 4), relu),
        "pad_reflect": seq1d(relu, lz(nn.ReflectionPad1d, (3, 2)), lz(nn.Conv1d, 4, 3, 4), relu),
        "pad_replicate_2d": seq2d(relu, lz(nn.ReplicationPad2d, (3, 2, 1, 0)), lz(nn.Conv2d, 4, 3, 4), relu),
        "repeat": seq1d(relu, lz(Fn, lambda x: x.repeat(1, 2, 1).repeat_interleave(2, 2)), lz(nn.Conv1d, 8, 3, 3)),
        "upsample_nearest": seq1d(relu, lz(nn.Upsample, scale_factor=3), lz(nn.Conv1d, 4, 3, 3), relu),
        "upsample_linear": seq1d(relu, lz(nn.Upsample, scale_factor=2.5, mode="linear"), lz(nn.Conv1d, 4, 3, 3)),
        "upsample_bilinear": seq2d(relu, lz(nn.Upsample, size=(13, 7), mode="bilinear", align_corners=True)),
        "conv_transpose1d": seq1d(relu, lz(nn.ConvTranspose1d, 4, 3, 4, stride=3, padding=1, output_padding=2), relu),
        "conv_transpose_groups": seq1d(relu, lz(nn.ConvTranspose1d, 4, 6, 3, groups=2, dilation=2, bias=False), relu),
        "conv_transpose2d": seq2d(relu, lz(nn.ConvTranspose2d, 4, 3, (2, 3), stride=2), relu),
        "depthwise_wide": seq2d(relu, lz(nn.Conv2d, 4, 12, (3, 2), groups=4, stride=(1, 2), padding=1), relu),
        "copy_function_halo": seq2d(
            lz(Fn, lambda x: x.flip(2)), lz(nn.LeakyReLU, 0.2), lz(nn.Conv2d, 4, 3, 3, padding=1), relu
        ),
        # several values
        "gate_channel": seq1d(relu, lz(Fn, lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True))), lz(nn.Tanh)),
        "gate_space": seq2d(relu, lz(Fn, lambda x: x * torch.sigmoid(x.mean(1, keepdim=True))), lz(nn.Tanh)),
        "divide": seq1d(lz(Fn, lambda x: x / (1 + x.square().sum(1, keepdim=True))), lz(nn.Tanh)),
        "broadcast_add": seq1d(relu, lz(Fn, lambda x: x - x.mean(2, keepdim=True)), lz(nn.Tanh)),
        "matmul": seq1d(lz(Fn, lambda x: x @ x.transpose(1, 2)), lz(nn.Tanh)),
        # reductions
        "mean_over_channels": seq2d(relu, lz(Fn, lambda x: x.mean(1))),
        "sum_two": seq2d(relu, lz(Fn, lambda x: x.sum((1, 3)))),
        "amax": seq1d(lz(Fn, lambda x: x.amax(2))),
        "max_dim": seq1d(lz(Fn, lambda x: x.max(1).values)),
        # norms
        "layer_norm": seq1d(lz(nn.LayerNorm, 16), relu, lz(nn.LayerNorm, (4, 16)), relu),
        "layer_norm_plain": seq1d(lz(nn.LayerNorm, 16, elementwise_affine=False), relu),
        "group_norm": seq1d(lz(nn.GroupNorm, 2, 4), relu, lz(nn.GroupNorm, 4, 4, affine=False), relu),
        "instance_norm": seq2d(lz(nn.InstanceNorm2d, 4, affine=True), relu, lz(nn.InstanceNorm2d, 4), relu),
        "softmax_space": seq1d(lz(nn.Softmax, 2), lz(nn.Conv1d, 4, 3, 3)),
        "log_softmax_channels": seq2d(lz(nn.LogSoftmax, 1), lz(nn.Conv2d, 4, 3, 3)),
        # batch norm, dropout, heads
        "bn_after_conv": seq1d(lz(nn.BatchNorm1d, 4), relu, lz(nn.Conv1d, 4, 5, 3), lz(nn.BatchNorm1d, 5), relu),
        "bn_before_conv": seq1d(relu, lz(nn.BatchNorm1d, 4), lz(nn.Conv1d, 4, 5, 3, padding=1), relu),
        "bn_after_pool": seq1d(relu, lz(nn.MaxPool1d, 2), lz(nn.BatchNorm1d, 4), lz(nn.ELU)),
        "bn_not_affine": seq2d(lz(nn.BatchNorm2d, 4, affine=False), relu),
        "dropout": seq1d(lz(nn.Dropout, 0.5), relu, lz(nn.Dropout1d, 0.3), lz(nn.Identity), lz(nn.AlphaDropout, 0.1)),
    }  # fmt: skip
    opaque: set[str] = set()
    return [Case(name, make, (shape,), opaque=name in opaque) for name, (make, shape) in recipes.items()]


def _whole() -> list[Case]:
    chain, relu = nn.Sequential, nn.ReLU
    no_statistics = partial(nn.BatchNorm1d, track_running_stats=False)
    return [
        Case("linear_only", lambda: nn.Linear(7, 3), ((7,),)),
        Case("linear_nobias", lambda: chain(nn.Linear(7, 5, bias=False), relu(), nn.Linear(5, 1)), ((7,),)),
        Case("linear_axes", lambda: chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), ((3, 4),)),
        Case("bn_linear", lambda: chain(nn.Linear(7, 6), nn.BatchNorm1d(6), relu(), nn.Linear(6, 3)), ((7,),)),
        Case("bn_first", lambda: chain(nn.BatchNorm1d(7), nn.Linear(7, 6), nn.ELU(), nn.Linear(6, 3)), ((7,),)),
        Case("softmax", lambda: chain(nn.Linear(7, 6), relu(), nn.Linear(6, 4), nn.Softmax(1)), ((7,),)),
        Case("log_softmax", lambda: chain(nn.Linear(7, 6), relu(), nn.Linear(6, 4), nn.LogSoftmax(-1)), ((7,),)),
        Case("softmax_axis", lambda: chain(nn.Conv1d(2, 4, 3), nn.Softmax(1)), ((2, 6),)),
        Case("scalar_output", lambda: chain(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)), ((7,),)),
        Case("conv_output", lambda: chain(nn.Conv2d(1, 2, 2), relu(), nn.Conv2d(2, 2, 2)), ((1, 4, 5),)),
        Case("identity", nn.Identity, ((4,),)),
        Case("residual", lambda: Residual1d(nn.Identity()), ((1, 20),)),
        Case("skips_all", SkipsAll, ((6,),)),
        Case("shared_conv", SharedConv, ((3, 12),)),
        Case("two_inputs", TwoInputs, ((1, 10), (3,))),
        Case("weight_norm", weight_normed, ((2, 12),)),
        Case("per_step", PerStep, ((2, 8),)),
        Case("lstm", LstmNet, ((7, 2),), opaque=True),
        Case("resnet1d_cumsum", lambda: Residual1d(CumulativeMean()), ((1, 20),), opaque=True),
        Case("attention", Attention, ((5, 4),)),
        Case("squeeze_excite", SqueezeExcite, ((2, 8),)),
        Case("resnet1d_custom", lambda: Residual1d(CustomBackward()), ((1, 20),), traceable=False),
        Case("mixes_samples", MixesSamples, ((4,),), traceable=False),
        Case("bn_no_statistics", lambda: chain(nn.Linear(4, 5), no_statistics(5)), ((4,),), traceable=False),
        Case("freezes_one", FreezesOne, ((4,),), traceable=False),
        Case("value_branch", ValueBranch, ((4,),), traceable=False),
    ]  # fmt: skip


_BENCH = [
    Case("cnn1d", cnn1d, ((1, 224),), bench=True),
    Case("cnn1d_strided", cnn1d_strided, ((1, 224),), bench=True),
    Case("lenet5", LeNet5, ((1, 28, 28),), bench=True),
    Case("mlp", mlp, ((224,),), bench=True),
    Case("fcn", fcn, ((1, 224),), bench=True),
]

CASES: dict[str, Case] = {case.name: case for case in [*_BENCH, *_small(), *_whole()]}
BENCH: tuple[Case, ...] = tuple(c for c in CASES.values() if c.bench)
SMALL: tuple[Case, ...] = tuple(c for c in CASES.values() if not c.bench)
TRACEABLE: tuple[Case, ...] = tuple(c for c in CASES.values() if c.traceable)
