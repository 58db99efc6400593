"""Maxima and minima on the tape (`tape.py`): a change goes to the places of the input's and reference's maximum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ir.calls import bind_arguments
from .compositions import axes
from .tape import InputAndReference, Tape, handles, is_pair, packet


def route_changes(
    tape: Tape,
    p: InputAndReference,
    ends: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    take: Callable[[Tensor, Tensor], Tensor],
) -> InputAndReference:
    """Values ``ends`` of ``p`` at the maxima's ``places``, each at input and reference; ``take(x, places)`` reads them.

    The input's maximum gets the part of the change above the reference's, the reference's the part below (as pools do
    in `deeplift.py`); each divided by the change of the number there.
    """
    (y, y_ref), (here, there) = ends, places
    top = torch.maximum(y, y_ref)
    moved = p.x - p.r
    same = here == there

    def share(part: Tensor, place: Tensor, still: float) -> Tensor:
        step = take(moved, place)
        return torch.where(step.abs() < tape.eps, still, part / step)

    up = torch.where(same, 1.0, share(top - y_ref, here, 1.0))
    down = torch.where(same, 0.0, share(y - top, there, 0.0))

    def change(t: Tensor) -> Tensor:
        return up * take(t, here) + down * take(t, there)

    return tape.record(change, [p], y, y_ref)


def pool_with_places(op: Any) -> Any:
    """The variant of a pool that also returns the places of the maxima."""
    name = packet(op)
    return getattr(torch.ops.aten, f"{name}_with_indices" if name.startswith("max_pool") else name).default


@handles("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices")
@handles("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def pool(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    name, p = packet(op), args[0]
    spatial = int(name.partition("pool")[2][0])
    if name == "max_pool1d":
        y, here = torch.nn.functional.max_pool1d_with_indices(p.x, *args[1:], **kwargs)
        y_ref, there = torch.nn.functional.max_pool1d_with_indices(p.r, *args[1:], **kwargs)
    else:
        whole = op if packet(op).endswith("indices") or name.startswith("adaptive") else pool_with_places(op)
        y, here = whole(p.x, *args[1:], **kwargs)
        y_ref, there = whole(p.r, *args[1:], **kwargs)

    def take(x: Tensor, places: Tensor) -> Tensor:
        lead = x.shape[: x.dim() - spatial]
        return x.reshape(*lead, -1).gather(-1, places.reshape(*lead, -1)).view(*lead, *places.shape[-spatial:])

    best = route_changes(tape, p, (y, y_ref), (here, there), take)
    return best if name in ("max_pool1d", "max_pool2d", "max_pool3d") else (best, here)


def along(tape: Tape, p: InputAndReference, dim: int, keepdim: bool) -> tuple[InputAndReference, Tensor]:
    """The maximum along one axis, and its place at the input."""
    (y, here), (y_ref, there) = (z.max(dim, keepdim=True) for z in (p.x, p.r))
    best = route_changes(tape, p, (y, y_ref), (here, there), lambda x, places: x.gather(dim, places))
    return (best, here) if keepdim else (tape("squeeze.dim", best, dim), here.squeeze(dim))


@handles("max", "min", "amax", "amin")
def extreme(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    """The maximum or minimum over axes, or of two values."""
    a, name = bind_arguments(op, args, kwargs), packet(op)
    if "other" in a:
        return of_two(tape, a["self"], a["other"], name == "min")
    p, least = a["self"], name in ("min", "amin")
    p = tape("neg.default", p) if least else p
    if isinstance(a.get("dim"), int):
        best, place = along(tape, p, a["dim"], a["keepdim"])
    else:
        best, place = over(tape, p, axes(a.get("dim"), p.x.dim()), bool(a.get("keepdim", False))), None
    best = tape("neg.default", best) if least else best
    return (best, place) if place is not None and not name.startswith("a") else best


def over(tape: Tape, p: InputAndReference, dims: list[int], keepdim: bool) -> InputAndReference:
    """The maximum over several axes."""
    shape, kept = list(p.shape), [d for d in range(len(p.shape)) if d not in dims]
    rows = tape("permute.default", p, [*kept, *dims])
    rows = tape("reshape.default", rows, [*(shape[d] for d in kept), math.prod(shape[d] for d in dims)])
    best, _ = along(tape, rows, -1, False)
    return tape("reshape.default", best, [1 if d in dims else n for d, n in enumerate(shape)]) if keepdim else best


@handles("maximum", "fmax")
def maximum(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    return of_two(tape, args[0], args[1], False)


@handles("minimum", "fmin")
def minimum(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    return of_two(tape, args[0], args[1], True)


def of_two(tape: Tape, one: Any, two: Any, least: bool) -> InputAndReference:
    """The larger (or smaller) of two values, as a pool of two places."""
    shape = torch.broadcast_shapes(one.shape, two.shape)
    dtype = torch.promote_types(*((z.x if is_pair(z) else z).dtype for z in (one, two)))
    both = [tape("expand.default", z, shape) for z in (one, two)]
    both = [tape("_to_copy.default", z, dtype=dtype) for z in both]
    rows = tape("stack.default", both, -1)
    best, _ = along(tape, tape("neg.default", rows) if least else rows, -1, False)
    return tape("neg.default", best) if least else best
