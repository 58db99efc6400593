"""Elementwise ops that are made of several forms."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from ...ir.program import Param, Product, Value
from .activation import elementwise
from .arithmetic import add_scaled, affine, multiply, shift_by, stretch_to
from .builder import NoForm, ProgramBuilder, lowers, need_value, number_of
from .index import blank, emit_index, stretch
from .reduce import of_two


@lowers("aten.addcmul.default", axes=())
def addcmul(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``self + value tensor1 tensor2``."""
    return add_scaled(b, a.self, product(b, a.tensor1, a.tensor2), float(number_of(a.value)))


@lowers("aten.addcdiv.default", axes=())
def addcdiv(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``self + value tensor1 / tensor2``."""
    return add_scaled(b, a.self, product(b, a.tensor1, inverse(b, a.tensor2)), float(number_of(a.value)))


@lowers("aten.lerp.Scalar", "aten.lerp.Tensor", axes=())
def lerp(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``self + weight (end - self)``."""
    return add_scaled(b, a.self, product(b, add_scaled(b, a.end, a.self, -1.0), a.weight), 1.0)


def product(b: ProgramBuilder, x: Any, y: Any) -> Any:
    if isinstance(x, Param) and isinstance(y, Param):
        return b.derive("aten.mul.Tensor", x, y)
    return multiply(b, x, y)


def inverse(b: ProgramBuilder, x: Any) -> Any:
    if isinstance(x, Param):
        return b.derive("aten.reciprocal.default", x)
    return elementwise(b, x, "reciprocal")


# ---------------------------------------------------------------------------------------------------------------
# The larger or smaller of two, and bounds that are tensors


@lowers("aten.maximum.default", "aten.max.other", axes=(), sign=1.0)
@lowers("aten.minimum.default", "aten.min.other", axes=(), sign=-1.0)
def extremum(b: ProgramBuilder, a: SimpleNamespace, sign: float) -> Value:
    x, y = (apply_sign(b, side, sign) for side in (a.self, a.other))
    if isinstance(x, Param):
        x, y = y, x
    x = need_value(x)
    if isinstance(y, Param):
        y = expand_constant(b, x, y)
    shape = stretch_to(b, x, need_value(y))
    return apply_sign(b, of_two(b, stretch(b, x, shape), stretch(b, y, shape), shape), sign)


def expand_constant(b: ProgramBuilder, x: Value, p: Param) -> Value:
    """A constant as a value that has no slope: zeros in the place of the value's numbers, and the constant added."""
    return shift_by(b, emit_index(b, x, blank(b.shape(x))), p)


def apply_sign(b: ProgramBuilder, x: Any, sign: float) -> Any:
    if sign == 1.0:
        return x
    return b.derive("aten.neg.default", x) if isinstance(x, Param) else affine(b, need_value(x), -1.0, 0.0)


@lowers("aten.clamp.Tensor", "aten.clamp_min.Tensor", "aten.clamp_max.Tensor", axes=())
def clamp(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``low + max(x - low, 0)``, then ``high - max(high - x, 0)``, for constant bounds."""
    x = need_value(a.self)
    for sign, bound in ((1.0, getattr(a, "min", None)), (-1.0, getattr(a, "max", None))):
        if bound is None:
            continue
        if not isinstance(bound, Param):
            raise NoForm("its bounds depend on the samples")
        above = affine(b, shift_by(b, x, bound, -1.0), sign, 0.0)
        x = shift_by(b, affine(b, elementwise(b, above, "clamp", 0.0, math.inf), sign, 0.0), bound)
    return x


# ---------------------------------------------------------------------------------------------------------------
# Functions of functions


@lowers("aten.pow.Scalar", axes=())
def power_of_number(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    base = number_of(a.self)
    if base <= 0:
        raise NoForm("a power of a number that is not positive has no form")
    return elementwise(b, affine(b, need_value(a.exponent), math.log(base), 0.0), "exp")


@lowers("aten.exp2.default", axes=(), function="exp", inner=math.log(2), outer=1.0)
@lowers("aten.log2.default", axes=(), function="log", inner=1.0, outer=1 / math.log(2))
@lowers("aten.log10.default", axes=(), function="log", inner=1.0, outer=1 / math.log(10))
def scaled_function(b: ProgramBuilder, a: SimpleNamespace, function: str, inner: float, outer: float) -> Value:
    return affine(b, elementwise(b, affine(b, need_value(a.self), inner, 0.0), function), outer, 0.0)


@lowers("aten.erfc.default", axes=())
def erfc(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    return affine(b, elementwise(b, a.self, "erf"), -1.0, 1.0)


@lowers("aten.tan.default", axes=())
def tan(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    cosine = elementwise(b, elementwise(b, x, "cos"), "reciprocal")
    return b.emit(Product("mul"), (elementwise(b, x, "sin"), cosine), b.shape(x))


@lowers("aten.softshrink.default", axes=())
def softshrink(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``x - clamp(x, -lambda, lambda)``."""
    bound = number_of(a.lambd)
    inner = elementwise(b, a.self, "clamp", -bound, bound)
    return add_scaled(b, need_value(a.self), inner, -1.0)


@lowers("aten.rrelu.default", axes=())
def rrelu(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    if a.training:
        raise NoForm("in train mode it draws random numbers")
    return elementwise(b, a.self, "leaky_relu", (number_of(a.lower) + number_of(a.upper)) / 2)


@lowers("aten.logit.default", axes=())
def logit(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``log(x) - log(1 - x)``."""
    x = need_value(a.self)
    if a.eps is not None:
        x = elementwise(b, x, "clamp", number_of(a.eps), 1.0 - number_of(a.eps))
    other = elementwise(b, affine(b, x, -1.0, 1.0), "log")
    return add_scaled(b, elementwise(b, x, "log"), other, -1.0)
