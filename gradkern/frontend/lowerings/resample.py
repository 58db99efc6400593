"""Interpolation to another size: the nearest element is an `Index`, every other separable mode a map over positions.

The common modes have formulas; the others take the rows of one small matrix per axis from torch itself.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import torch

from ...ir.calls import operator_of
from ...ir.indexing import along
from ...ir.program import Contract, Positions, Value
from .builder import NoForm, ProgramBuilder, lowers, need_value
from .index import emit_index
from .pool import Rows, identity_rows

# ---------------------------------------------------------------------------------------------------------------
# By formulas


def scales(a: SimpleNamespace) -> list[float | None]:
    """Scale factors that the caller gave, per axis; None if a size was given."""
    scales = getattr(a, "scale_factors", None) or [getattr(a, k, None) for k in ("scales_h", "scales_w", "scales")]
    return list(scales)


def upsampled_axes(b: ProgramBuilder, a: SimpleNamespace) -> list[tuple[int, int, float]]:
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
    for axis, (n, m, step) in enumerate(upsampled_axes(b, a), start=1):
        wanted = [i if n == m else min(int(i * step), n - 1) for i in range(m)]
        x = emit_index(b, x, along(b.shape(x), axis, wanted))
    return x


@lowers("aten.upsample_linear1d.vec", "aten.upsample_bilinear2d.vec", "aten.upsample_linear1d.default",
        "aten.upsample_bilinear2d.default")  # fmt: skip
def upsample_linear(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.input if hasattr(a, "input") else a.self)
    axes = []
    for n, m, step in upsampled_axes(b, a):
        rows = []
        for i in range(m):
            at = i * (n - 1) / max(m - 1, 1) if a.align_corners else max((i + 0.5) * step - 0.5, 0.0)
            first = min(int(at), n - 1)
            rest = at - first
            rows.append((first, (1.0 - rest, rest) if first + 1 < n and rest else (1.0,)))
        axes.append(tuple(rows))
    return b.emit(Contract(Positions(tuple(axes))), (x,), a.result)


# ---------------------------------------------------------------------------------------------------------------
# By torch's own op


OPS = {
    "aten._upsample_nearest_exact1d.vec": 1, "aten._upsample_nearest_exact2d.vec": 2,
    "aten._upsample_nearest_exact3d.vec": 3, "aten.upsample_nearest3d.vec": 3, "aten.upsample_bicubic2d.vec": 2,
    "aten._upsample_bilinear2d_aa.vec": 2, "aten._upsample_bicubic2d_aa.vec": 2, "aten.upsample_trilinear3d.vec": 3,
}  # fmt: skip


@lowers(*OPS)
def resample(b: ProgramBuilder, a: SimpleNamespace) -> Value:
    x = need_value(a.input)
    dims = OPS[b.op]
    if len(b.shape(x)) != dims + 1:
        raise NoForm("it has no channel axis")
    factors = tuple(a.scale_factors) if a.scale_factors else (None,) * dims
    axes = []
    for k, (n, m) in enumerate(zip(b.shape(x)[1:], a.result[1:], strict=True)):
        corners = getattr(a, "align_corners", None)
        axes.append(identity_rows(n) if n == m else matrix(b.op, dims, k, n, m, factors[k], corners))
    if "nearest" not in b.op:
        return b.emit(Contract(Positions(tuple(axes))), (x,), a.result)
    for axis, rows in enumerate(axes, start=1):
        x = emit_index(b, x, along(b.shape(x), axis, [first for first, _ in rows]))
    return x


@lru_cache(maxsize=64)
def matrix(op: str, dims: int, axis: int, n: int, m: int, factor: float | None, corners: bool | None) -> Rows:
    """The rows of one axis: torch's own op on unit vectors along it."""
    size = [2] * dims  # not 1, for which torch may take another memory format
    size[axis] = n
    along = [n if k == axis else 1 for k in range(dims)]
    units = torch.eye(n, dtype=torch.float64).reshape(n, 1, *along).expand(n, 1, *size).contiguous()
    to = list(size)
    to[axis] = m
    factors = [1.0] * dims
    factors[axis] = factor if factor is not None else 1.0
    sizes = (None, factors) if factor is not None else (to, None)
    with torch.inference_mode(False), torch.no_grad():
        arguments = (sizes[0], sizes[1]) if corners is None else (sizes[0], corners, sizes[1])
        columns = operator_of(op)(units, *arguments)
        columns = columns.movedim(axis + 2, 1).flatten(2)[:, :, 0]  # [n, m]
    rows = []
    for i in range(m):
        used = columns[:, i].nonzero().flatten().tolist() or [0]
        rows.append((used[0], tuple(columns[used[0] : used[-1] + 1, i].tolist())))
    return tuple(rows)
