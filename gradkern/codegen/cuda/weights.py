"""Packed weights in the layouts of the GPU's kernels."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ...ir.calls import Params
from .. import limits
from ..records import ScatterAlgorithm
from ..units import Node
from ..weights import ScatterLayout, WindowLayout, align
from .clock_model import WARP


class DeviceWindow(WindowLayout):
    """Forward weights ``[groups][K][O to a multiple of 4]``."""

    @property
    def row_length(self) -> int:
        return (self.O + 3) // 4 * 4

    def fill(self, packed: Tensor, params: Params) -> None:
        w, b = self.folded(params)  # [groups·O, K], [groups·O]
        g, o, k = self.groups, self.O, self.K
        self.view(packed, g, k, self.row_length)[:, :, :o] = w.reshape(g, o, k).transpose(1, 2)
        self.view(packed, g, self.row_length, offset=self.bias)[:, :o] = b.reshape(g, o)


class DeviceScatter(ScatterLayout):
    """Backward weights ``[taps · O][window to a multiple of 4]``; ``window`` lists its offsets."""

    algorithm: ClassVar[ScatterAlgorithm] = ScatterAlgorithm.Walk

    @property
    def window(self) -> list[int]:
        return [r + i for r in self.runs for i in range(self.L)]

    @property
    def row_length(self) -> int:
        return (len(self.runs) * self.L + 3) // 4 * 4

    @property
    def size(self) -> int:
        # Idle lanes of a walk read past the last row.
        return super().size + (WARP * limits.WALK_ELEMENTS if self.algorithm == ScatterAlgorithm.Walk else 0)

    def fits(self, node: Node, upstream: Node) -> bool:
        """Whether the kernel can add to the cotangent of ``node``, reading that of ``upstream``."""
        return True

    def fill(self, packed: Tensor, params: Params) -> None:
        w = self.rows(params)
        self.view(packed, w.shape[0], self.row_length)[:, : w.shape[1]] = w


class QuadScatter(DeviceScatter):
    """Backward weights for quads (csrc/cuda/quads.cuh): ``[variants][O][rows with zeros above and below][columns]``.

    Each tap of a merged window reads a channel's weights at its own offset, so that they are shifted to the tap's
    position, with zeros around them, and the window's quads are contiguous.  A window of one row is shifted by columns
    in the same way; otherwise every shift by columns is a separate variant.
    """

    algorithm = ScatterAlgorithm.Quads

    @property
    def margin(self) -> tuple[int, int]:
        """Rows and columns from the first tap to the last."""
        return self.taps[-1] if self.merged else (0, 0)

    @property
    def variants(self) -> list[int]:
        """The shifts, in columns, that have their own weights."""
        return [0] if len(self.runs) == 1 and self.channels % 4 == 0 else sorted({j for _, j in self.taps})

    @property
    def length(self) -> int:
        """Elements of a row."""
        return self.L + self.margin[1] * self.channels * (len(self.variants) == 1)

    @property
    def row_length(self) -> int:
        return ((len(self.runs) + self.margin[0]) * self.length + 3) // 4 * 4

    def offsets(self) -> list[int]:
        """The offsets of every tap's weights."""
        rows, columns = self.margin
        return [
            (rows - i) * self.length
            + (self.variants.index(j) * self.O * self.row_length if j in self.variants[1:] else 0)
            + ((columns - j) * self.channels if len(self.variants) == 1 else 0)
            for i, j in (self.taps if self.merged else [(0, 0)])
        ]

    @property
    def size(self) -> int:
        return align(len(self.variants) * self.O * self.row_length)

    def fill(self, packed: Tensor, params: Params) -> None:
        w, _ = self.folded(params)
        rows, columns = self.margin
        high = len(self.runs) + rows
        inner = w.reshape(self.O, high - 2 * rows, -1)  # [O, rows, columns · channels]
        back = self.view(packed, len(self.variants), self.O, self.row_length)
        back = back[:, :, : high * self.length].unflatten(2, (high, self.length))
        for variant, shift in zip(back, self.variants, strict=True):
            start = (shift if len(self.variants) > 1 else columns) * self.channels
            variant[:, rows : high - rows, start : start + inner.shape[2]] = inner

    def fits(self, node: Node, upstream: Node) -> bool:
        """Whether everything that quads read and write is aligned to four elements."""
        origin = node.interior + self.origin
        steps = (origin, *self.step, *self.runs, self.L, self.O, upstream.interior, upstream.row)
        return self.groups == 1 and len(self.taps) <= limits.QUAD_PLANES and all(n % 4 == 0 for n in steps)


class NarrowScatter(DeviceScatter):
    """Backward weights for narrow windows (csrc/cuda/quads.cuh): ``[taps][O][window to a multiple of 4]``.

    Channels are in the order 0, 4, 8 …, 1, 5, 9 …, 2 …, so that those of neighbouring lanes are adjacent.
    """

    algorithm = ScatterAlgorithm.Narrow

    def rows(self, params: Params) -> Tensor:
        w = super().rows(params)
        return w.view(-1, self.O // 4, 4, w.shape[1]).transpose(1, 2).reshape(w.shape)

    def fits(self, node: Node, upstream: Node) -> bool:
        """Whether the window is short and contiguous, and cotangents can be read four at a time."""
        narrow = self.L <= limits.NARROW and len(self.taps) <= limits.QUAD_PLANES
        fours = all(n % 4 == 0 for n in (self.O, upstream.interior, upstream.row))
        return self.groups == 1 and len(self.runs) == 1 and narrow and fours
