"""Where samples come from: every kind of source as rows ``read(start, stop)`` of CPU tensors.

A source has a length and random access by ranges, because a run that resumes or is sharded must read the samples of
one chunk alone.  Streams without either are refused, with what to do.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate

from ..util.options import BadType, BadValue

Span = tuple[int, int]
ACCEPTED = (
    "a tensor, a numpy array or memmap, a zarr array or group, an h5py dataset or group, a torch Dataset or "
    "DataLoader, a Hugging Face dataset, a tuple of arrays (one per input of the model), or a path to "
    ".npy, .npz, .pt, .safetensors, .zarr, .h5 or .parquet"
)


class Source:
    """Samples in a fixed order.  ``read(a, b)`` gives one tensor ``[b - a, *in]`` per input of the model."""

    kind = "source"

    def __init__(self, samples: int) -> None:
        if samples < 1:
            raise BadValue("source: got no samples, expected at least one.")
        self.samples = samples
        self.cast: torch.dtype | None = None

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def read(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """The samples ``start:stop``, floating inputs and bytes cast where a dtype was asked for."""
        found = self.rows(start, stop)
        for x in found:
            if x.shape[:1] != (stop - start,):
                raise BadValue(
                    f"source: reading samples {start} … {stop - 1} gave shape {list(x.shape)}, expected "
                    f"[{stop - start}, ...]: one row per sample."
                )
        if self.cast is None:
            return found
        return tuple(x.to(self.cast) if x.is_floating_point() or x.dtype == torch.uint8 else x for x in found)

    def stream(self, spans: Sequence[Span]) -> Iterator[tuple[Tensor, ...]]:
        """`read` of one span after the other."""
        for start, stop in spans:
            yield self.read(start, stop)


# ---------------------------------------------------------------------------------------------------------------
# Arrays


class Arrays(Source):
    """Anything with ``shape`` and slicing: tensors, numpy, memory maps, zarr, HDF5.  One per input of the model."""

    kind = "arrays"

    def __init__(self, arrays: Sequence[Any]) -> None:
        for i, array in enumerate(arrays):
            if not getattr(array, "shape", ()):
                raise BadType(f"source: number {i} is {type(array).__name__} without axes, expected [N, ...].")
            if array.shape[0] != arrays[0].shape[0]:
                raise BadValue(
                    f"source: number {i} has {array.shape[0]} samples and number 0 has {arrays[0].shape[0]}, expected "
                    "as many."
                )
        super().__init__(arrays[0].shape[0])
        self.arrays = list(arrays)

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        return tuple(_tensor(a[start:stop]) for a in self.arrays)

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps and HDF5 travel to other processes as the place to open them again, not as their content."""
        return self.__dict__ | {"arrays": [_place_of(a) for a in self.arrays]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = [a() if isinstance(a, _Place) else a for a in self.arrays]


class _Place:
    """A function and its arguments: how to open an array again."""

    def __init__(self, opener: Callable[..., Any], *arguments: Any) -> None:
        self.opener, self.arguments = opener, arguments

    def __call__(self) -> Any:
        return self.opener(*self.arguments)


def _place_of(array: Any) -> Any:
    if isinstance(array, np.memmap) and array.filename is not None and array.flags.c_contiguous:
        offset = array.offset + array.__array_interface__["data"][0] - _start_of_map(array)
        return _Place(np.memmap, str(array.filename), array.dtype, "r", offset, array.shape)
    if type(array).__module__.startswith("h5py"):
        return _Place(_open_hdf5, str(array.file.filename), array.name)
    return array


def _start_of_map(array: np.memmap) -> int:
    """The address at which the map that ``array`` is a view of begins (its ``offset`` belongs to that)."""
    base: Any = array
    while isinstance(base.base, np.memmap):
        base = base.base
    return base.__array_interface__["data"][0]


def _open_hdf5(path: str, name: str) -> Any:
    import h5py

    return h5py.File(path, "r")[name]


def _tensor(x: Any) -> Tensor:
    """A CPU tensor that owns its memory or shares the caller's tensor; what is on disk is read here and now."""
    if isinstance(x, Tensor):
        return x.detach().cpu()
    array = np.array(x)  # a copy: the reading happens in this thread, and torch wants writable memory
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise BadType(f"source: got an array of {array.dtype}, expected numbers that torch has.") from error


# ---------------------------------------------------------------------------------------------------------------
# Datasets


class Samples(Source):
    """A map-style torch Dataset, sample by sample, collated; with workers where a DataLoader brings them."""

    kind = "dataset"

    def __init__(
        self, dataset: Dataset, columns: Any, collate: Callable[..., Any] | None = None, workers: int = 0
    ) -> None:
        super().__init__(len(dataset))  # type: ignore[arg-type]
        self.dataset, self.columns, self.workers = dataset, columns, workers
        self.collate = collate or default_collate

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(list(range(start, stop))) if fetch else [self.dataset[i] for i in range(start, stop)]
        return pick(self.collate(items), self.columns)

    def stream(self, spans: Sequence[Span]) -> Iterator[tuple[Tensor, ...]]:
        if not self.workers:
            yield from super().stream(spans)
            return
        batches = [list(range(a, b)) for a, b in spans]
        loader = DataLoader(self.dataset, batch_sampler=batches, collate_fn=self.collate, num_workers=self.workers)
        for found in loader:
            rows = pick(found, self.columns)
            yield rows if self.cast is None else tuple(x.to(self.cast) if x.is_floating_point() else x for x in rows)


def _from_loader(loader: DataLoader, columns: Any) -> Source:
    if isinstance(loader.dataset, IterableDataset):
        raise BadType(_no_access("the DataLoader's dataset is an IterableDataset"))
    sampler = loader.sampler if loader.batch_size is not None else loader.batch_sampler
    if isinstance(sampler, BatchSampler):
        sampler = sampler.sampler
    if not isinstance(sampler, SequentialSampler):
        raise BadValue(
            f"source: the DataLoader draws its samples by {type(sampler).__name__}, expected them in order, so that "
            "a run can resume. Use shuffle=False, or pass the Dataset (a torch.utils.data.Subset for some of it)."
        )
    return Samples(loader.dataset, columns, loader.collate_fn, loader.num_workers)


def _no_access(what: str) -> str:
    return (
        f"source: {what}, which has no random access, so that a run could neither resume nor be sharded. Write it to "
        "a file first (np.lib.format.open_memmap, zarr, parquet), or give a map-style Dataset."
    )


class Table(Source):
    """A Hugging Face dataset in torch or numpy format."""

    kind = "datasets"

    def __init__(self, dataset: Any, columns: Any) -> None:
        super().__init__(len(dataset))
        kind = (dataset.format or {}).get("type")
        self.dataset = dataset if kind in ("torch", "numpy") else dataset.with_format("numpy")
        self.columns = columns

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        return pick(self.dataset[start:stop], self.columns)


class Parquet(Source):
    """Parquet files in the order of their names; a column of (nested) lists gives samples of that shape."""

    kind = "parquet"

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
        """One row group, the last one kept: chunks are read in order."""
        if self._kept is None or self._kept[0] != i:
            import pyarrow.parquet as parquet

            _, _, group, path = self.groups[i]
            wanted = self.columns if self.columns is None else list(_as_tuple(self.columns))
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
    shape = [len(array)]
    while arrow.types.is_list(array.type) or arrow.types.is_large_list(array.type) or _fixed(array.type):
        outer, array = len(array), array.flatten()
        if outer and len(array) % outer:
            raise BadValue(f"source: a parquet column of lists of different lengths, expected {outer} equal ones.")
        shape.append(len(array) // max(outer, 1))
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _fixed(kind: Any) -> bool:
    import pyarrow as arrow

    return arrow.types.is_fixed_size_list(kind)


# ---------------------------------------------------------------------------------------------------------------
# Which fields of a sample are the model's inputs


def _as_tuple(columns: Any) -> tuple[Any, ...]:
    return tuple(columns) if isinstance(columns, (tuple, list)) else (columns,)


def pick(found: Any, columns: Any) -> tuple[Tensor, ...]:
    """The fields that are the model's inputs: by name or number, else the first of a tuple, the one of a dict."""
    if isinstance(found, dict):
        if columns is None:
            numbers = [k for k, v in found.items() if _floating(v)]
            if len(numbers) != 1:
                raise BadValue(
                    f"source: its samples have the columns {list(found)}, of which {numbers or 'none'} hold floating "
                    "numbers. Say which are the model's inputs: columns=('name', ...)."
                )
            columns = numbers
        missing = [c for c in _as_tuple(columns) if c not in found]
        if missing:
            raise BadValue(f"source: got columns={columns!r}, but the samples have {list(found)}.")
        return tuple(_tensor(found[c]) for c in _as_tuple(columns))
    if isinstance(found, (tuple, list)):
        return tuple(_tensor(found[c]) for c in _as_tuple(0 if columns is None else columns))
    return (_tensor(found),)


def _floating(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


# ---------------------------------------------------------------------------------------------------------------
# Telling them apart


def open_source(source: Any, columns: Any = None, dtype: torch.dtype | None = None) -> Source:
    """Anything of `ACCEPTED` as a `Source`.

    ``columns``: which fields of a sample are the model's inputs (names or numbers).  ``dtype``: cast floating
    inputs and bytes to it, for data that is stored in another precision than the model's.
    """
    found = source if isinstance(source, Source) else _open(source, columns)
    if dtype is not None:
        found.cast = dtype
    return found


def _open(source: Any, columns: Any) -> Source:
    if isinstance(source, (str, Path)):
        from .files import open_path

        return _open(open_path(str(source), columns), columns)
    if isinstance(source, Source):
        return source
    module = type(source).__module__.split(".")[0]
    if isinstance(source, (Tensor, np.ndarray)):
        return Arrays([source])
    if isinstance(source, DataLoader):
        return _from_loader(source, columns)
    if isinstance(source, IterableDataset) or (module == "datasets" and not hasattr(source, "__len__")):
        raise BadType(_no_access(f"got {type(source).__name__}"))
    if module == "datasets" and hasattr(source, "with_format"):
        return Table(source, columns)
    if module in ("zarr", "h5py"):
        return Arrays(_members(source, columns) if not hasattr(source, "shape") else [source])
    if isinstance(source, dict):
        return Arrays(_members(source, columns))
    if isinstance(source, (tuple, list)) and source and all(hasattr(a, "shape") for a in source):
        return Arrays(list(source))
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return Samples(source, columns)
    raise BadType(f"source: got {type(source).__name__}, expected {ACCEPTED}.")


def _members(group: Any, columns: Any) -> list[Any]:
    """Arrays of a group by name; the only one where there is one."""
    names = [k for k in group if hasattr(group[k], "shape")]
    if columns is None:
        if len(names) != 1:
            raise BadValue(f"source: the group holds {names or 'no arrays'}. Say which: columns=('name', ...).")
        columns = names
    missing = [c for c in _as_tuple(columns) if c not in names]
    if missing:
        raise BadValue(f"source: got columns={columns!r}, but the group holds {names}.")
    return [group[c] for c in _as_tuple(columns)]


def travels(source: Source) -> bool:
    """Can the source be sent to another process?"""
    try:
        pickle.dumps(source)
    except Exception:
        return False
    return True
