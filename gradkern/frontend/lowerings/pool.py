"""Pools: maximum (`Select`) and averages (`Contract` through `Positions`)."""

from __future__ import annotations

import math
from types import SimpleNamespace

from ...ir.indexing import along
from ...ir.program import Contract, Positions, Select, Shape, Value, Windows
from ...util.options import BadValue
from .builder import NoForm, ProgramBuilder, as_shape, lowers, need_value, sample_axis, tuple_of
from .index import as_list, emit_index, permute_axes

Row = tuple[int, tuple[float, ...]]  # first input index, coefficients
Rows = tuple[Row, ...]


def with_channels(b: ProgramBuilder, x: Value, dims: int) -> Value:
    """The value as ``[C, *spatial]``; pools also take values without a channel axis."""
    shape = b.shape(x)
    if len(shape) == dims:
        return as_shape(b, x, (1, *shape))
    if len(shape) != dims + 1:
        raise NoForm(f"its input has {len(shape)} axes per sample, not {dims + 1}")
    return x


def window_count(size: int, k: int, s: int, p: int, d: int, ceil: bool) -> int:
    """The number of windows along one axis, by torch's rule: under ``ceil`` no window starts in the far padding."""
    room = size + 2 * p - d * (k - 1) - 1
    count = -(-room // s) + 1 if ceil else room // s + 1
    return count - 1 if ceil and (count - 1) * s >= size + p else count


# ---------------------------------------------------------------------------------------------------------------
# Maximum


@lowers("aten.max_pool1d.default", "aten.max_pool1d_with_indices.default", dims=1)
@lowers("aten.max_pool2d.default", "aten.max_pool2d_with_indices.default", dims=2)
@lowers("aten.max_pool3d.default", "aten.max_pool3d_with_indices.default", dims=3)
def max_pool(b: ProgramBuilder, a: SimpleNamespace, dims: int) -> Value:
    x = need_value(a.self)
    source = with_channels(b, x, dims)
    channels, *spatial = b.shape(source)
    kernel = tuple_of(a.kernel_size, dims)
    stride = tuple_of(a.stride, dims) if a.stride else kernel
    padding, dilation = tuple_of(a.padding, dims), tuple_of(a.dilation, dims)
    axes = list(zip(spatial, kernel, stride, padding, dilation, strict=True))
    counts = tuple(window_count(*axis, a.ceil_mode) for axis in axes)
    # Under ``ceil`` the padding after grows until the last window fits.
    after = [max(p, (c - 1) * s + d * (k - 1) + 1 - n - p) for c, (n, k, s, p, d) in zip(counts, axes, strict=True)]
    windows = Windows(kernel, stride, tuple(zip(padding, after, strict=True)), dilation)
    if windows.outside(tuple(spatial)):
        raise BadValue(
            f"A max pool with kernel {kernel}, padding {padding} and dilation {dilation} has windows that read nothing "
            f"of its input of {tuple(spatial)}: its result there is -inf, and torch's own backward pass writes to "
            "memory that is not its own. Use a smaller dilation or padding."
        )
    y = b.emit(Select(windows), (source,), (channels, *counts))
    return y if source == x else as_shape(b, y, counts)


# ---------------------------------------------------------------------------------------------------------------
# Averages


@lowers("aten.avg_pool1d.default", dims=1)
@lowers("aten.avg_pool2d.default", dims=2)
@lowers("aten.avg_pool3d.default", dims=3)
def avg_pool(b: ProgramBuilder, a: SimpleNamespace, dims: int) -> Value:
    """An average pool, which is separable: a window's divisor is the product over axes of the positions that count."""
    x = need_value(a.self)
    source = with_channels(b, x, dims)
    channels, *spatial = b.shape(source)
    kernel = tuple_of(a.kernel_size, dims)
    stride = tuple_of(a.stride, dims) if a.stride else kernel
    padding = tuple_of(a.padding, dims)
    divisor = getattr(a, "divisor_override", None)
    axes = [
        average_rows(n, k, s, p, a.ceil_mode, a.count_include_pad)
        for n, k, s, p in zip(spatial, kernel, stride, padding, strict=True)
    ]
    if divisor:
        axes = [tuple((start, (1.0,) * len(c)) for start, c in rows) for rows in axes]
        axes[0] = tuple((start, tuple(v / divisor for v in c)) for start, c in axes[0])
    y = b.emit(Contract(Positions(tuple(axes))), (source,), (channels, *(len(rows) for rows in axes)))
    return y if source == x else as_shape(b, y, tuple(len(rows) for rows in axes))


def average_rows(n: int, k: int, s: int, p: int, ceil: bool, count_padding: bool) -> Rows:
    """One axis of an average pool: windows are clipped to the padded input, and read only inside the input."""
    rows = []
    for i in range(window_count(n, k, s, p, 1, ceil)):
        start = i * s - p
        stop = min(start + k, n + p)
        first, last = max(start, 0), min(stop, n)
        count = stop - start if count_padding else last - first
        rows.append((first, (1.0 / count,) * (last - first)))
    return tuple(rows)


@lowers("aten.adaptive_avg_pool1d.default", dims=1)
@lowers("aten.adaptive_avg_pool2d.default", "aten._adaptive_avg_pool2d.default", dims=2)
@lowers("aten.adaptive_avg_pool3d.default", "aten._adaptive_avg_pool3d.default", dims=3)
def adaptive(b: ProgramBuilder, a: SimpleNamespace, dims: int) -> Value:
    x = need_value(a.self)
    source = with_channels(b, x, dims)
    channels, *spatial = b.shape(source)
    counts = tuple_of(a.output_size, dims)
    axes = tuple(adaptive_rows(n, m) for n, m in zip(spatial, counts, strict=True))
    y = source if counts == tuple(spatial) else b.emit(Contract(Positions(axes)), (source,), (channels, *counts))
    return y if source == x else as_shape(b, y, counts)


def adaptive_bounds(n: int, m: int) -> list[tuple[int, int]]:
    """Output ``i`` of ``m`` reads inputs ``floor(i n / m)`` up to ``ceil((i + 1) n / m)``."""
    return [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]


def adaptive_rows(n: int, m: int) -> Rows:
    return tuple((first, (1.0 / (last - first),) * (last - first)) for first, last in adaptive_bounds(n, m))


@lowers("aten.adaptive_max_pool1d.default", dims=1)
@lowers("aten.adaptive_max_pool2d.default", dims=2)
@lowers("aten.adaptive_max_pool3d.default", dims=3)
def adaptive_max(b: ProgramBuilder, a: SimpleNamespace, dims: int) -> Value:
    """An adaptive max pool.  Windows of unequal lengths are filled up with copies of their last element; of equal
    elements the first gets the gradient."""
    x = need_value(a.self)
    source = with_channels(b, x, dims)
    y, kernel = source, []
    counts = tuple_of(a.output_size, dims)
    for axis, m in enumerate(counts, start=1):
        n = b.shape(y)[axis]
        bounds = adaptive_bounds(n, m)
        longest = max(last - first for first, last in bounds)
        wanted = [min(first + k, last - 1) for first, last in bounds for k in range(longest)]
        y = emit_index(b, y, along(b.shape(y), axis, wanted))
        kernel.append(longest)
    windows = Windows(tuple(kernel), tuple(kernel), ((0, 0),) * dims, (1,) * dims)
    y = b.emit(Select(windows), (y,), (b.shape(source)[0], *counts))
    return y if source == x else as_shape(b, y, counts)


# ---------------------------------------------------------------------------------------------------------------
# Means and sums over axes


@lowers("aten.mean.dim", along="dim", average=True)
@lowers("aten.sum.dim_IntList", along="dim", average=False)
def sum_or_mean(b: ProgramBuilder, a: SimpleNamespace, average: bool) -> Value:
    """A mean or sum over per-sample axes: rows that gather the reduced axes, and a view without them."""
    x = need_value(a.self)
    if a.dtype is not None:
        raise NoForm("it changes the dtype")
    shape = b.shape(x)
    dims = {sample_axis(d, len(shape)) for d in a.dim or range(len(shape) + 1)}
    if any(shape[d] == 0 for d in dims):
        raise NoForm("it reduces an empty axis")
    if dims and 0 not in dims:  # only spatial axes, so no element has to move
        axes = tuple(
            ((0, (1.0 / n if average else 1.0,) * n),) if i in dims else identity_rows(n)
            for i, n in enumerate(shape[1:], start=1)
        )
        y = b.emit(Contract(Positions(axes)), (x,), (shape[0], *(len(rows) for rows in axes)))
        return without(b, y, shape, dims, a.keepdim)
    source, count = move_kept_axes_first(b, x, dims)
    row = ((0, (1.0 / count if average else 1.0,) * count),)
    y = b.emit(Contract(Positions((row,))), (source,), (b.shape(source)[0], 1))
    return without(b, y, shape, dims, a.keepdim)


def move_kept_axes_first(b: ProgramBuilder, x: Value, dims: set[int]) -> tuple[Value, int]:
    """The value as ``[kept, reduced]`` and the size of the second: a map over positions keeps axis 0."""
    shape = b.shape(x)
    if any(shape[d] == 0 for d in dims):
        raise NoForm("it reduces an empty axis")
    permuted_x = permute_axes(b, x, [d for d in range(len(shape)) if d not in dims] + sorted(dims))
    count = math.prod(shape[d] for d in dims)
    return as_shape(b, permuted_x, (math.prod(shape) // count, count)), count


def without(b: ProgramBuilder, y: Value, shape: Shape, dims: set[int], keepdim: bool) -> Value:
    """The reduced value under the shape that torch gives it."""
    kept = tuple(1 if i in dims else n for i, n in enumerate(shape))
    return as_shape(b, y, kept if keepdim else tuple(n for i, n in enumerate(shape) if i not in dims))


@lowers("aten.amax.default", along="dim", ties="split")  # equal maxima share the cotangent
@lowers("aten.max.dim", along="dim", ties="first")  # the values of ``x.max(dim)``: the first of equal maxima gets it
def maximum(b: ProgramBuilder, a: SimpleNamespace, ties: str) -> Value:
    """The maximum over whole axes."""
    x = need_value(a.self)
    shape = b.shape(x)
    dims = {sample_axis(d, len(shape)) for d in as_list(a.dim) or range(len(shape) + 1)}
    source, count = move_kept_axes_first(b, x, dims)
    windows = Windows((count,), (1,), ((0, 0),), (1,))
    y = b.emit(Select(windows, ties), (source,), (b.shape(source)[0], 1))
    return without(b, y, shape, dims, a.keepdim)


def identity_rows(n: int) -> Rows:
    return tuple((i, (1.0,)) for i in range(n))
