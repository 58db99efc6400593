"""Elementwise functions and their derivatives, with torch's rule at every kink and at NaN.

`FUNCTIONS` maps a `Scale`'s name to ``f(x, *params)`` and ``df(x, y, *params)``.  A derivative of dtype bool is a
mask: the cotangent passes or becomes exactly zero, even where it is not finite, as torch's own masks do.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Function(NamedTuple):
    """``f(x, *params) -> y`` and ``df(x, y, *params) -> dy/dx``, elementwise on tensors of any shape."""

    f: Callable[..., Tensor]
    df: Callable[..., Tensor]


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Two numbers by a condition, in the dtype of ``like`` (for plain numbers `torch.where` would return float32)."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def _elu_slope(x: Tensor, y: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    left = (x * input_scale).exp() * (alpha * scale * input_scale)
    return torch.where(x > 0, scale, left)


def _elu(x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    return torch.where(x <= 0, torch.expm1(x * input_scale) * (alpha * scale), x * scale)


def _gelu_slope(x: Tensor, y: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density


def _gelu_tanh_slope(x: Tensor, y: Tensor) -> Tensor:
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)


def _silu_slope(x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _softplus_slope(x: Tensor, y: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta))


def _hardswish_slope(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 3 + 0.5))


def _zero(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _mish_slope(x: Tensor, y: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * torch.sigmoid(x) * (1 - t * t)


_SIXTH = struct.unpack("f", struct.pack("f", 1 / 6))[0]  # torch rounds its 1/6 to float32, even for float64

#: ReLUs of attribution rules (guided backpropagation, deconvolution), which send no negative cotangent back.
RECTIFYING = frozenset({"guided_relu", "open_relu"})

FUNCTIONS: dict[str, Function] = {
    "relu": Function(torch.relu, lambda x, y: ~(y <= 0)),
    "leaky_relu": Function(F.leaky_relu, lambda x, y, slope: _either(x > 0, 1.0, slope, x)),
    "elu": Function(_elu, _elu_slope),
    "guided_relu": Function(torch.relu, lambda x, y: ~(y <= 0)),
    "open_relu": Function(torch.relu, lambda x, y: torch.ones_like(x, dtype=torch.bool)),
    "tanh": Function(torch.tanh, lambda x, y: 1 - y * y),
    "sigmoid": Function(torch.sigmoid, lambda x, y: y * (1 - y)),
    "affine": Function(lambda x, a, b: a * x + b, lambda x, y, a, b: torch.full_like(x, a)),
    "gelu": Function(F.gelu, _gelu_slope),
    "gelu_tanh": Function(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_slope),
    "silu": Function(F.silu, _silu_slope),
    "mish": Function(F.mish, _mish_slope),
    "softplus": Function(lambda x, beta, threshold: F.softplus(x, beta, threshold), _softplus_slope),
    "hardtanh": Function(F.hardtanh, lambda x, y, low, high: (x > low) & (x < high)),
    "clamp": Function(torch.clamp, lambda x, y, low, high: (x >= low) & (x <= high)),
    "hardswish": Function(F.hardswish, _hardswish_slope),
    "hardsigmoid": Function(F.hardsigmoid, lambda x, y: _either((x > -3) & (x < 3), _SIXTH, 0.0, x)),
    "square": Function(torch.square, lambda x, y: 2 * x),
    "power": Function(torch.pow, lambda x, y, p: p * x ** (p - 1)),
    "negative_part": Function(lambda x: x.clamp(max=0.0), lambda x, y: ~(x > 0)),
    "exp": Function(torch.exp, lambda x, y: y),
    "expm1": Function(torch.expm1, lambda x, y: y + 1),
    "log": Function(torch.log, lambda x, y: 1 / x),
    "log1p": Function(torch.log1p, lambda x, y: 1 / (x + 1)),
    "sqrt": Function(torch.sqrt, lambda x, y: 0.5 / y),
    "rsqrt": Function(torch.rsqrt, lambda x, y: -0.5 * y**3),
    "reciprocal": Function(torch.reciprocal, lambda x, y: -y * y),
    "abs": Function(torch.abs, lambda x, y: torch.sign(x)),
    "erf": Function(torch.erf, lambda x, y: torch.exp(-x * x) * (2 / math.sqrt(math.pi))),
    "sin": Function(torch.sin, lambda x, y: torch.cos(x)),
    "cos": Function(torch.cos, lambda x, y: -torch.sin(x)),
    "sinh": Function(torch.sinh, lambda x, y: torch.cosh(x)),
    "cosh": Function(torch.cosh, lambda x, y: torch.sinh(x)),
    "atan": Function(torch.atan, lambda x, y: 1 / (x * x + 1)),
    "asin": Function(torch.asin, lambda x, y: (1 - x * x).rsqrt()),
    "acos": Function(torch.acos, lambda x, y: -((1 - x * x).rsqrt())),
    "asinh": Function(torch.asinh, lambda x, y: 1 / (x * x + 1).sqrt()),
    "atanh": Function(torch.atanh, lambda x, y: 1 / (1 - x * x)),
    "hardshrink": Function(F.hardshrink, lambda x, y, bound: (x < -bound) | (x > bound)),
    "threshold": Function(F.threshold, lambda x, y, bound, value: ~(x <= bound)),
    "sign": Function(torch.sign, _zero),
    "floor": Function(torch.floor, _zero),
    "ceil": Function(torch.ceil, _zero),
    "round": Function(torch.round, _zero),
    "trunc": Function(torch.trunc, _zero),
    "remainder": Function(torch.remainder, lambda x, y, divisor: torch.ones_like(x)),
}
