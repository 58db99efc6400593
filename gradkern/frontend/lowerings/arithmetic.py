"""Sums and products of values (`Sum`, `Product`), arithmetic with numbers (`Scale`) and constants (`Channels`)."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from ...ir.indexing import along
from ...ir.program import MAX_CHANNELS, Channels, Contract, Param, Product, Scale, Shape, Sum, Value
from .activation import elementwise
from .builder import NoForm, ProgramBuilder, as_shape, lowers, need_value, sample_axis
from .index import emit_index, stretch


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def affine(b: ProgramBuilder, x: Value, a: float, shift: float) -> Value:
    """``a x + shift``; nothing is emitted for the identity."""
    return x if (a, shift) == (1.0, 0.0) else elementwise(b, x, "affine", a, shift)


def per_channel(b: ProgramBuilder, x: Value, p: Param) -> tuple[Value, int, Param, Shape]:
    """A constant that broadcasts against the live ``[N, *shape]``, as one number per channel.

    Returns the value in a shape that allows this, the axis of the channels, the constant as ``[channels]``, and the
    shape of the result.  If each element has its own number, the value is flat.  If that would be more channels than a
    kernel takes, the value has two axes, and the numbers repeat along the first.
    """
    shape, p_shape = b.shape(x), b.param_shape(p)
    if len(p_shape) > len(shape) + 1 or (len(p_shape) == len(shape) + 1 and p_shape[0] != 1) or not shape:
        raise NoForm("the tensor that it reads has more axes than the samples")
    missing = len(shape) - len(p_shape)
    p_shape = p_shape[1:] if missing < 0 else (1,) * missing + p_shape
    full = tuple(m if n == 1 else n for n, m in zip(p_shape, shape, strict=True))
    x = stretch(b, x, full)
    for axis in (0, len(full) - 1):
        if math.prod(p_shape) == p_shape[axis] == full[axis]:
            factors = p if b.param_shape(p) == (p_shape[axis],) else b.derive("aten.reshape.default", p, (-1,))
            return x, axis, factors, full
    if math.prod(p_shape) == 1:
        one = b.derive("aten.reshape.default", p, (1,))
        return x, 0, b.derive("aten.expand.default", one, (full[0],)), full
    first = next(d for d, n in enumerate(p_shape) if n != 1)
    if not first or math.prod(full) <= MAX_CHANNELS:  # a flat value is never copied for this
        first = 0
    own = b.derive("aten.expand.default", b.derive("aten.reshape.default", p, p_shape[first:]), full[first:])
    flat = math.prod(full[:first]), math.prod(full[first:])
    at = as_shape(b, x, flat if first else flat[1:])
    return at, len(b.shape(at)) - 1, b.derive("aten.reshape.default", own, (-1,)), full


def scale_by(b: ProgramBuilder, x: Value, p: Param, inverse: bool = False) -> Value:
    """``p x`` or ``x / p`` for a constant that broadcasts against the value."""
    at, axis, factors, full = per_channel(b, x, p)
    if inverse:
        factors = b.derive("aten.reciprocal.default", factors)
    return as_shape(b, b.emit(Contract(Channels(axis), factors), (at,), b.shape(at)), full)


def shift_by(b: ProgramBuilder, x: Value, p: Param, alpha: float = 1) -> Value:
    """``x + alpha p``."""
    at, axis, shifts, full = per_channel(b, x, p)
    if alpha != 1:
        shifts = b.derive("aten.mul.Tensor", shifts, alpha)
    return as_shape(b, b.emit(Contract(Channels(axis), None, shifts), (at,), b.shape(at)), full)


@lowers("aten.add.Tensor", "aten.add.Scalar", axes=(), sign=1)
@lowers("aten.sub.Tensor", "aten.sub.Scalar", axes=(), sign=-1)
def add(b: ProgramBuilder, a: SimpleNamespace, sign: int) -> Value:
    return add_scaled(b, a.self, a.other, sign * a.alpha)


@lowers("aten.rsub.Scalar", "aten.rsub.Tensor", axes=())
def rsub(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    return add_scaled(b, a.other, a.self, -a.alpha)


def add_scaled(b: ProgramBuilder, x: Any, y: Any, alpha: float) -> Value:
    """``x + alpha y`` for values, constant tensors and numbers."""
    if isinstance(x, Value) and isinstance(y, Value):
        shape = stretch_to(b, x, y)
        return b.emit(Sum(), (stretch(b, x, shape), stretch(b, affine(b, y, float(alpha), 0.0), shape)), shape)
    if isinstance(x, Value) and is_number(y):
        return affine(b, x, 1.0, float(alpha * y))
    if is_number(x) and isinstance(y, Value):
        return affine(b, y, float(alpha), float(x))
    if isinstance(x, Value) and isinstance(y, Param):
        return shift_by(b, x, y, alpha)
    if isinstance(x, Param) and isinstance(y, Value):
        return shift_by(b, affine(b, y, float(alpha), 0.0), x)
    raise NoForm("the addend depends on more than the samples")


def stretch_to(b: ProgramBuilder, x: Value, y: Value) -> tuple[int, ...]:
    """The shape that two values of equal rank broadcast to.  (Else the batch axis would meet another axis.)"""
    one, two = b.shape(x), b.shape(y)
    if len(one) != len(two):
        raise NoForm(f"it joins values of shapes {one} and {two}")
    return tuple(m if n == 1 else n for n, m in zip(one, two, strict=True))


@lowers("aten.mul.Tensor", "aten.mul.Scalar", axes=())
def mul(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    return multiply(b, a.self, a.other)


def multiply(b: ProgramBuilder, x: Any, y: Any) -> Value:
    x, y = (x, y) if isinstance(x, Value) else (y, x)
    if isinstance(x, Value) and is_number(y):
        return affine(b, x, float(y), 0.0)
    if isinstance(x, Value) and isinstance(y, Param):
        return scale_by(b, x, y)
    if isinstance(x, Value) and isinstance(y, Value):
        if x == y:
            return elementwise(b, x, "square")
        gate = sigmoid_of(b, x, y)
        return gate if gate is not None else b.emit(Product("mul"), (x, y), stretch_to(b, x, y))
    raise NoForm("a factor depends on more than the samples")


def sigmoid_of(b: ProgramBuilder, x: Value, y: Value) -> Value | None:
    """``x sigmoid(x)`` written out is SiLU."""
    for one, two in ((x, y), (y, x)):
        step = b.step(two)
        if step is not None and step.form == Scale("sigmoid") and step.inputs == (one.id,):
            return elementwise(b, one, "silu")
    return None


@lowers("aten.div.Tensor", "aten.div.Scalar", axes=())
def div(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    if isinstance(a.self, Value) and is_number(a.other) and a.other != 0:
        return affine(b, a.self, 1.0 / a.other, 0.0)
    if isinstance(a.self, Value) and isinstance(a.other, Param):
        return scale_by(b, a.self, a.other, inverse=True)
    if isinstance(a.other, Value):
        return multiply(b, elementwise(b, a.other, "reciprocal"), a.self)
    raise NoForm("the divisor depends on more than the samples")


@lowers("aten.glu.default")
def glu(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """The first half along an axis, gated by the second."""
    x = need_value(a.self)
    axis = sample_axis(a.dim, len(b.shape(x)))
    half = b.shape(x)[axis] // 2
    first, second = (emit_index(b, x, along(b.shape(x), axis, range(k, k + half))) for k in (0, half))
    return b.emit(Product("mul"), (first, elementwise(b, second, "sigmoid")), b.shape(first))


@lowers("aten.neg.default", axes=())
def neg(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    return affine(b, need_value(a.self), -1.0, 0.0)
