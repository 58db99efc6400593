"""Attention: matrix products of values, a scale and a softmax."""

from __future__ import annotations

import math
from types import SimpleNamespace

from ...ir.indexing import along
from ...ir.program import LowRank, Param, Value
from .arithmetic import add_scaled, affine, shift_by
from .builder import NoForm, ProgramBuilder, lowers, need_value
from .index import emit_index, permute_axes
from .linear import matmul_values
from .masks import additive, causal


@lowers("aten.scaled_dot_product_attention.default")
def attention(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``softmax(q kᵀ scale + mask) v`` over the last two axes."""
    q, k, v = (need_value(x) for x in (a.query, a.key, a.value))
    mask = a.attn_mask
    if not (mask is None or isinstance(mask, (Param, Value))):
        raise NoForm("its mask depends on more than the samples")
    if isinstance(mask, Value) and not b.dtypes.get(mask, a.result_dtype).is_floating_point:
        raise NoForm("a mask of booleans that depends on the samples has no form")
    if a.enable_gqa:
        k, v = (repeat_heads(b, x, b.shape(q)[-3]) for x in (k, v))
    rank, width = len(b.shape(q)), b.shape(q)[-1]
    transposed = permute_axes(b, k, [*range(rank - 2), rank - 1, rank - 2])
    scores = affine(b, matmul_values(b, q, transposed), 1 / math.sqrt(width) if a.scale is None else a.scale, 0.0)
    if isinstance(mask, Param):
        scores = shift_by(b, scores, additive(b, mask, a.result_dtype))
    elif mask is not None:
        scores = add_scaled(b, scores, mask, 1.0)
    if a.is_causal:
        scores = shift_by(b, scores, causal(b, b.shape(scores)[-2:], a.result_dtype, a.result_device))
    weights = b.emit(LowRank("softmax", rank - 1), (scores,), b.shape(scores))
    return matmul_values(b, weights, v)


def repeat_heads(b: ProgramBuilder, x: Value, heads: int) -> Value:
    """Keys or values ``[*, heads', T, E]``, each head repeated for the query heads that share it."""
    shape = b.shape(x)
    axis = len(shape) - 3
    times = heads // shape[axis]
    return emit_index(b, x, along(shape, axis, [h for h in range(shape[axis]) for _ in range(times)]))
