"""Views of the same numbers (`View`), and ops that disappear."""

from __future__ import annotations

import math
from types import SimpleNamespace

from ...ir.program import Value
from .builder import NoForm, ProgramBuilder, as_shape, lowers, need_value

#: Ops that only give the same numbers another shape.
VIEWS = (
    *("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints"),
    *(
        "aten.view_as.default",
        "aten.reshape_as.default",
        "aten.unflatten.int",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.squeeze.default",
        "aten.unsqueeze.default",
    ),
)


@lowers(*VIEWS)
def view(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """A view, given by its shape alone, since the row-major order and the batch axis stay."""
    x = need_value(a.self)
    if math.prod(b.shape(x)) != math.prod(a.result):
        raise NoForm("it changes how many numbers a sample has")
    return as_shape(b, x, a.result)


@lowers("aten.clone.default", "aten.alias.default", "aten.contiguous.default", "aten.lift_fresh_copy.default", axes=())
def identity(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    return need_value(a.self)


@lowers("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default", axes=())
def dropout(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    if a.train and a.p > 0:
        raise NoForm("dropout in train mode draws random numbers")
    return need_value(a.input)


@lowers("aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.other", "aten.type_as.default")
def drop_cast(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """The value itself: these ops disappear if they do not change the dtype."""
    x = need_value(a.self)
    if b.shape(x) != a.result or b.dtypes.get(x) != a.result_dtype:
        raise NoForm("it changes the dtype")
    return x
