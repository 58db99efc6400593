"""Sources that return samples one by one or in tables: torch Datasets and DataLoaders, Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, default_collate

from ...util.options import BadType, BadValue
from .arrays import package_of
from .columns import pick
from .registry import SOURCE_KINDS, Source, Span, register


class TorchDataset(Source):
    """A map-style Dataset, read sample by sample and collated, by a DataLoader's worker processes if it has any."""

    about = "a torch Dataset or DataLoader"

    def __init__(self, dataset: Any, columns: Any, collate: Callable[..., Any] | None = None, workers: int = 0) -> None:
        super().__init__(len(dataset))
        self.dataset, self.columns, self.workers = dataset, columns, workers
        self.collate = collate or default_collate

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
        if isinstance(loader.dataset, IterableDataset):
            raise no_random_access("the DataLoader's dataset is an IterableDataset")
        sampler = loader.sampler if loader.batch_size is not None else loader.batch_sampler
        if isinstance(sampler, BatchSampler):
            sampler = sampler.sampler
        if not isinstance(sampler, SequentialSampler):
            raise BadValue(
                f"source: the DataLoader draws its samples by {type(sampler).__name__}, expected them in order, so "
                "that a run can resume. Use shuffle=False, or pass the Dataset (a torch.utils.data.Subset for some "
                "of it)."
            )
        return cls(loader.dataset, columns, loader.collate_fn, loader.num_workers)

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
        for (start, stop), batch in zip(spans, loader, strict=True):
            yield self.prepared(pick(batch, self.columns), start, stop)


SOURCE_KINDS.append(TorchDataset)  # asked last, since most objects have a length and can be indexed


def no_random_access(what: str) -> BadType:
    return BadType(
        f"source: {what}, which has no random access, so that a run could neither resume nor be sharded. Write it to "
        "a file first (np.lib.format.open_memmap, zarr, parquet), or give a map-style Dataset."
    )


@register
class HuggingFaceDataset(Source):
    """A Hugging Face dataset in torch or numpy format."""

    about = "a Hugging Face dataset"

    def __init__(self, dataset: Any, columns: Any) -> None:
        super().__init__(len(dataset))
        numeric = (dataset.format or {}).get("type") in ("torch", "numpy")
        self.dataset = dataset if numeric else dataset.with_format("numpy")
        self.columns = columns

    @classmethod
    def accepts(cls, data: Any) -> bool:
        return package_of(data) == "datasets" and hasattr(data, "with_format")

    @classmethod
    def of(cls, data: Any, columns: Any) -> Source:
        if not hasattr(data, "__len__"):
            raise no_random_access(f"got {type(data).__name__}")
        return cls(data, columns)

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        return pick(self.dataset[start:stop], self.columns)
