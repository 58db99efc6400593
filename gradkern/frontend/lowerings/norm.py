"""Batch norm in eval (`Contract` through `Channels`); softmax and the norms over a sample's own numbers (`LowRank`)."""

from __future__ import annotations

import math
from types import SimpleNamespace

from ...ir.program import Channels, Contract, LowRank, Param, Value
from .builder import MixesSamples, NoForm, ProgramBuilder, as_shape, lowers, need_value, sample_axis
from .masks import replace_infinities


@lowers("aten.batch_norm.default", "aten.native_batch_norm.default")
def batch_norm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    if a.training or a.running_mean is None:
        raise MixesSamples("uses the statistics of the batch")
    return fold_batch_norm(b, a)


@lowers("aten._native_batch_norm_legit.no_stats", "aten._native_batch_norm_legit_functional.default")
def batch_norm_train(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    raise MixesSamples("uses the statistics of the batch")


@lowers("aten._native_batch_norm_legit_no_training.default")
def fold_batch_norm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` as one factor and one shift per channel, both derived."""
    value = need_value(a.input)
    if not b.shape(value):
        raise NoForm("its input has no channel axis")
    scale, shift = factors(b, a)
    return b.emit(Contract(Channels(), scale, shift), (value,), b.shape(value))


def factors(b: ProgramBuilder, a: SimpleNamespace) -> tuple[Param, Param]:
    """``[C]`` each: the factor and the shift of a norm that uses stored statistics."""
    if not all(isinstance(p, Param) for p in (a.running_mean, a.running_var)):
        raise NoForm("its statistics depend on the samples")
    scale = b.derive("aten.rsqrt.default", b.derive("aten.add.Tensor", a.running_var, a.eps))  # [C]
    if a.weight is not None:
        scale = b.derive("aten.mul.Tensor", scale, a.weight)
    shift = b.derive("aten.mul.Tensor", a.running_mean, scale)  # [C]
    shift = b.derive("aten.neg.default", shift) if a.bias is None else b.derive("aten.sub.Tensor", a.bias, shift)
    return scale, shift


@lowers("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default", along="dim")
def softmax(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    if getattr(a, "dtype", None) is not None or getattr(a, "half_to_float", False):
        raise NoForm("it changes the dtype")
    axis = sample_axis(a.dim, len(b.shape(x)))
    if "log_softmax" in b.op:
        return b.emit(LowRank("log_softmax", axis), (x,), b.shape(x))
    return b.emit(LowRank("softmax", axis), (replace_infinities(b, x, a.result_dtype),), b.shape(x))


# ---------------------------------------------------------------------------------------------------------------
# Norms: one axis holds all numbers that are normalised together; then come a factor and a shift


def normalize_groups(b: ProgramBuilder, x: Value, groups: int, eps: float) -> Value:
    """The value with each of ``groups`` equal stretches of the sample normalised to mean 0 and variance 1."""
    shape = b.shape(x)
    rows = as_shape(b, x, (groups, math.prod(shape) // groups))
    return as_shape(b, b.emit(LowRank("normalize", 1, (float(eps),)), (rows,), b.shape(rows)), shape)


def affine_along(b: ProgramBuilder, x: Value, axis: int, weight: Param | None, bias: Param | None) -> Value:
    """One factor and one shift per index along ``axis`` (0 or the last)."""
    if weight is None and bias is None:
        return x
    return b.emit(Contract(Channels(axis), weight, bias), (x,), b.shape(x))


@lowers("aten.layer_norm.default", "aten.native_layer_norm.default", axes=())
def layer_norm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.input)
    shape, inner = b.shape(x), tuple(a.normalized_shape)
    if len(inner) > len(shape):
        raise NoForm("it normalises over the samples")
    size = math.prod(inner)
    y = as_shape(b, normalize_groups(b, x, math.prod(shape) // size, a.eps), (math.prod(shape) // size, size))
    flat = [
        p if p is None or len(inner) == 1 else b.derive("aten.reshape.default", p, (-1,)) for p in (a.weight, a.bias)
    ]
    if len(inner) == len(shape):
        y = as_shape(b, y, (size,))
    return as_shape(b, affine_along(b, y, len(b.shape(y)) - 1, *flat), shape)


@lowers("aten.group_norm.default", groups="num_groups")
@lowers("aten.native_group_norm.default", groups="group")
def group_norm(b: ProgramBuilder, a: SimpleNamespace, groups: str) -> Value:
    return affine_along(b, normalize_groups(b, need_value(a.input), getattr(a, groups), a.eps), 0, a.weight, a.bias)


@lowers("aten.instance_norm.default")
def instance_norm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    if not a.use_input_stats:
        return fold_batch_norm(b, a)
    x = need_value(a.input)
    return affine_along(b, normalize_groups(b, x, b.shape(x)[0], a.eps), 0, a.weight, a.bias)
