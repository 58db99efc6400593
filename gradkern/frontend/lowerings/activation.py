"""Elementwise functions: `Scale`."""

from __future__ import annotations

import math
from types import SimpleNamespace

from ...ir.program import Channels, Contract, Param, Scale, Sum, Value
from .builder import NoForm, ProgramBuilder, lowers, need_value, number_of


def elementwise(b: ProgramBuilder, x: object, function: str, *params: float) -> Value:
    value = need_value(x)
    return b.emit(Scale(function, tuple(float(p) for p in params)), (value,), b.shape(value))


@lowers("aten.leaky_relu.default", axes=(), function="leaky_relu", params=("negative_slope",))
# The last two are 1 for plain ELU.
@lowers("aten.elu.default", axes=(), function="elu", params=("alpha", "scale", "input_scale"))
@lowers("aten.selu.default", axes=(), function="elu", params=(1.6732632423543772848, 1.0507009873554804935, 1.0))
@lowers("aten.softplus.default", axes=(), function="softplus", params=("beta", "threshold"))
@lowers("aten.hardtanh.default", axes=(), function="hardtanh", params=("min_val", "max_val"))
@lowers("aten.relu6.default", axes=(), function="hardtanh", params=(0.0, 6.0))
@lowers("aten.threshold.default", axes=(), function="threshold", params=("threshold", "value"))
@lowers("aten.hardshrink.default", axes=(), function="hardshrink", params=("lambd",))
@lowers("aten.remainder.Scalar", axes=(), function="remainder", params=("other",))
@lowers("aten.clamp_min.default", axes=(), function="clamp", params=("min", math.inf))
@lowers("aten.clamp_max.default", axes=(), function="clamp", params=(-math.inf, "max"))
def parametric(b: ProgramBuilder, a: SimpleNamespace, function: str, params: tuple[str | float, ...] = ()) -> Value:
    """An elementwise function; each of its parameters is a number, or the name of the op's argument that holds it."""
    return elementwise(b, a.self, function, *(number_of(getattr(a, p)) if isinstance(p, str) else p for p in params))


for _name in (
    *("relu", "tanh", "sigmoid", "silu", "exp", "log", "sqrt", "abs", "square", "hardswish", "hardsigmoid"),
    *("rsqrt", "reciprocal", "erf", "sin", "cos", "log1p", "expm1", "mish", "sinh", "cosh", "atan", "asin", "acos"),
    *("asinh", "atanh", "sign", "floor", "ceil", "round", "trunc"),
):
    lowers(f"aten.{_name}.default", axes=(), function=_name)(parametric)


@lowers("aten.celu.default", axes=())
def celu(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "elu", number_of(a.alpha), 1.0, 1.0 / number_of(a.alpha))


@lowers("aten.gelu.default", axes=())
def gelu(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    return elementwise(b, a.self, "gelu" if a.approximate == "none" else "gelu_tanh")


@lowers("aten.prelu.default", "aten._prelu_kernel.default")
def prelu(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``x`` where it is positive and ``w x`` elsewhere, with one ``w`` per channel (or one for all channels)."""
    x = need_value(a.self)
    if not isinstance(a.weight, Param):
        raise NoForm("its weight depends on the samples")
    shape = b.shape(x)
    channels = shape[0] if shape else 1
    param_shape = b.param_shape(a.weight)
    weight = a.weight if param_shape == (channels,) else b.derive("aten.reshape.default", a.weight, (-1,))
    if math.prod(param_shape) == 1 and channels != 1:
        weight = b.derive("aten.expand.default", weight, (channels,))
    positive = b.emit(Scale("leaky_relu", (0.0,)), (x,), shape)
    negative = b.emit(Contract(Channels(), weight), (elementwise(b, x, "negative_part"),), shape)
    return b.emit(Sum(), (positive, negative), shape)


@lowers("aten.log_sigmoid.default", "aten.log_sigmoid_forward.default", axes=())
def log_sigmoid(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``-softplus(-x)``, which is linear from 40 on: there ``exp(-40)`` is below the rounding of float64."""
    minus = elementwise(b, a.self, "affine", -1.0, 0.0)
    return elementwise(b, elementwise(b, minus, "softplus", 1.0, 40.0), "affine", -1.0, 0.0)


@lowers("aten.clamp.default", axes=())
def clamp(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    low = float("-inf") if a.min is None else number_of(a.min)
    high = float("inf") if a.max is None else number_of(a.max)
    return elementwise(b, a.self, "clamp", low, high)


@lowers("aten.pow.Tensor_Scalar", axes=())
def power(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    exponent = number_of(a.exponent)
    if exponent == 2.0:
        return elementwise(b, a.self, "square")
    if exponent == 0.0:
        raise NoForm("a power of zero is constant")
    return elementwise(b, a.self, "power", exponent)
