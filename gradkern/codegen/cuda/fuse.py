"""Convolutions with the ReLU or the pool behind them as one record: what the convolution gives never leaves registers.

A rewriting of a chain's forward records for the GPU (csrc/cuda/pooled.cuh), which has threads that hold whole pools.
"""

from __future__ import annotations

from .cost import PATTERN, WINDOW, ZERO
from .slices import Op, touches

TAPS = (1, 2, 4)  # of a pool that a thread's positions hold whole: eight, or four doubles


def fused(forward: list[Op], backward: list[Op]) -> list[Op]:
    """The forward records, with every convolution that only the pattern behind it reads joined to that."""
    out: list[Op] = []
    dropped: set[int] = set()
    for i, op in enumerate(forward):
        window = next((w for w in reversed(out) if w["kind"] == WINDOW), None)
        if op["kind"] == PATTERN and window is not None and joins(window, op, forward[:i], forward[i + 1 :] + backward):
            if window["dst"][0] is not op["dst"][0]:
                dropped.add(id(window["dst"][0]))
            out.remove(window)
            keep = ("dst", "dst_row", "dst_px", "bits", "nb", "taps", "relu", "kh", "kw")
            out.append(window | {k: op[k] for k in keep} | {"Hi": op["H"], "Wi": op["W"]})
        else:
            out.append(op)
    return [op for op in out if not (op["kind"] == ZERO and id(op["dst"][0]) in dropped)]


def joins(window: Op, pattern: Op, before: list[Op], after: list[Op]) -> bool:
    """Whether the pattern alone reads the convolution's result, in pools that neither meet nor hang over the edge.

    A ReLU may work in place: then later records read what it leaves.
    """
    buffer, in_place = window["dst"][0], window["dst"][0] is pattern["dst"][0]
    users = [
        op
        for op in before + (after if not in_place else [])
        if any(touches(op, key, buffer) for key in ("src", "aux", "dst"))
    ]
    alone = all(op is window or op["kind"] == ZERO for op in users) and pattern["src"] == window["dst"]
    apart = all(
        pattern["s" + x] == pattern["k" + x] and pattern["d" + x] == 1 and pattern["p" + x] == 0
        for x in "hw"
        if pattern["k" + x] > 1 or pattern["p" + x]
    )
    inside = all(pattern[a] * pattern["k" + x] <= window[a] for a, x in (("H", "h"), ("W", "w")))
    plain = not window["block"] and window["groups"] == 1 and pattern["taps"] in TAPS and not window.get("taps")
    return alone and apart and inside and plain
