"""Assignments to constant places, ``y[:, 0] = x`` or ``y[:, [0, 3]] = x``, of values and constants.

The elements of ``y`` that stay and those of ``x`` are copied to disjoint places (`Index`); constants are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...ir.indexing import along
from ...ir.program import Call, Index, Param, Shape, Sum, Value
from .arithmetic import affine, shift_by
from .builder import NoForm, ProgramBuilder, as_shape, lowers, need_value, number_of, sample_axis
from .gather import LARGEST, constant, read_indices
from .index import emit_index, takes_all


@lowers("aten.slice_scatter.default", "aten.select_scatter.default", along="dim")
def assign_slice(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """A value in which other values replace some positions along an axis (``y[:, 0] = x``)."""
    x, source = a.self, a.src
    shape = a.result
    if not hasattr(a, "index") and a.dim % (len(shape) + 1) == 0 and takes_all(a):
        return need_value(source, "the assigned value")
    axis = sample_axis(a.dim, len(shape))
    for tensor, rank in ((x, len(shape) + 1), (source, len(shape) + 1 - hasattr(a, "index"))):
        if isinstance(tensor, Param) and len(b.param_shape(tensor)) != rank:
            raise NoForm("one of its constants has other axes than the samples")
    places = range(shape[axis])
    chosen = [places[a.index]] if hasattr(a, "index") else list(places[a.start : a.end : a.step])
    part = (*shape[:axis], len(chosen), *shape[axis + 1 :])
    if len(chosen) == len(places) and isinstance(source, Value):
        return as_shape(b, source, part)
    where = {place: k for k, place in enumerate(chosen)}
    parts, values = [], []
    if isinstance(x, Value):
        parts.append(along(shape, axis, [-1 if i in where else i for i in places]))
        values.append(x)
    if isinstance(source, Value):
        parts.append(along(part, axis, [where.get(i, -1) for i in places]))
        values.append(as_shape(b, source, part))
    y = copies(b, parts, values, shape)
    return with_constants(b, y, (("self", x, shape), ("src", source, None)), a)


def copies(b: ProgramBuilder, parts: list[Any], values: list[Value], shape: Shape) -> Value:
    if not values:
        raise NoForm("it does not depend on the samples alone")
    if len(values) == 1:
        return emit_index(b, values[0], parts[0])
    return b.emit(Index(tuple(parts)), tuple(values), shape)


def with_constants(
    b: ProgramBuilder, y: Value, tensors: Sequence[tuple[str, Any, Shape | None]], a: SimpleNamespace
) -> Value:
    """The copied values ``y``, plus the op's result on the constants, with zeros in place of the values."""
    constants = [x for _, x, _ in tensors if isinstance(x, Param)]
    if not constants or all(is_zero(b, x) for x in constants):
        return y
    like = {"dtype": a.result_dtype, "device": a.result_device}
    arguments = dict(vars(a))
    for name, x, shape in tensors:
        if isinstance(x, Value):
            arguments[name] = b.derive("aten.zeros.default", (1, *(b.shape(x) if shape is None else shape)), **like)
    names = ("result", "result_dtype", "result_device", "piece")
    keywords = tuple(sorted((k, v) for k, v in arguments.items() if k not in names))
    shift = b.note_meta(b.derive_call(Call(b.op, (), keywords)), (1, *a.result), a.result_dtype)
    return shift_by(b, y, shift)


def is_zero(b: ProgramBuilder, x: Param) -> bool:
    try:
        return not bool(constant(b, x).any())
    except NoForm:
        return False


# ---------------------------------------------------------------------------------------------------------------
# Places of any kind, found by numbering the elements


def copy_from_several(
    b: ProgramBuilder, tensors: Sequence[tuple[str, Any, Shape]], f: Callable[..., Tensor], a: SimpleNamespace
) -> Value:
    """The value of an op that copies elements of several tensors, each ``(name, tensor, per-sample shape)``.

    Where the elements go is found by running ``f`` on numbered elements, one tensor ``[1, *shape]`` per name.
    """
    total = sum(math.prod(shape) for _, _, shape in tensors) + math.prod(a.result)
    if total > LARGEST:
        raise NoForm(f"a copy of more than {LARGEST} separately placed numbers has no form")
    numbers, first = {}, {}
    count = 1
    for name, x, shape in tensors:
        n = math.prod(shape)
        live = isinstance(x, Value)
        first[name] = count
        numbers[name] = (torch.arange(count, count + n) if live else torch.zeros(n)).double().reshape(1, *shape)
        count += n if live else 0
    with torch.inference_mode(False), torch.no_grad():
        origin = f(**numbers).flatten().long().tolist()
    parts, values = [], []
    for name, x, shape in tensors:
        if isinstance(x, Value):
            n = math.prod(shape)
            places = [i - first[name] if first[name] <= i < first[name] + n else -1 for i in origin]
            parts.append(along((n,), 0, places))
            values.append(as_shape(b, x, (n,)))
    return as_shape(b, copies(b, parts, values, (len(origin),)), a.result)


def shape_of(b: ProgramBuilder, x: Any) -> Shape:
    """A tensor's per-sample shape."""
    if isinstance(x, Param):
        shape = b.param_shape(x)
        return shape[1:] if shape and shape[0] == 1 else shape
    return b.shape(need_value(x))


@lowers("aten.index_put.default")
def index_put(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``y[:, indices] = x`` for constant indices."""
    if a.accumulate or not a.indices or a.indices[0] is not None:
        raise NoForm("it adds to places, or takes some of the samples")
    indices = [None if i is None else constant(b, i) for i in a.indices]
    if isinstance(a.values, Value) and len(b.shape(a.values)) != values_rank(indices, len(a.result)):
        raise NoForm("the assigned value is repeated over an axis")
    given = shape_of(b, a.values)
    tensors = (("self", a.self, a.result), ("values", a.values, given))

    def put(self: Tensor, values: Tensor) -> Tensor:
        return torch.ops.aten.index_put.default(self, indices, values)

    return with_constants(b, copy_from_several(b, tensors, put, a), tensors, a)


def values_rank(indices: Sequence[Tensor | None], rank: int) -> int:
    """How many per-sample axes ``y[indices]`` has, if ``y`` has ``rank``."""
    given = [i for i in indices if i is not None]
    return rank - len(given) + max(i.dim() for i in given)


@lowers("aten.index_copy.default", source="source")
@lowers("aten.scatter.src", source="src")
@lowers("aten.scatter.value", source=None)
def scatter(b: ProgramBuilder, a: SimpleNamespace, source: str | None) -> Value:
    """``y`` with other numbers at constant places along an axis, the same for all samples."""
    sample_axis(a.dim, len(a.result))
    index = constant(b, a.index)
    if source != "source" and index.shape[0] != 1:
        raise NoForm("its places differ between samples")
    x = getattr(a, source) if source else number_of(a.value)
    tensors = [("self", a.self, a.result)]
    if source:
        tensors.append((source, x, shape_of(b, x)))
    op = b.op

    def run(self: Tensor, **other: Tensor) -> Tensor:
        if op == "aten.index_copy.default":
            return self.index_copy(a.dim, index, other["source"])
        return self.scatter(a.dim, index, other["src"]) if other else self.scatter(a.dim, index, 0.0)

    y = copy_from_several(b, tensors, run, a)
    if source or not x:
        return with_constants(b, y, tensors, a)
    like = {"dtype": a.result_dtype, "device": a.result_device}
    zeros = b.derive("aten.zeros.default", (1, *a.result), **like)
    shift = b.derive("aten.scatter.value", zeros, a.dim, a.index, a.value)
    return shift_by(b, y, b.note_meta(shift, (1, *a.result), a.result_dtype))


@lowers("aten.index_add.default")
def index_add(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x, source = need_value(a.self), need_value(a.source)
    axis = sample_axis(a.dim, len(a.result))
    places = read_indices(b, a.index, a.result[axis])
    if len(set(places)) != len(places):
        raise NoForm("it adds several elements to one place")
    where = {place: k for k, place in enumerate(places)}
    wide = emit_index(b, source, along(b.shape(source), axis, [where.get(i, -1) for i in range(a.result[axis])]))
    return b.emit(Sum(), (x, affine(b, wide, float(a.alpha), 0.0)), a.result)
