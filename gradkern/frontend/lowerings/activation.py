"""Elementwise functions: `Scale`."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

from ...ir.program import Channels, Contract, Param, Scale, Sum, Value
from .builder import Builder, NoForm, lowers, need_value, number_of


def elementwise(b: Builder, x: object, function: str, *params: float) -> Value:
    value = need_value(x)
    return b.emit(Scale(function, tuple(float(p) for p in params)), (value,), b.shape(value))


def plain(name: str) -> Callable[[Builder, SimpleNamespace], Value]:
    return lambda b, a: elementwise(b, a.self, name)


for _name in ("relu", "tanh", "sigmoid", "silu", "exp", "log", "sqrt", "abs", "square", "hardswish", "hardsigmoid"):
    lowers(f"aten.{_name}.default")(plain(_name))
for _name in ("rsqrt", "reciprocal", "erf", "sin", "cos", "log1p", "expm1", "mish"):
    lowers(f"aten.{_name}.default")(plain(_name))


@lowers("aten.leaky_relu.default")
def leaky_relu(b: Builder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "leaky_relu", number_of(a.negative_slope))


@lowers("aten.elu.default")
def elu(b: Builder, a: SimpleNamespace) -> Value:
    """Params: alpha, scale, input scale.  Plain ELU has the last two at 1, SELU and CELU do not."""
    return elementwise(b, a.self, "elu", number_of(a.alpha), number_of(a.scale), number_of(a.input_scale))


@lowers("aten.selu.default")
def selu(b: Builder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "elu", 1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)


@lowers("aten.celu.default")
def celu(b: Builder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "elu", number_of(a.alpha), 1.0, 1.0 / number_of(a.alpha))


@lowers("aten.gelu.default")
def gelu(b: Builder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "gelu" if a.approximate == "none" else "gelu_tanh")


@lowers("aten.prelu.default", "aten._prelu_kernel.default")
def prelu(b: Builder, a: SimpleNamespace) -> Value:
    """``x`` where it is positive, ``w x`` elsewhere, with one ``w`` per channel (or one for all of them)."""
    x = need_value(a.self)
    if not isinstance(a.weight, Param):
        raise NoForm("its weight depends on the samples")
    shape = b.shape(x)
    channels = shape[0] if shape else 1
    given = b.param_shape(a.weight)
    weight = a.weight if given == (channels,) else b.derive("aten.reshape.default", a.weight, (-1,))
    if math.prod(given) == 1 and channels != 1:
        weight = b.derive("aten.expand.default", weight, (channels,))
    positive = b.emit(Scale("leaky_relu", (0.0,)), (x,), shape)
    negative = b.emit(Contract(Channels(), weight), (elementwise(b, x, "negative_part"),), shape)
    return b.emit(Sum(), (positive, negative), shape)


@lowers("aten.log_sigmoid.default", "aten.log_sigmoid_forward.default")
def log_sigmoid(b: Builder, a: SimpleNamespace) -> Value:
    """``-softplus(-x)``."""
    minus = elementwise(b, a.self, "affine", -1.0, 0.0)
    return elementwise(b, elementwise(b, minus, "softplus", 1.0, 1e30), "affine", -1.0, 0.0)


@lowers("aten.softplus.default")
def softplus(b: Builder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "softplus", number_of(a.beta), number_of(a.threshold))


@lowers("aten.hardtanh.default")
def hardtanh(b: Builder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "hardtanh", number_of(a.min_val), number_of(a.max_val))


@lowers("aten.relu6.default")
def relu6(b: Builder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "hardtanh", 0.0, 6.0)


@lowers("aten.clamp.default")
def clamp(b: Builder, a: SimpleNamespace) -> Value:
    low = float("-inf") if a.min is None else number_of(a.min)
    high = float("inf") if a.max is None else number_of(a.max)
    return elementwise(b, a.self, "clamp", low, high)


@lowers("aten.clamp_min.default")
def clamp_min(b: Builder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "clamp", number_of(a.min), float("inf"))


@lowers("aten.clamp_max.default")
def clamp_max(b: Builder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "clamp", float("-inf"), number_of(a.max))


@lowers("aten.pow.Tensor_Scalar")
def power(b: Builder, a: SimpleNamespace) -> Value:
    exponent = number_of(a.exponent)
    if exponent == 2.0:
        return elementwise(b, a.self, "square")
    if exponent == 0.0:
        raise NoForm("a power of zero is constant")
    return elementwise(b, a.self, "power", exponent)
