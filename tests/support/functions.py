"""torch's own functions for the names in `gradkern.ir.functions.FUNCTIONS`, and arguments for them."""

from __future__ import annotations

import torch
from torch import nn

ARGUMENTS = {
    "leaky_relu": (0.2,),
    "elu": (0.7, 1.1, 1.3),
    "affine": (-0.5, 2.0),
    "softplus": (2.0, 3.0),
    "hardtanh": (-1.0, 2.0),
    "clamp": (-1.0, 2.0),
    "power": (3.0,),
    "hardshrink": (1.0,),
    "threshold": (1.0, -2.0),
    "remainder": (0.7,),
}
ORIGINALS = {
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "elu": torch.ops.aten.elu.default,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "affine": lambda x, a, b: x * a + b,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "softplus": nn.functional.softplus,
    "hardtanh": nn.functional.hardtanh,
    "clamp": torch.clamp,
    "hardswish": nn.functional.hardswish,
    "hardsigmoid": nn.functional.hardsigmoid,
    "square": torch.square,
    "negative_part": lambda x: nn.functional.prelu(x, x.new_ones(1)) - torch.relu(x),  # what PReLU scales
    "power": torch.pow,
    **{name: getattr(torch, name) for name in ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal")},
    **{name: getattr(torch, name) for name in ("abs", "erf", "sin", "cos", "sinh", "cosh", "atan", "asin", "acos")},
    **{name: getattr(torch, name) for name in ("asinh", "atanh", "sign", "floor", "ceil", "round", "trunc")},
    "hardshrink": nn.functional.hardshrink,
    "threshold": nn.functional.threshold,
    "remainder": torch.remainder,
}
