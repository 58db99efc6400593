"""The scratch memory that a chain's records refer to: buffers of values and cotangents, and bits."""

from __future__ import annotations

import math

from . import units
from .records import Extent, PatternRef, Place
from .scratch import SLACK, Buffer, round_up
from .units import Node, Unit


class Buffers:
    """The buffers of one chain, each made at its first use.  Their places in memory are assigned later."""

    def __init__(self, slack: int = SLACK, multiple: int = 16) -> None:
        self.slack = slack  # elements past the end of every buffer
        self.multiple = multiple  # the sizes of buffers are multiples of it
        self.values: dict[int, Buffer] = {}  # by Node.memory
        self.cotangents: dict[Node, Buffer] = {}
        self.saved: dict[Unit, Buffer] = {}
        self.bits: dict[units.Pattern, int] = {}  # byte offset among a sample's bits
        self.bit_bytes = 0  # bytes of bits per sample

    def value(self, node: Node) -> Buffer:
        return self.values.setdefault(node.memory, Buffer(round_up(node.size + self.slack, self.multiple)))

    def cotangent(self, node: Node, interleaved: int = 1) -> Buffer:
        """The buffer of a cotangent.  ``interleaved``: how many of its rows are interleaved; the numbers of rows and of
        windows on them are rounded up."""
        extra = 0 if interleaved == 1 else 3 * interleaved * node.row
        elements = round_up(node.size + extra + self.slack, self.multiple)
        return self.cotangents.setdefault(node, Buffer(elements, cotangent=True))

    def saved_for(self, unit: Unit, elements: int) -> Buffer:
        """Memory for the values that the unit's backward pass needs of every sample: derivatives, probabilities, …"""
        return self.saved.setdefault(unit, Buffer(elements + self.slack, per_sample=True))

    def pattern(self, unit: units.Pattern) -> PatternRef:
        """The place and geometry of a pattern's bits."""
        source, out = unit.reads[0], unit.out
        w = unit.windows
        taps, plane_bytes = math.prod(w.kernel), (out.C + 15) // 16 * 2
        if unit not in self.bits:
            self.bits[unit] = self.bit_bytes
            self.bit_bytes += (out.P * taps * plane_bytes + 63) // 64 * 64
        return PatternRef(
            bits=self.bits[unit], taps=taps, plane_bytes=plane_bytes, H=source.H, W=source.W,
            kh=w.kernel.h, kw=w.kernel.w, sh=w.stride.h, sw=w.stride.w,
            ph=w.before.h, pw=w.before.w, dh=w.dilation.h, dw=w.dilation.w,
        )  # fmt: skip


def interior(node: Node, buffer: Buffer) -> Place:
    """The node's interior in this buffer."""
    return Place(buffer, offset=node.interior, row=node.row, position=node.C)


def extent(node: Node) -> Extent:
    return Extent(C=node.C, H=node.H, W=node.W)
