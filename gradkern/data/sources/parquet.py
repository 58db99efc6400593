"""Parquet files as a source."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...util.options import BadValue
from .columns import as_tuple, pick
from .registry import Source, register


@register
class Parquet(Source):
    """Parquet files in the order of their names; a column of (nested) lists gives samples of that shape."""

    suffixes = (".parquet",)

    def __init__(self, paths: Sequence[str], columns: Any) -> None:
        import pyarrow.parquet as parquet

        self.paths, self.columns = list(paths), columns
        self.groups: list[tuple[int, int, int, str]] = []  # first row, rows, group, path
        first = 0
        for path in self.paths:
            meta = parquet.ParquetFile(path).metadata
            for g in range(meta.num_row_groups):
                self.groups.append((first, meta.row_group(g).num_rows, g, path))
                first += meta.row_group(g).num_rows
        self._kept: tuple[int, Any] | None = None
        super().__init__(first)

    @classmethod
    def accepts_path(cls, path: str) -> bool:
        in_folder = Path(path).is_dir() and any(Path(path).glob("*.parquet"))
        return in_folder or "*" in path or super().accepts_path(path)

    @classmethod
    def at(cls, path: str, name: str | None, columns: Any) -> Source:
        paths = sorted(glob.glob(f"{path}/*.parquet" if Path(path).is_dir() else path))
        if not paths:
            raise BadValue(f"source: there are no parquet files at {path!r}.")
        return cls(paths, name or columns)

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        import pyarrow as arrow

        parts = []
        for i, (first, count, _, _) in enumerate(self.groups):
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                parts.append(self._group(i).slice(low - first, high - low))
        table = arrow.concat_tables(parts)
        return pick({name: _nested(table.column(name)) for name in table.column_names}, self.columns)

    def _group(self, i: int) -> Any:
        """One row group; the last one is kept, because chunks are read in order."""
        if self._kept is None or self._kept[0] != i:
            import pyarrow.parquet as parquet

            _, _, group, path = self.groups[i]
            wanted = None if self.columns is None else list(as_tuple(self.columns))
            self._kept = (i, parquet.ParquetFile(path).read_row_group(group, columns=wanted))
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


def _nested(column: Any) -> np.ndarray:
    """A parquet column as ``[n, ...]``: list columns are flattened down to their numbers, all of one length."""
    import pyarrow as arrow

    array = column.combine_chunks()
    if isinstance(array, arrow.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else arrow.concat_arrays(array.chunks)
    kinds = arrow.types
    shape = [len(array)]
    while kinds.is_list(array.type) or kinds.is_large_list(array.type) or kinds.is_fixed_size_list(array.type):
        outer, array = len(array), array.flatten()
        if outer and len(array) % outer:
            raise BadValue(f"source: a parquet column of lists of different lengths, expected {outer} equal ones.")
        shape.append(len(array) // max(outer, 1))
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)
