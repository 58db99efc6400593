"""Convolutions of one to three dimensions: `Contract` through `Windows`."""

from __future__ import annotations

from types import SimpleNamespace

from ...ir.indexing import along
from ...ir.program import Contract, Index, Param, Shape, Value, Windows
from .builder import NoForm, ProgramBuilder, as_shape, lowers, need_value, tuple_of
from .index import emit_index

Padding = tuple[tuple[int, int], ...]


@lowers("aten.convolution.default")
def general(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    if not isinstance(a.weight, Param):
        raise NoForm("its weight depends on the samples")
    dims = len(b.param_shape(a.weight)) - 2
    if dims not in (1, 2, 3):
        raise NoForm(f"a convolution over {dims} axes has no form yet")
    return conv_transpose(b, a, dims) if a.transposed else convolution(b, a, dims)


@lowers("aten.conv_transpose1d.default", dims=1)
@lowers("aten.conv_transpose2d.input", dims=2)
@lowers("aten.conv_transpose3d.input", dims=3)
def conv_transpose(b: ProgramBuilder, a: SimpleNamespace, dims: int) -> Value:
    """A convolution with the flipped weight, over the input with zeros inserted between its elements."""
    x = conv_input(b, a, dims)
    channels, per_group, *kernel = b.param_shape(a.weight)  # [C, O/groups, *kernel]
    stride, dilation = tuple_of(a.stride, dims), tuple_of(a.dilation, dims)
    padding, more = tuple_of(a.padding, dims), tuple_of(a.output_padding, dims)
    sides = []
    for k in range(dims):
        n = b.shape(x)[k + 1]
        spread = [i // stride[k] if i % stride[k] == 0 else -1 for i in range((n - 1) * stride[k] + 1)]
        before = dilation[k] * (kernel[k] - 1) - padding[k]
        if before < 0:
            raise NoForm("a transposed convolution that cuts off whole inputs has no form yet")
        x = emit_index(b, x, along(b.shape(x), k + 1, spread + [-1] * more[k]))
        sides.append((before, before))
    flipped = b.derive("aten.flip.default", a.weight, tuple(range(2, dims + 2)))
    split = b.derive("aten.reshape.default", flipped, (a.groups, channels // a.groups, per_group, *kernel))
    transposed = b.derive("aten.transpose.int", split, 1, 2)  # [groups, O/groups, C/groups, *kernel]
    weight = b.derive("aten.reshape.default", transposed, (a.groups * per_group, channels // a.groups, *kernel))
    windows = Windows(tuple(kernel), (1,) * dims, tuple(sides), dilation, a.groups)
    spatial = window_counts(windows, b.shape(x)[1:])
    return b.emit(Contract(windows, weight, a.bias), (x,), (a.groups * per_group, *spatial))


@lowers("aten.conv1d.default", "aten.conv1d.padding", dims=1)
@lowers("aten.conv2d.default", "aten.conv2d.padding", dims=2)
@lowers("aten.conv3d.default", "aten.conv3d.padding", dims=3)
def convolution(b: ProgramBuilder, a: SimpleNamespace, dims: int) -> Value:
    """``[C, *spatial] -> [O, *spatial']`` with weight ``[O, C/groups, *kernel]``."""
    x = conv_input(b, a, dims)
    outputs, _, *kernel = b.param_shape(a.weight)
    stride, dilation = tuple_of(a.stride, dims), tuple_of(a.dilation, dims)
    padding = padding_of(a.padding, tuple(kernel), dilation)
    x, padding = absorb_zeros(b, x, padding)
    windows = Windows(tuple(kernel), stride, padding, dilation, a.groups)
    result = (outputs, *window_counts(windows, b.shape(x)[1:]))
    x, windows, weight = planar(b, x, windows, a.weight)
    spatial = window_counts(windows, b.shape(x)[1:])
    return as_shape(b, b.emit(Contract(windows, weight, a.bias), (x,), (outputs, *spatial)), result)


def planar(b: ProgramBuilder, x: Value, w: Windows, weight: Param) -> tuple[Value, Windows, Param]:
    """A convolution over three axes reduced to one over two axes, for which there are kernels; unchanged if impossible.

    A first axis that one window covers joins the channels.  Another axis of length one, with a window of length one, is
    dropped.
    """
    if len(w.kernel) != 3:
        return x, w, weight
    channels, *spatial = b.shape(x)
    outputs, per_group, *kernel = b.param_shape(weight)
    if kernel[0] == spatial[0] and w.padding[0] == (0, 0) and (kernel[0] == 1 or w.dilation[0] == 1):
        gone, channels, per_group = 0, channels * spatial[0], per_group * spatial[0]
    else:
        trivial = [k for k in (1, 2) if spatial[k] == kernel[k] == 1 and w.padding[k] == (0, 0)]
        if not trivial:
            return x, w, weight
        gone = trivial[0]
    rest = [k for k in range(3) if k != gone]
    one, two = rest
    padding = (w.padding[one], w.padding[two])
    kept, stride, dilation = ((axis[one], axis[two]) for axis in (w.kernel, w.stride, w.dilation))
    flat = b.derive("aten.reshape.default", weight, (outputs, per_group, *(kernel[k] for k in rest)))
    x = as_shape(b, x, (channels, *(spatial[k] for k in rest)))
    return x, Windows(kept, stride, padding, dilation, w.groups), flat


def conv_input(b: ProgramBuilder, a: SimpleNamespace, dims: int) -> Value:
    """The input ``[C, *spatial]`` of a convolution whose weights are constants."""
    x = need_value(a.input)
    if not isinstance(a.weight, Param) or not (a.bias is None or isinstance(a.bias, Param)):
        raise NoForm("its weight depends on the samples")
    if len(b.shape(x)) != dims + 1:
        raise NoForm(f"its input has {len(b.shape(x))} axes per sample, not {dims + 1}")
    return x


def absorb_zeros(b: ProgramBuilder, x: Value, padding: Padding) -> tuple[Value, Padding]:
    """The value without the zeros that an earlier step put around it, and the padding that includes them."""
    step = b.step(x)
    if step is None or not isinstance(step.form, Index) or len(step.form.parts) != 1:
        return x, padding
    part, source = step.form.parts[0], Value(step.inputs[0])
    shape = b.shape(source)
    if part.order != tuple(range(len(shape))) or part.axes[0] != ((0, shape[0], 1),):
        return x, padding
    sides = []
    for axis, n in zip(part.axes[1:], shape[1:], strict=True):
        zeros = [r for r in axis if r[0] < 0]
        if [r for r in axis if r[0] >= 0] != [(0, n, 1)]:
            return x, padding
        before = axis[0][1] if axis[0][0] < 0 else 0
        sides.append((before, sum(r[1] for r in zeros) - before))
    return source, tuple((p + s, q + t) for (p, q), (s, t) in zip(padding, sides, strict=True))


def padding_of(padding: object, kernel: Shape, dilation: Shape) -> Padding:
    """``(before, after)`` per axis.  If ``same`` needs an odd number of zeros, torch puts the extra one after."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in tuple_of(padding, len(kernel)))


def window_counts(windows: Windows, spatial: Shape) -> Shape:
    """How many windows fit along each axis."""
    axes = zip(spatial, windows.kernel, windows.stride, windows.padding, windows.dilation, strict=True)
    return tuple((n + p[0] + p[1] - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
