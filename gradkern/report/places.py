"""Positions of features, for people."""

from __future__ import annotations

from collections.abc import Sequence


def place(index: Sequence[int], shape: Sequence[int]) -> str:
    """A feature's position for people: without the axes of length one."""
    kept = [str(int(i)) for i, size in zip(index, shape, strict=True) if size > 1]
    return kept[0] if len(kept) == 1 else "(" + ",".join(kept) + ")" if kept else "0"
