"""Picks the fields of a sample that are the model's inputs, and turns fields into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...util.options import BadType, BadValue


class NotNumbers(BadType):
    """Rows that cannot be turned into numbers; the caller adds which sample it is."""


def as_tuple(columns: Any) -> tuple[Any, ...]:
    return tuple(columns) if isinstance(columns, (tuple, list)) else (columns,)


Rows = Tensor | list[Tensor]  # [n, *in]; a list of n tensors [*in] where these have different shapes


def pick(fields: Any, columns: Any) -> tuple[Rows, ...]:
    """The fields that are the model's inputs: by name or index, else the first of a tuple, the only one of a dict.

    Columns with one number per sample, floating ones among them, are the features of one input ``[n, columns]``.
    """
    if isinstance(fields, dict):
        if columns is None:
            floating = [k for k, v in fields.items() if len(fields) == 1 or _is_floating(v)]
            if len(floating) != 1:
                raise BadValue(
                    f"source: its samples have the columns {list(fields)}, of which {floating or 'none'} hold floating "
                    "numbers. Say which are the model's inputs: columns=('name', ...)."
                )
            columns = floating
        if any(c not in fields for c in as_tuple(columns)):
            raise BadValue(f"source: got columns={columns!r}, but the samples have {list(fields)}.")
        picked = [to_tensor(fields[c]) for c in as_tuple(columns)]
        numbers = [x for x in picked if isinstance(x, Tensor) and x.dim() == 1]
        if len(numbers) == len(picked) and any(x.is_floating_point() for x in numbers):
            return (torch.stack([x.to(_common(numbers)) for x in numbers], dim=1),)
        return tuple(picked)
    if isinstance(fields, (tuple, list)):
        chosen = as_tuple(0 if columns is None else columns)
        if any(not isinstance(c, int) or not -len(fields) <= c < len(fields) for c in chosen):
            raise BadValue(
                f"source: got columns={columns!r}, but a sample is {len(fields)} fields: 0 … are their names."
            )
        return tuple(to_tensor(fields[c]) for c in chosen)
    return (to_tensor(fields),)


def _common(columns: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds the numbers of all columns, as numpy finds it (whole numbers may not fit into a float32)."""
    kinds = [x.dtype for x in columns]
    if torch.bfloat16 in kinds:
        return reduce(torch.promote_types, kinds)
    return torch.from_numpy(np.zeros(0, np.result_type(*(torch.zeros(0, dtype=k).numpy() for k in kinds)))).dtype


class UnequalRows:
    """Samples of different shapes, which are an error where some are read together without padding."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows, self.shape = rows, (len(rows),)

    def __getitem__(self, which: slice) -> Any:
        return self.rows[which]


def array_of(data: Any) -> Any:
    """Nested lists of numbers as an array, or as `UnequalRows`."""
    try:
        return np.asarray(data)
    except ValueError:
        return UnequalRows(data)


def members(group: Any, columns: Any) -> list[Any]:
    """The arrays of a group or dict with the given names, or its only array.  Others are not read."""
    if columns is None:
        names = (
            list(group)
            if len(group) == 1
            else [k for k in group if hasattr(group[k], "shape") or isinstance(group[k], list)]
        )
        if len(names) != 1:
            raise BadValue(f"source: the group holds {names or 'no arrays'}. Say which: columns=('name', ...).")
        columns = names
    if any(c not in group for c in as_tuple(columns)):
        raise BadValue(f"source: got columns={columns!r}, but the group holds {list(group)}.")
    arrays = [group[c] for c in as_tuple(columns)]
    return [array_of(x) if isinstance(x, list) else x for x in arrays]


def _is_floating(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    if isinstance(value, float):
        return True
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
        array = _array(x)  # a copy: the data is read in this thread, and torch needs writable memory
    except ValueError:  # rows of different shapes
        return [_row(row) for row in x]
    if array.dtype == object and array.ndim == 1 and all(hasattr(row, "__len__") for row in array):
        return one_or_list([_row(row) for row in array])
    return _tensor(array)


def _row(row: Any) -> Tensor:
    try:
        return _tensor(_array(row))
    except ValueError:
        raise NotNumbers("source: got lists of different lengths in one sample, expected one shape.") from None


def _array(x: Any) -> np.ndarray:
    if np.ma.is_masked(x):
        raise NotNumbers("source: got a masked array, and the mask would be lost. Fill it: array.filled(value).")
    return np.array(x)


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise NotNumbers(
            f"source: got an array of {array.dtype}, expected numbers that torch has: x.astype('float64')?"
        ) from error


def one_or_list(rows: list[Tensor]) -> Rows:
    """The rows as one tensor, if they have one shape."""
    return torch.stack(rows) if rows and all(r.shape == rows[0].shape for r in rows) else rows


def stack_rows(rows: Rows, start: int) -> Tensor:
    """The rows as one tensor.  Raises `BadValue` where they have different shapes, which names the first two."""
    if isinstance(rows, Tensor):
        return rows
    shapes = [list(r.shape) for r in rows]
    other = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
    raise BadValue(
        f"source: the samples have different shapes: sample {start} has {shapes[0]}, sample {start + other} has "
        f"{shapes[other]}. All samples of a run must be alike: pad or crop them before."
    )
