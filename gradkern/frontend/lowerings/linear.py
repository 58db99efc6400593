"""Linear layers (`Contract` through `Dense`) and matrix products (`Product` of two values, or `einsum`)."""

from __future__ import annotations

from types import SimpleNamespace

from ...ir.program import Contract, Dense, Param, Product, Value
from .arithmetic import add_scaled, affine
from .builder import NoForm, ProgramBuilder, lowers, need_value
from .einsum import product


@lowers("aten.linear.default", axes=())
def linear(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``[*, I] -> [*, O]`` with weight ``[O, I]``."""
    x, bias = need_value(a.input), a.bias
    if not isinstance(a.weight, Param) or not (bias is None or isinstance(bias, Param)):
        raise NoForm("its weight depends on the samples")
    shape = b.shape(x)
    if not shape or len(b.param_shape(a.weight)) != 2:
        raise NoForm("its input has no feature axis")
    return b.emit(Contract(Dense(), a.weight, bias), (x,), (*shape[:-1], b.param_shape(a.weight)[0]))


@lowers("aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.mv.default", axes=())
def matmul(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``[*, I] @ [I, O]`` with a constant right operand (`Contract`), or any other product (`einsum`)."""
    x, right = a.self, next(getattr(a, name) for name in ("other", "mat2", "vec") if hasattr(a, name))
    if isinstance(x, Value) and isinstance(right, Value):
        return matmul_values(b, x, right)
    if isinstance(x, Value) and isinstance(right, Param) and len(b.param_shape(right)) == 2 and b.shape(x):
        weight = b.derive("aten.t.default", right)  # [O, I]
        return b.emit(Contract(Dense(), weight), (x,), (*b.shape(x)[:-1], b.param_shape(right)[1]))
    if not (isinstance(x, (Value, Param)) and isinstance(right, (Value, Param))):
        raise NoForm("a factor depends on more than the samples")
    return product(b, x, right, a.result)


def matmul_values(b: ProgramBuilder, x: Value, y: Value) -> Value:
    """``[*B, M, K] @ [*B, K, P]`` per sample, with leading axes of length one repeated."""
    one, two = b.shape(x), b.shape(y)
    if min(len(one), len(two)) < 2:
        raise NoForm(f"a product of values of shapes {one} and {two} has no form yet")
    if one[:-2] == two[:-2]:
        return b.emit(Product("matmul"), (x, y), (*one[:-1], two[-1]))
    if len(one) != len(two):
        raise NoForm(f"a product of values of shapes {one} and {two} has no form yet")
    lead = tuple(m if n == 1 else n for n, m in zip(one[:-2], two[:-2], strict=True))
    return product(b, x, y, (*lead, one[-2], two[-1]))


@lowers("aten.addmm.default", axes=())
def addmm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``bias + x @ weight`` with weight ``[I, O]``."""
    unscaled = a.alpha == 1 and a.beta == 1
    if not (unscaled and isinstance(a.self, Param) and isinstance(a.mat1, Value) and isinstance(a.mat2, Param)):
        raise NoForm("not a product with a constant matrix on the right")
    width = b.param_shape(a.mat2)[1]
    bias = a.self
    if b.param_shape(bias) == (1, width):
        bias = b.derive("aten.reshape.default", bias, (width,))
    elif b.param_shape(bias) != (width,):
        raise NoForm(f"its added tensor is not of shape ({width},)")
    weight = b.derive("aten.t.default", a.mat2)  # [O, I]
    return b.emit(Contract(Dense(), weight, bias), (a.mat1,), (*b.shape(a.mat1)[:-1], width))


@lowers("aten.baddbmm.default", axes=())
def baddbmm(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``beta mask + alpha x @ y`` per sample; attention that also returns its weights has a constant mask."""
    result = affine(b, matmul_values(b, need_value(a.batch1), need_value(a.batch2)), float(a.alpha), 0.0)
    return add_scaled(b, result, a.self, float(a.beta)) if a.beta else result
