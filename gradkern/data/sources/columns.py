"""Picks the fields of a sample that are the model's inputs, and turns fields into tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...util.options import BadType, BadValue


def as_tuple(columns: Any) -> tuple[Any, ...]:
    return tuple(columns) if isinstance(columns, (tuple, list)) else (columns,)


def pick(fields: Any, columns: Any) -> tuple[Tensor, ...]:
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
    """Arrays of a group or dict by name; without names, its only array."""
    names = [k for k in group if hasattr(group[k], "shape")]
    if columns is None:
        if len(names) != 1:
            raise BadValue(f"source: the group holds {names or 'no arrays'}. Say which: columns=('name', ...).")
        columns = names
    if any(c not in names for c in as_tuple(columns)):
        raise BadValue(f"source: got columns={columns!r}, but the group holds {names}.")
    return [group[c] for c in as_tuple(columns)]


def _is_floating(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def to_tensor(x: Any) -> Tensor:
    """A CPU tensor that owns its memory or shares the caller's tensor; data on disk is read here."""
    if isinstance(x, Tensor):
        return x.detach().cpu()
    array = np.array(x)  # a copy: the data is read in this thread, and torch needs writable memory
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise BadType(f"source: got an array of {array.dtype}, expected numbers that torch has.") from error
