"""Copies of elements to other places (`Index`): permute, slice, select, split, cat, stack, pad, repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from ...ir.indexing import Runs, along, identity, identity_runs, indices, is_permutation, length, runs, then
from ...ir.program import (
    MOST_AXES,
    Channels,
    Contract,
    Index,
    Param,
    Part,
    Scale,
    Shape,
    Sum,
    Value,
    Windows,
)
from .builder import (
    MULTI_RESULT_OPS,
    NoForm,
    ProgramBuilder,
    as_shape,
    has_few_axes,
    lowers,
    merge_axes_around,
    need_value,
    number_of,
    sample_axis,
)


def emit_index(b: ProgramBuilder, x: Value, part: Part) -> Value:
    """A part of one value.  Nothing is emitted for the identity.  A value that is itself an `Index` of one part is
    joined with it in one step."""
    shape = b.shape(x)
    if part == identity(shape):
        return x
    step = b.step(x)
    if step is not None and isinstance(step.form, Index) and len(step.form.parts) == 1:
        return emit_index(b, Value(step.inputs[0]), then(step.form.parts[0], part))
    result = tuple(sum(count for _, count, _ in axis) for axis in part.axes)
    long = [a for a in part.order if shape[a] != 1]
    if is_permutation(part, shape) and long == sorted(long):
        return as_shape(b, x, result)  # only axes of length one move
    fewer, merged = merge_neighbours(shape, part)
    if MOST_AXES < len(shape) > len(merged):
        return as_shape(b, emit_index(b, as_shape(b, x, merged), fewer), result)
    if len(merged) > MOST_AXES and is_permutation(fewer, merged) and has_few_axes(b, x):
        return as_shape(b, brought_to_front(b, x, merged, fewer.order), result)
    return b.emit(Index((part,)), (x,), result)


def brought_to_front(b: ProgramBuilder, x: Value, shape: Shape, order: Shape) -> Value:
    """A permutation of many axes as several of three axes, each of which brings one axis to the front."""
    kept = len(order) - 1
    while order[kept - 1] < order[kept]:
        kept -= 1  # the axes from here on stay in order
    axes = list(range(len(order)))
    for a in reversed(order[:kept]):
        at = axes.index(a)
        x = as_shape(b, x, merge_axes_around(tuple(shape[i] for i in axes), at))
        x = permute_axes(b, x, (1, 0, 2))
        axes.insert(0, axes.pop(at))
    return x


def merge_neighbours(shape: Shape, part: Part) -> tuple[Part, Shape]:
    """The part with neighbours that stay neighbours as one axis, and the shape of the value that it then reads.

    As many are merged as it takes to have three axes, the smallest first, so that a permutation and its inverse are
    treated alike; those whose map is one run before others.  An axis of which one index is read (a `select`) may stand
    anywhere in the result.
    """
    sizes, axes = list(shape), list(zip(part.order, part.axes, strict=True))
    while len(axes) > MOST_AXES:
        places = [next(d for d, (a, _) in enumerate(axes) if a == source) for source in range(len(sizes))]
        pairs = [
            (sizes[a] * sizes[a + 1], a, d, e)
            for a, (d, e) in enumerate(pairwise(places))
            if e == d + 1 or 1 in (length(axes[d][1]), length(axes[e][1]))
        ]
        if not pairs:
            break
        size, a, d, e = min(pairs, key=lambda p: (one_run(axes[p[2]][1], axes[p[3]][1], sizes[p[1] + 1]) is None, p))
        outer, inner = axes[d][1], axes[e][1]
        run = one_run(outer, inner, sizes[a + 1])
        kept, gone = (e, d) if length(outer) == 1 else (d, e)
        axes[kept] = (a, (run,) if run else product_runs(outer, inner, sizes[a + 1]))
        del axes[gone]
        axes = [(source - (source > a), m) for source, m in axes]
        sizes[a : a + 2] = [size]
    return Part(tuple(a for a, _ in axes), tuple(m for _, m in axes)), tuple(sizes)


def one_run(outer: Runs, inner: Runs, n: int) -> tuple[int, int, int] | None:
    """The map of two neighbouring axes merged into one, if it is a single run; the inner axis has ``n`` elements."""
    if len(outer) != 1 or len(inner) != 1 or min(outer[0][0], inner[0][0]) < 0:
        return None
    (start, count, step), (first, many, over) = outer[0], inner[0]
    if count == 1:
        return start * n + first, many, over
    if many == 1:
        return start * n + first, count, step * n
    return (start * n, count * n, 1) if step == 1 and inner == identity_runs(n) else None


def product_runs(outer: Runs, inner: Runs, n: int) -> Runs:
    """The map of two neighbouring axes merged into one; the inner axis has ``n`` elements."""
    return runs(-1 if min(o, i) < 0 else o * n + i for o in indices(outer) for i in indices(inner))


def blank(shape: Shape) -> Part:
    """The part that is zero in the shape of a value."""
    return Part(tuple(range(len(shape))), tuple(((-1, n, 0),) if n else () for n in shape))


def permute_axes(b: ProgramBuilder, x: Value, order: Sequence[int]) -> Value:
    """Per-sample axes in another order."""
    return emit_index(b, x, identity(b.shape(x), order))


def stretch(b: ProgramBuilder, x: Value, shape: Shape) -> Value:
    """Axes of length one repeated up to ``shape``; missing leading axes are added."""
    before = b.shape(x)
    x = as_shape(b, x, (1,) * (len(shape) - len(before)) + before)
    axes = tuple(identity_runs(n) if n == m else ((0, m, 0),) for n, m in zip(b.shape(x), shape, strict=True))
    return emit_index(b, x, Part(tuple(range(len(shape))), axes))


# ---------------------------------------------------------------------------------------------------------------
# Other orders of the axes


@lowers("aten.permute.default", axes=("dims",))
@lowers("aten.transpose.int", axes=("dim0", "dim1"))
@lowers("aten.swapaxes.default", axes=("axis0", "axis1"))
@lowers("aten.movedim.int")
def permute(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    rank = len(b.shape(x)) + 1
    if hasattr(a, "axis0"):
        a.dim0, a.dim1 = a.axis0, a.axis1
    if hasattr(a, "dims"):
        order = [d % rank for d in a.dims]
    elif hasattr(a, "dim0"):
        order = list(range(rank))
        i, j = a.dim0 % rank, a.dim1 % rank
        order[i], order[j] = order[j], order[i]
    else:
        sources, targets = ([d % rank for d in as_list(s)] for s in (a.source, a.destination))
        order = [d for d in range(rank) if d not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            order.insert(target, source)
    if order[0] != 0:
        raise NoForm("it moves the batch axis")
    return permute_axes(b, x, [d - 1 for d in order[1:]])


def as_list(x: Any) -> list[int]:
    return [x] if isinstance(x, int) else list(x)


@lowers("aten.mT.default", "aten.adjoint.default")
def matrix_transpose(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    rank = len(b.shape(x))
    if rank < 2:
        raise NoForm("it moves the batch axis")
    return permute_axes(b, x, [*range(rank - 2), rank - 1, rank - 2])


@lowers("aten.flip.default", along="dims")
def flip(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    for d in as_list(a.dims):
        axis = sample_axis(d, len(b.shape(x)))
        x = emit_index(b, x, along(b.shape(x), axis, range(b.shape(x)[axis] - 1, -1, -1)))
    return x


@lowers("aten.roll.default", along="dims")
def roll(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    if not a.dims:
        raise NoForm("it rolls samples into each other")
    for shift, d in zip(as_list(a.shifts), as_list(a.dims), strict=True):
        axis = sample_axis(d, len(b.shape(x)))
        n = b.shape(x)[axis]
        x = emit_index(b, x, along(b.shape(x), axis, [(i - shift) % n for i in range(n)]))
    return x


# ---------------------------------------------------------------------------------------------------------------
# Fewer elements


@lowers("aten.slice.Tensor", along="dim")
def slice_(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    shape = b.shape(x)
    if a.dim % (len(shape) + 1) == 0:
        if a.result == shape and takes_all(a):
            return x
        raise NoForm("it takes some of the samples")
    axis = sample_axis(a.dim, len(shape))
    end = a.end if a.end is None or isinstance(a.end, int) else None
    wanted = range(shape[axis])[slice(a.start, end, a.step)]
    trimmed = trim_convolution(b, x, axis, wanted)
    return emit_index(b, x, along(shape, axis, wanted)) if trimmed is None else trimmed


def takes_all(a: SimpleNamespace) -> bool:
    """Whether a slice is ``x[:]``, whatever the length."""
    return a.step == 1 and a.start in (None, 0) and a.end in (None, 2**63 - 1)


def trim_convolution(b: ProgramBuilder, x: Value, axis: int, wanted: range) -> Value | None:
    """A convolution whose last windows are cut off (as in causal networks) becomes one with less padding at the end."""
    step = b.step(x)
    if step is None or axis == 0 or not isinstance(step.form, Contract) or not isinstance(step.form.map, Windows):
        return None
    w: Windows = step.form.map
    before, after = w.padding[axis - 1]
    after -= (step.shape[axis] - len(wanted)) * w.stride[axis - 1]
    spatial = b.shape(Value(step.inputs[0]))[axis]
    reach = (len(wanted) - 1) * w.stride[axis - 1] + w.dilation[axis - 1] * (w.kernel[axis - 1] - 1) + 1
    if wanted != range(len(wanted)) or not wanted or after < 0 or reach > before + spatial + after:
        return None
    padding = tuple((before, after) if k == axis - 1 else p for k, p in enumerate(w.padding))
    shape = tuple(len(wanted) if k == axis else n for k, n in enumerate(step.shape))
    return b.emit(replace(step.form, map=replace(w, padding=padding)), (Value(step.inputs[0]),), shape)


@lowers("aten.select.int", along="dim")
def select(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    axis = sample_axis(a.dim, len(b.shape(x)))
    return as_shape(b, emit_index(b, x, along(b.shape(x), axis, [a.index % b.shape(x)[axis]])), a.result)


@lowers("aten.narrow.default")
def narrow(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    axis = sample_axis(a.dim, len(b.shape(x)))
    start = int(number_of(a.start)) % b.shape(x)[axis]
    return emit_index(b, x, along(b.shape(x), axis, range(start, start + a.length)))


MULTI_RESULT_OPS.update(("aten.tensor_split.sections",))


@lowers("aten.tensor_split.sections", along="dim")
def tensor_split(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """One of ``sections`` pieces, of which the first ``n % sections`` are longer by one."""
    x = need_value(a.self)
    axis = sample_axis(a.dim, len(b.shape(x)))
    size, longer = divmod(b.shape(x)[axis], a.sections)
    start = a.piece * size + min(a.piece, longer)
    return emit_index(b, x, along(b.shape(x), axis, range(start, start + size + (a.piece < longer))))


PIECES = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int")
MULTI_RESULT_OPS.update(PIECES)


@lowers(*PIECES, along="dim")
def split(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """One of several pieces: ``a.piece`` says which."""
    x = need_value(a.self)
    axis = sample_axis(a.dim, len(b.shape(x)))
    n = b.shape(x)[axis]
    if hasattr(a, "split_sizes"):
        start, size = sum(a.split_sizes[: a.piece]), a.split_sizes[a.piece]
    else:
        size = a.split_size if hasattr(a, "split_size") else (-(-n // a.chunks) if hasattr(a, "chunks") else 1)
        start = a.piece * size
    return as_shape(b, emit_index(b, x, along(b.shape(x), axis, range(start, min(start + size, n)))), a.result)


# ---------------------------------------------------------------------------------------------------------------
# Several values side by side


@lowers("aten.cat.default", along="dim")
def cat(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    axis = sample_axis(a.dim, len(a.result))
    # torch leaves out tensors of shape [0], with which caches of keys and values begin.
    tensors = [
        x
        for x in a.tensors
        if (b.param_shape(x) != (0,) if isinstance(x, Param) else len(b.shape(need_value(x))) == len(a.result))
    ]
    if not any(isinstance(x, Param) for x in tensors):
        return concatenate(b, tensors, axis, a.result)
    if not any(isinstance(x, Value) for x in tensors):
        raise NoForm("it does not depend on the samples")
    return beside_constants(b, tensors, axis, a)


def beside_constants(b: ProgramBuilder, tensors: list[Value | Param], axis: int, a: SimpleNamespace) -> Value:
    """A concatenation of values and constants (a class token): the values with zeros between, plus the constants."""
    like = {"dtype": a.result_dtype, "device": a.result_device}
    parts, pieces, values, first = [], [], [], 0
    for x in tensors:
        shape = b.shape(x) if isinstance(x, Value) else b.param_shape(x)
        if isinstance(x, Param) and len(shape) == len(a.result) + 1:
            shape = shape[1:]
        if len(shape) != len(a.result):
            raise NoForm("one of its constants has other axes than the samples")
        n = shape[axis]
        if isinstance(x, Value):
            pieces.append(b.derive("aten.zeros.default", (1, *shape), **like))
            parts.append(along(shape, axis, [-1] * first + list(range(n)) + [-1] * (a.result[axis] - first - n)))
            values.append(x)
        else:
            pieces.append(b.derive("aten.reshape.default", x, (1, *shape)))
        first += n
    y = emit_index(b, values[0], parts[0]) if len(values) == 1 else b.emit(Index(tuple(parts)), tuple(values), a.result)
    full = b.derive("aten.cat.default", tuple(pieces), axis + 1)
    shift = b.derive("aten.reshape.default", full, (-1,))
    flat = as_shape(b, y, (math.prod(a.result),))
    return as_shape(b, b.emit(Contract(Channels(), None, shift), (flat,), b.shape(flat)), a.result)


@lowers("aten.stack.default")
def stack(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    axis = sample_axis(a.dim, len(a.result))
    one = (*a.result[:axis], 1, *a.result[axis + 1 :])
    tensors: list[Value | Param] = []
    for x in a.tensors:
        if isinstance(x, Param):
            row = b.derive("aten.reshape.default", x, (1, *one))
            b.param_meta[row] = b.param_meta[x].new_empty((1, *one), device="meta")
            tensors.append(row)
        else:
            tensors.append(as_shape(b, need_value(x, "one of its inputs"), one))
    if any(isinstance(x, Param) for x in tensors):
        return beside_constants(b, tensors, axis, a)
    return concatenate(b, tensors, axis, a.result)  # type: ignore[arg-type]


@lowers("aten.diff.default", along="dim")
def diff(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """Each element less the one before it."""
    x = need_value(a.self)
    if a.prepend is not None or a.append is not None:
        raise NoForm("it joins other tensors")
    axis = sample_axis(a.dim, len(b.shape(x)))
    for _ in range(a.n):
        n = b.shape(x)[axis]
        later, earlier = (emit_index(b, x, along(b.shape(x), axis, range(k, k + n - 1))) for k in (1, 0))
        minus = b.emit(Scale("affine", (-1.0, 0.0)), (earlier,), b.shape(earlier))
        x = b.emit(Sum(), (later, minus), b.shape(later))
    return x


def concatenate(b: ProgramBuilder, values: list[Value], axis: int, shape: Shape) -> Value:
    parts, first = [], 0
    values = [v for v in values if b.shape(v)[axis]] or values[:1]  # empty values are not read
    if len(shape) > MOST_AXES and any(has_few_axes(b, v) for v in values):
        few = [as_shape(b, v, merge_axes_around(b.shape(v), axis)) for v in values]
        return as_shape(b, concatenate(b, few, 1, merge_axes_around(shape, axis)), shape)
    for v in values:
        n = b.shape(v)[axis]
        wanted = [-1] * first + list(range(n)) + [-1] * (shape[axis] - first - n)
        parts.append(along(b.shape(v), axis, wanted))
        first += n
    return values[0] if len(values) == 1 else b.emit(Index(tuple(parts)), tuple(values), shape)


# ---------------------------------------------------------------------------------------------------------------
# More elements: padding, repetition


def reflect(i: int, n: int) -> int:
    i = abs(i)
    return 2 * (n - 1) - i if i >= n else i


BORDERS: dict[str, Callable[[int, int], int]] = {
    "constant": lambda i, n: i if 0 <= i < n else -1,
    "reflect": reflect,
    "replicate": lambda i, n: min(max(i, 0), n - 1),
    "circular": lambda i, n: i % n,
}


def pad_axes(b: ProgramBuilder, x: Value, flat: Sequence[int], mode: str) -> Value:
    """``flat``: (before, after) of the last axis, of the one before it, …; negative numbers cut off."""
    rank = len(b.shape(x))
    if any(flat[2 * rank :]):
        raise NoForm("it pads the batch axis")
    for k in range(0, min(len(flat), 2 * rank), 2):
        axis = rank - 1 - k // 2
        n = b.shape(x)[axis]
        x = emit_index(b, x, along(b.shape(x), axis, [BORDERS[mode](i, n) for i in range(-flat[k], n + flat[k + 1])]))
    return x


PADS = ("aten.constant_pad_nd.default", "aten.pad.default", *(
    f"aten.{kind}_pad{d}d.default" for kind in ("reflection", "replication") for d in (1, 2, 3)
))  # fmt: skip


@lowers("aten.constant_pad_nd.default", "aten.pad.default")
def pad(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x, mode = need_value(a.self), getattr(a, "mode", "constant")
    y = pad_axes(b, x, a.pad, mode)
    if mode != "constant" or not a.value:
        return y
    like = {"dtype": a.result_dtype, "device": a.result_device}
    inside = b.derive("aten.zeros.default", (1, *b.shape(x)), **like)
    shift = b.derive("aten.constant_pad_nd.default", inside, tuple(a.pad[: 2 * len(b.shape(x))]), a.value)
    flat = as_shape(b, y, (math.prod(b.shape(y)),))
    shift = b.derive("aten.reshape.default", shift, (-1,))
    return as_shape(b, b.emit(Contract(Channels(), None, shift), (flat,), b.shape(flat)), b.shape(y))


@lowers(*(f"aten.reflection_pad{d}d.default" for d in (1, 2, 3)), mode="reflect")
@lowers(*(f"aten.replication_pad{d}d.default" for d in (1, 2, 3)), mode="replicate")
def pad_as(b: ProgramBuilder, a: SimpleNamespace, mode: str) -> Value:
    return pad_axes(b, need_value(a.self), a.padding, mode)


@lowers("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default", axes=())
def expand(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    if len(b.shape(x)) != len(a.result):
        raise NoForm("it repeats the samples")
    return stretch(b, x, a.result)


@lowers("aten.repeat.default", "aten.tile.default")
def repeat(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    rank = len(b.shape(x)) + 1
    repeats = a.repeats if hasattr(a, "repeats") else (1,) * (rank - len(a.dims)) + tuple(a.dims)
    if len(repeats) != rank or repeats[0] != 1:
        raise NoForm("it repeats the samples")
    for axis, times in enumerate(repeats[1:]):
        n = b.shape(x)[axis]
        x = emit_index(b, x, along(b.shape(x), axis, list(range(n)) * times))
    return x


@lowers("aten.repeat_interleave.self_int")
def repeat_interleave(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    if a.dim is None:
        raise NoForm("it runs over the samples")
    axis = sample_axis(a.dim, len(b.shape(x)))
    return emit_index(b, x, along(b.shape(x), axis, [i for i in range(b.shape(x)[axis]) for _ in range(a.repeats)]))
