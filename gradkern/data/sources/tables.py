"""Tables as sources: DataFrames, Arrow tables, and ``.csv``; and several files of one kind as one source."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...util.options import BadValue
from . import csv
from .arrays import package_of
from .columns import Rows, as_tuple, pick
from .parquet import Parquet, refuse_twice
from .registry import Source, check_rows, is_pattern, matching, open_source, register_source


@register_source
class Table(Source):
    """A table whose columns of numbers are the features of one input ``[N, columns]``, in the order of ``columns``.

    A column of lists or arrays is a separate input.
    """

    about = "a pandas DataFrame"
    suffixes = (".csv", ".tsv")

    def __init__(self, frame: Any, columns: Any) -> None:
        present = list(frame.columns)
        refuse_twice(present)
        names = present if columns is None else list(as_tuple(columns))
        unknown = [name for name in names if name not in frame.columns]
        if unknown:
            raise BadValue(f"source: got the column {unknown[0]!r}, but the table has {present}.")
        super().__init__(len(frame))
        if not names:
            raise BadValue("source: the table has no columns.")
        kinds = {name: getattr(dtype, "kind", "O") for name, dtype in frame.dtypes.items()}
        lists = {name for name in names if kinds[name] == "O" and _holds_lists(frame[name])}
        for name in names:
            if name not in lists and kinds[name] not in "biuf":
                raise BadValue(
                    f"source: the column {name!r} holds {frame[name].dtype}{_first_text(frame[name])}, expected "
                    "numbers. Say which columns are features: columns=('name', ...)."
                )
        self.frame, self.names = frame[names], tuple(names)
        self.inputs = columns if lists else None  # else all columns are one input
        self.dtypes = {
            name: dtype if isinstance(dtype, np.dtype) and dtype.kind != "O" else None if name in lists
            else _dtype_of(frame[name]) for name, dtype in self.frame.dtypes.items()
        }  # fmt: skip

    @classmethod
    def accepts(cls, data: Any) -> bool:
        return package_of(data) == "pandas" and hasattr(data, "columns")

    @classmethod
    def of(cls, data: Any, columns: Any) -> Source:
        return cls(data, columns)

    @classmethod
    def at(cls, path: str, name: str | None, columns: Any) -> Source:
        columns = columns if name is None else tuple(name.split(","))
        return cls(csv.read(path, columns is None), columns)

    def ordered_as(self, names: Sequence[Any], path: str, first: str) -> Table:
        """This table with its columns in the order of another file's.  Raises `BadValue` if it has others."""
        if set(names) != set(self.names):
            other = min({*names} ^ {*self.names}, key=str)
            raise BadValue(f"source: {first} and {path} have other columns ({other!r} is in one of them only).")
        return Table(self.frame[list(names)], self.inputs)

    def rows(self, start: int, stop: int) -> tuple[Rows, ...]:
        part = self.frame.iloc[start:stop]
        numbers = [dtype for dtype in self.dtypes.values() if dtype is not None]
        if len(numbers) < len(self.names):
            return pick({name: _numbers(part[name], dtype) for name, dtype in self.dtypes.items()}, self.inputs)
        whole = np.result_type(*set(numbers))
        if all(isinstance(dtype, np.dtype) for dtype in part.dtypes):
            return (torch.from_numpy(np.ascontiguousarray(part.to_numpy(whole))),)
        return (torch.from_numpy(np.stack([_numbers(part[name], whole) for name in self.names], axis=1)),)


def column(spec: str) -> Any:
    """A column of names, of any type, from ``table.csv:name`` or ``table.parquet:name``."""
    path, _, name = os.path.expanduser(spec).rpartition(":")
    suffix = Path(path).suffix.lower()
    if suffix not in (*Table.suffixes, ".parquet") or not Path(path).exists():
        raise BadValue(f"ids: got {spec!r}, expected a .txt file, an .npy, or table.csv:column of a file that exists.")
    frame = csv.read(path, text=name) if suffix in Table.suffixes else _parquet(path)
    if name not in frame.columns:
        raise BadValue(f"ids: {path} has no column {name!r}, it has {list(frame.columns)}.")
    return frame[name].to_numpy()


def _parquet(path: str) -> Any:
    import pandas

    return pandas.read_parquet(path)


def _holds_lists(column: Any) -> bool:
    return column.dtype == object and isinstance(next(iter(column.dropna()), None), (list, tuple, np.ndarray, Tensor))


def _dtype_of(column: Any) -> np.dtype:
    """The numpy dtype that holds all of a column's numbers; a missing whole number is NaN, so the dtype is floating."""
    kept = column.dropna()
    dtype = kept.iloc[:1].to_numpy().dtype
    return dtype if len(kept) == len(column) or dtype.kind == "f" else np.dtype(np.float64)


def _numbers(column: Any, dtype: np.dtype | None) -> np.ndarray:
    return column.to_numpy() if dtype is None else column.to_numpy(dtype, na_value=np.nan if dtype.kind == "f" else 0)


def _first_text(column: Any) -> str:
    """Where the first value is that is not a number, in a column that also has numbers."""
    import pandas

    text = pandas.to_numeric(column, errors="coerce").isna() & column.notna() if column.dtype.kind == "O" else None
    if text is None or text.all() or not text.any():
        return ""
    sample = int(text.to_numpy().argmax())
    return f" ({column.iloc[sample]!r} in sample {sample})"


@register_source
class Parts(Source):
    """Files of one kind, in the order of their names, one after the other: ``parts/*.npy``."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts, self.ends = list(parts), list(accumulate(part.samples for part in parts))
        super().__init__(self.ends[-1])

    @classmethod
    def accepts_path(cls, path: str) -> bool:
        return is_pattern(path) and not Parquet.accepts_path(path)

    @classmethod
    def at(cls, path: str, name: str | None, columns: Any) -> Source:
        paths = matching(path)
        if not paths:
            raise BadValue(f"source: there are no files at {path!r}.")
        parts: list[Source] = []
        for p in paths:
            part = open_source(p if name is None else f"{p}:{name}", columns)
            if parts and isinstance(part, Table) and isinstance(parts[0], Table):
                part = part.ordered_as(parts[0].names, p, paths[0])
            parts.append(part)
        tables = [part for part in parts if isinstance(part, Table)]
        for column in tables[0].names if tables else ():  # whole numbers in one file may be fractions in the next
            dtypes = [dtype for part in tables if (dtype := part.dtypes[column]) is not None]
            if len(dtypes) == len(tables):
                for part in tables:
                    part.dtypes[column] = np.result_type(*dtypes)
        return cls(parts)

    def rows(self, start: int, stop: int) -> tuple[Rows, ...]:
        pieces = []
        for i in range(bisect_right(self.ends, start), len(self.parts)):
            first = self.ends[i] - self.parts[i].samples
            if first >= stop:
                break
            low, high = max(start - first, 0), min(stop - first, self.parts[i].samples)
            pieces.append(self.parts[i].rows(low, high))
            check_rows(pieces[-1], start, start + high - low)
        if len({len(piece) for piece in pieces}) > 1:
            raise BadValue("source: the files hold different numbers of inputs.")
        return tuple(_together(column) for column in zip(*pieces, strict=True))


def _together(pieces: Sequence[Rows]) -> Rows:
    """The rows of several files together, as a list if their shapes differ."""
    tensors = [x for x in pieces if isinstance(x, Tensor)]
    if len(tensors) == len(pieces) and all(x.shape[1:] == tensors[0].shape[1:] for x in tensors):
        return torch.cat(tensors)
    return [row for piece in pieces for row in piece]
