"""Products of tensors by the names of their axes: einsum, and matrix products with constants or with repeated axes.

A tensor is a string of letters, one per axis.  A letter in two tensors and not in the result is summed over.  With a
constant, a product is a linear layer over the summed axes (`Contract`); of two values it is a matrix product, or an
elementwise one if nothing is summed (`Product`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

from ...ir.program import Channels, Contract, Dense, Param, Product, Shape, Value, Windows
from .arithmetic import multiply, scale_by
from .builder import NoForm, ProgramBuilder, as_shape, lowers, need_value
from .index import permute_axes
from .pool import move_kept_axes_first
from .reduce import rows

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Named:
    """A value or a constant, and one letter per axis (per sample)."""

    def __init__(self, x: Value | Param, letters: str, shape: Shape) -> None:
        self.x, self.letters, self.shape = x, letters, shape
        if len(set(letters)) != len(letters):
            raise NoForm("it takes a diagonal")

    def size(self, letters: str) -> int:
        return math.prod(self.shape[self.letters.index(c)] for c in letters)

    def order(self, letters: str) -> list[int]:
        return [self.letters.index(c) for c in letters]


def only(one: str, *others: str, also: str = "") -> str:
    """The letters of a tensor that none of the others has; if ``also`` is given, only those that it has as well."""
    return "".join(c for c in one if not any(c in other for other in others) and (not also or c in also))


def arrange_axes(b: ProgramBuilder, t: Named, *groups: str) -> Value | Param:
    """A tensor with one axis per group of letters."""
    shape = tuple(t.size(g) for g in groups)
    order = t.order("".join(groups))
    if isinstance(t.x, Value):
        return as_shape(b, permute_axes(b, t.x, order), shape)
    whole = t.x if b.param_shape(t.x) == t.shape else b.derive("aten.reshape.default", t.x, t.shape)
    if order != list(range(len(order))):
        whole = b.derive("aten.permute.default", whole, tuple(order))
    if shape == tuple(t.shape[i] for i in order):
        return whole
    return b.derive("aten.reshape.default", whole, shape)


def sum_over(b: ProgramBuilder, t: Named, letters: str) -> Named:
    """The tensor summed over the axes of some letters."""
    if not letters:
        return t
    kept = only(t.letters, letters)
    shape = tuple(t.size(c) for c in kept)
    if isinstance(t.x, Param):
        whole = b.derive("aten.reshape.default", t.x, t.shape)
        total = b.derive("aten.sum.dim_IntList", whole, tuple(t.order(letters)))
        b.param_meta[total] = b.param_meta[t.x].new_empty(shape, device="meta")
        return Named(total, kept, shape)
    source, _ = move_kept_axes_first(b, t.x, set(t.order(letters)))
    return Named(as_shape(b, rows(b, source), shape), kept, shape)


def pair(b: ProgramBuilder, one: Named, two: Named, result: str) -> Named:
    """The product of two tensors, at least one of them a value, summed over the letters that the result lacks."""
    if isinstance(one.x, Param):
        one, two = two, one
    one = sum_over(b, one, only(one.letters, two.letters, result))
    two = sum_over(b, two, only(two.letters, one.letters, result))
    both = only(one.letters, also=two.letters) if two.letters else ""
    shared, lost = only(both, also=result) if result else "", only(both, result)
    left, right = only(one.letters, both), only(two.letters, both)
    letters = shared + left + right
    shape = tuple((one if c in one.letters else two).size(c) for c in letters)
    if isinstance(two.x, Param):
        y = with_constant(b, one, two, (shared, left, right, lost))
    elif not lost and not (left and right):
        y = elementwise_pair(b, one, two, letters)
    else:
        y = matrices(b, one, two, (shared, left, right, lost))
    return Named(as_shape(b, y, shape), letters, shape)


def elementwise_pair(b: ProgramBuilder, one: Named, two: Named, letters: str) -> Value:
    sides = []
    for t in (one, two):
        own = "".join(c for c in letters if c in t.letters)
        x = arrange_axes(b, t, *own)
        assert isinstance(x, Value)
        sides.append(as_shape(b, x, tuple(t.size(c) if c in t.letters else 1 for c in letters)))
    return multiply(b, *sides)


def matrices(b: ProgramBuilder, one: Named, two: Named, groups: Sequence[str]) -> Value:
    """The matrix product ``[shared, left, lost] @ [shared, lost, right]``."""
    shared, left, right, lost = groups
    lead = (shared,) if shared else ()
    x, y = arrange_axes(b, one, *lead, left, lost), arrange_axes(b, two, *lead, lost, right)
    assert isinstance(x, Value) and isinstance(y, Value)
    shape = (*(one.size(g) for g in (*lead, left)), two.size(right))
    return b.emit(Product("matmul"), (x, y), shape)


def with_constant(b: ProgramBuilder, one: Named, two: Named, groups: Sequence[str]) -> Value:
    """The product of a value and a constant: a linear layer (one per index of the shared axes), or, if nothing is
    summed, a factor."""
    shared, left, right, lost = groups
    if not lost and not right:
        x, factors = arrange_axes(b, one, shared, left), arrange_axes(b, two, shared)
        assert isinstance(x, Value) and isinstance(factors, Param)
        b.param_meta[factors] = b.param_meta[two.x].new_empty((two.size(shared),), device="meta")  # type: ignore[index]
        n = two.size(shared)
        return scale_by(b, x, column(b, factors, n))
    if not shared:
        x, weight = arrange_axes(b, one, left, lost), arrange_axes(b, two, right, lost)
        assert isinstance(x, Value) and isinstance(weight, Param)
        return b.emit(Contract(Dense(), weight), (x,), (one.size(left), two.size(right)))
    x, weight = arrange_axes(b, one, shared + lost, left), arrange_axes(b, two, shared + right, lost)
    assert isinstance(x, Value) and isinstance(weight, Param)
    n, inner, outer = one.size(shared), one.size(lost), two.size(right)
    weight = b.derive("aten.reshape.default", weight, (n * outer, inner, 1))
    windows = Windows((1,), (1,), ((0, 0),), (1,), n)
    y = b.emit(Contract(windows, weight), (x,), (n * outer, one.size(left)))
    if not (left and right):
        return y
    split = as_shape(b, y, (n, outer, one.size(left)))
    return permute_axes(b, split, (0, 2, 1))


def column(b: ProgramBuilder, p: Param, n: int) -> Param:
    q = b.derive("aten.reshape.default", p, (n, 1))
    b.param_meta[q] = b.param_meta[p].new_empty((n, 1), device="meta")
    return q


def contract(b: ProgramBuilder, tensors: Sequence[Named], result: str, shape: Shape) -> Value:
    """The product of all tensors, multiplied one after the other."""
    tensors = sorted(tensors, key=lambda t: isinstance(t.x, Param))  # values first
    product, rest = tensors[0], list(tensors[1:])
    while rest:
        needed = result + "".join(t.letters for t in rest[1:])
        product = pair(b, product, rest.pop(0), needed)
    product = sum_over(b, product, only(product.letters, result))
    if set(product.letters) != set(result):
        raise NoForm("its result repeats or lacks an axis")
    y = arrange_axes(b, product, *result) if result else product.x
    assert isinstance(y, Value)
    return as_shape(b, y, shape)


# ---------------------------------------------------------------------------------------------------------------
# The ops


@lowers("aten.einsum.default")
def einsum(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``a.equation`` names the axes, the samples among them."""
    inputs, result = letters_of(b, a)
    batch = {i[0] for i, x in zip(inputs, a.tensors, strict=True) if isinstance(x, Value)}
    if len(batch) != 1 or not result or result[0] not in batch:
        raise NoForm("it moves the batch axis")
    (samples,) = batch
    tensors = []
    for letters, x in zip(inputs, a.tensors, strict=True):
        shape = live_shape(b, x)
        if samples in letters[1:] or (samples in letters and shape[0] != 1):
            raise NoForm("it contracts the batch axis")
        lead = letters[:1] == samples
        letters, shape = (letters[1:], shape[1:]) if lead else (letters, shape)
        tensors.append(Named(x, letters, shape))
    known: dict[str, int] = {}
    for t in tensors:
        for c, n in zip(t.letters, t.shape, strict=True):
            if known.setdefault(c, n) != n:
                raise NoForm("it repeats an axis of length one")
    return contract(b, tensors, result[1:], a.result)


def live_shape(b: ProgramBuilder, x: Value | Param) -> Shape:
    """A value's shape with one sample, or a constant's own shape."""
    return b.param_shape(x) if isinstance(x, Param) else (1, *b.shape(need_value(x)))


def letters_of(b: ProgramBuilder, a: SimpleNamespace) -> tuple[list[str], str]:
    """The letters of the operands and of the result, with letters in place of an ellipsis."""
    equation = a.equation.replace(" ", "")
    left, arrow, result = equation.partition("->")
    inputs = left.split(",")
    if "..." in equation:
        free = [c for c in LETTERS + LETTERS.lower() if c not in equation]
        ranks = [len(live_shape(b, x)) - len(i.replace("...", "")) for i, x in zip(inputs, a.tensors, strict=True)]
        most = max(r for r, i in zip(ranks, inputs, strict=True) if "..." in i)
        inputs = [i.replace("...", "".join(free[most - r : most])) for r, i in zip(ranks, inputs, strict=True)]
        result = result.replace("...", "".join(free[:most]))
    if not arrow:
        once = sorted(c for c, n in Counter("".join(inputs)).items() if n == 1)
        result = "".join(once)
    return inputs, result


def product(b: ProgramBuilder, x: Value | Param, y: Value | Param, shape: Shape) -> Value:
    """``x @ y``, at least one of them a value; axes of length one are repeated."""
    sides = []
    for t, last in ((x, "MK"), (y, "KP")):
        dims = live_shape(b, t)
        if isinstance(t, Value) or len(dims) == len(shape) + 1 > 2:
            if dims[0] != 1:
                raise NoForm("the constant has one matrix per sample")
            dims = dims[1:]
        if len(dims) == 1 and isinstance(t, Value):
            raise NoForm("a product with one vector per sample has no form")
        own = last if len(dims) >= 2 else "K"
        lead = len(dims) - len(own)
        letters = "abcdefgh"[8 - lead :] + own
        sides.append((t, letters, dims))
    tensors = []
    for t, letters, dims in sides:
        kept = [(c, n) for c, n in zip(letters, dims, strict=True) if n != 1 or c in "MKP"]
        sizes = tuple(n for _, n in kept)
        value = as_shape(b, t, sizes) if isinstance(t, Value) else t
        tensors.append(Named(value, "".join(c for c, _ in kept), sizes))
    present = {c for t in tensors for c in t.letters}
    result = "".join(c for c in "abcdefghMP" if c in present)
    return contract(b, tensors, result, shape)


@lowers("aten.bilinear.default")
def bilinear(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``y[o] = Σ x1[i] w[o, i, j] x2[j] + b[o]``."""
    one, two = need_value(a.input1), need_value(a.input2)
    if not isinstance(a.weight, Param) or len(b.shape(one)) != 1 or b.shape(two) == ():
        raise NoForm("its weight depends on the samples, or its inputs have several axes")
    tensors = [Named(x, c, b.shape(x)) for x, c in ((one, "i"), (two, "j"))]
    weight = Named(a.weight, "oij", b.param_shape(a.weight))
    partial = pair(b, tensors[0], weight, "oj")
    product = pair(b, partial, tensors[1], "o")
    y = as_shape(b, product.x, a.result)  # type: ignore[arg-type]
    if a.bias is None:
        return y
    return b.emit(Contract(Channels(), None, a.bias), (y,), a.result)
