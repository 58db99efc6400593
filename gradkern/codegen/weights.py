"""Packed weights: folded, reordered and padded for one vector length.

A layout says *where* every weight goes (integers, decided when the chain is lowered); `fill` writes the live values
there.  It also folds in the batch norms after a contraction, in the precision of the weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from ..ir.calls import Params
from ..ir.program import MAX_CHANNELS, Channels, Contract, Dense, Param, Positions, Windows
from . import units
from .caches import L1_BYTES
from .scratch import round_up
from .units import Fold, Node, Windows2d

ALIGN = 16  # elements


def align(n: int) -> int:
    return round_up(n, ALIGN)


@dataclass
class Layout(ABC):
    """A piece of the packed weights: ``size`` elements from offset ``weights`` on, in rows of ``row_length``."""

    form: Contract
    weights: int = field(default=-1, kw_only=True)

    @property
    @abstractmethod
    def size(self) -> int: ...

    @property
    @abstractmethod
    def row_length(self) -> int: ...

    @abstractmethod
    def fill(self, packed: Tensor, params: Params) -> None:
        """Write the live values of the parameters there."""

    def names(self) -> list[str]:
        """The parameters that it is filled from."""
        return param_names([self.form])

    def view(self, packed: Tensor, *shape: int, offset: int | None = None) -> Tensor:
        """The packed weights from here, or from ``offset``, on."""
        start = self.weights if offset is None else offset
        return packed[start : start + math.prod(shape)].view(shape)


@dataclass
class ContractionLayout(Layout):
    """Common to the forward and the backward layout of one contraction: its weight as a matrix, folded."""

    folds: tuple[Fold, ...]
    lanes: int
    geometry: tuple[int, int, int]  # C, H, W of the input
    storage_order: bool  # a linear layer whose input is flattened in storage order

    def columns(self, weight: Tensor) -> Tensor:
        """The weight as ``[groups·O, K]``, K in the order of channels-last windows (rows, columns, channels)."""
        w = weight.detach()
        if isinstance(self.form.map, Dense):
            C, H, W = self.geometry
            if self.storage_order:
                return w
            return w.reshape(-1, C, H, W).permute(0, 2, 3, 1).reshape(w.shape[0], -1)
        w = w.reshape(w.shape[0], w.shape[1], -1)  # [O, C/groups, taps]
        return w.transpose(1, 2).reshape(w.shape[0], -1)

    def folded(self, params: Params) -> tuple[Tensor, Tensor]:
        """Weight ``[groups·O, K]`` and bias ``[groups·O]`` with the batch norms after them."""
        assert self.form.weight is not None
        w = self.columns(params[self.form.weight.name])
        b = params[self.form.bias.name].detach() if self.form.bias else w.new_zeros(w.shape[0])
        for fold in self.folds:
            channels = slice(fold.first, fold.first + w.shape[0])
            if fold.form.weight is not None:
                scale = params[fold.form.weight.name].detach()[channels]
                w, b = w * scale[:, None], b * scale
            if fold.form.bias is not None:
                b = b + params[fold.form.bias.name].detach()[channels]
        return w, b

    def names(self) -> list[str]:
        return param_names([self.form, *(f.form for f in self.folds)])


@dataclass
class WindowLayout(ContractionLayout):
    """Forward weights, for windows made of R contiguous runs of L elements, group by group.

    The weights of each group and tile of output vectors are ``[K][vectors · lanes]``.
    """

    channels: int  # read per group
    O: int  # written per group  # noqa: E741
    groups: int
    R: int
    L: int
    origin: int  # offset of the first window's start from the interior
    stride: tuple[int, int]
    runs: list[int]  # R offsets
    tile_vectors: int

    @property
    def K(self) -> int:
        return self.R * self.L

    @property
    def vectors(self) -> int:
        return math.ceil(self.O / self.lanes)

    @property
    def row_length(self) -> int:
        """Weights of one term: O in whole vectors."""
        return self.vectors * self.lanes

    @classmethod
    def of(cls, unit: units.Window, lanes: int, tile_vectors: int = 1) -> Self:
        form, node, out = unit.form, unit.reads[0], unit.out
        C, row = node.C, node.row
        if isinstance(form.map, Dense):
            joined = row == node.W * C
            runs, groups = [0] if joined else [h * row for h in range(node.H)], 1
            length, origin, stride = node.W * C * (node.H if joined else 1), 0, (1, 1)
        else:
            assert isinstance(form.map, Windows)
            (kh, kw), stride, (ph, pw), (dh, dw) = Windows2d.of(form.map)
            groups, origin = form.map.groups, -(ph * row + pw * C)
            if groups == 1 and dw == 1:
                runs, length = [i * dh * row for i in range(kh)], kw * C
            else:
                runs = [i * dh * row + j * dw * C for i in range(kh) for j in range(kw)]
                length = C // groups
        return cls(
            form=form, folds=unit.folds, lanes=lanes, geometry=(C, node.H, node.W), storage_order=unit.storage_order,
            channels=C // groups, O=out.C // groups, groups=groups, R=len(runs), L=length, origin=origin,
            stride=stride, runs=runs, tile_vectors=tile_vectors,
        )  # fmt: skip

    @property
    def bias(self) -> int:
        return self.weights + align(self.groups * self.K * self.row_length)

    @property
    def size(self) -> int:
        return self.bias - self.weights + align(self.groups * self.row_length)

    def fill(self, packed: Tensor, params: Params) -> None:
        w, b = self.folded(params)
        g, o, k, n = self.groups, self.O, self.K, self.lanes
        wide = w.new_zeros(g, self.vectors * n, k)
        wide[:, :o] = w.reshape(g, o, k)
        cursor = self.weights
        for group in wide:
            for first, count in tiles(self.vectors, self.tile_vectors):
                tile = group[first * n : (first + count) * n].T  # [K, vectors·lanes]
                packed[cursor : cursor + tile.numel()] = tile.reshape(-1)
                cursor += tile.numel()
        self.view(packed, g, self.row_length, offset=self.bias)[:, :o] = b.reshape(g, o)


@dataclass
class ScatterLayout(ContractionLayout):
    """Backward weights: one row per output channel (and pool tap), laid out like the window that it is added to.

    A window is R contiguous runs of L elements of the cotangent, cut into vectors.  If a pool follows the
    contraction and windows are narrow, its taps are ``merged``: one window covers them all, and the rows of tap j
    hold the weight shifted to the position of that tap.  ``fold`` interleaves that many rows of the cotangent, so
    that one run of a narrow 2-D window fills more of a vector.
    """

    O: int  # all groups  # noqa: E741
    groups: int
    channels: int  # per group
    runs: list[int]
    L: int
    origin: int
    step: tuple[int, int]  # elements from one window to the next, per row and per column of the iterated positions
    taps: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])  # shifts in input rows and columns
    extent: tuple[int, int] = (1, 1)  # rows and columns of the merged window
    merged: bool = False
    fold: int = 1

    @property
    def window(self) -> list[int]:
        """Pairs (offset, live lanes)."""
        n = self.lanes
        return [x for r in self.runs for i in range(0, self.L, n) for x in (r + i, min(n, self.L - i))]

    @property
    def row_length(self) -> int:
        """Elements of a row.  If the rows do not all stay in L1, this is an odd multiple of `ALIGN`, so that the pieces
        of rows that a tile of the window reads fall on all sets of the cache."""
        length = len(self.window) // 2 * self.lanes
        return length if length * self.O * len(self.taps) * 4 <= L1_BYTES else align(length) | ALIGN

    @classmethod
    def of(cls, unit: units.Window, lanes: int) -> Self:
        """The plain layout: one window per output position."""
        w, node = WindowLayout.of(unit, lanes), unit.reads[0]
        step = (w.stride[0] * node.row, w.stride[1] * node.C)
        return cls(
            form=w.form, folds=w.folds, lanes=lanes, geometry=w.geometry, storage_order=w.storage_order,
            O=w.O * w.groups, groups=w.groups, channels=w.channels, runs=w.runs, L=w.L, origin=w.origin, step=step,
        )  # fmt: skip

    @classmethod
    def merge(cls, unit: units.Window, lanes: int, pool: Windows, fold: int) -> Self:
        """One window per pool output.  Needs groups and dilation of 1, and a pool that never leaves its input."""
        form, node, out = unit.form, unit.reads[0], unit.out
        (kh, kw), (sh, sw), (ph, pw), _ = windows_of(form)
        (qh, qw), (th, tw), _, (eh, ew) = Windows2d.of(pool)
        taps = [(i * eh * sh, j * ew * sw) for i in range(qh) for j in range(qw)]
        rows = kh + taps[-1][0]
        rows, columns = -(-rows // fold) * fold, kw + taps[-1][1]
        row, px = node.row * fold, node.C * fold  # the strides of a group of interleaved rows
        halo_h, halo_w = node.halo[0] - ph, node.halo[2] - pw
        origin = halo_h // fold * row + halo_w * px - (node.interior if fold > 1 else 0)
        if fold == 1:
            origin = -(ph * node.row + pw * node.C)
        runs, step = [r * row for r in range(rows // fold)], (th * sh * node.row, tw * sw * px)
        return cls(
            form=form, folds=unit.folds, lanes=lanes, geometry=(node.C, node.H, node.W),
            storage_order=unit.storage_order, O=out.C, groups=1, channels=node.C, runs=runs, L=columns * px,
            origin=origin, step=step, taps=taps, extent=(rows, columns), merged=True, fold=fold,
        )  # fmt: skip

    @property
    def size(self) -> int:
        return align(len(self.taps) * self.O * self.row_length)

    def fill(self, packed: Tensor, params: Params) -> None:
        w = self.rows(params)
        rows = self.view(packed, w.shape[0], self.row_length)[:, : len(self.window) // 2 * self.lanes]
        rows.unflatten(1, (len(self.runs), -1))[:, :, : self.L] = w.reshape(w.shape[0], len(self.runs), self.L)

    def rows(self, params: Params) -> Tensor:
        """``[taps · O, window]``."""
        w, _ = self.folded(params)
        return self.shifted(w) if self.merged else w

    def shifted(self, w: Tensor) -> Tensor:
        """``[O, K] -> [taps·O, merged window]``, rows interleaved by ``fold``."""
        kh, kw = windows_of(self.form).kernel
        rows, columns = self.extent
        wide = w.new_zeros(len(self.taps), self.O, rows, columns, self.channels)
        for j, (dh, dw) in enumerate(self.taps):
            wide[j, :, dh : dh + kh, dw : dw + kw] = w.reshape(self.O, kh, kw, self.channels)
        wide = wide.reshape(len(self.taps) * self.O, rows // self.fold, self.fold, columns, self.channels)
        return wide.transpose(2, 3).reshape(len(self.taps) * self.O, -1)


def mergeable(unit: units.Window, pattern: units.Pattern) -> bool:
    """Whether all taps of the pool after a convolution can share one window: no groups, dilation or overhang."""
    pool, w = pattern.pool, unit.form.map
    assert isinstance(w, Windows)
    if pool is None or pool.taps == 1 or w.groups != 1 or any(d != 1 for d in w.dilation):
        return False
    (qh, qw), (th, tw), before, (eh, ew) = Windows2d.of(pool)
    out, source = pattern.out, unit.out
    inside = (out.H - 1) * th + (qh - 1) * eh < source.H and (out.W - 1) * tw + (qw - 1) * ew < source.W
    return inside and before == (0, 0) and pool.taps * source.C <= MAX_CHANNELS


def scatter_cost(layout: ScatterLayout, seeds: int, taps: int) -> float:
    """Approximate cycles per pool output: for each window a start (40) and a read-add-write of every vector (1.5), and
    for each live channel one multiply-add per vector, two at a time.  About three in four pool outputs are alive.

    These are estimates, which only decide which of two layouts is taken.
    """
    vectors = len(layout.window) // 2
    windows = 1 if layout.merged else taps
    return windows * (40 + 1.5 * vectors * seeds) + 0.75 * layout.O * vectors * seeds / 2


@dataclass
class StencilLayout(Layout):
    """A channelwise map over positions: for each result, its reads as (offset, weight row); rows of C weights."""

    rows: int
    C: int
    entries: list[list[tuple[int, int]]]
    coefficients: list[float] | None  # of the rows, if they are constants
    first: int  # the channel of the weight that belongs to the first channel here

    @property
    def row_length(self) -> int:
        return align(self.C)

    @classmethod
    def of(cls, unit: units.Stencil) -> StencilLayout:
        form, node, out = unit.form, unit.reads[0], unit.out
        if isinstance(form.map, Channels):
            at = [[(h * node.row + w * node.C, 0)] for h in range(out.H) for w in range(out.W)]
            return cls(form, rows=1, C=node.C, entries=at, coefficients=None, first=unit.first)
        if isinstance(form.map, Positions):
            entries, coefficients = averages(form.map, node)
            rows = len(coefficients)
            return cls(form, rows=rows, C=node.C, entries=entries, coefficients=coefficients, first=unit.first)
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = windows_of(form)  # depthwise

        def line(n: int, k: int, start: int, d: int, step: int) -> list[tuple[int, int]]:
            return [((start + j * d) * step, j) for j in range(k) if 0 <= start + j * d < n]

        down = [line(node.H, kh, y * sh - ph, dh, node.row) for y in range(out.H)]
        along = [line(node.W, kw, x * sw - pw, dw, node.C) for x in range(out.W)]
        entries = [[(a + b, i * kw + j) for a, i in row for b, j in column] for row in down for column in along]
        return cls(form, rows=kh * kw, C=node.C, entries=entries, coefficients=None, first=unit.first)

    @property
    def bias(self) -> int:
        return self.weights + self.rows * self.row_length

    @property
    def size(self) -> int:
        return (self.rows + 1) * self.row_length

    def fill(self, packed: Tensor, params: Params) -> None:
        table = self.view(packed, self.rows, self.row_length)[:, : self.C]
        channels = slice(self.first, self.first + self.C)
        if self.coefficients is not None:
            table[:] = torch.tensor(self.coefficients, dtype=packed.dtype)[:, None]
        elif self.form.weight is None:
            table[:] = 1
        else:
            w = params[self.form.weight.name].detach()[channels]
            table[:] = w.reshape(self.C, -1).T
        if self.form.bias is not None:
            packed[self.bias : self.bias + self.C] = params[self.form.bias.name].detach()[channels]


def averages(positions: Positions, node: Node) -> tuple[list[list[tuple[int, int]]], list[float]]:
    """The entries of a constant map over positions, and the coefficient of each row."""
    still = ((0, (1.0,)),)
    axes = (still, still, *positions.axes)[-2:]
    rows: dict[float, int] = {}

    def reads(h0: int, ch: Sequence[float], w0: int, cw: Sequence[float]) -> list[tuple[int, int]]:
        pairs = [((h, a), (w, b)) for h, a in enumerate(ch, h0) for w, b in enumerate(cw, w0)]
        return [(h * node.row + w * node.C, rows.setdefault(a * b, len(rows))) for (h, a), (w, b) in pairs]

    entries = [reads(h0, ch, w0, cw) for h0, ch in axes[0] for w0, cw in axes[1]]
    return entries, list(rows)


def tiles(count: int, most: int) -> list[tuple[int, int]]:
    """``count`` items in even tiles of at most ``most``: (first, size); csrc/cpu/body_window.h cuts the same way."""
    parts, first, left = [], 0, math.ceil(count / most)
    while first < count:
        size = math.ceil((count - first) / left)
        parts.append((first, size))
        first, left = first + size, left - 1
    return parts


def windows_of(form: Contract) -> Windows2d:
    """The windows of a convolution."""
    assert isinstance(form.map, Windows)
    return Windows2d.of(form.map)


def param_names(forms: list[Contract]) -> list[str]:
    return [p.name for f in forms for p in (f.weight, f.bias) if isinstance(p, Param)]
