"""Constants that are the same for every sample, though their size holds the number of samples.

``torch.ones(x.shape[0], 4)`` or a class token expanded to the batch is one row for all samples.  To find out whether an
expression repeats a row, it is computed with numbers in place of the parameters, for one sample and for several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ...ir.calls import evaluate, rewrite, values_in
from ...ir.program import Batch, Call, Param
from ...util import rounding
from ...util.options import debugging
from .builder import NoForm, ProgramBuilder
from .gather import constant

_SAMPLES = 5
_LARGEST = 2**22  # the most elements that are computed for the comparison

#: Ops whose result depends on the shape of their argument alone, and the number that they are filled with.
FILLS = {
    "aten.zeros_like.default": 0, "aten.ones_like.default": 1, "aten.new_zeros.default": 0, "aten.new_ones.default": 1,
    "aten.zero.default": 0, "aten.empty_like.default": 0, "aten.new_empty.default": 0, "aten.empty.memory_format": 0,
}  # fmt: skip
GIVEN = {
    "aten.full_like.default": 1, "aten.new_full.default": 2, "aten.fill.Scalar": 1, "aten.fill.Tensor": 1,
}  # fmt: skip


def is_fill(call: Call) -> bool:
    return call.op in FILLS or call.op in GIVEN or call.op == "aten.expand_as.default"


def as_fill(b: ProgramBuilder, call: Call, shape: Sequence[Any], meta: Tensor) -> Call:
    """``zeros_like(x)`` and similar calls as ``full(shape)``, which reads no value; other calls unchanged."""
    if call.op == "aten.expand_as.default" and not values_in(call.args[0]):
        return Call("aten.expand.default", (call.args[0], tuple(shape)))
    if call.op in FILLS:
        value: Any = FILLS[call.op]
    elif call.op in GIVEN:
        value = call.args[GIVEN[call.op]]
    else:
        return call
    kwargs = (("device", meta.device), ("dtype", meta.dtype))
    if isinstance(value, Param):
        full = Call("aten.expand.default", (value, tuple(shape)))
        return full if b.param_meta[value].dtype == meta.dtype else Call("aten.to.dtype", (full, meta.dtype))
    if isinstance(value, (bool, int, float)):
        return Call("aten.full.default", (tuple(shape), value), kwargs)
    return call


def row_of(b: ProgramBuilder, call: Call) -> Param | None:
    """The row that ``call``, which reads no value, repeats for every sample; None if samples differ.

    It is ``[1, *shape]``.  If the samples are along another axis, that has length one (or one sample's share of it).
    """
    if call not in b.repeated:
        b.repeated[call] = _row(b, call)
    return b.repeated[call]


def _row(b: ProgramBuilder, call: Call) -> Param | None:
    one = rewrite(call, lambda x: x.times if isinstance(x, Batch) else x)
    if not isinstance(one, Call):
        return None
    try:
        with torch.inference_mode(False), torch.no_grad():
            tensors: dict[Param, Tensor] = {}
            alone, together = (_compute(b, call, n, tensors) for n in (1, _SAMPLES))
    except Exception:  # whatever torch raises for numbers that mean something else here
        if debugging():
            raise
        return None
    if not _is_repeated(alone, together):
        return None
    param = b.derive_call(one)
    b.param_meta[param] = alone.to("meta")
    return param


def _compute(b: ProgramBuilder, call: Call, n: int, tensors: dict[Param, Tensor]) -> Tensor:
    def leaf(x: Any) -> Any:
        if isinstance(x, Batch):
            return x.times * n
        if x not in tensors:
            tensors[x] = _numbers(b, x, len(tensors))
        return tensors[x]

    return evaluate(call, leaf)


def _numbers(b: ProgramBuilder, param: Param, seed: int) -> Tensor:
    """Random numbers of a parameter's shape and dtype; literals, and tensors derived from them, keep their values."""
    with suppress(NoForm):
        return constant(b, param)
    meta = b.param_meta[param]
    shape = tuple(int(s) for s in meta.shape)
    if math.prod(shape) > _LARGEST:
        raise ValueError("too large")
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
    return numbers.to(meta.dtype) if meta.dtype.is_floating_point else (numbers * 2).to(meta.dtype)


def _is_repeated(alone: Tensor, together: Tensor) -> bool:
    grown = [k for k, (n, m) in enumerate(zip(alone.shape, together.shape, strict=True)) if n != m]
    if len(grown) != 1 or together.numel() > _LARGEST:
        return False
    (axis,) = grown
    share = alone.shape[axis]
    if together.shape[axis] != _SAMPLES * share:
        return False
    split = together.unflatten(axis, (_SAMPLES, share))
    rows = alone.unsqueeze(axis).expand_as(split)  # a matrix product of fewer rows may round differently
    return rounding.close_elements(split, rows, rounding.for_layer(alone.dtype))
