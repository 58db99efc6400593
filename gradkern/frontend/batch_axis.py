"""Per-sample views of tensors whose batch axis is not axis 0.

A sequence-first tensor ``[L, N, E]`` is ``[L, 1, E]`` for each sample: an axis of length one replaces the batch axis,
and the batch becomes axis 0.  ``[N·H, L, E]``, samples by heads, is ``[H, L, E]``.  An op on the original tensor is the
same op on this view with its axes shifted by one, unless it works along the batch axis.  So `nn.MultiheadAttention`,
and encoders that keep sequences first, are lowered as if they had been written with the batch in front.

An axis may join the samples with other axes.  Its inner extent is how many neighbouring indices belong to one sample:
1 for ``[L·N, E]``, H for ``[N·H, L, E]``.  Whole batches may be joined along it and taken apart again.  A view that
reads the samples in another order mixes them, and has no form here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from ..ir.program import Batch, Call, Value
from .lowerings import NoForm
from .lowerings.builder import ALONG, AXES, ROWS, Complex
from .lowerings.index import PADS, takes_all
from .lowerings.shape import VIEWS

ATTENTION = "aten.scaled_dot_product_attention.default"  # along its last two axes
PIECE_COUNTS = {"aten.chunk.default": "chunks", "aten.tensor_split.sections": "sections"}  # by op: the number of pieces
BATCH_SIZES = ("split_size", "split_sizes", "start", "end")  # arguments in samples, where whole batches are taken apart


@dataclass(frozen=True)
class NonLeadingBatch:
    """``value``: the tensor per sample, with an axis of length one for the batch.  ``call``: the tensor itself.

    ``inner_extent``: how many numbers of one sample are adjacent in the axis that holds the samples.
    """

    value: Value | Complex
    call: Call
    inner_extent: int = 1


class BatchAxis(NamedTuple):
    """The axis of a tensor that holds the samples: its place, its inner extent, and its length in batches."""

    place: int
    inner: int
    times: int


def make_per_sample(op: str, named: SimpleNamespace, rank: int, axes_of: Sequence[BatchAxis]) -> None:
    """Shift the axes in a call's arguments by one.

    ``named``: the arguments by name, changed in place; ``rank``: the rank of the tensor that the axes refer to;
    ``axes_of``: the batch axis of each tensor that is read.  Raises `NoForm` for an unknown op, or one that works along
    the batch on anything but whole batches.
    """
    batch = [axis.place for axis in axes_of]
    if op == ATTENTION:
        if any(axis >= rank - 2 for axis in batch):
            raise NoForm("it attends to other samples")
        return
    if op in VIEWS:
        return
    if op == "aten.repeat.default":
        if len(named.repeats) != rank or any(named.repeats[a.place] != 1 and a.inner != 1 for a in axes_of):
            raise NoForm("it repeats the samples")
        named.repeats = (1, *named.repeats)
        return
    if op in ROWS:
        if any(axis != 0 for axis in batch):
            raise NoForm(f"{op} has no form where the batch is not axis 0")
        return
    if op in PADS:
        flat = getattr(named, "pad", None) or named.padding
        if any(flat[2 * (rank - 1 - axis) :][:2] not in ((), (0, 0)) for axis in batch):
            raise NoForm("it pads the batch axis")
        return
    if op == "aten.stack.default":
        named.dim = named.dim % (rank + 1) + 1
        return
    if op not in AXES and op not in ALONG:
        raise NoForm(f"{op} has no form where the batch is not axis 0")
    for name in AXES.get(op, ()):
        setattr(named, name, shift_axes(getattr(named, name), rank))
    if "dims" in AXES.get(op, ()):
        named.dims = (0, *named.dims)
    if op in ALONG:
        axes = shift_axes(getattr(named, ALONG[op]), rank)
        along = axes is None or {a - 1 for a in ((axes,) if isinstance(axes, int) else axes)} & set(batch)
        if along and not (op == "aten.slice.Tensor" and takes_all(named)):
            _take_whole_batches(op, named, axes_of)
        setattr(named, ALONG[op], axes)


def _take_whole_batches(op: str, named: SimpleNamespace, axes_of: Sequence[BatchAxis]) -> None:
    """Whole batches that lie one after the other, ``[k·N, …]``, are the numbers of an axis of k per sample: they may be
    joined and taken apart, as attention does whose heads are pieces of a longer batch.

    Replaces sizes that are multiples of the batch by the multiples.
    """
    if any(axis.inner != 1 for axis in axes_of):
        raise NoForm("it works along the batch axis")
    if op == "aten.cat.default":
        if not all(isinstance(x, Value) for x in named.tensors):
            raise NoForm("it joins samples and constants")
        return
    pieces = PIECE_COUNTS.get(op)
    if pieces is not None and axes_of[0].times % getattr(named, pieces) == 0:
        return
    if op not in ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.slice.Tensor"):
        raise NoForm("it works along the batch axis")
    if getattr(named, "step", 1) != 1:
        raise NoForm("it takes some of the samples")
    for name in BATCH_SIZES:
        if hasattr(named, name):
            setattr(named, name, _batches(getattr(named, name)))


def _batches(size: Any) -> Any:
    """A number of samples as a number of batches."""
    if isinstance(size, (tuple, list)):
        return tuple(map(_batches, size))
    if isinstance(size, Batch):
        return size.times
    if size in (None, 0, 2**63 - 1):
        return size
    raise NoForm("it takes some of the samples")


def inner_extent(op: str, sources: Sequence[tuple[int, int]], times: int, after: Sequence[int]) -> int:
    """How many numbers of one sample are adjacent in the axis that holds the samples, in the result of an op.

    ``sources``: for each tensor that the op reads, its inner extent and its elements per index of the axis; ``times``:
    the numbers of a sample in the result's axis; ``after``: the sizes of the axes after it.  Raises `NoForm` if tensors
    or a view have the samples in different orders.
    """
    if op not in VIEWS:
        extents = {inner for inner, _ in sources}
        if len(extents) != 1:
            raise NoForm("it joins samples in different orders")
        return extents.pop()
    step = math.prod(sources[0])  # from one sample to the next; a view does not change it
    inner, rest = divmod(step, max(math.prod(after), 1))
    if rest or not inner or times % inner:
        raise NoForm("it views the samples in another order")
    return inner


def shift_axes(axes: Any, rank: int) -> Any:
    """An axis, or several axes, shifted by one."""
    if isinstance(axes, int):
        return axes % rank + 1
    return tuple(axis % rank + 1 for axis in axes) if axes is not None else None
