"""Operations for tests of DeepLift's rules: functions of one or three values ``[N, 4, 6]``, and networks of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradkern.attr.rules import eager
from gradkern.dispatch.targets import Seeds

SHAPE = (4, 6)


def hand_written_norm(x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + 1e-5)


def hand_written_softmax(x: Tensor) -> Tensor:
    e = (x - x.max(-1, keepdim=True)[0]).exp()
    return e / e.sum(-1, keepdim=True)


def causal(q: Tensor, k: Tensor, v: Tensor, mask: float = -math.inf) -> Tensor:
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.transpose(-1, -2)).masked_fill(later, mask), -1) @ v


def volume(x: Tensor) -> Tensor:
    """Three spatial axes."""
    return x.reshape(-1, 1, 2, 2, 6)


#: Functions of one value.
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in ("relu", "elu", "gelu", "silu", "mish", "softplus", "softsign", "tanhshrink",
                                           "softshrink", "hardshrink", "hardswish", "hardsigmoid", "logsigmoid", "selu",
                                           "leaky_relu", "relu6", "hardtanh", "rrelu", "celu")},
    **{name: getattr(torch, name) for name in ("tanh", "sigmoid", "square", "exp", "expm1", "erf", "sin", "cos", "abs",
                                               "sinh", "asinh", "atan", "sign", "floor", "round", "erfc", "sinc")},
    "threshold": lambda x: F.threshold(x, 0.1, 0.5),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp_min": lambda x: x.clamp(min=0.1),
    "log": lambda x: (x.abs() + 1).log(),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
    "reciprocal": lambda x: 1 / (x.abs() + 0.1),
    "power": lambda x: (x.abs() + 0.1) ** 1.7,
    "cube": lambda x: x**3,
    "prelu": lambda x: F.prelu(x, torch.full((4,), 0.3, dtype=x.dtype)),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "layer_norm_2d": lambda x: F.layer_norm(x, (4, 6)),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": lambda x: F.instance_norm(x),
    "hand_written_norm": hand_written_norm,
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize_1": lambda x: F.normalize(x, p=1.0, dim=-1),
    "norm_3": lambda x: x / x.norm(p=3, dim=-1, keepdim=True),
    "norm_inf": lambda x: x / x.norm(p=math.inf, dim=-1, keepdim=True),
    "std": lambda x: x / x.std(-1, keepdim=True),
    "var": lambda x: x + x.var((1, 2), keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "softmax_rows": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmin": lambda x: F.softmin(x, -1),
    "hand_written_softmax": hand_written_softmax,
    "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
    "logsumexp_all": lambda x: x + x.logsumexp((1, 2), keepdim=True),
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "max_pool1d": lambda x: F.max_pool1d(x, 3, 1, 1),
    "max_pool2d": lambda x: F.max_pool2d(x.unsqueeze(1), 3, 1, 1).squeeze(1),
    "max_pool3d": lambda x: F.max_pool3d(volume(x), 3, 1, 1).reshape(-1, 4, 6),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 3).repeat(1, 1, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x.unsqueeze(1), (4, 3)).squeeze(1).repeat(1, 1, 2),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(volume(x), (2, 2, 3)).reshape(-1, 4, 3).repeat(1, 1, 2),
    "lp_pool": lambda x: F.lp_pool1d(x, 2.0, 3, 1).repeat(1, 1, 2)[..., :6],
    "max_dim": lambda x: x - x.max(-1, keepdim=True)[0],
    "min_dim": lambda x: x - x.min(1, keepdim=True)[0],
    "amax": lambda x: x * x.amax((1, 2), keepdim=True),
    "amin": lambda x: x - x.amin(-1, keepdim=True),
    "max_of_zero": lambda x: torch.max(x, torch.zeros_like(x)),
    "where_itself": lambda x: torch.where(x > 0.1, x, 0.1 * x),
    "mask": lambda x: x * (x > 0).to(x.dtype),
    "masked_fill": lambda x: x.masked_fill(x < -0.3, 0.2),
    "prod": lambda x: x * x.prod(-1, keepdim=True),
    "cumprod": lambda x: x.cumprod(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "glu": lambda x: F.glu(x, 1).repeat(1, 2, 1),
    "swish_by_hand": lambda x: x * torch.sigmoid(1.7 * x),
    "flip": lambda x: x.flip(-1),
    "pad": lambda x: F.pad(x, (1, 1))[..., :6],
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="linear")[..., 3:9],
}  # fmt: skip

#: Functions of three values.
TERNARY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mul": lambda a, b, c: a * b * c,
    "div": lambda a, b, c: a / (b * b + 1) + c,
    "matmul": lambda a, b, c: a @ b.transpose(1, 2) @ c,
    "bmm": lambda a, b, c: torch.bmm(torch.bmm(a, b.transpose(1, 2)), c),
    "einsum_2": lambda a, b, c: torch.einsum("nij,nkj->nik", a, b) @ c,
    "einsum_3": lambda a, b, c: torch.einsum("nij,nkj,nkl->nil", a, b, c),
    "bilinear": lambda a, b, c: F.bilinear(a, b, torch.linspace(-1, 1, 216, dtype=a.dtype).view(6, 6, 6)) + c,
    "maximum": lambda a, b, c: torch.maximum(a, b) * c,
    "minimum": lambda a, b, c: torch.minimum(a, b) + c,
    "where": lambda a, b, c: torch.where(a > 0, b, c),
    "where_and": lambda a, b, c: torch.where((a > 0) & (b > 0), c, a),
    "gate": lambda a, b, c: a * (b > c),
    "attention": lambda a, b, c: F.scaled_dot_product_attention(a, b, c),
    "causal_attention": lambda a, b, c: F.scaled_dot_product_attention(a, b, c, is_causal=True),
    "masked_attention": causal,
    "attention_masked_by_large_numbers": lambda a, b, c: causal(a, b, c, torch.finfo(torch.float32).min),
    "atan2": lambda a, b, c: torch.atan2(a, b + 3) + c,
    "hypot": lambda a, b, c: torch.hypot(a, b) + c,
    "logaddexp": lambda a, b, c: torch.logaddexp(a, b) + c,
    "power": lambda a, b, c: (a.abs() + 1) ** b + c,
    "lerp": torch.lerp,
    "addcmul": torch.addcmul,
    "addcdiv": lambda a, b, c: torch.addcdiv(a, b, c.abs() + 1),
    "cosine_similarity": lambda a, b, c: F.cosine_similarity(a, b, -1).unsqueeze(-1) * c,
    "cdist": lambda a, b, c: torch.cdist(a, b) @ c,
    "pairwise_distance": lambda a, b, c: F.pairwise_distance(a, b).unsqueeze(-1) * c,
}

#: Modules from ``[N, 4, 6]`` to ``[N, 4, 6]``.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(6, 6, batch_first=True),
    "lstm_both_ways": lambda: nn.LSTM(6, 3, 2, batch_first=True, bidirectional=True),
    "gru": lambda: nn.GRU(6, 6, batch_first=True),
    "rnn": lambda: nn.RNN(6, 6, batch_first=True),
    "transformer": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
    "conv1d": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "group_norm": lambda: nn.GroupNorm(2, 4),
}

#: Operations that have no rule, which needs a warning.
UNRULED: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda x: x.sort(-1)[0],
    "median": lambda x: x.median(-1)[0],
    "topk": lambda x: x.topk(2, -1)[0],
}


class Mixed(nn.Module):
    """Linear layers around operations: ``[N, 4, 6] -> [N, 3]``."""

    def __init__(self, *names: str) -> None:
        """``names``: keys of the tables above, each with its table's name in front, as ``"unary:relu"``."""
        super().__init__()
        self.names = names
        self.linear = nn.ModuleList(nn.ModuleList(nn.Linear(6, 6) for _ in range(3)) for _ in names)
        self.inner = nn.ModuleDict({str(k): MODULES[name[7:]]() for k, name in enumerate(names) if name[0] == "m"})
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        for k, (name, (p, q, r)) in enumerate(zip(self.names, self.linear, strict=True)):
            kind, _, key = name.partition(":")
            if kind == "ternary":
                x = TERNARY[key](p(x), q(x), r(x))
            elif kind == "unary":
                x = UNARY[key](p(x))
            else:
                y = self.inner[str(k)](p(x))
                x = y[0] if isinstance(y, tuple) else y
        return self.last(x.flatten(1))


OPERATIONS = [f"unary:{k}" for k in UNARY] + [f"ternary:{k}" for k in TERNARY] + [f"module:{k}" for k in MODULES]


def ends(seed: int, n: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs and references; some of their numbers are equal."""
    generator = torch.Generator().manual_seed(seed)
    x, r = torch.randn(2, n, *SHAPE, generator=generator, dtype=torch.float64)
    r[0, 0] = x[0, 0]
    return x, r


def by_tape(model, x, r):
    """Multipliers of every output, ``[N, C, *in]``."""
    every = lambda n, out: Seeds(out[0], out, None)  # noqa: E731
    return eager.multipliers(model, (x,), (r,), (), every, 1e-10)[0][0]


def incomplete(model, multipliers, x, r):
    """The largest error of the sum, relative to the sum of the contributions' sizes."""
    contributions = multipliers * (x - r).unsqueeze(1)
    with torch.no_grad():
        change = model(x) - model(r)
    size = contributions.abs().flatten(2).sum(2).clamp(min=1.0)
    return float(((contributions.flatten(2).sum(2) - change).abs() / size).max())
