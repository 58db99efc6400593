"""Networks of regulatory genomics and of signals, cut small: ``python -m tests.support.sequence_models``.

Prints which of them run on kernels, and why not where they do not.  Packages that are not installed are left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import gradkern
from benchmarks.sequences import BPNet, Residual, basset
from benchmarks.zoo import stubs

LENGTH = 64


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
    package = importlib.import_module("bpnetlite.bpnet")

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


def signal_models() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Networks of other packages for EEG and speech: name, how it is made, the shape of a sample."""

    def braindecode(name: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            net: nn.Module = getattr(importlib.import_module("braindecode.models"), name)(
                n_chans=8, n_outputs=4, n_times=512
            )
            return net

        return make

    def wav2vec2() -> nn.Module:
        package = importlib.import_module("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        convolutions = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
        more = {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
        config = package.Wav2Vec2Config(**sizes, **convolutions, **more, classifier_proj_size=16, num_labels=4)

        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = package.Wav2Vec2ForSequenceClassification(config)

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x).logits

        return Logits()

    for name in ("EEGNet", "ShallowFBCSPNet", "Deep4Net", "EEGConformer"):
        yield f"braindecode: {name}", braindecode(name), (8, 512)
    yield "transformers: wav2vec2", wav2vec2, (640,)


def row(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> str:
    torch.manual_seed(0)
    try:
        net = make().eval()
    except Exception as error:
        return f"| {name} | not tried: {error} | |"
    x = torch.rand(2, *shape)
    more = (torch.rand(2, 2, LENGTH),) if isinstance(net, Controlled) else ()
    try:
        plan = gradkern.explain(net, (x, *more) if more else x, engine="kernel", show=False)
    except Exception as error:
        return f"| {name} | no | {str(error).splitlines()[0]} |"
    steps = [s for s in plan.steps if not s.implementation.fused]
    why = sorted({s.why for s in steps})
    why = why or ([str(plan).splitlines()[0]] if not plan.steps else [])
    return f"| {name} | {plan.fused_share:.0%} | {'; '.join(why)} |"


def main() -> None:
    stubs.install()  # packages that the others import and do not need
    print("| model | fused | the rest |\n|---|---|---|")
    for name, make in MODELS.items():
        print(row(name, make, (4, LENGTH)), flush=True)
    for name, make, shape in signal_models():
        print(row(name, make, shape), flush=True)


if __name__ == "__main__":
    main()
