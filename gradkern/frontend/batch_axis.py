"""Tensors that have the batch elsewhere than in front, sample by sample.

``[L, N, E]``, sequence first, is ``[L, 1, E]`` for each sample: an axis of one number stands where the batch was, and
the batch is in front again.  ``[N·H, L, E]``, samples by heads, is ``[H, L, E]``.  An op on the one is the same op on
the other with its axes counted from one on, unless it works along the batch axis.  So `nn.MultiheadAttention`, and
encoders that keep sequences first, are lowered as if they had been written with the batch in front.

A joined axis holds, for each index in front of the samples, the numbers of each sample after it: ``[L·N, E]`` has
an inner extent of one, ``[N·H, L, E]`` of H.  A view that reads the samples in another order mixes them, and has no
form here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..ir.program import Call, Value
from .lowerings import NoForm
from .lowerings.builder import ALONG, AXES
from .lowerings.index import takes_all
from .lowerings.shape import VIEWS

ATTENTION = "aten.scaled_dot_product_attention.default"  # along its last two axes


@dataclass(frozen=True)
class NonLeadingBatch:
    """``value``: the tensor per sample, batch axis of one number included.  ``call``: the tensor itself.

    ``inner_extent``: how many numbers of a sample stand beside each other in the axis that holds the samples.
    """

    value: Value
    call: Call
    inner_extent: int = 1


def per_sample(op: str, named: SimpleNamespace, rank: int, batch: tuple[int, ...]) -> None:
    """Count the axes of a call's arguments from one on.

    ``named``: the arguments by name, changed in place; ``rank``: of the tensor that its axes are counted in; ``batch``:
    where the tensors that it reads have the batch.  Raises `NoForm` where the op is unknown, or works along the batch.
    """
    if op == ATTENTION:
        if any(axis >= rank - 2 for axis in batch):
            raise NoForm("it attends to other samples")
        return
    if op in VIEWS:
        return
    if op not in AXES and op not in ALONG:
        raise NoForm(f"{op} has no form where the batch is not axis 0")
    for name in AXES.get(op, ()):
        setattr(named, name, counted(getattr(named, name), rank))
    if "dims" in AXES.get(op, ()):
        named.dims = (0, *named.dims)
    if op in ALONG:
        axes = counted(getattr(named, ALONG[op]), rank)
        along = axes is None or {a - 1 for a in ((axes,) if isinstance(axes, int) else axes)} & set(batch)
        if along and not (op == "aten.slice.Tensor" and takes_all(named)):
            raise NoForm("it works along the batch axis")
        setattr(named, ALONG[op], axes)


def inner_extent(op: str, sources: Sequence[tuple[int, int]], times: int, after: Sequence[int]) -> int:
    """How many numbers of a sample stand beside each other in the axis that holds the samples, in an op's result.

    ``sources``: the same number, and that of the elements after the axis, of each tensor that the op reads; ``times``:
    the numbers of a sample in the result's axis; ``after``: the sizes of the axes after that.  Raises `NoForm` where
    tensors or a view have the samples in different orders.
    """
    if op not in VIEWS:
        extents = {inner for inner, _ in sources}
        if len(extents) != 1:
            raise NoForm("it joins samples in different orders")
        return extents.pop()
    step = math.prod(sources[0])  # from one sample to the next; a view leaves it as it is
    inner, rest = divmod(step, max(math.prod(after), 1))
    if rest or not inner or times % inner:
        raise NoForm("it views the samples in another order")
    return inner


def counted(axes: Any, rank: int) -> Any:
    """An axis, or several, counted from one on."""
    if isinstance(axes, int):
        return axes % rank + 1
    return tuple(axis % rank + 1 for axis in axes) if axes is not None else None
