"""Attention: matrix products of values, a scale and a softmax."""

from __future__ import annotations

import math
from types import SimpleNamespace

from ...ir.program import LowRank, Param, Value
from .arithmetic import affine, shifted
from .builder import NoForm, ProgramBuilder, lowers, need_value
from .index import permuted
from .linear import multiplied
from .masks import additive, causal


@lowers("aten.scaled_dot_product_attention.default")
def attention(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    """``softmax(q kᵀ scale + mask) v`` over the last two axes."""
    q, k, v = (need_value(x) for x in (a.query, a.key, a.value))
    if a.enable_gqa or not (a.attn_mask is None or isinstance(a.attn_mask, Param)):
        raise NoForm("attention with shared heads or a mask per sample has no form yet")
    rank, width = len(b.shape(q)), b.shape(q)[-1]
    transposed = permuted(b, k, [*range(rank - 2), rank - 1, rank - 2])
    scores = affine(b, multiplied(b, q, transposed), 1 / math.sqrt(width) if a.scale is None else a.scale, 0.0)
    if a.attn_mask is not None:
        scores = shifted(b, scores, additive(b, a.attn_mask, a.result_dtype))
    if a.is_causal:
        scores = shifted(b, scores, causal(b, b.shape(scores)[-2:], a.result_dtype, a.result_device))
    weights = b.emit(LowRank("softmax", rank - 1), (scores,), b.shape(scores))
    return multiplied(b, weights, v)
