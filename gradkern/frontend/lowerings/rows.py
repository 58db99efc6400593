"""Layers over tensors whose axis 0 holds several rows of each sample: ``conv1d(x.reshape(-1, 1, L))``.

Per sample such a tensor is ``[rows, C, *spatial]``.  A convolution gets the rows as one more spatial axis, which its
windows do not mix; for pools and norms, rows and channels are one axis.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

from ...ir.program import Channels, Contract, Param, Value, Windows
from .builder import LOWERINGS, NoForm, ProgramBuilder, as_shape, lowers_rows, need_value, tuple_of
from .conv import padding_of, planar, window_counts
from .index import permute_axes
from .norm import factors, normalize_groups


@lowers_rows("aten.conv1d.default", "aten.conv1d.padding", dims=1)
@lowers_rows("aten.conv2d.default", "aten.conv2d.padding", dims=2)
def convolution(b: ProgramBuilder, a: SimpleNamespace, dims: int) -> Value:
    x = need_value(a.input)
    if not isinstance(a.weight, Param) or not (a.bias is None or isinstance(a.bias, Param)):
        raise NoForm("its weight depends on the samples")
    if len(b.shape(x)) != dims + 2:
        raise NoForm(f"its input has {len(b.shape(x))} axes per sample, not {dims + 2}")
    outputs, per_group, *kernel = b.param_shape(a.weight)
    stride, dilation = tuple_of(a.stride, dims), tuple_of(a.dilation, dims)
    padding = ((0, 0), *padding_of(a.padding, tuple(kernel), dilation))
    windows = Windows((1, *kernel), (1, *stride), padding, (1, *dilation), a.groups)
    order = (1, 0, *range(2, dims + 2))
    x = permute_axes(b, x, order)
    weight = b.derive("aten.reshape.default", a.weight, (outputs, per_group, 1, *kernel))
    b.param_meta[weight] = b.param_meta[a.weight].new_empty((outputs, per_group, 1, *kernel), device="meta")
    result = (outputs, *window_counts(windows, b.shape(x)[1:]))
    x, windows, weight = planar(b, x, windows, weight)
    spatial = window_counts(windows, b.shape(x)[1:])
    y = as_shape(b, b.emit(Contract(windows, weight, a.bias), (x,), (outputs, *spatial)), result)
    return permute_axes(b, y, order)


POOLS = {
    "aten.max_pool1d.default": 1, "aten.max_pool2d.default": 2, "aten.avg_pool1d.default": 1,
    "aten.avg_pool2d.default": 2, "aten.adaptive_avg_pool1d.default": 1, "aten.adaptive_avg_pool2d.default": 2,
    "aten.adaptive_max_pool1d.default": 1, "aten.adaptive_max_pool2d.default": 2,
}  # fmt: skip


@lowers_rows(*POOLS)
def pool(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    dims = POOLS[b.op]
    shape = b.shape(x)
    split = len(shape) - dims
    flat = as_shape(b, x, (math.prod(shape[:split]), *shape[split:]))
    return as_shape(b, LOWERINGS[b.op](b, SimpleNamespace(**{**vars(a), "self": flat})), a.result)


@lowers_rows("aten.batch_norm.default")
def batch_norm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.input)
    if a.training or a.running_mean is None:
        raise NoForm("it uses the statistics of the batch")
    return per_channel(b, x, *factors(b, a))


def per_channel(b: ProgramBuilder, x: Value, scale: Param | None, shift: Param | None) -> Value:
    """``x [rows, C, *]`` with one factor and one shift per channel."""
    shape = b.shape(x)
    if scale is None and shift is None:
        return x
    count, channels, *rest = shape
    if rest:
        scale, shift = (p if p is None else b.derive("aten.repeat.default", p, (count,)) for p in (scale, shift))
        x = as_shape(b, x, (count * channels, *rest))
    y = b.emit(Contract(Channels(0 if rest else 1), scale, shift), (x,), b.shape(x))
    return as_shape(b, y, shape)


@lowers_rows("aten.group_norm.default")
def group_norm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.input)
    return per_channel(b, normalize_groups(b, x, b.shape(x)[0] * a.num_groups, a.eps), a.weight, a.bias)


@lowers_rows("aten.instance_norm.default")
def instance_norm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.input)
    if not a.use_input_stats:
        return per_channel(b, x, *factors(b, a))
    rows, channels = b.shape(x)[:2]
    return per_channel(b, normalize_groups(b, x, rows * channels, a.eps), a.weight, a.bias)
