"""Copies of elements to other places (`Index`): permute, slice, select, split, cat, stack, pad, repeat, upsample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ...ir.indexing import along, identity, identity_runs, is_permutation, then
from ...ir.program import Channels, Contract, Index, Param, Part, Positions, Shape, Value, Windows
from .builder import SEVERAL, NoForm, ProgramBuilder, as_shape, lowers, need_value, number_of, sample_axis


def emit(b: ProgramBuilder, x: Value, part: Part) -> Value:
    """The part of one value.  The identity emits nothing; a value that is itself an `Index` of one part is merged."""
    shape = b.shape(x)
    if part == identity(shape):
        return x
    step = b.step(x)
    if step is not None and isinstance(step.form, Index) and len(step.form.parts) == 1:
        return emit(b, Value(step.inputs[0]), then(step.form.parts[0], part))
    result = tuple(sum(count for _, count, _ in axis) for axis in part.axes)
    long = [a for a in part.order if shape[a] != 1]
    if is_permutation(part, shape) and long == sorted(long):
        return as_shape(b, x, result)  # only axes of length one move
    pairs = [
        (a, axis) for a, axis in zip(part.order, part.axes, strict=True) if shape[a] != 1 or axis != identity_runs(1)
    ]
    if 3 < len(shape) > len(pairs):  # no kernel copies so many axes: leave out those that are and stay of length one
        kept = sorted(a for a, _ in pairs)
        small = Part(tuple(kept.index(a) for a, _ in pairs), tuple(axis for _, axis in pairs))
        return as_shape(b, emit(b, as_shape(b, x, tuple(shape[a] for a in kept)), small), result)
    return b.emit(Index((part,)), (x,), result)


def permuted(b: ProgramBuilder, x: Value, order: Sequence[int]) -> Value:
    """Per-sample axes in another order."""
    return emit(b, x, identity(b.shape(x), order))


def stretched(b: ProgramBuilder, x: Value, shape: Shape) -> Value:
    """Axes of length one repeated up to ``shape``; missing leading axes are added."""
    before = b.shape(x)
    x = as_shape(b, x, (1,) * (len(shape) - len(before)) + before)
    axes = tuple(identity_runs(n) if n == m else ((0, m, 0),) for n, m in zip(b.shape(x), shape, strict=True))
    return emit(b, x, Part(tuple(range(len(shape))), axes))


# ---------------------------------------------------------------------------------------------------------------
# Other orders of the axes


@lowers("aten.permute.default", axes=("dims",))
@lowers("aten.transpose.int", axes=("dim0", "dim1"))
@lowers("aten.movedim.int", "aten.swapaxes.default")
def permute(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    rank = len(b.shape(x)) + 1
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
    return permuted(b, x, [d - 1 for d in order[1:]])


def as_list(x: Any) -> list[int]:
    return [x] if isinstance(x, int) else list(x)


@lowers("aten.mT.default", "aten.adjoint.default")
def matrix_transpose(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    rank = len(b.shape(x))
    if rank < 2:
        raise NoForm("it moves the batch axis")
    return permuted(b, x, [*range(rank - 2), rank - 1, rank - 2])


@lowers("aten.flip.default", along="dims")
def flip(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    for d in as_list(a.dims):
        axis = sample_axis(d, len(b.shape(x)))
        x = emit(b, x, along(b.shape(x), axis, range(b.shape(x)[axis] - 1, -1, -1)))
    return x


@lowers("aten.roll.default")
def roll(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    if not a.dims:
        raise NoForm("it rolls samples into each other")
    for shift, d in zip(as_list(a.shifts), as_list(a.dims), strict=True):
        axis = sample_axis(d, len(b.shape(x)))
        n = b.shape(x)[axis]
        x = emit(b, x, along(b.shape(x), axis, [(i - shift) % n for i in range(n)]))
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
    return emit(b, x, along(shape, axis, wanted)) if trimmed is None else trimmed


def takes_all(a: SimpleNamespace) -> bool:
    """Whether a slice is ``x[:]``, whatever the length."""
    return a.step == 1 and a.start in (None, 0) and a.end in (None, 2**63 - 1)


def trim_convolution(b: ProgramBuilder, x: Value, axis: int, wanted: range) -> Value | None:
    """A convolution whose last windows are cut off (a causal network's chomp), as one with less padding after."""
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
    return as_shape(b, emit(b, x, along(b.shape(x), axis, [a.index % b.shape(x)[axis]])), a.result)


@lowers("aten.narrow.default")
def narrow(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    axis = sample_axis(a.dim, len(b.shape(x)))
    start = int(number_of(a.start)) % b.shape(x)[axis]
    return emit(b, x, along(b.shape(x), axis, range(start, start + a.length)))


SEVERAL.update(("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int"))


@lowers(*SEVERAL, along="dim")
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
    return as_shape(b, emit(b, x, along(b.shape(x), axis, range(start, min(start + size, n)))), a.result)


# ---------------------------------------------------------------------------------------------------------------
# Several values side by side


@lowers("aten.cat.default", along="dim")
def cat(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    axis = sample_axis(a.dim, len(a.result))
    tensors = [x for x in a.tensors if isinstance(x, Param) or len(b.shape(need_value(x))) == len(a.result)]
    sizes = [b.param_shape(x)[axis + 1] if isinstance(x, Param) else b.shape(x)[axis] for x in tensors]
    if not any(isinstance(x, Param) for x in tensors):
        return joined(b, tensors, axis, a.result)
    if len([x for x in tensors if isinstance(x, Value)]) != 1:
        raise NoForm("it joins constants and several values")
    return beside_constants(b, tensors, sizes, axis)


def beside_constants(b: ProgramBuilder, tensors: list[Value | Param], sizes: list[int], axis: int) -> Value:
    """One value with constants before and after it (a class token): zeros there, and the constants added."""
    at = next(k for k, x in enumerate(tensors) if isinstance(x, Value))
    before, after = sum(sizes[:at]), sum(sizes[at + 1 :])
    x: Value = tensors[at]  # type: ignore[assignment]
    wide = emit(b, x, along(b.shape(x), axis, [-1] * before + list(range(sizes[at])) + [-1] * after))
    like = b.param_meta[next(p for p in tensors if isinstance(p, Param))]
    blank = b.derive("aten.zeros.default", (1, *b.shape(x)), dtype=like.dtype, device=like.device)
    full = b.derive("aten.cat.default", tuple(blank if k == at else p for k, p in enumerate(tensors)), axis + 1)
    flat = as_shape(b, wide, (math.prod(b.shape(wide)),))
    shift = b.derive("aten.reshape.default", full, (-1,))
    return as_shape(b, b.emit(Contract(Channels(), None, shift), (flat,), b.shape(flat)), b.shape(wide))


@lowers("aten.stack.default")
def stack(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    axis = sample_axis(a.dim, len(a.result))
    values = []
    for x in a.tensors:
        shape = b.shape(need_value(x, "one of its inputs"))
        values.append(as_shape(b, x, (*shape[:axis], 1, *shape[axis:])))
    return joined(b, values, axis, a.result)


@lowers("aten.slice_scatter.default", "aten.select_scatter.default")
def assigned(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """A value in which other values replace some positions (``y[:, 0] = x``)."""
    x, source = need_value(a.self), need_value(a.src, "what is assigned")
    shape = b.shape(x)
    if not hasattr(a, "index") and a.dim % (len(shape) + 1) == 0 and takes_all(a):
        return source
    axis = sample_axis(a.dim, len(shape))
    places = range(shape[axis])
    taken = [places[a.index]] if hasattr(a, "index") else list(places[a.start : a.end : a.step])
    source = as_shape(b, source, (*shape[:axis], len(taken), *shape[axis + 1 :]))
    if len(taken) == len(places):
        return source
    kept = along(shape, axis, [-1 if i in taken else i for i in places])
    new = along(b.shape(source), axis, [taken.index(i) if i in taken else -1 for i in places])
    return b.emit(Index((kept, new)), (x, source), shape)


def joined(b: ProgramBuilder, values: list[Value], axis: int, shape: Shape) -> Value:
    parts, first = [], 0
    values = [v for v in values if b.shape(v)[axis]] or values[:1]  # empty values are not read
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


def padded(b: ProgramBuilder, x: Value, flat: Sequence[int], mode: str) -> Value:
    """``flat``: (before, after) of the last axis, of the one before it, …; negative numbers cut off."""
    rank = len(b.shape(x))
    if any(flat[2 * rank :]):
        raise NoForm("it pads the batch axis")
    for k in range(0, min(len(flat), 2 * rank), 2):
        axis = rank - 1 - k // 2
        n = b.shape(x)[axis]
        x = emit(b, x, along(b.shape(x), axis, [BORDERS[mode](i, n) for i in range(-flat[k], n + flat[k + 1])]))
    return x


@lowers("aten.constant_pad_nd.default", "aten.pad.default")
def pad(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    mode = getattr(a, "mode", "constant")
    if mode == "constant" and a.value:
        raise NoForm(f"it pads with {a.value}, not with zeros")
    return padded(b, need_value(a.self), a.pad, mode)


@lowers(*(f"aten.reflection_pad{d}d.default" for d in (1, 2, 3)), mode="reflect")
@lowers(*(f"aten.replication_pad{d}d.default" for d in (1, 2, 3)), mode="replicate")
def pad_as(b: ProgramBuilder, a: SimpleNamespace, mode: str) -> Value:
    return padded(b, need_value(a.self), a.padding, mode)


@lowers("aten.expand.default", "aten.expand_as.default")
def expand(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    if len(b.shape(x)) != len(a.result):
        raise NoForm("it repeats the samples")
    return stretched(b, x, a.result)


@lowers("aten.repeat.default")
def repeat(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    if len(a.repeats) != len(a.result) + 1 or a.repeats[0] != 1:
        raise NoForm("it repeats the samples")
    for axis, times in enumerate(a.repeats[1:]):
        n = b.shape(x)[axis]
        x = emit(b, x, along(b.shape(x), axis, list(range(n)) * times))
    return x


@lowers("aten.repeat_interleave.self_int")
def repeat_interleave(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.self)
    if a.dim is None:
        raise NoForm("it runs over the samples")
    axis = sample_axis(a.dim, len(b.shape(x)))
    return emit(b, x, along(b.shape(x), axis, [i for i in range(b.shape(x)[axis]) for _ in range(a.repeats)]))


# ---------------------------------------------------------------------------------------------------------------
# Upsampling: the nearest element is an `Index`, linear interpolation a map over positions


def scales(a: SimpleNamespace) -> list[float | None]:
    """Scale factors that the caller gave, per axis; None if a size was given."""
    scales = getattr(a, "scale_factors", None) or [getattr(a, k, None) for k in ("scales_h", "scales_w", "scales")]
    return list(scales)


def upsampled(b: ProgramBuilder, a: SimpleNamespace) -> list[tuple[int, int, float]]:
    """Per spatial axis: input length, output length, and input steps per output step."""
    shape = b.shape(need_value(a.input if hasattr(a, "input") else a.self))
    factors = [s for s in scales(a) if s is not None]
    axes = list(zip(shape[1:], a.result[1:], strict=True))
    if factors and len(factors) != len(axes):
        factors = []
    return [(n, m, 1 / factors[k] if factors else n / m) for k, (n, m) in enumerate(axes)]


@lowers("aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec", "aten.upsample_nearest1d.default",
        "aten.upsample_nearest2d.default")  # fmt: skip
def upsample_nearest(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.input if hasattr(a, "input") else a.self)
    for axis, (n, m, step) in enumerate(upsampled(b, a), start=1):
        wanted = [i if n == m else min(int(i * step), n - 1) for i in range(m)]
        x = emit(b, x, along(b.shape(x), axis, wanted))
    return x


@lowers("aten.upsample_linear1d.vec", "aten.upsample_bilinear2d.vec", "aten.upsample_linear1d.default",
        "aten.upsample_bilinear2d.default")  # fmt: skip
def upsample_linear(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.input if hasattr(a, "input") else a.self)
    axes = []
    for n, m, step in upsampled(b, a):
        rows = []
        for i in range(m):
            at = i * (n - 1) / max(m - 1, 1) if a.align_corners else max((i + 0.5) * step - 0.5, 0.0)
            first = min(int(at), n - 1)
            rest = at - first
            rows.append((first, (1.0 - rest, rest) if first + 1 < n and rest else (1.0,)))
        axes.append(tuple(rows))
    return b.emit(Contract(Positions(tuple(axes))), (x,), a.result)
