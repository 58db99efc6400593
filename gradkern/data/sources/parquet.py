"""Parquet files, and Arrow tables with lists, as sources."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...util.options import BadValue
from .arrays import package_of
from .columns import Rows, as_tuple, pick
from .registry import Source, is_pattern, matching, one_line, open_source, register_source


@register_source
class Parquet(Source):
    """Parquet files in the order of their names; a column of (nested) lists gives samples of that shape."""

    suffixes = (".parquet",)

    def __init__(self, paths: Sequence[str], columns: Any) -> None:
        import pyarrow.parquet as parquet

        self.paths, self.columns = list(paths), columns
        self.groups: list[tuple[int, int, int, str]] = []  # first row, rows, group, path
        first = 0
        self.schema: Any = None
        for path in self.paths:
            file = parquet.ParquetFile(path)
            meta = file.metadata
            self.schema = _common_schema(self.schema, _wanted(file.schema_arrow, columns, path), self.paths[0], path)
            for g in range(meta.num_row_groups):
                self.groups.append((first, meta.row_group(g).num_rows, g, path))
                first += meta.row_group(g).num_rows
        self._kept: tuple[int, Any] | None = None
        super().__init__(first)

    @classmethod
    def accepts_path(cls, path: str) -> bool:
        if Path(path).is_dir() and any(Path(path).glob("*.parquet")):
            return True
        if is_pattern(path):
            return {Path(p).suffix for p in matching(path) or [path]} <= {".parquet", ""}
        return super().accepts_path(path)

    @classmethod
    def at(cls, path: str, name: str | None, columns: Any) -> Source:
        folder = Path(path).is_dir()
        paths = matching(f"{glob.escape(path)}/*.parquet") if folder else matching(path) if is_pattern(path) else [path]
        if not paths:
            raise BadValue(f"source: there are no parquet files at {path!r}.")
        return cls(paths, tuple(name.split(",")) if name and name not in _names(paths[0]) else name or columns)

    def rows(self, start: int, stop: int) -> tuple[Rows, ...]:
        import pyarrow as arrow

        parts = []
        for i, (first, count, _, _) in enumerate(self.groups):
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                parts.append(self._group(i).slice(low - first, high - low))
        fields = _fields(arrow.concat_tables(parts), start)
        wide = all(isinstance(v, np.ndarray) and v.ndim == 1 and v.dtype.kind == "f" for v in fields.values())
        return pick(fields, list(fields) if self.columns is None and wide else self.columns)

    def _group(self, i: int) -> Any:
        """One row group.  The latest one is kept, because chunks are read in order."""
        if self._kept is None or self._kept[0] != i:
            import pyarrow.parquet as parquet

            _, _, group, path = self.groups[i]
            read = parquet.ParquetFile(path).read_row_group(group, columns=self.schema.names).select(self.schema.names)
            self._kept = (i, read if read.schema.equals(self.schema) else read.cast(self.schema))
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


def _names(path: str) -> list[str]:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path).schema_arrow.names


def _wanted(schema: Any, columns: Any, path: str) -> Any:
    """The part of a file's schema that is read: ``columns``, or all but the index that pandas saved."""
    import pyarrow as arrow

    names = schema.names
    refuse_twice(names)
    index = [c for c in (schema.pandas_metadata or {}).get("index_columns", ()) if isinstance(c, str)]
    chosen = [n for n in names if n not in index] if columns is None else list(as_tuple(columns))
    lacking = [c for c in chosen if c not in names]
    if lacking:
        raise BadValue(f"source: got the column {lacking[0]!r}, but {path} has {names}.")
    return arrow.schema([schema.field(c).remove_metadata() for c in chosen])


def _common_schema(schema: Any, other: Any, first: str, path: str) -> Any:
    """The schema whose types hold the columns of all files so far and of one more."""
    import pyarrow as arrow

    if schema is None:
        return other
    if set(schema.names) != set(other.names):
        name = min({*schema.names} ^ {*other.names})
        raise BadValue(f"source: {first} and {path} have other columns ({name!r} is in one of them only).")
    try:
        return arrow.unify_schemas([schema, other], promote_options="permissive")
    except arrow.ArrowException as error:
        raise BadValue(f"source: {first} and {path} have columns of other types ({one_line(error)}).") from error


def refuse_twice(names: Sequence[Any]) -> None:
    seen: set[Any] = set()
    for name in names:
        if name in seen:
            raise BadValue(f"source: the table has several columns named {name!r}. Rename them.")
        seen.add(name)


@register_source
class Arrow(Source):
    """An Arrow table with a column of (nested) lists or tensors; one of numbers alone is a `tables.Table`."""

    about = "a polars DataFrame, an Arrow table or array"

    def __init__(self, table: Any, columns: Any) -> None:
        super().__init__(len(table))
        self.table, self.columns = table, columns

    @classmethod
    def accepts(cls, data: Any) -> bool:
        return hasattr(data, "to_arrow") or (package_of(data) == "pyarrow" and hasattr(data, "__getitem__"))

    @classmethod
    def of(cls, data: Any, columns: Any) -> Source:
        import pyarrow as arrow

        data = data.to_arrow() if hasattr(data, "to_arrow") else data
        if isinstance(data, arrow.RecordBatch):
            data = arrow.Table.from_batches([data])
        table = data if isinstance(data, arrow.Table) else arrow.table({"x": data})
        table = table.select(_wanted(table.schema, columns, "the table").names)
        for i, field in enumerate(table.schema):
            if arrow.types.is_dictionary(field.type):
                table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
        if not any(_is_list(t) or isinstance(t, arrow.BaseExtensionType) for t in table.schema.types):
            return open_source(table.to_pandas(), columns)
        return cls(table, columns)

    def rows(self, start: int, stop: int) -> tuple[Rows, ...]:
        return pick(_fields(self.table.slice(start, stop - start), start), self.columns)


def _fields(table: Any, first: int) -> dict[str, Any]:
    """The columns of a table whose first row is the sample ``first``, as `_nested` gives them."""
    return {name: _nested(table.column(name), name, first) for name in table.column_names}


def _nested(column: Any, name: str, first: int) -> np.ndarray | list[Tensor]:
    """A column of (nested) lists as ``[n, ...]``; a list of n tensors where the lists have different lengths.

    Raises `BadValue` for missing values, which names the first samples that lack them (counted from ``first``).
    """
    import pyarrow as arrow

    array = column.combine_chunks()
    if isinstance(array, arrow.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else arrow.concat_arrays(array.chunks)
    if hasattr(array, "to_numpy_ndarray"):  # tensors of a fixed shape
        return array.to_numpy_ndarray()
    shape, whole = [len(array)], array
    owner = np.arange(first, first + len(array))  # the sample that an element belongs to
    while _is_list(array.type):
        _refuse_missing(array, name, owner)
        lengths = np.asarray(array.value_lengths())
        if len(lengths) and (lengths != lengths[0]).any():
            return [_one(row, name, int(i)) for row, i in zip(whole, range(first, first + len(whole)), strict=True)]
        array, owner = array.flatten(), np.repeat(owner, lengths)
        shape.append(int(lengths[0]) if len(lengths) else 0)
    if arrow.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not arrow.types.is_floating(array.type):  # in floating columns, a missing number is NaN
        _refuse_missing(array, name, owner)
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _is_list(kind: Any) -> bool:
    import pyarrow as arrow

    named = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(arrow.types, f"is_{name}")(kind) for name in named if hasattr(arrow.types, f"is_{name}"))


def _refuse_missing(array: Any, name: str, owner: np.ndarray) -> None:
    if array.null_count:
        missing = np.asarray(array.is_null())
        samples = ", ".join(map(str, np.unique(owner[missing])[:5]))
        raise BadValue(f"source: the column {name!r} has no value for some samples (the first: {samples}).")


def _one(row: Any, name: str, sample: int) -> Tensor:
    """One sample of a column whose samples have different shapes."""
    try:
        return torch.from_numpy(np.array(row.as_py()))
    except (ValueError, TypeError):
        raise BadValue(f"source: sample {sample} of the column {name!r} holds lists of different lengths.") from None
