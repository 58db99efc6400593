"""Complex numbers as pairs of real values, and Fourier transforms as linear maps between them.

A Program has real values only.  A complex tensor of the graph is a `Complex`, and what reads it is lowered to steps on
its two parts.  A short transform is a matrix; a long one is torch's own, which needs fewer multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ...ir.indexing import along
from ...ir.program import Call, Contract, Dense, Opaque, Param, Sum, Value, Windows
from .activation import elementwise
from .arithmetic import affine, multiply
from .builder import (
    LOWERINGS,
    Complex,
    NoForm,
    ProgramBuilder,
    as_shape,
    lowers_complex,
    need_value,
    real_dtype,
    sample_axis,
)
from .index import concatenate, emit_index, permute_axes
from .reduce import root

_LONGEST = 512  # the longest transform that is lowered to a matrix
_OWN = "a long Fourier transform is faster as torch's own"

Part = Value | Param | None  # of a complex number; None: zero
Number = Complex | Value


# ---------------------------------------------------------------------------------------------------------------
# Parts


def parts(b: ProgramBuilder, x: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The real and the imaginary part of an operand; None for an imaginary part that is zero."""
    if isinstance(x, Complex):
        return x.real, x.imag
    if isinstance(x, Param) and b.param_meta[x].dtype.is_complex:
        shape = b.param_shape(x)
        real, imag = (
            b.note_meta(b.derive("aten.clone.default", b.derive(f"aten.{part}.default", x)), shape, dtype)
            for part in ("real", "imag")
        )
        return real, imag
    if isinstance(x, complex):
        return x.real, x.imag
    return x, None


def with_parts(a: SimpleNamespace, dtype: torch.dtype, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(a), "result_dtype": dtype, **changes})


#: Ops that only copy or add elements, so that they do the same to both parts.
LINEAR = (
    *("view", "reshape", "_unsafe_view", "clone", "contiguous", "permute", "neg", "flip", "roll", "unsqueeze", "cat"),
    *("stack", "expand", "constant_pad_nd", "repeat", "squeeze"),
)
LINEAR_OVERLOADS = (
    *(f"aten.{name}.default" for name in LINEAR),
    *("aten.transpose.int", "aten.slice.Tensor", "aten.select.int", "aten.unflatten.int", "aten.flatten.using_ints"),
    *("aten.sum.dim_IntList", "aten.mean.dim", "aten.squeeze.dim", "aten.squeeze.dims", "aten.split.Tensor"),
    *("aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int", "aten.cumsum.default"),
)


@lowers_complex(*LINEAR_OVERLOADS)
def on_parts(b: ProgramBuilder, a: SimpleNamespace) -> Complex:
    dtype = real_dtype(a.result_dtype)
    done = []
    for part in (0, 1):

        def pick(x: Any, part: int = part) -> Any:
            if isinstance(x, tuple):
                return tuple(pick(item, part) for item in x)
            if not isinstance(x, (Complex, Param)):
                return x
            y = parts(b, x, dtype)[part]
            if y is None:
                raise NoForm("it joins real and complex numbers")
            return y

        named = {k: pick(v) for k, v in vars(a).items()}
        done.append(LOWERINGS[b.op](b, with_parts(SimpleNamespace(**named), dtype)))
    return Complex(*done)


@lowers_complex("aten.mul.Tensor", "aten.mul.Scalar", names=("self", "other"))
@lowers_complex("aten.matmul.default", names=("self", "other"))
@lowers_complex("aten.bmm.default", "aten.mm.default", names=("self", "mat2"))
@lowers_complex("aten.einsum.default", names=("tensors",))
def product(b: ProgramBuilder, a: SimpleNamespace, names: tuple[str, ...]) -> Complex:
    """``(a + bi)(c + di)`` for any product that is linear in both."""
    dtype = real_dtype(a.result_dtype)
    operands = a.tensors if names == ("tensors",) else tuple(getattr(a, name) for name in names)
    if len(operands) != 2:
        raise NoForm("a product of more than two complex tensors has no form")
    one, two = (parts(b, x, dtype) for x in operands)

    def real(x: Part, y: Part) -> Value | None:
        if x is None or y is None:
            return None
        change = {"tensors": (x, y)} if names == ("tensors",) else dict(zip(names, (x, y), strict=True))
        return LOWERINGS[b.op](b, with_parts(a, dtype, **change))

    rr, ii, ri, ir = (real(one[i], two[k]) for i, k in ((0, 0), (1, 1), (0, 1), (1, 0)))
    return Complex(total(b, rr, ii, -1.0), total(b, ri, ir, 1.0))


def total(b: ProgramBuilder, x: Value | None, y: Value | None, sign: float) -> Value:
    """``x + sign y``, either of which may be zero (None)."""
    if y is not None:
        y = affine(b, y, sign, 0.0)
    if x is None or y is None:
        return need_value(x if y is None else y)
    return b.emit(Sum(), (x, y), b.shape(x))


@lowers_complex("aten.add.Tensor", "aten.sub.Tensor")
def add(b: ProgramBuilder, a: SimpleNamespace) -> Complex:
    dtype = real_dtype(a.result_dtype)
    (r, i), (s, k) = (parts(b, x, dtype) for x in (a.self, a.other))
    real = LOWERINGS[b.op](b, with_parts(a, dtype, self=r, other=s))
    if i is not None and k is not None:
        return Complex(real, LOWERINGS[b.op](b, with_parts(a, dtype, self=i, other=k)))
    imag = need_value(i if k is None else affine(b, need_value(k), 1.0 if "add" in b.op else -1.0, 0.0))
    if b.shape(imag) != b.shape(real):
        raise NoForm("it joins real and complex numbers of unequal shapes")
    return Complex(real, imag)


@lowers_complex("aten.div.Tensor")
def div(b: ProgramBuilder, a: SimpleNamespace) -> Complex:
    dtype = real_dtype(a.result_dtype)
    below, imag = parts(b, a.other, dtype)
    if imag is not None or not isinstance(a.self, Complex):
        raise NoForm("it divides by complex numbers")
    real, imag = (LOWERINGS[b.op](b, with_parts(a, dtype, self=x, other=below)) for x in (a.self.real, a.self.imag))
    return Complex(real, imag)


@lowers_complex("aten._conj.default", "aten.conj.default", "aten._conj_physical.default", "aten.conj_physical.default",
                "aten.resolve_conj.default")  # fmt: skip
def conj(b: ProgramBuilder, a: SimpleNamespace) -> Complex:
    x: Complex = a.self
    return x if "resolve" in b.op else Complex(x.real, affine(b, x.imag, -1.0, 0.0))


@lowers_complex("aten.complex.default")
def complex_(b: ProgramBuilder, a: SimpleNamespace) -> Complex:
    real, imag = need_value(a.real, "its real part"), need_value(a.imag, "its imaginary part")
    if b.shape(real) != b.shape(imag):
        raise NoForm("its parts are of unequal shapes")
    return Complex(real, imag)


@lowers_complex("aten.polar.default")
def polar(b: ProgramBuilder, a: SimpleNamespace) -> Complex:
    length, angle = need_value(a.abs), need_value(a.angle)
    return Complex(*(multiply(b, length, elementwise(b, angle, f)) for f in ("cos", "sin")))


@lowers_complex("aten.view_as_complex.default")
def view_as_complex(b: ProgramBuilder, a: SimpleNamespace) -> Complex:
    return complex_from_last_axis(b, need_value(a.self))


def complex_from_last_axis(b: ProgramBuilder, x: Value) -> Complex:
    """A value ``[*, 2]`` as complex numbers."""
    shape = b.shape(x)
    return Complex(*(as_shape(b, emit_index(b, x, along(shape, len(shape) - 1, [k])), shape[:-1]) for k in (0, 1)))


@lowers_complex("aten.view_as_real.default")
def view_as_real(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    last = [as_shape(b, x, (*b.shape(x), 1)) for x in (a.self.real, a.self.imag)]
    return concatenate(b, last, len(b.shape(last[0])) - 1, (*b.shape(a.self.real), 2))


@lowers_complex("aten.real.default", part=0)
@lowers_complex("aten.imag.default", part=1)
def part_of(b: ProgramBuilder, a: SimpleNamespace, part: int) -> Value:
    x: Complex = a.self
    return (x.real, x.imag)[part]


@lowers_complex("aten.abs.default")
def modulus(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """The absolute value of complex numbers, whose derivative at zero is zero."""
    squares = [elementwise(b, x, "square") for x in (a.self.real, a.self.imag)]
    return root(b, b.emit(Sum(), tuple(squares), b.shape(squares[0])), a.result_dtype)


# ---------------------------------------------------------------------------------------------------------------
# Transforms along one axis


def waves(b: ProgramBuilder, rows: int, columns: int, n: int, a: SimpleNamespace) -> tuple[Param, Param]:
    """``cos`` and ``sin`` of ``2π row column / n``, ``[rows, columns]``, in float64."""
    kwargs = {"dtype": torch.float64, "device": a.result_device}
    k, t = (b.derive("aten.arange.default", size, **kwargs) for size in (rows, columns))
    turns = b.derive("aten.remainder.Scalar", b.derive("aten.outer.default", k, t), n)
    angles = b.derive("aten.mul.Tensor", turns, 2 * math.pi / n)
    sines = b.derive("aten.sin.default", angles)
    # The sine is set to exactly zero at every half turn, since the sign of a rounding error there would decide a phase.
    half = b.derive("aten.eq.Scalar", b.derive("aten.remainder.Scalar", b.derive("aten.mul.Tensor", turns, 2), n), 0)
    return b.derive("aten.cos.default", angles), b.derive("aten.masked_fill.Scalar", sines, half, 0)


def blocks(b: ProgramBuilder, rows: Sequence[Sequence[Param]], dtype: torch.dtype) -> Param:
    """One matrix made of ``rows`` of matrices."""
    wide = [row[0] if len(row) == 1 else b.derive("aten.cat.default", tuple(row), 1) for row in rows]
    whole = wide[0] if len(wide) == 1 else b.derive("aten.cat.default", tuple(wide), 0)
    return b.derive("aten.to.dtype", whole, dtype)


def times(b: ProgramBuilder, p: Param, factor: float) -> Param:
    if factor == 1:
        return p
    return b.derive("aten.add.Tensor", b.derive("aten.mul.Tensor", p, factor), 0.0)  # no zero is negative


def resize_last_axis(b: ProgramBuilder, x: Value, n: int) -> Value:
    """The last axis cut, or padded with zeros, to ``n`` elements."""
    shape = b.shape(x)
    return emit_index(b, x, along(shape, len(shape) - 1, [k if k < shape[-1] else -1 for k in range(n)]))


def split_last_axis(b: ProgramBuilder, y: Value) -> Complex:
    """The first and the second half of the last axis."""
    shape = b.shape(y)
    n = shape[-1] // 2
    return Complex(*(emit_index(b, y, along(shape, len(shape) - 1, range(k, k + n))) for k in (0, n)))


def both(b: ProgramBuilder, x: Complex) -> Value:
    """The parts side by side along the last axis."""
    shape = b.shape(x.real)
    return concatenate(b, [x.real, x.imag], len(shape) - 1, (*shape[:-1], 2 * shape[-1]))


def dense(b: ProgramBuilder, x: Value, weight: Param, outputs: int) -> Value:
    return b.emit(Contract(Dense(), weight), (x,), (*b.shape(x)[:-1], outputs))


def scale_of(norm: str | None, n: int, inverse: bool) -> float:
    if norm == "ortho":
        return 1 / math.sqrt(n)
    return 1 / n if (norm == "forward") != inverse else 1.0


def dft(b: ProgramBuilder, x: Number, n: int, outputs: int, a: SimpleNamespace, inverse: bool) -> Complex:
    """The first ``outputs`` of ``n`` frequencies of the last axis; ``inverse``: with the opposite sign of ``i``."""
    dtype, sign = real_dtype(a.result_dtype), 1.0 if inverse else -1.0
    c, s = (times(b, w, scale_of(a.norm, n, inverse)) for w in waves(b, outputs, n, n, a))
    minus, plus = times(b, s, -sign), times(b, s, sign)
    if isinstance(x, Complex):
        x = Complex(resize_last_axis(b, x.real, n), resize_last_axis(b, x.imag, n))
        return split_last_axis(b, dense(b, both(b, x), blocks(b, ((c, minus), (plus, c)), dtype), 2 * outputs))
    return split_last_axis(b, dense(b, resize_last_axis(b, x, n), blocks(b, ((c,), (plus,)), dtype), 2 * outputs))


def backward_real(b: ProgramBuilder, x: Complex, n: int, a: SimpleNamespace) -> Value:
    """The real signal of ``n // 2 + 1`` frequencies along the last axis."""
    dtype, frequencies = real_dtype(a.result_dtype), n // 2 + 1
    even = int(n % 2 == 0)
    weights = b.derive("aten.cat.default", tuple(
        b.derive("aten.full.default", (count,), value, dtype=torch.float64, device=a.result_device)
        for count, value in ((1, 1.0), (frequencies - 1 - even, 2.0), (even, 1.0))
    ), 0)  # fmt: skip
    c, s = (times(b, w, scale_of(a.norm, n, True)) for w in waves(b, n, frequencies, n, a))
    cosines, sines = b.derive("aten.mul.Tensor", c, weights), b.derive("aten.mul.Tensor", s, weights)
    x = Complex(resize_last_axis(b, x.real, frequencies), resize_last_axis(b, x.imag, frequencies))
    return dense(b, both(b, x), blocks(b, ((cosines, times(b, sines, -1.0)),), dtype), n)


def on_last(b: ProgramBuilder, x: Number, axis: int, f: Callable[[Number], Number]) -> Number:
    """``f`` of the value with ``axis`` moved to the end; in the result it is moved back."""
    rank = len(b.shape(x.real if isinstance(x, Complex) else x))
    order = [d for d in range(rank) if d != axis] + [axis]
    back = [order.index(d) for d in range(rank)]

    def moved(y: Number, to: Sequence[int]) -> Number:
        if isinstance(y, Complex):
            return Complex(permute_axes(b, y.real, to), permute_axes(b, y.imag, to))
        return permute_axes(b, y, to)

    return moved(f(moved(x, order)), back)


def length(b: ProgramBuilder, x: Number, axis: int) -> int:
    return b.shape(x.real if isinstance(x, Complex) else x)[axis]


def torch_transform(
    b: ProgramBuilder, x: Number, op: str, n: int, axis: int, a: SimpleNamespace, outputs: int
) -> Number:
    """A step that runs torch's own transform on pairs of real values."""
    values = (x.real, x.imag) if isinstance(x, Complex) else (x,)
    argument: Any = Call("aten.complex.default", values) if isinstance(x, Complex) else x
    call = Call(op, (argument, n, axis + 1, a.norm))
    shape = list(b.shape(values[0]))
    shape[axis] = outputs
    if op == "aten.fft_irfft.default":
        return b.emit(Opaque(call, _OWN), values, tuple(shape))
    pair = b.emit(Opaque(Call("aten.view_as_real.default", (call,)), _OWN), values, (*shape, 2))
    return complex_from_last_axis(b, pair)


def transform(b: ProgramBuilder, x: Number, n: int | None, axis: int, a: SimpleNamespace, kind: str) -> Number:
    """``kind``: rfft, irfft, fft or ifft."""
    before = length(b, x, axis)
    size = n if n is not None else 2 * (before - 1) if kind == "irfft" else before
    outputs = size // 2 + 1 if kind == "rfft" else size
    if size > _LONGEST:
        return torch_transform(b, x, f"aten.fft_{kind}.default", size, axis, a, outputs)
    if kind == "irfft":
        if not isinstance(x, Complex):
            raise NoForm("its input is real")
        return on_last(b, x, axis, lambda y: backward_real(b, y, size, a))  # type: ignore[arg-type]
    return on_last(b, x, axis, lambda y: dft(b, y, size, outputs, a, kind == "ifft"))


@lowers_complex("aten.fft_rfft.default", along="dim", kind="rfft")
@lowers_complex("aten.fft_irfft.default", along="dim", kind="irfft")
@lowers_complex("aten.fft_fft.default", along="dim", kind="fft")
@lowers_complex("aten.fft_ifft.default", along="dim", kind="ifft")
def one_axis(b: ProgramBuilder, a: SimpleNamespace, kind: str) -> Number:
    x = a.self if isinstance(a.self, Complex) else need_value(a.self)
    rank = len(b.shape(x.real if isinstance(x, Complex) else x))
    return transform(b, x, a.n, sample_axis(a.dim, rank), a, kind)


@lowers_complex("aten.fft_rfft2.default", "aten.fft_rfftn.default", along="dim", kind="rfft")
@lowers_complex("aten.fft_irfft2.default", "aten.fft_irfftn.default", along="dim", kind="irfft")
@lowers_complex("aten.fft_fft2.default", "aten.fft_fftn.default", along="dim", kind="fft")
@lowers_complex("aten.fft_ifft2.default", "aten.fft_ifftn.default", along="dim", kind="ifft")
def several_axes(b: ProgramBuilder, a: SimpleNamespace, kind: str) -> Number:
    """A transform over several axes, one after the other; of real numbers, the last has half of the frequencies."""
    x = a.self if isinstance(a.self, Complex) else need_value(a.self)
    rank = len(b.shape(x.real if isinstance(x, Complex) else x))
    if a.dim is None:
        raise NoForm("it transforms over the samples")
    axes = [sample_axis(d, rank) for d in ((a.dim,) if isinstance(a.dim, int) else a.dim)]
    sizes = list(a.s) if a.s is not None else [None] * len(axes)
    steps = list(zip(axes, sizes, strict=True))
    other = "ifft" if kind in ("ifft", "irfft") else "fft"
    if kind == "rfft":
        x = transform(b, x, steps[-1][1], steps[-1][0], a, kind)
        steps.pop()
    last = steps.pop() if kind == "irfft" else None
    for axis, n in reversed(steps):
        x = transform(b, x, n, axis, a, other)
    return x if last is None else transform(b, x, last[1], last[0], a, kind)


# ---------------------------------------------------------------------------------------------------------------
# The short-time transform: a convolution with waves


@lowers_complex("aten.stft.default", axes=())
def stft(b: ProgramBuilder, a: SimpleNamespace) -> Number:
    """The short-time transform ``[*, T] -> [*, frequencies, frames]``."""
    x = need_value(a.self)
    shape = b.shape(x)
    if a.onesided is False or a.align_to_window or not shape or shape[-1] < a.n_fft:
        raise NoForm("a two-sided short-time transform has no form")
    hop = a.hop_length if a.hop_length is not None else a.n_fft // 4
    frequencies, dtype = a.n_fft // 2 + 1, real_dtype(a.result_dtype)
    c, s = waves(b, frequencies, a.n_fft, a.n_fft, a)
    whole = b.derive("aten.cat.default", (c, times(b, s, -1.0)), 0)
    if a.normalized:
        whole = times(b, whole, 1 / math.sqrt(a.n_fft))
    if a.window is not None:
        if not isinstance(a.window, Param):
            raise NoForm("its window depends on the samples")
        width = a.win_length or a.n_fft
        left = (a.n_fft - width) // 2
        window = b.derive("aten.constant_pad_nd.default", a.window, (left, a.n_fft - width - left))
        whole = b.derive("aten.mul.Tensor", whole, window)
    elif a.win_length not in (None, a.n_fft):
        raise NoForm("a short window without its numbers has no form")
    weight = b.derive("aten.reshape.default", b.derive("aten.to.dtype", whole, dtype), (2 * frequencies, 1, 1, a.n_fft))
    rows = math.prod(shape[:-1])
    frames = (shape[-1] - a.n_fft) // hop + 1
    windows = Windows((1, a.n_fft), (1, hop), ((0, 0), (0, 0)), (1, 1))
    if rows == 1:  # the kernels for one axis are faster
        windows = Windows((a.n_fft,), (hop,), ((0, 0),), (1,))
        weight = b.derive("aten.reshape.default", weight, (2 * frequencies, 1, a.n_fft))
        y = b.emit(Contract(windows, weight), (as_shape(b, x, (1, shape[-1])),), (2 * frequencies, frames))
        y = as_shape(b, y, (2 * frequencies, 1, frames))
    else:
        source = as_shape(b, x, (1, rows, shape[-1]))
        y = b.emit(Contract(windows, weight), (source,), (2 * frequencies, rows, frames))
    halves = []
    for k in (0, frequencies):
        half = permute_axes(b, emit_index(b, y, along(b.shape(y), 0, range(k, k + frequencies))), (1, 0, 2))
        halves.append(as_shape(b, half, (*shape[:-1], frequencies, frames)))
    if a.return_complex:
        return Complex(*halves)
    last = [as_shape(b, v, (*b.shape(v), 1)) for v in halves]
    return concatenate(b, last, len(b.shape(last[0])) - 1, (*b.shape(halves[0]), 2))
