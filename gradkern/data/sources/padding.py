"""Pads samples of different shapes to one shape, on request, and remembers which of their numbers are data."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...util.options import BadValue
from .columns import Rows

SCANNED = 256  # samples per read while shapes are collected

Pad = float | tuple[float, int]  # the number, and the length (else that of the longest sample)

#: By name of an argument that a model takes after its inputs: what it gets.
TAKEN = {
    **dict.fromkeys(("lengths", "length", "lens", "seq_lens"), "lengths"),
    **dict.fromkeys(("mask", "attention_mask"), "mask"),
    **dict.fromkeys(("padding_mask", "key_padding_mask", "src_key_padding_mask"), "padding_mask"),
}


class Ragged(Protocol):
    """The part of a source that padding needs."""

    samples: int

    def checked(self, start: int, stop: int) -> tuple[Rows, ...]: ...


@dataclass(frozen=True)
class Padding:
    """How the samples of a source are padded, at the end of every axis in which they differ.

    ``shapes``: ``[*in]`` of each input, padded.  ``lengths`` int64 ``[N, A]``: the samples' own lengths in the A axes
    in which they differ, which ``axes`` names by input and axis.  ``gives``: what the model gets after its inputs:
    ``lengths`` int64 ``[n]``, ``mask`` bool ``[n, L]`` (True for data), or ``padding_mask`` (True for padding).
    """

    value: float
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[int, int], ...]
    lengths: Tensor
    gives: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Ragged, pad: Pad) -> Padding:
        """Look at the shapes of all samples."""
        value, length = read_pad(pad)
        shapes = _shapes(source)  # [N, dims] per input
        largest = [s.max(0).values for s in shapes]
        axes = [(k, a) for k, s in enumerate(shapes) for a in range(s.shape[1]) if (s[:, a] != s[0, a]).any()]
        if not axes and length is not None and shapes[0].shape[1] == 1:
            axes = [(0, 0)]
        lengths = torch.stack([shapes[k][:, a] for k, a in axes], dim=1) if axes else torch.zeros(source.samples, 0)
        if length is not None:
            if not axes:
                raise BadValue(f"pad: got the length {length}, but all samples have one shape. Leave pad= out.")
            longer = (lengths > length).any(1).nonzero()[:, 0]
            if len(longer):
                raise BadValue(
                    f"pad: got the length {length}, but sample {int(longer[0])} is "
                    f"{int(lengths[longer[0]].max())} long, and {len(longer) - 1} others are longer, too. Crop them, "
                    "or give a greater length."
                )
            for k, a in axes:
                largest[k][a] = length
        return cls(value, tuple(tuple(s.tolist()) for s in largest), tuple(axes), lengths.long())

    def padded(self, given: Sequence[Rows], start: int) -> tuple[Tensor, ...]:
        """Padded rows from sample ``start`` on, one ``[n, *in]`` per input, and the model's other arguments."""
        return (*(self._one(rows, shape) for rows, shape in zip(given, self.shapes, strict=True)),
                *self._more(start, start + len(given[0])))  # fmt: skip

    def _one(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        if isinstance(rows, Tensor) and rows.shape[1:] == shape:
            return rows
        padded = torch.full((len(rows), *shape), self.value).to(rows[0].dtype)
        for row, place in zip(rows, padded, strict=True):
            place[tuple(slice(0, size) for size in row.shape)] = row
        return padded

    def _more(self, start: int, stop: int) -> list[Tensor]:
        """The tensors that ``gives`` names, of these samples."""
        if not self.gives:
            return []
        if len(self.axes) > 1:
            raise BadValue(
                f"pad: the model takes {self.gives[0]!r}, but the samples differ in {len(self.axes)} axes, so there is "
                "no one length. Give such arguments as further inputs of the source."
            )
        k, a = self.axes[0] if self.axes else (0, 0)
        size = self.shapes[k][a]
        lengths = self.lengths[start:stop, 0] if self.axes else torch.full((stop - start,), size)
        mask = torch.arange(size) < lengths[:, None]
        named = {"lengths": lengths, "mask": mask, "padding_mask": ~mask}
        return [named[name] for name in self.gives]

    def mask(self, start: int, stop: int, of: int) -> Tensor:
        """Which numbers of the samples ``start:stop`` are data, bool ``[n, *in]``, for the input with index ``of``."""
        return mask_of(self.lengths[start:stop], self.axes, self.shapes[of], of)


def mask_of(lengths: Tensor, axes: Sequence[Sequence[int]], shape: Sequence[int], of: int) -> Tensor:
    """Which numbers of samples ``[*shape]`` are data, bool ``[n, *shape]``; ``lengths`` ``[n, A]`` as in `Padding`."""
    mask = torch.ones(len(lengths), *shape, dtype=torch.bool)
    for column, (k, a) in enumerate(axes):
        if k == of:
            inside = torch.arange(shape[a]) < lengths[:, column, None]  # [n, L]
            mask &= inside.view(len(lengths), *(shape[a] if i == a else 1 for i in range(len(shape))))
    return mask


def read_pad(pad: Any) -> tuple[float, int | None]:
    """The number to pad with, and the length.  Raises `BadValue` for anything else."""
    value, length = pad if isinstance(pad, (tuple, list)) and len(pad) == 2 else (pad, None)
    numbers = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numbers or not (length is None or (isinstance(length, int) and not isinstance(length, bool) and length > 0)):
        raise BadValue(f"pad: got {pad!r}, expected a number, or a number and a length, such as 0.0 or (0.0, 500).")
    return float(value), length


def _shapes(source: Ragged) -> list[Tensor]:
    """The shapes of all samples, int64 ``[N, dims]`` per input."""
    per_input: list[list[list[int]]] = []
    for start in range(0, source.samples, SCANNED):
        stop = min(start + SCANNED, source.samples)
        given = source.checked(start, stop)
        per_input = per_input or [[] for _ in given]
        for shapes, rows in zip(per_input, given, strict=True):
            shapes += [list(row.shape) for row in rows]
            other = next((i for i in range(start, stop) if len(shapes[i]) != len(shapes[0])), None)
            if other is not None:
                raise BadValue(
                    f"pad: sample 0 has the shape {shapes[0]}, and sample {other} {shapes[other]}. Only lengths can be "
                    "padded, not axes."
                )
    return [torch.tensor(shapes, dtype=torch.int64).view(source.samples, -1) for shapes in per_input]


def taken_by(model: Any, inputs: int) -> tuple[str, ...]:
    """The arguments in `TAKEN` that a model's ``forward`` takes after its ``inputs`` inputs."""
    try:
        names = list(inspect.signature(getattr(model, "forward", model)).parameters)[inputs:]
    except (TypeError, ValueError):
        return ()
    taken: list[str] = []
    for name in names:
        if name not in TAKEN:
            break
        taken.append(TAKEN[name])
    return tuple(taken)
