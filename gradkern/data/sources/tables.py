"""Tables as sources: DataFrames, Arrow tables, and ``.csv``; and several files of one kind as one source."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...util.options import BadValue
from .arrays import package_of
from .columns import Rows, as_tuple
from .registry import Source, open_source, register


@register
class Table(Source):
    """A table whose columns of numbers are the features of one input ``[N, columns]``, in the order of ``columns``."""

    about = "a pandas or polars DataFrame, an Arrow table"
    suffixes = (".csv", ".tsv")

    def __init__(self, frame: Any, columns: Any) -> None:
        names = list(frame.columns if columns is None else as_tuple(columns))
        unknown = [name for name in names if name not in frame.columns]
        if unknown:
            raise BadValue(f"source: got the column {unknown[0]!r}, but the table has {list(frame.columns)}.")
        for name in names:
            if getattr(frame[name].dtype, "kind", "O") not in "biuf":
                raise BadValue(
                    f"source: the column {name!r} holds {frame[name].dtype}, expected numbers. Say which columns are "
                    "features: columns=('name', ...)."
                )
        super().__init__(len(frame))
        self.frame = frame[names]

    @classmethod
    def accepts(cls, data: Any) -> bool:
        return package_of(data) in ("pandas", "polars", "pyarrow") and hasattr(data, "columns")

    @classmethod
    def of(cls, data: Any, columns: Any) -> Source:
        return cls(data if package_of(data) == "pandas" else data.to_pandas(), columns)

    @classmethod
    def at(cls, path: str, name: str | None, columns: Any) -> Source:
        try:
            import pandas
        except ImportError:
            raise BadValue("source: .csv takes pandas: pip install pandas. Or save the numbers as .npy.") from None
        separator = "\t" if Path(path).suffix.lower() == ".tsv" else ","
        frame = pandas.read_csv(path, sep=separator)
        if all(_is_number(column) for column in frame.columns):  # there is no header
            frame = pandas.read_csv(path, sep=separator, header=None)
        return cls(frame, columns if name is None else tuple(name.split(",")))

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        part = self.frame.iloc[start:stop]
        return (torch.from_numpy(np.stack([part[name].to_numpy() for name in part.columns], axis=1)),)


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@register
class Parts(Source):
    """Files of one kind, in the order of their names, one after the other: ``parts/*.npy``."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts, self.ends = list(parts), list(accumulate(part.samples for part in parts))
        super().__init__(self.ends[-1])

    @classmethod
    def accepts_path(cls, path: str) -> bool:
        return "*" in path and "://" not in path and not path.endswith((".parquet", "*"))

    @classmethod
    def at(cls, path: str, name: str | None, columns: Any) -> Source:
        paths = sorted(glob.glob(path))
        if not paths:
            raise BadValue(f"source: there are no files at {path!r}.")
        return cls([open_source(p if name is None else f"{p}:{name}", columns) for p in paths])

    def rows(self, start: int, stop: int) -> tuple[Rows, ...]:
        pieces = []
        for i in range(bisect_right(self.ends, start), len(self.parts)):
            first = self.ends[i] - self.parts[i].samples
            if first >= stop:
                break
            pieces.append(self.parts[i].read(max(start - first, 0), min(stop - first, self.parts[i].samples)))
        shapes = [[list(x.shape[1:]) for x in piece] for piece in pieces]
        if any(shape != shapes[0] for shape in shapes):
            raise BadValue(f"source: files hold samples of different shapes, {shapes[0]} and others.")
        return tuple(torch.cat(column) for column in zip(*pieces, strict=True))
