"""Index maps as runs: making them, inspecting them, and applying them to tensors.

An axis map lists, per output index, the input index that it reads (-1: a zero), as runs ``(start, count, step)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .program import Index, Part, Shape

Runs = tuple[tuple[int, int, int], ...]


def runs(indices: Iterable[int]) -> Runs:
    """The shortest greedy list of runs for ``indices``; zeros (-1) make runs of their own."""
    grouped: list[tuple[int, int, int]] = []
    for i in indices:
        start, count, step = grouped[-1] if grouped else (0, 0, 0)
        if grouped and start < 0 and i < 0:
            grouped[-1] = (-1, count + 1, 0)
        elif grouped and start >= 0 and i >= 0 and (count == 1 or i == start + count * step):
            grouped[-1] = (start, count + 1, i - start if count == 1 else step)
        else:
            grouped.append((-1, 1, 0) if i < 0 else (i, 1, 1))
    return tuple(grouped)


def indices(axis: Runs) -> list[int]:
    """The input index of every output index, -1 for zeros."""
    return [-1 if start < 0 else start + k * step for start, count, step in axis for k in range(count)]


def length(axis: Runs) -> int:
    return sum(count for _, count, _ in axis)


def identity_runs(n: int) -> Runs:
    """The map of an axis of ``n`` elements to itself."""
    return ((0, n, 1),) if n else ()


def identity(shape: Shape, order: Sequence[int] | None = None) -> Part:
    """All of a value of ``shape``, its axes in ``order``."""
    order = tuple(range(len(shape))) if order is None else tuple(order)
    return Part(order, tuple(identity_runs(shape[a]) for a in order))


def along(shape: Shape, axis: int, wanted: Iterable[int]) -> Part:
    """The part of a value with the indices ``wanted`` along one axis."""
    axes = [identity_runs(n) for n in shape]
    axes[axis] = runs(wanted)
    return Part(tuple(range(len(shape))), tuple(axes))


def is_permutation(part: Part, shape: Shape) -> bool:
    """Whether a part of a value of ``shape`` only permutes its axes."""
    return all(axis == identity_runs(shape[a]) for a, axis in zip(part.order, part.axes, strict=True))


def then(first: Part, second: Part) -> Part:
    """One part that does ``first`` and then ``second``."""
    axes = []
    for a, axis in zip(second.order, second.axes, strict=True):
        inner = indices(first.axes[a])
        axes.append(runs(-1 if i < 0 else inner[i] for i in indices(axis)))
    return Part(tuple(first.order[a] for a in second.order), tuple(axes))


# ---------------------------------------------------------------------------------------------------------------
# On tensors


class _Axis(NamedTuple):
    """One axis map in the form that tensors need: as a block that is copied, or as lists of indices."""

    block: tuple[int, int, int] | None  # (first output, first input, count)
    source: Tensor | None  # input index per live output
    live: Tensor | None  # live outputs; None: all of them
    length: int


@lru_cache(maxsize=512)
def _axis(axis: Runs, device: torch.device) -> _Axis:
    total = length(axis)
    live = [r for r in axis if r[0] >= 0]
    if len(live) == 1 and (live[0][2] == 1 or live[0][1] == 1):
        before = sum(c for _, c, _ in axis[: axis.index(live[0])])
        return _Axis((before, live[0][0], live[0][1]), None, None, total)
    every = indices(axis)
    kept = [k for k, i in enumerate(every) if i >= 0]
    with torch.inference_mode(False):
        source = torch.tensor([every[k] for k in kept], dtype=torch.int64, device=device)
        places = None if len(kept) == total else torch.tensor(kept, dtype=torch.int64, device=device)
    return _Axis(None, source, places, total)


def apply(form: Index, args: Sequence[Tensor], shape: Shape) -> Tensor:
    """``[N, *in]`` per input -> ``[N, *shape]``."""
    only = form.parts[0]
    if len(form.parts) == 1 and all(r[0] >= 0 for axis in only.axes for r in axis):
        return _taken(only, args[0])[0].clone(memory_format=torch.contiguous_format)
    y = args[0].new_zeros(args[0].shape[0], *shape)
    for part, x in zip(form.parts, args, strict=True):
        taken, place = _taken(part, x)
        _window(y, part, 1).index_put_(place, taken) if place else _window(y, part, 1).copy_(taken)
    return y


def transpose(form: Index, shapes: Sequence[Shape], g: Tensor) -> tuple[Tensor, ...]:
    """``g [N, S, *out]`` -> one ``[N, S, *in]`` per input: every element gets the sum over its copies."""
    cotangents = []
    for part, shape in zip(form.parts, shapes, strict=True):
        back = _window(g, part, 2)
        for a, axis in enumerate(part.axes):
            back = _collect(back, a + 2, _axis(axis, g.device), shape[part.order[a]])
        inverse = sorted(range(len(part.order)), key=lambda a: part.order[a])
        cotangents.append(back.permute(0, 1, *[a + 2 for a in inverse]))
    return tuple(cotangents)


def _window(y: Tensor, part: Part, lead: int) -> Tensor:
    """The block of the output that the part fills, along axes whose map is a block."""
    for a, axis in enumerate(part.axes):
        block = _axis(axis, y.device).block
        if block is not None:
            y = y.narrow(a + lead, block[0], block[2])
    return y


def _taken(part: Part, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The elements that the part reads, and their place in its window of the output (None: they fill the window)."""
    x = x.permute(0, *[a + 1 for a in part.order])
    scattered: dict[int, Tensor] = {}
    for d, axis in enumerate(part.axes, start=1):
        m = _axis(axis, x.device)
        if m.block is not None:
            x = x.narrow(d, m.block[1], m.block[2])
        else:
            assert m.source is not None, "an axis map is a block, or lists"
            x = x.index_select(d, m.source)
            if m.live is not None:
                scattered[d] = m.live
    if not scattered:
        return x, None
    grids = [scattered.get(d, torch.arange(n, device=x.device)) for d, n in enumerate(x.shape)]
    return x, tuple(grid.reshape([-1 if k == d else 1 for k in range(x.dim())]) for d, grid in enumerate(grids))


def _collect(g: Tensor, dim: int, m: _Axis, size: int) -> Tensor:
    """The transposed action along one axis of a cotangent."""
    shape = list(g.shape)
    shape[dim] = size
    if m.block is not None:
        if m.block[2] == size:
            return g
        back = g.new_zeros(shape)
        back.narrow(dim, m.block[1], m.block[2]).copy_(g)
        return back
    assert m.source is not None, "an axis map is a block, or lists"
    if m.live is not None:
        g = g.index_select(dim, m.live)
    return g.new_zeros(shape).index_add_(dim, m.source, g)
