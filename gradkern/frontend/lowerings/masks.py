"""Constant masks: fill values, and the scores that a softmax leaves out."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ...ir.program import Channels, Contract, Param, Shape, Value, View
from .arithmetic import per_channel
from .builder import NoForm, ProgramBuilder, as_shape, lowers, need_value, number_of
from .gather import fill_where


def lowest(dtype: torch.dtype) -> float:
    """A stand-in for -inf, which no kernel multiplies: next to any other score, its exponential is exactly zero."""
    return max(-1e30, torch.finfo(dtype).min)


def as_numbers(b: ProgramBuilder, mask: Param, dtype: torch.dtype) -> Param:
    """1 where a boolean mask is true, else 0."""
    if b.param_meta[mask].dtype != torch.bool:
        raise NoForm("its mask is not of booleans")
    return b.note_meta(b.derive("aten.to.dtype", mask, dtype), b.param_shape(mask), dtype)


def additive(b: ProgramBuilder, mask: Param, dtype: torch.dtype) -> Param:
    """The numbers that attention adds to its scores.  ``mask``: those numbers, or booleans that are true to attend."""
    if b.param_meta[mask].dtype.is_floating_point:
        return b.note_meta(b.derive("aten.clamp.default", mask, lowest(dtype)), b.param_shape(mask), dtype)
    below = b.derive("aten.sub.Tensor", as_numbers(b, mask, dtype), 1.0)  # 0 and -1
    return b.note_meta(b.derive("aten.mul.Tensor", below, -lowest(dtype)), b.param_shape(mask), dtype)


def causal(b: ProgramBuilder, shape: Shape, dtype: torch.dtype, device: torch.device) -> Param:
    """The mask ``[queries, keys]`` under which no query attends to a later key."""
    full = b.derive("aten.full.default", shape, lowest(dtype), dtype=dtype, device=device)
    return b.note_meta(b.derive("aten.triu.default", full, 1), shape, dtype)


def replace_infinities(b: ProgramBuilder, x: Value, dtype: torch.dtype) -> Value:
    """A softmax's argument, with `lowest` in place of constants of -inf that were added to it."""
    step = b.step(x)
    if step is not None and isinstance(step.form, View):
        return as_shape(b, replace_infinities(b, Value(step.inputs[0]), dtype), b.shape(x))
    form = step.form if step is not None else None
    if not (isinstance(form, Contract) and isinstance(form.map, Channels) and form.bias is not None):
        return x
    low = b.derive("aten.clamp.default", form.bias, lowest(dtype))
    return b.emit(Contract(form.map, form.weight, low), (Value(step.inputs[0]),), b.shape(x))  # type: ignore[union-attr]


@lowers("aten.masked_fill.Scalar", axes=())
def masked_fill(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``x (1 - mask) + value mask``, for scores that a softmax leaves out; for finite scores this is the same.

    Other fills may replace numbers that are not finite (padding, a logarithm's result), and 0 · NaN is NaN; there the
    mask has to be a constant of the code.
    """
    x, value = need_value(a.self), number_of(a.value)
    if value > -1e4:
        return fill_where(b, x, a.mask, value, a)
    if not isinstance(a.mask, Param):
        raise NoForm("its mask depends on the samples")
    at, axis, ones, full = per_channel(b, x, as_numbers(b, a.mask, a.result_dtype))
    keep = b.derive("aten.sub.Tensor", b.derive("aten.ones_like.default", ones), ones)
    zeros = b.derive("aten.zeros_like.default", ones)
    fill = b.derive("aten.masked_fill.Scalar", zeros, b.derive("aten.eq.Scalar", ones, 1), value)
    return as_shape(b, b.emit(Contract(Channels(axis), keep, fill), (at,), b.shape(at)), full)
