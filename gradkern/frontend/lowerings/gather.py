"""Copies whose places are constants of the code: `Index` by running the op on numbered elements, and fills."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...ir.calls import evaluate, operator_of
from ...ir.indexing import along
from ...ir.program import Call, Param, Shape, Sum, Value
from .arithmetic import shift_by
from .builder import NoForm, ProgramBuilder, as_shape, lowers, need_value, number_of, sample_axis
from .index import emit_index, permute_axes, stretch

LARGEST = 2**16  # the most elements of a value whose places are listed one by one


def constant(b: ProgramBuilder, x: Any) -> Tensor:
    """The content of a tensor that the code itself makes; raises `NoForm` for parameters and buffers, which change."""
    calls = {param: call for call, param in b.derived_by_call.items()}

    def leaf(param: Any) -> Tensor:
        if not isinstance(param, Param) or param not in calls:
            raise NoForm("its places or its mask depend on a tensor that may change")
        return evaluate(calls[param], leaf)

    call = calls.get(x) if isinstance(x, Param) else x
    if not isinstance(call, Call):
        raise NoForm("its places or its mask depend on a tensor that may change")
    with torch.inference_mode(False), torch.no_grad():
        return evaluate(call, leaf)


def copy_elements(b: ProgramBuilder, x: Value, shape: Shape, places: Sequence[int]) -> Value:
    """A value of ``shape`` whose element ``i`` is element ``places[i]`` of another, or zero for -1 (both row-major)."""
    n = math.prod(b.shape(x))
    if max(n, len(places)) > LARGEST:
        raise NoForm(f"a copy of more than {LARGEST} separately placed numbers has no form")
    return as_shape(b, emit_index(b, as_shape(b, x, (n,)), along((n,), 0, places)), shape)


def copy_by_numbers(b: ProgramBuilder, x: Value, f: Callable[[Tensor], Tensor], shape: Shape) -> Value:
    """The value of an op that copies elements.  To find out which, ``f`` runs on two samples of numbered elements."""
    n = math.prod(b.shape(x))
    if n > LARGEST:
        raise NoForm(f"a copy of more than {LARGEST} separately placed numbers has no form")
    numbers = torch.arange(1, 2 * n + 1, dtype=torch.float64).reshape(2, *b.shape(x))
    with torch.inference_mode(False), torch.no_grad():
        origin = f(numbers).reshape(2, -1).long()
    first, second = origin.tolist()
    if [i and i + n for i in first] != second:
        raise NoForm("it copies elements from one sample to another")
    return copy_elements(b, x, shape, [i - 1 for i in first])


COPIES = tuple(f"aten.{name}.default" for name in ("tril", "triu", "diagonal", "diag_embed", "rot90", "im2col"))


@lowers(*COPIES)
def by_numbers(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """An op with one tensor argument that copies elements."""
    op = operator_of(b.op)
    names = [x.name for x in op._schema.arguments]  # type: ignore[attr-defined]

    def run(x: Tensor) -> Tensor:
        return op(**{name: x if name == "self" else getattr(a, name) for name in names})

    return copy_by_numbers(b, need_value(a.self), run, a.result)


@lowers("aten.col2im.default")
def fold(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """The sum of windows at their places (``col2im``): one copy per tap of the window, and their sum."""
    x = need_value(a.self)
    shape = b.shape(x)
    if len(shape) != 2:
        raise NoForm("it works along the batch axis")
    taps = math.prod(a.kernel_size)
    channels = shape[0] // taps
    size = (channels, *a.output_size)
    numbers = torch.arange(1, math.prod(size) + 1, dtype=torch.float64).reshape(1, *size)
    geometry = (a.kernel_size, a.dilation, a.padding, a.stride)
    with torch.inference_mode(False), torch.no_grad():
        target = torch.ops.aten.im2col.default(numbers, *geometry).long()  # [1, C · taps, L]: where each number goes
    target = target.reshape(channels, taps, shape[1])
    pieces = []
    for tap in range(taps):
        places = [-1] * math.prod(size)
        for c in range(channels):
            for window, to in enumerate(target[c, tap].tolist()):
                if to:
                    places[to - 1] = (c * taps + tap) * shape[1] + window
        pieces.append(copy_elements(b, x, size, places))
    return pieces[0] if len(pieces) == 1 else b.emit(Sum(), tuple(pieces), size)


# ---------------------------------------------------------------------------------------------------------------
# Constant indices


@lowers("aten.index_select.default", along="dim")
def index_select(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    axis = sample_axis(a.dim, len(b.shape(x)))
    return emit_index(b, x, along(b.shape(x), axis, read_indices(b, a.index, b.shape(x)[axis])))


def read_indices(b: ProgramBuilder, index: Any, n: int) -> list[int]:
    """Constant indices along an axis of ``n`` elements; a mask of booleans lists the true ones."""
    content = constant(b, index)
    if content.dtype in (torch.bool, torch.uint8):
        content = content.nonzero().squeeze(1)
    indices = [i + n if i < 0 else i for i in content.flatten().tolist()]
    if any(not 0 <= i < n for i in indices):
        raise NoForm("an index is out of range")
    return indices


@lowers("aten.index.Tensor")
def index(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``x[:, indices]``: constant indices for some of the axes."""
    x = need_value(a.self)
    shape = b.shape(x)
    if a.indices and a.indices[0] is not None:
        raise NoForm("it takes some of the samples")
    given = [(axis, i) for axis, i in enumerate(a.indices[1:]) if i is not None]
    if len(given) == 1:
        axis, i = given[0]
        content = constant(b, i)
        if content.dim() == 1:
            return emit_index(b, x, along(shape, axis, read_indices(b, i, shape[axis])))
    contents = [None if i is None else constant(b, i) for i in a.indices]
    return copy_by_numbers(b, x, lambda t: torch.ops.aten.index.Tensor(t, contents), a.result)


@lowers("aten.gather.default")
def gather(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``x`` at constant places along an axis, the same for all samples."""
    x = need_value(a.self)
    places = constant(b, a.index)
    axis = sample_axis(a.dim, len(b.shape(x)))
    if places.shape[0] != 1:
        raise NoForm("its places differ between samples")
    return copy_by_numbers(b, x, lambda t: t.gather(axis + 1, places.expand(2, *places.shape[1:])), a.result)


# ---------------------------------------------------------------------------------------------------------------
# Constant masks


def read_mask(b: ProgramBuilder, mask: Any, shape: Shape) -> list[bool]:
    """A constant mask for the numbers of a sample of ``shape``, row-major."""
    content = constant(b, mask)
    if content.dtype != torch.bool:
        raise NoForm("its mask is not of booleans")
    if content.dim() > len(shape) + 1 or (content.dim() == len(shape) + 1 and content.shape[0] != 1):
        raise NoForm("its mask has more axes than the samples")
    if content.dim() == len(shape) + 1:
        content = content[0]
    kept: list[bool] = content.expand(shape).flatten().tolist()
    return kept


def keep_where(b: ProgramBuilder, x: Value, mask: list[bool], shape: Shape, keep: bool) -> Value:
    """The numbers where the mask is ``keep``, and zeros elsewhere."""
    return copy_elements(b, stretch(b, x, shape), shape, [i if m == keep else -1 for i, m in enumerate(mask)])


def fill_where(b: ProgramBuilder, x: Value, mask: Any, value: float, a: SimpleNamespace) -> Value:
    """``value`` where the mask is true: zeros there, which are exact whatever the numbers were, and a shift."""
    y = keep_where(b, x, read_mask(b, mask, a.result), a.result, False)
    if value == 0:
        return y
    zeros = b.derive("aten.zeros.default", (1, *a.result), dtype=a.result_dtype, device=a.result_device)
    shift = b.note_meta(b.derive("aten.masked_fill.Scalar", zeros, mask, value), (1, *a.result), a.result_dtype)
    return shift_by(b, y, shift)


@lowers("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", axes=())
def where(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """The first of two where a constant mask is true, and the second elsewhere."""
    mask = read_mask(b, a.condition, a.result)
    sides = []
    for x, keep in ((a.self, True), (a.other, False)):
        if isinstance(x, Value):
            if len(b.shape(x)) != len(a.result):
                raise NoForm("it joins values of unequal ranks")
            sides.append((keep, keep_where(b, x, mask, a.result, keep)))
    if len(sides) == 2:
        return b.emit(Sum(), tuple(side for _, side in sides), a.result)
    if not sides:
        raise NoForm("the values that it gathers do not depend on the samples")
    (keep, y), other = sides[0], a.other if sides[0][0] else a.self
    if not isinstance(other, Param):
        if number_of(other) == 0:
            return y
        other = b.note_meta(b.derive("aten.full.default", (1,), number_of(other), dtype=a.result_dtype,
                                      device=a.result_device), (1,), a.result_dtype)  # fmt: skip
    zero = b.note_meta(b.derive("aten.zeros.default", (1,), dtype=a.result_dtype, device=a.result_device), (1,),
                     a.result_dtype)  # fmt: skip
    pair = (zero, other) if keep else (other, zero)
    shift = b.note_meta(b.derive("aten.where.self", a.condition, *pair), (), a.result_dtype)
    return shift_by(b, y, b.note_meta(b.derive("aten.expand.default", shift, (1, *a.result)), (1, *a.result),
                                   a.result_dtype))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Axes split and joined


def rearrange_axes(b: ProgramBuilder, x: Value, split: Shape, order: Sequence[int], shape: Shape) -> Value:
    """A value viewed as ``split``, with these axes in another order, under ``shape``."""
    return as_shape(b, permute_axes(b, as_shape(b, x, split), order), shape)


def image(b: ProgramBuilder, given: Any) -> tuple[Value, Shape]:
    """A value as ``[channels, rows, columns]``, and that shape."""
    x = need_value(given)
    if len(b.shape(x)) != 3:
        raise NoForm("it works along the batch axis")
    return x, b.shape(x)


@lowers("aten.pixel_shuffle.default")
def pixel_shuffle(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    (x, (c, h, w)), r = image(b, a.self), a.upscale_factor
    return rearrange_axes(b, x, (c // r**2, r, r, h, w), (0, 3, 1, 4, 2), a.result)


@lowers("aten.pixel_unshuffle.default")
def pixel_unshuffle(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    (x, (c, h, w)), r = image(b, a.self), a.downscale_factor
    return rearrange_axes(b, x, (c, h // r, r, w // r, r), (0, 2, 4, 1, 3), a.result)


@lowers("aten.channel_shuffle.default")
def channel_shuffle(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    c, *rest = b.shape(x)
    return rearrange_axes(b, x, (a.groups, c // a.groups, math.prod(rest)), (1, 0, 2), a.result)


@lowers("aten.unfold.default", along="dimension")
def unfold(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """Windows along an axis; the positions inside a window become the last axis."""
    x = need_value(a.self)
    shape = b.shape(x)
    axis = sample_axis(a.dimension, len(shape))
    count = (shape[axis] - a.size) // a.step + 1
    y = emit_index(b, x, along(shape, axis, [k * a.step + j for k in range(count) for j in range(a.size)]))
    split = (*shape[:axis], count, a.size, *shape[axis + 1 :])
    order = [d for d in range(len(split)) if d != axis + 1] + [axis + 1]
    return rearrange_axes(b, y, split, order, a.result)
