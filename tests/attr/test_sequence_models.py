"""Models of regulatory genomics, cut small: they have a Program, and DeepLIFT/SHAP on the kernels adds up.

Where bpnet-lite is installed its own networks are tried too; the others are written here in the published shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern
from benchmarks.sequences import BPNet, Residual, basset
from gradkern.attr import DeepLiftShap

LENGTH, R = 64, 2


class Controlled(nn.Module):
    """BPNet with control tracks beside the sequence: they join before the profile and the counts heads."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv1d(4, 8, 7, padding=3), nn.ReLU(), Residual(8, 2), Residual(8, 4))
        self.profile, self.total = nn.Conv1d(8 + 2, 2, 9, padding=4), nn.Linear(8 + 1, 1)
        self.counts = counts

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        trunk = self.trunk(x)
        if self.counts:
            return self.total(torch.cat([trunk.mean(2), torch.log(control.sum((1, 2)) + 1)[:, None]], 1))
        return self.profile(torch.cat([trunk, control], 1)).flatten(1)


class ChromBPNet(nn.Module):
    """A bias model and an accessibility model: profiles are added, counts in the log-sum-exp (ChromBPNet)."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.bias, self.access = BPNet(6, 2, 32, pooled=counts), BPNet(8, 3, 32, pooled=counts)
        self.counts = counts

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.bias(x), self.access(x)
        return torch.logsumexp(torch.cat([a, b], 1), 1, keepdim=True) if self.counts else a + b


class Borzoi(nn.Module):
    """A trunk as of Enformer and Borzoi: convolutions with pools, attention, and a way back up with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 16, 7, padding=3)
        self.tower = nn.Sequential(nn.BatchNorm1d(16), nn.GELU(), nn.Conv1d(16, 16, 5, padding=2))
        self.pool, self.norm = nn.MaxPool1d(2), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Conv1d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        y = self.pool(skip + self.tower(skip))
        tokens = self.norm(y.mT)
        y = y + self.attention(tokens, tokens, tokens, need_weights=False)[0].mT
        up = nn.functional.interpolate(y, scale_factor=2.0, mode="nearest") + skip
        return nn.functional.softplus(self.head(nn.functional.gelu(up))).mean(2)


def bpnetlite(part: int) -> nn.Module:
    package = pytest.importorskip("bpnetlite.bpnet")

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = package.BPNet(n_filters=8, n_layers=3, n_outputs=1, n_control_tracks=0, trimming=16)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[part].flatten(1)

    return Part()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bpnet-profile": lambda: BPNet(8, 3, 32),
    "bpnet-counts": lambda: BPNet(8, 3, 32, pooled=True),
    "bpnet-control-profile": lambda: Controlled(False),
    "bpnet-control-counts": lambda: Controlled(True),
    "chrombpnet-profile": lambda: ChromBPNet(False),
    "chrombpnet-counts": lambda: ChromBPNet(True),
    "basset": lambda: basset(LENGTH, 5),
    "borzoi-like": Borzoi,
    "bpnet-lite-profile": lambda: bpnetlite(0),
    "bpnet-lite-counts": lambda: bpnetlite(1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_attributions_add_up_on_kernels(name: str) -> None:
    torch.manual_seed(0)
    net = MODELS[name]().double().eval()
    x, refs = (
        nn.functional.one_hot(torch.randint(4, (*shape, LENGTH)), 4).transpose(-1, -2).double()
        for shape in ((2,), (2, R))
    )
    control = (torch.rand(2, 2, LENGTH, dtype=torch.float64),) if isinstance(net, Controlled) else ()
    assert gradkern.prepare(net, (x, *control)) is not None, "the model has no Program"
    maps = DeepLiftShap(net, engine="kernel").attribute_all(x, refs, additional_forward_args=control or None)
    with torch.no_grad():
        before = net(refs.flatten(0, 1), *(c.repeat_interleave(R, 0) for c in control))
        change = net(x, *control) - before.view(2, R, -1).mean(1)
    torch.testing.assert_close(maps.sum((2, 3)), change)
