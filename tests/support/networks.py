"""Networks that are commonly explained, from their published descriptions, small and in full size.

`NETWORKS` has every one of them as a `tests.cases.Case` (plus what the benchmark needs to know).  The small ones have
the structure of the full ones with fewer channels and shorter inputs, so that the float64 oracle is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradkern.ir.program import Shape
from tests.support.case import Case
from tests.support.modules import LeNet5, fcn

# ---------------------------------------------------------------------------------------------------------------
# Time series


def fcn_of(width: int) -> nn.Module:
    """FCN with ``width``, ``2·width`` and ``width`` channels (Wang et al. 2017)."""
    layers: list[nn.Module] = []
    for a, b, size in ((1, width, 8), (width, 2 * width, 5), (2 * width, width, 3)):
        layers += [nn.Conv1d(a, b, size, padding="same"), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 5))


class InceptionBlock(nn.Module):
    """Bottleneck, three long kernels side by side, and a max pool with a convolution (Fawaz et al. 2020)."""

    def __init__(self, channels: int, filters: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(channels, filters, 1, bias=False) if channels > 1 else nn.Identity()
        width = filters if channels > 1 else channels
        self.convs = nn.ModuleList(nn.Conv1d(width, filters, k, padding=k // 2, bias=False) for k in kernels)
        self.pool = nn.MaxPool1d(3, stride=1, padding=1)
        self.pointwise = nn.Conv1d(channels, filters, 1, bias=False)
        self.bn = nn.BatchNorm1d(filters * (len(kernels) + 1))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, L] -> [N, 4·filters, L]
        narrow = self.bottleneck(x)
        branches = [conv(narrow) for conv in self.convs] + [self.pointwise(self.pool(x))]
        return F.relu(self.bn(torch.cat(branches, dim=1)))


class InceptionTime(nn.Module):
    """Six inception blocks, a residual every third (Fawaz et al. 2020)."""

    def __init__(self, classes: int, filters: int = 32, kernels: Sequence[int] = (39, 19, 9), depth: int = 6) -> None:
        super().__init__()
        wide = filters * (len(kernels) + 1)
        self.blocks = nn.ModuleList(InceptionBlock(1 if i == 0 else wide, filters, kernels) for i in range(depth))
        self.shortcuts = nn.ModuleList(
            nn.Sequential(nn.Conv1d(1 if i == 2 else wide, wide, 1, bias=False), nn.BatchNorm1d(wide))
            for i in range(2, depth, 3)
        )
        self.head = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, L] -> [N, classes]
        start = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 3 == 2:
                x = F.relu(x + self.shortcuts[i // 3](start))
                start = x
        return self.head(x.mean(-1))


class WangBlock(nn.Module):
    """Three convolutions (8, 5, 3) and a shortcut (Wang et al. 2017)."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        sizes = [(channels, 8), (filters, 5), (filters, 3)]
        self.convs = nn.ModuleList(nn.Conv1d(c, filters, k, padding="same") for c, k in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(filters) for _ in sizes)
        own = nn.Identity() if channels == filters else nn.Conv1d(channels, filters, 1)
        self.shortcut = nn.Sequential(own, nn.BatchNorm1d(filters))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.convs[0](x)))
        y = F.relu(self.norms[1](self.convs[1](y)))
        return F.relu(self.norms[2](self.convs[2](y)) + self.shortcut(x))


class ResNet1D(nn.Module):
    def __init__(self, classes: int, filters: int = 64, channels: int = 1) -> None:
        super().__init__()
        widths = [channels, filters, 2 * filters, 2 * filters]
        self.blocks = nn.Sequential(*[WangBlock(a, b) for a, b in pairwise(widths)])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, L] -> [N, classes]
        return self.head(self.blocks(x).mean(-1))


class Chomp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    """Two weight-normalised dilated causal convolutions and a shortcut (Bai et al. 2018)."""

    def __init__(self, channels: int, filters: int, kernel: int, dilation: int) -> None:
        super().__init__()
        norm, pad = nn.utils.parametrizations.weight_norm, (kernel - 1) * dilation
        layers: list[nn.Module] = []
        for c in (channels, filters):
            layers += [norm(nn.Conv1d(c, filters, kernel, padding=pad, dilation=dilation)), Chomp(pad), nn.ReLU()]
            layers += [nn.Dropout(0.2)]
        self.net = nn.Sequential(*layers)
        self.shortcut = nn.Identity() if channels == filters else nn.Conv1d(channels, filters, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.net(x) + self.shortcut(x))


class TCN(nn.Module):
    def __init__(self, classes: int, channels: int = 1, filters: int = 25, levels: int = 8, kernel: int = 7) -> None:
        super().__init__()
        widths = [channels] + [filters] * levels
        self.blocks = nn.Sequential(*[TemporalBlock(a, b, kernel, 2**i) for i, (a, b) in enumerate(pairwise(widths))])
        self.head = nn.Linear(filters, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, L] -> [N, classes]
        return self.head(self.blocks(x)[:, :, -1])


class SqueezeExcite1d(nn.Module):
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, channels // reduction, bias=False)
        self.up = nn.Linear(channels // reduction, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool1d(x, 1).flatten(1)))))
        return x * gate.unsqueeze(-1).expand_as(x)


class LstmFcn(nn.Module):
    """LSTM-FCN (Karim et al. 2018); with ``squeeze`` MLSTM-FCN (2019)."""

    def __init__(
        self, channels: int, length: int, classes: int, cells: int = 8, widths: Sequence[int] = (128, 256, 128),
        squeeze: int = 0, shuffle: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shuffle = shuffle
        self.lstm = nn.LSTM(length if shuffle else channels, cells, batch_first=True)
        layers: list[nn.Module] = []
        for k, (a, b, size) in enumerate(zip((channels, *widths), widths, (8, 5, 3), strict=False)):
            layers += [nn.Conv1d(a, b, size, padding="same"), nn.BatchNorm1d(b), nn.ReLU()]
            if squeeze and k < 2:
                layers += [SqueezeExcite1d(b, squeeze)]
        self.convs = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] + cells, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, L] -> [N, classes]
        state, _ = self.lstm(x if self.shuffle else x.transpose(1, 2))
        features = self.convs(x).mean(-1)
        return self.head(torch.cat([F.dropout(state[:, -1], 0.8, self.training), features], dim=1))


# ---------------------------------------------------------------------------------------------------------------
# EEG


def eegnet(chans: int, times: int, classes: int, f1: int = 8, d: int = 2, kernel: int = 64) -> nn.Module:
    """EEGNet-8,2 (Lawhern et al. 2018): temporal, depthwise spatial and separable convolutions."""
    f2 = f1 * d
    body = [
        nn.Conv2d(1, f1, (1, kernel), padding="same", bias=False), nn.BatchNorm2d(f1),
        nn.Conv2d(f1, f2, (chans, 1), groups=f1, bias=False), nn.BatchNorm2d(f2), nn.ELU(),
        nn.AvgPool2d((1, 4)), nn.Dropout(0.5),
        nn.Conv2d(f2, f2, (1, 16), padding="same", groups=f2, bias=False), nn.Conv2d(f2, f2, 1, bias=False),
        nn.BatchNorm2d(f2), nn.ELU(), nn.AvgPool2d((1, 8)), nn.Dropout(0.5), nn.Flatten(),
    ]  # fmt: skip
    return nn.Sequential(*body, nn.Linear(f2 * (times // 32), classes))


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class SafeLog(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.clamp(x, min=1e-6))


def shallow(chans: int, times: int, classes: int, filters: int = 40, pool: tuple[int, int] = (75, 15)) -> nn.Module:
    """ShallowFBCSPNet (Schirrmeister et al. 2017)."""
    positions = (times - 24 - pool[0]) // pool[1] + 1
    return nn.Sequential(
        nn.Conv2d(1, filters, (1, 25)), nn.Conv2d(filters, filters, (chans, 1), bias=False), nn.BatchNorm2d(filters),
        Square(), nn.AvgPool2d((1, pool[0]), stride=(1, pool[1])), SafeLog(), nn.Dropout(0.5),
        nn.Conv2d(filters, classes, (1, positions)), nn.Flatten(),
    )  # fmt: skip


def deep4(chans: int, times: int, classes: int, filters: int = 25, kernel: int = 10) -> nn.Module:
    """Deep4Net (Schirrmeister et al. 2017): convolution, ELU and max pool, four times."""
    layers: list[nn.Module] = [
        nn.Conv2d(1, filters, (1, kernel)), nn.Conv2d(filters, filters, (chans, 1), bias=False),
        nn.BatchNorm2d(filters), nn.ELU(), nn.MaxPool2d((1, 3)),
    ]  # fmt: skip
    t, width = (times - kernel + 1) // 3, filters
    for _ in range(3):
        layers += [nn.Dropout(0.5), nn.Conv2d(width, 2 * width, (1, kernel), bias=False)]
        layers += [nn.BatchNorm2d(2 * width), nn.ELU(), nn.MaxPool2d((1, 3))]
        t, width = (t - kernel + 1) // 3, 2 * width
    return nn.Sequential(*layers, nn.Conv2d(width, classes, (1, t)), nn.Flatten())


# ---------------------------------------------------------------------------------------------------------------
# Genomics


class BPNet(nn.Module):
    """A dilated residual stack with a profile and a count head (Avsec et al. 2021, as in bpnet-lite).

    The heads' results are joined: ``length`` numbers per strand and one count.
    """

    def __init__(self, filters: int = 64, layers: int = 8, strands: int = 1, trim: int = 0) -> None:
        super().__init__()
        self.trim = trim
        self.first = nn.Conv1d(4, filters, 21, padding=10)
        self.stack = nn.ModuleList(
            nn.Conv1d(filters, filters, 3, padding=2**i, dilation=2**i) for i in range(1, layers + 1)
        )
        self.profile = nn.Conv1d(filters, strands, 75, padding=37)
        self.count = nn.Linear(filters, 1)

    def forward(self, x: Tensor) -> Tensor:  # [N, 4, L] -> [N, strands·(L - 2 trim) + 1]
        x = F.relu(self.first(x))
        for conv in self.stack:
            x = x + F.relu(conv(x))
        profile = self.profile(x)[:, :, self.trim : x.shape[-1] - self.trim]
        count = self.count(x[:, :, self.trim - 37 if self.trim > 37 else 0 :].mean(-1))
        return torch.cat([profile.flatten(1), count], dim=1)


def basset(length: int, tracks: int, widths: Sequence[int], hidden: int, bottleneck: int) -> nn.Module:
    """A DeepSEA/Basset-like network: three convolutions with pools, two linear layers, a sigmoid per track."""
    layers: list[nn.Module] = []
    c, n = 4, length
    for w, k, p in zip(widths, (19, 11, 7), (3, 4, 4), strict=True):
        layers += [nn.Conv1d(c, w, k, padding=k // 2), nn.BatchNorm1d(w), nn.ReLU(), nn.MaxPool1d(p)]
        c, n = w, n // p
    layers += [nn.Flatten(), nn.Linear(c * n, hidden), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(hidden, bottleneck), nn.ReLU(), nn.Linear(bottleneck, tracks), nn.Sigmoid())


# ---------------------------------------------------------------------------------------------------------------
# Sound


class FeatureEncoder(nn.Module):
    """wav2vec 2.0's convolutional feature encoder (Baevski et al. 2020): group norm in the first layer, GELU."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (k, s) in enumerate([(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]):
            layers += [nn.Conv1d(1 if i == 0 else width, width, k, stride=s, bias=False)]
            layers += [nn.GroupNorm(width, width)] if i == 0 else []
            layers += [nn.GELU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, L] -> [N, T, width]
        return self.layers(x).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------
# Images


def alexnet(classes: int, size: int, widths: Sequence[int] = (64, 192, 384, 256, 256), hidden: int = 512) -> nn.Module:
    """AlexNet's layers for small images (Krizhevsky 2012, with the kernels that fit 32×32)."""
    a, b, c, d, e = widths
    side = size // 8
    return nn.Sequential(
        nn.Conv2d(3, a, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(a, b, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(c, d, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(d, e, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(), nn.Linear(e * side * side, hidden), nn.ReLU(inplace=True),
        nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes),
    )  # fmt: skip


def vgg11(classes: int, size: int, width: int = 64, hidden: int = 4096) -> nn.Module:
    """VGG-11 (Simonyan and Zisserman 2015)."""
    layers: list[nn.Module] = []
    c = 3
    for w in (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"):
        if w == "M":
            layers += [nn.MaxPool2d(2)]
        else:
            layers += [nn.Conv2d(c, int(w) * width, 3, padding=1), nn.ReLU(inplace=True)]
            c = int(w) * width
    features = 8 * width * (size // 32) ** 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(True), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, classes),
    )  # fmt: skip


class BasicBlock(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or channels != filters:
            self.down = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


def resnet18(classes: int, width: int = 64) -> nn.Module:
    """ResNet-18 (He et al. 2016)."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2, 1),
    ]
    c = width
    for w, stride in zip((1, 2, 4, 8), (1, 2, 2, 2), strict=True):
        layers += [BasicBlock(c, w * width, stride), BasicBlock(w * width, w * width, 1)]
        c = w * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D]
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) with a class token."""

    def __init__(self, classes: int, size: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.5)
        self.layers = nn.Sequential(*[EncoderLayer(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, size, size] -> [N, classes]
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


class PatchTransformer(nn.Module):
    """A transformer over patches of a series (PatchTST, Nie et al. 2023), made of torch's own encoder."""

    def __init__(self, classes: int, length: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv1d(1, width, patch, stride=patch // 2)
        tokens = (length - patch) // (patch // 2) + 1
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.5)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, length] -> [N, classes]
        return self.head(self.encoder(self.patches(x).transpose(1, 2) + self.position).mean(1))


# ---------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Network:
    """One network in two sizes.

    ``seeds`` outputs are asked for in the full size (None: all of them), ``samples`` is its N in the benchmark.
    """

    name: str
    small: Case
    full: Case
    seeds: int | None = None
    samples: int = 64
    floor: float = 0.95  # the least speed, relative to the best peer


def pair(name: str, small: Callable[[], nn.Module], small_shape: Shape, full: Callable[[], nn.Module],
         shape: Shape, **more: object) -> Network:  # fmt: skip
    return Network(name, Case(f"{name}_small", small, (small_shape,)), Case(name, full, (shape,)), **more)  # type: ignore[arg-type]


_ALL = [
    pair("inceptiontime", lambda: InceptionTime(3, 4, (9, 5, 3)), (1, 24), lambda: InceptionTime(5), (1, 224),
         samples=32, floor=2.0),
    pair("resnet1d", lambda: ResNet1D(3, 6), (1, 24), lambda: ResNet1D(5), (1, 224), samples=32, floor=2.0),
    pair("fcn", lambda: fcn_of(4), (1, 20), fcn, (1, 224), samples=64),
    pair("tcn", lambda: TCN(3, 2, 6, 3, 3), (2, 30), lambda: TCN(10), (1, 784), samples=32, floor=2.0),
    pair("eegnet", lambda: eegnet(5, 64, 3, 4, 2, 16), (1, 5, 64), lambda: eegnet(22, 256, 4), (1, 22, 256), floor=2.0),
    pair("deep4", lambda: deep4(4, 250, 3, 5, 4), (1, 4, 250), lambda: deep4(22, 500, 4), (1, 22, 500), samples=32),
    pair("shallow", lambda: shallow(4, 60, 3, 6, (12, 4)), (1, 4, 60), lambda: shallow(22, 500, 4), (1, 22, 500)),
    pair("bpnet", lambda: BPNet(6, 3), (4, 90), lambda: BPNet(64, 8), (4, 1000), seeds=4, samples=16, floor=2.0),
    pair("basset", lambda: basset(96, 25, (6, 5, 4), 12, 7), (4, 96),
         lambda: basset(600, 919, (300, 200, 200), 1000, 240), (4, 600), samples=8),
    pair("lstm_fcn", lambda: LstmFcn(1, 20, 3, 4, (6, 8, 6), shuffle=False), (1, 20), lambda: LstmFcn(1, 224, 5),
         (1, 224)),
    pair("mlstm_fcn", lambda: LstmFcn(3, 20, 3, 4, (8, 12, 6), squeeze=4), (3, 20),
         lambda: LstmFcn(6, 100, 5, squeeze=16), (6, 100)),
    pair("wav2vec2", lambda: FeatureEncoder(6), (1, 800), lambda: FeatureEncoder(128), (1, 4000), seeds=16, samples=8),
    pair("lenet5", lambda: nn.Sequential(nn.Conv2d(1, 3, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                         nn.Linear(48, 4)), (1, 8, 8), LeNet5, (1, 28, 28), samples=512),
    pair("alexnet", lambda: alexnet(4, 16, (4, 6, 8, 6, 6), 12), (3, 16, 16), lambda: alexnet(10, 32), (3, 32, 32),
         samples=16),
    pair("vgg11", lambda: vgg11(4, 32, 2, 10), (3, 32, 32), lambda: vgg11(10, 32, hidden=512), (3, 32, 32), samples=8),
    pair("resnet18", lambda: resnet18(4, 3), (3, 32, 32), lambda: resnet18(1000), (3, 64, 64), seeds=10, samples=8),
    pair("patchtst", lambda: PatchTransformer(4, 40, 8, 8, 2, 2), (1, 40),
         lambda: PatchTransformer(5, 336, 16, 64, 3, 4), (1, 336), samples=32),
    pair("vit", lambda: ViT(4, 8, 4, 8, 2, 2), (3, 8, 8), lambda: ViT(10, 32, 4, 64, 4, 4), (3, 32, 32), samples=32),
]  # fmt: skip

NETWORKS: dict[str, Network] = {n.name: n for n in _ALL}
