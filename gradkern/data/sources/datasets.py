"""Sources that return samples one by one or in tables: torch Datasets and DataLoaders, Hugging Face datasets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    default_collate,
    default_convert,
)

from ...util.options import BadType, BadValue, InputError
from .arrays import is_nested_numbers, package_of
from .columns import NotNumbers, Rows, one_or_list, pick
from .registry import SOURCE_KINDS, Source, Span, one_line, register_source

ONE_ROW = (
    "expected one row. Every item of the Dataset must give exactly one: leave bad records out of the Dataset itself "
    "(torch.utils.data.Subset), and give windows an index of their own"
)


@dataclass(frozen=True)
class Collate:
    """Turns the items of a Dataset into rows, one per item, or finds the item that gives no row or several.

    The caller's collate function may leave out an item, or make two rows of one, without saying which.  So it is called
    with one item at a time.
    """

    function: Callable[..., Any]
    columns: Any
    batched: bool = True  # whether the function takes a list of items, or else a single item

    def __call__(self, items: Sequence[Any]) -> tuple[tuple[Rows, ...], tuple[int, str] | None]:
        """The rows, or the position of the first bad item and what is wrong with it."""
        if self.function in (default_collate, default_convert):
            for k, item in enumerate(items):
                if wrong := _misread(item, self.columns):
                    return (), (k, wrong)
        if self.function is default_collate and self.batched:
            try:
                return pick(default_collate(list(items)), self.columns), None
            except (RuntimeError, ValueError, TypeError):  # items of different shapes, or one that is None
                pass
        kept: list[tuple[Tensor, ...]] = []
        for k, item in enumerate(items):
            try:
                rows = pick(self.function([item]), self.columns) if self.batched else self._single(item)
            except Exception as error:
                if isinstance(error, InputError) and not isinstance(error, NotNumbers):
                    raise
                return (), (k, f"could not be collated ({one_line(error)})")
            count = next((len(r) for r in rows if len(r) != 1), None)
            if count is not None:
                return (), (k, f"gave {count} rows, {ONE_ROW}")
            kept.append(tuple(r[0] for r in rows))
        return tuple(one_or_list(list(column)) for column in zip(*kept, strict=True)), None

    def mixes(self, two: Callable[[], Sequence[Any]]) -> bool:
        """Whether the caller's function gives other numbers for two items together than for each alone.

        False if it pads them, leaves one out, or fails: that is found when they are read.
        """
        if self.function is default_collate:
            return False
        try:
            items = list(two())
            (alone, _), together = self(items), pick(self.function(list(items)), self.columns)
            pairs = [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(alone, together, strict=True)]
        except Exception:
            return False
        return any(
            a.shape == b.shape and not torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-6, equal_nan=True)
            for a, b in pairs
        )

    def _single(self, item: Any) -> tuple[Tensor, ...]:
        return tuple(torch.as_tensor(x)[None] for x in pick(self.function(item), self.columns))


def _misread(item: Any, columns: Any) -> str | None:
    """What torch's own collate functions would silently get wrong, or None: they take each number of a list for a
    field, and drop masks."""
    if columns is None and is_nested_numbers(item) and (len(item) > 1 or isinstance(item[0], list)):
        return (
            f"is a list of {len(item)}, and so, for a DataLoader, {len(item)} fields. Give an array: np.array(numbers)"
        )
    fields = item.values() if isinstance(item, Mapping) else item if isinstance(item, (tuple, list)) else (item,)
    masked = any(isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x) for x in fields)
    return "is a masked array, and its mask would be lost. Fill it: array.filled(value)" if masked else None


class TorchDataset(Source):
    """A map-style Dataset, read sample by sample and collated, by a DataLoader's worker processes if it has any."""

    about = "a torch Dataset or DataLoader"

    def __init__(
        self, dataset: Any, columns: Any, collate: Collate | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(len(dataset))
        self.dataset = dataset
        self.collate = collate or Collate(default_collate, columns)
        self.options = dict(options or {})  # the DataLoader's, if it has workers

    @classmethod
    def accepts(cls, data: Any) -> bool:
        if isinstance(data, (DataLoader, IterableDataset)):
            return True
        return hasattr(data, "__getitem__") and hasattr(data, "__len__")

    @classmethod
    def of(cls, data: Any, columns: Any) -> Source:
        if isinstance(data, IterableDataset):
            raise no_random_access(f"got {type(data).__name__}")
        return cls._of_loader(data, columns) if isinstance(data, DataLoader) else cls(data, columns)

    @classmethod
    def _of_loader(cls, loader: DataLoader, columns: Any) -> Source:
        if isinstance(loader.dataset, IterableDataset) or not cls.accepts(loader.dataset):
            raise no_random_access(f"the DataLoader's dataset is a {type(loader.dataset).__name__}")
        batched = loader.batch_sampler is not None
        sampler = loader.batch_sampler if batched and loader.batch_size is None else loader.sampler
        if type(sampler) is BatchSampler:  # a class made from it may have an order of its own
            sampler = sampler.sampler
        if type(sampler) is not SequentialSampler:
            raise BadValue(
                f"source: the DataLoader draws its samples by {type(sampler).__name__}, expected them in order, so "
                "that a run can resume. Use shuffle=False, or pass the Dataset (a torch.utils.data.Subset for some "
                "of it)."
            )
        samples = len(loader.dataset)  # type: ignore[arg-type]
        if len(sampler) != samples:
            raise BadValue(
                f"source: the DataLoader's sampler has {len(sampler)} samples and its dataset {samples}, expected "
                "as many. For some of them pass torch.utils.data.Subset(dataset, numbers)."
            )
        names = ("num_workers", "worker_init_fn", "multiprocessing_context", "timeout", "prefetch_factor")
        options = {name: getattr(loader, name) for name in names} if loader.num_workers else {}
        source = cls(loader.dataset, columns, Collate(loader.collate_fn, columns, batched), options)
        if batched and source.samples > 1 and source.collate.mixes(lambda: source._items([0, 1])):
            raise BadValue(
                "source: the DataLoader's collate function gives other rows for the samples 0 and 1 together than for "
                "each alone, so a sample's row would depend on its batch. Do in the Dataset what concerns one sample "
                "(scale by fixed numbers, augment), or write the batches to a file first."
            )
        return source

    def rows(self, start: int, stop: int) -> tuple[Rows, ...]:
        return self._sound(self.collate(self._items(list(range(start, stop)))), start)

    def _items(self, indices: list[int]) -> list[Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        return list(fetch(indices)) if fetch else [self.dataset[i] for i in indices]

    def stream(self, spans: Sequence[Span]) -> Iterator[tuple[Tensor, ...]]:
        if not self.options:
            yield from super().stream(spans)
            return
        batches = [list(range(a, b)) for a, b in spans]
        loader = DataLoader(self.dataset, batch_sampler=batches, collate_fn=self.collate, **self.options)
        collated = _started(loader)
        for start, stop in spans:
            try:
                batch = next(collated)
            except Exception as error:
                self.blame(start, stop, error)
            yield self.prepared(self._sound(batch, start), start, stop)

    def _sound(self, collated: tuple[tuple[Rows, ...], tuple[int, str] | None], start: int) -> tuple[Rows, ...]:
        rows, bad = collated
        if bad is not None:
            raise BadValue(f"source: sample {start + bad[0]} {bad[1].rstrip('.')}.")
        return rows


def _started(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator, whose workers are forked from a separate thread.

    A worker that is forked from a thread of a ThreadPoolExecutor fails at its end, because it waits for that thread,
    which in the worker is itself; torch then reports that it exited unexpectedly.
    """
    started: list[Iterator[Any]] = []
    failed: list[BaseException] = []

    def start() -> None:
        try:
            started.append(iter(loader))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=start, name="gradkern-workers")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return started[0]


SOURCE_KINDS.append(TorchDataset)  # asked last, since most objects have a length and can be indexed


def no_random_access(what: str) -> BadType:
    return BadType(
        f"source: {what}, which has no random access, so that a run could neither resume nor be sharded. Write it to "
        "a file first (np.lib.format.open_memmap, zarr, parquet), or give a map-style Dataset."
    )


@register_source
class HuggingFaceDataset(Source):
    """A Hugging Face dataset in torch or numpy format."""

    about = "a Hugging Face dataset"

    def __init__(self, dataset: Any, columns: Any) -> None:
        super().__init__(len(dataset))
        numeric = dataset.format["type"] in ("torch", "numpy", "custom")  # "custom": the caller's own transform
        self.dataset = dataset if numeric else dataset.with_format("numpy")
        self.columns = columns

    @classmethod
    def accepts(cls, data: Any) -> bool:
        return package_of(data) == "datasets" and hasattr(data, "with_format")

    @classmethod
    def of(cls, data: Any, columns: Any) -> Source:
        if isinstance(data, dict):
            raise BadValue(
                f"source: got {type(data).__name__}, which holds the datasets {list(data)}. Give one of them."
            )
        if not hasattr(data, "__len__"):
            raise no_random_access(f"got {type(data).__name__}")
        return cls(data, columns)

    def rows(self, start: int, stop: int) -> tuple[Rows, ...]:
        return pick(self.dataset[start:stop], self.columns)
