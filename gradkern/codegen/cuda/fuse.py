"""Joins convolutions with the ReLU or pool after them, so that the convolution's result never leaves registers.

This rewrites a chain's forward records for the GPU (csrc/cuda/window.cuh), where one thread holds whole pools.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..records import Pattern, PooledWindow, Record, Window, Zero
from ..scratch import Buffer

TAPS = (1, 2, 4)  # the sizes of pools that a thread's positions (eight floats or four doubles) hold whole


def fuse_patterns(forward: Sequence[Record], backward: Sequence[Record]) -> list[Record]:
    """The forward records, after joining every convolution to the pattern after it if that is its only reader."""
    out: list[Record] = []
    dropped: set[Buffer | None] = set()
    for i, op in enumerate(forward):
        window = next((w for w in reversed(out) if isinstance(w, Window)), None)
        if isinstance(op, Pattern) and window and joins(window, op, forward[:i], [*forward[i + 1 :], *backward]):
            if window.dst.buffer is not op.dst.buffer:
                dropped.add(window.dst.buffer)
            out.remove(window)
            changes = {"dst": op.dst, "H": op.extent.H, "W": op.extent.W}
            out.append(PooledWindow(**vars(window) | changes, pattern=op.pattern, relu=op.relu))
        else:
            out.append(op)
    return [op for op in out if not (isinstance(op, Zero) and op.dst.buffer in dropped)]


def joins(window: Window, pattern: Pattern, before: Iterable[Record], after: Iterable[Record]) -> bool:
    """Whether only the pattern reads the convolution's result, in pools that neither overlap nor leave the input.

    A ReLU may work in place: then later records read its result.
    """
    buffer, p = window.dst.buffer, pattern.pattern
    assert buffer is not None
    others = before if buffer is pattern.dst.buffer else [*before, *after]
    alone = all(op is window or isinstance(op, Zero) for op in others if op.reads(buffer) or op.writes(buffer))
    same = pattern.src.buffer is buffer and pattern.src.offset == window.dst.offset
    apart = all(
        stride == kernel and dilation == 1 and padding == 0
        for kernel, stride, padding, dilation in ((p.kh, p.sh, p.ph, p.dh), (p.kw, p.sw, p.pw, p.dw))
        if kernel > 1 or padding
    )
    inside = pattern.extent.H * p.kh <= window.H and pattern.extent.W * p.kw <= window.W
    simple = not window.whole_block and window.groups == 1 and p.taps in TAPS and type(window) is Window
    return alone and same and apart and inside and simple
