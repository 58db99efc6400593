"""Reductions over a sample's own axes that are made of several forms: variances, norms, minima, products."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch

from ...ir.indexing import along
from ...ir.program import Contract, Dense, Positions, Product, Select, Shape, Sum, Value, Windows
from .activation import elementwise
from .arithmetic import affine, multiply, scale_by
from .builder import MULTI_RESULT_OPS, NoForm, ProgramBuilder, as_shape, lowers, need_value, sample_axis
from .index import as_list, concatenate, emit_index, permute_axes, stretch
from .pool import move_kept_axes_first, without


def reduced_axes(dim: object, rank: int) -> set[int]:
    """The per-sample axes that a reduction names.  None and an empty list mean all; then samples mix: an error."""
    return {sample_axis(d, rank) for d in as_list(dim if dim is not None else []) or range(rank + 1)}


def rows(b: ProgramBuilder, x: Value, coefficient: float = 1.0) -> Value:
    """``[K, n] -> [K, 1]``: the sum of each row, times ``coefficient``."""
    k, n = b.shape(x)
    return b.emit(Contract(Positions((((0, (coefficient,) * n),),))), (x,), (k, 1))


def minus(b: ProgramBuilder, x: Value, y: Value) -> Value:
    """``x - y``, with ``y`` repeated along axes of length one."""
    other = stretch(b, affine(b, y, -1.0, 0.0), b.shape(x))
    return b.emit(Sum(), (x, other), b.shape(x))


def largest(b: ProgramBuilder, x: Value, ties: str = "first") -> Value:
    """``[K, n] -> [K, 1]``: the maximum of each row."""
    k, n = b.shape(x)
    return b.emit(Select(Windows((n,), (1,), ((0, 0),), (1,)), ties), (x,), (k, 1))


def root(b: ProgramBuilder, x: Value, dtype: torch.dtype) -> Value:
    """The square root of numbers that are not negative.  As in torch's norms, its derivative at zero is zero.

    Sums of squares below the smallest normal number count as zero.
    """
    if dtype == torch.float16:
        raise NoForm("squares of small numbers are zero in float16")
    tiny = torch.finfo(dtype).tiny
    above = elementwise(b, elementwise(b, x, "clamp", tiny, math.inf), "sqrt")
    return affine(b, above, 1.0, -math.sqrt(tiny))


# ---------------------------------------------------------------------------------------------------------------
# Variances


def variance(b: ProgramBuilder, x: Value, correction: float) -> Value:
    """``[K, n] -> [K, 1]``."""
    n = b.shape(x)[1]
    if n <= correction:
        raise NoForm("a variance of too few numbers is not finite")
    centred = minus(b, x, rows(b, x, 1.0 / n))
    return rows(b, elementwise(b, centred, "square"), 1.0 / (n - correction))


MULTI_RESULT_OPS.update(
    ("aten.var_mean.dim", "aten.var_mean.correction", "aten.std_mean.dim", "aten.std_mean.correction")
)


@lowers("aten.var.dim", "aten.var.correction", "aten.var_mean.dim", "aten.var_mean.correction", along="dim", std=False)
@lowers("aten.std.dim", "aten.std.correction", "aten.std_mean.dim", "aten.std_mean.correction", along="dim", std=True)
def var(b: ProgramBuilder, a: SimpleNamespace, std: bool) -> Value:
    x = need_value(a.self)
    shape = b.shape(x)
    dims = reduced_axes(a.dim, len(shape))
    source, n = move_kept_axes_first(b, x, dims)
    if a.piece == 1:
        return without(b, rows(b, source, 1.0 / n), shape, dims, a.keepdim)
    given = a.unbiased if hasattr(a, "unbiased") else a.correction
    correction = 1.0 if given is None else float(given)
    y = variance(b, source, correction)
    return without(b, root(b, y, a.result_dtype) if std else y, shape, dims, a.keepdim)


# ---------------------------------------------------------------------------------------------------------------
# Norms


def norm(b: ProgramBuilder, x: Value, order: float, dtype: torch.dtype) -> Value:
    """``[K, n] -> [K, 1]``."""
    if order == 2:
        return root(b, rows(b, elementwise(b, x, "square")), dtype)
    if order == 1:
        return rows(b, elementwise(b, x, "abs"))
    if order == math.inf:
        return largest(b, elementwise(b, x, "abs"), "split")
    raise NoForm(f"a norm of order {order} has no form")


def norm_along(b: ProgramBuilder, x: Value, axis: int, dtype: torch.dtype) -> Value:
    """The Euclidean norm along one per-sample axis, which stays with length one."""
    source, _ = move_kept_axes_first(b, x, {axis})
    return without(b, norm(b, source, 2, dtype), b.shape(x), {axis}, True)


@lowers("aten.linalg_vector_norm.default", along="dim", order="ord")
@lowers("aten.norm.ScalarOpt_dim", along="dim", order="p")
def vector_norm(b: ProgramBuilder, a: SimpleNamespace, order: str) -> Value:
    x = need_value(a.self)
    if getattr(a, "dtype", None) not in (None, a.result_dtype):
        raise NoForm("it changes the dtype")
    shape = b.shape(x)
    dims = reduced_axes(a.dim, len(shape))
    p = getattr(a, order)
    y = norm(b, move_kept_axes_first(b, x, dims)[0], 2.0 if p is None else float(p), a.result_dtype)
    return without(b, y, shape, dims, a.keepdim)


@lowers("aten.cosine_similarity.default")
def cosine_similarity(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """Both sides are divided by their norms, or by ``eps`` if these are smaller."""
    one, two = need_value(a.x1), need_value(a.x2)
    if len(b.shape(one)) != len(b.shape(two)):
        raise NoForm("it compares values of unequal ranks")
    axis = sample_axis(a.dim, len(b.shape(one)))
    sides = []
    for x in (one, two):
        bounded = elementwise(b, norm_along(b, x, axis, a.result_dtype), "clamp", float(a.eps), math.inf)
        sides.append(multiply(b, x, elementwise(b, bounded, "reciprocal")))
    product = multiply(b, *sides)
    source, _ = move_kept_axes_first(b, product, {axis})
    return without(b, rows(b, source), b.shape(product), {axis}, False)


@lowers("aten.pairwise_distance.default")
def pairwise_distance(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    one, two = need_value(a.x1), need_value(a.x2)
    if b.shape(one) != b.shape(two) or not b.shape(one):
        raise NoForm("it compares values of unequal shapes")
    apart = affine(b, minus(b, one, two), 1.0, float(a.eps))
    axis = len(b.shape(apart)) - 1
    y = norm(b, move_kept_axes_first(b, apart, {axis})[0], float(a.p), a.result_dtype)
    return without(b, y, b.shape(apart), {axis}, a.keepdim)


@lowers("aten.rms_norm.default", axes=())
def rms_norm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.input)
    shape, inner = b.shape(x), len(a.normalized_shape)
    if inner > len(shape):
        raise NoForm("it normalises over the samples")
    eps = torch.finfo(a.result_dtype).eps if a.eps is None else float(a.eps)
    n = math.prod(shape[len(shape) - inner :])
    source = as_shape(b, x, (math.prod(shape) // n, n))
    power = affine(b, rows(b, elementwise(b, source, "square"), 1.0 / n), 1.0, eps)
    y = as_shape(b, multiply(b, source, elementwise(b, power, "rsqrt")), shape)
    return y if a.weight is None else scale_by(b, y, a.weight)


# ---------------------------------------------------------------------------------------------------------------
# Sums of exponentials, minima, products


@lowers("aten.logsumexp.default", along="dim")
def logsumexp(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    shape = b.shape(x)
    dims = reduced_axes(a.dim, len(shape))
    source, _ = move_kept_axes_first(b, x, dims)
    top = largest(b, source)
    below = rows(b, elementwise(b, minus(b, source, top), "exp"))
    y = b.emit(Sum(), (elementwise(b, below, "log"), top), b.shape(top))
    return without(b, y, shape, dims, a.keepdim)


@lowers("aten.amin.default", along="dim", ties="split")  # equal minima share the cotangent
@lowers("aten.min.dim", along="dim", ties="first")
def minimum(b: ProgramBuilder, a: SimpleNamespace, ties: str) -> Value:
    x = need_value(a.self)
    shape = b.shape(x)
    dims = reduced_axes(a.dim, len(shape))
    source, _ = move_kept_axes_first(b, affine(b, x, -1.0, 0.0), dims)
    return without(b, affine(b, largest(b, source, ties), -1.0, 0.0), shape, dims, a.keepdim)


@lowers("aten.prod.dim_int", along="dim")
def prod(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """A product along an axis: its two halves are multiplied until one number is left."""
    x = need_value(a.self)
    if a.dtype is not None:
        raise NoForm("it changes the dtype")
    shape = b.shape(x)
    dims = {sample_axis(a.dim, len(shape))}
    y, n = move_kept_axes_first(b, x, dims)
    while n > 1:
        first, second = (emit_index(b, y, along(b.shape(y), 1, range(k, k + n // 2))) for k in (0, n // 2))
        product = b.emit(Product("mul"), (first, second), b.shape(first))
        rest = [emit_index(b, y, along(b.shape(y), 1, [n - 1]))] if n % 2 else []
        y = side_by_side(b, [product, *rest], 1)
        n = b.shape(y)[1]
    return without(b, y, shape, dims, a.keepdim)


def side_by_side(b: ProgramBuilder, values: list[Value], axis: int) -> Value:
    shape = list(b.shape(values[0]))
    shape[axis] = sum(b.shape(v)[axis] for v in values)
    return concatenate(b, values, axis, tuple(shape))


def over_rows(b: ProgramBuilder, x: Value, axis: int, f: Callable[[Value], Value]) -> Value:
    """``f`` on the last axis of ``[*, n]``, for the values along one per-sample axis."""
    order = [d for d in range(len(b.shape(x))) if d != axis] + [axis]
    y = f(permute_axes(b, x, order))
    return permute_axes(b, y, [order.index(d) for d in range(len(order))])


_LONGEST_SUM = 1024  # the longest running sum; its matrix has the square of its length


@lowers("aten.cumsum.default", along="dim")
def cumsum(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """A running sum, as a linear layer whose weight is a triangle of ones."""
    x = need_value(a.self)
    axis = sample_axis(a.dim, len(b.shape(x)))
    n = b.shape(x)[axis]
    if a.dtype not in (None, a.result_dtype) or n > _LONGEST_SUM:
        raise NoForm(f"it changes the dtype, or runs over more than {_LONGEST_SUM} elements")
    ones = b.derive("aten.ones.default", (n, n), dtype=a.result_dtype, device=a.result_device)
    weight = b.derive("aten.tril.default", ones)
    return over_rows(b, x, axis, lambda y: b.emit(Contract(Dense(), weight), (y,), b.shape(y)))


# ---------------------------------------------------------------------------------------------------------------
# The larger or smaller of two


def of_two(b: ProgramBuilder, x: Value, y: Value, shape: Shape) -> Value:
    """The larger of two values of one shape; equal ones share the cotangent."""
    n = math.prod(shape)
    pair = side_by_side(b, [as_shape(b, v, (n, 1)) for v in (x, y)], 1)
    return as_shape(b, largest(b, pair, "split"), shape)
