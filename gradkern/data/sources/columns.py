"""Picks the fields of a sample that are the model's inputs, and turns fields into tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...util.options import BadType, BadValue


def as_tuple(columns: Any) -> tuple[Any, ...]:
    return tuple(columns) if isinstance(columns, (tuple, list)) else (columns,)


Rows = Tensor | list[Tensor]  # [n, *in]; a list of n tensors [*in] where these have different shapes


def pick(fields: Any, columns: Any) -> tuple[Rows, ...]:
    """The fields that are the model's inputs: by name or index, else the first of a tuple, the only one of a dict."""
    if isinstance(fields, dict):
        if columns is None:
            floating = [k for k, v in fields.items() if _is_floating(v)]
            if len(floating) != 1:
                raise BadValue(
                    f"source: its samples have the columns {list(fields)}, of which {floating or 'none'} hold floating "
                    "numbers. Say which are the model's inputs: columns=('name', ...)."
                )
            columns = floating
        if any(c not in fields for c in as_tuple(columns)):
            raise BadValue(f"source: got columns={columns!r}, but the samples have {list(fields)}.")
        return tuple(to_tensor(fields[c]) for c in as_tuple(columns))
    if isinstance(fields, (tuple, list)):
        return tuple(to_tensor(fields[c]) for c in as_tuple(0 if columns is None else columns))
    return (to_tensor(fields),)


def members(group: Any, columns: Any) -> list[Any]:
    """Arrays of a group or dict by name; without names, its only array.  Others are not read."""
    if columns is None:
        names = list(group) if len(group) == 1 else [k for k in group if hasattr(group[k], "shape")]
        if len(names) != 1:
            raise BadValue(f"source: the group holds {names or 'no arrays'}. Say which: columns=('name', ...).")
        columns = names
    if any(c not in group for c in as_tuple(columns)):
        raise BadValue(f"source: got columns={columns!r}, but the group holds {list(group)}.")
    return [group[c] for c in as_tuple(columns)]


def _is_floating(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    if isinstance(value, list):
        return any(_is_floating(v) for v in value)
    return isinstance(value, np.ndarray) and (value.dtype.kind == "f" or any(map(_is_floating, _objects(value))))


def _objects(array: np.ndarray) -> list[Any]:
    """The items of an array of objects (rows of different shapes); none for numbers."""
    return list(array.flat) if array.dtype == object else []


def to_tensor(x: Any) -> Rows:
    """A CPU tensor that owns its memory or shares the caller's tensor; data on disk is read here.

    Rows of different shapes come as a list of tensors.
    """
    if isinstance(x, Tensor):
        return list(x.detach().cpu().unbind()) if x.is_nested else x.detach().cpu()
    try:
        array = np.array(x)  # a copy: the data is read in this thread, and torch needs writable memory
    except ValueError:  # rows of different shapes
        return [_tensor(np.asarray(row)) for row in x]
    if array.dtype == object and array.ndim == 1 and all(hasattr(row, "__len__") for row in array):
        return one_or_list([_tensor(np.array(row)) for row in array])
    return _tensor(array)


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise BadType(f"source: got an array of {array.dtype}, expected numbers that torch has.") from error


def one_or_list(rows: list[Tensor]) -> Rows:
    """The rows as one tensor, if they have one shape."""
    return torch.stack(rows) if rows and all(r.shape == rows[0].shape for r in rows) else rows


def stacked(rows: Rows, start: int) -> Tensor:
    """The rows as one tensor.  Raises `BadValue` where they have different shapes, which names the first two."""
    if isinstance(rows, Tensor):
        return rows
    shapes = [list(r.shape) for r in rows]
    other = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
    raise BadValue(
        f"source: the samples have different shapes: sample {start} has {shapes[0]}, sample {start + other} has "
        f"{shapes[other]}. All samples of a run must be alike: pad or crop them before."
    )
