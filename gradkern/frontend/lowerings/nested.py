"""Calls that have a form although the batch is not axis 0 inside them."""

from __future__ import annotations

from dataclasses import replace

from ...ir.calls import values_in
from ...ir.program import Call, Opaque, Value
from ...ir.recurrent import GATES, recognize
from .builder import ProgramBuilder, as_shape
from .index import along, emit_index
from .repeated import row_of


def simplify(b: ProgramBuilder, call: Call) -> Call:
    """The call with plain constants in place of constants that are repeated for every sample (a class token)."""

    def plain(x: object) -> object:
        if isinstance(x, tuple):
            return tuple(plain(item) for item in x)
        row = row_of(b, x) if isinstance(x, Call) and not values_in(x) else None
        return x if row is None else row

    if call.op in GATES:
        return call  # its state is part of it
    return replace(call, args=tuple(plain(x) for x in call.args), kwargs=tuple((k, plain(v)) for k, v in call.kwargs))


def last_state(b: ProgramBuilder, call: Call) -> Value | None:
    """``h_n[k]`` of the last layer of a recurrent layer: the output after the last step (backward: after the first)."""
    if call.op != "aten.select.int" or not isinstance(call.args[0], Call):
        return None
    inner, dim, index = call.args[:3]
    if inner.op not in GATES or inner.index != 1 or dim != 0:
        return None
    layer = replace(inner, index=0)
    r = recognize(layer)
    if r is None:
        return None
    states = len(r.weights)
    d = index % states - (states - r.directions)
    if d < 0:
        return None
    x = layer.args[0]
    hidden, steps = b.param_shape(r.weights[0][1])[1], b.shape(x)[0]
    y = b.emit(Opaque(layer, "a recurrent layer goes step by step"), (x,), (steps, r.directions * hidden))
    y = emit_index(b, y, along(b.shape(y), 0, [0 if d else steps - 1]))
    y = emit_index(b, y, along(b.shape(y), 1, range(d * hidden, (d + 1) * hidden)))
    return as_shape(b, y, (hidden,))
