"""Checks of the samples while they are read: their order, shapes and dtypes, and that a later run reads the same.

Some samples, spread over the source, are read alone at the start of every run.  When a chunk with one of them is read,
its row must be that sample, bit by bit.  The ledger holds the checksum of every chunk that was read.  A run that
continues reads finished chunks again, and compares the checksums, before it skips them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...util.options import BadValue
from ...util.samples import spread_indices
from ..sources import Source
from ..sources.registry import Span
from ..store.checks import UNKNOWN, checksum
from ..store.results import Results
from .fingerprint import Mismatch

SPOT_SAMPLES = 32  # samples that are read alone
SHOWN = 5


def _checksum(rows: Sequence[Tensor]) -> int:
    return checksum(x.contiguous().view(torch.uint8).numpy() if x.numel() else np.zeros(0) for x in rows)


@dataclass(frozen=True)
class SpotSamples:
    """Samples read one at a time: one tensor ``[1, *in]`` per input, by the sample's index."""

    rows: Mapping[int, tuple[Tensor, ...]]

    @classmethod
    def of(cls, source: Source) -> SpotSamples:
        return cls({i: source.read(i, i + 1) for i in spread_indices(source.samples, SPOT_SAMPLES)})

    @property
    def copied_bytes(self) -> int:
        """Bytes of one sample's inputs, as far as reading copies them; a view of the source takes no memory."""
        first = next(iter(self.rows.values()))
        return sum(x.nbytes for x in first if x.untyped_storage().nbytes() == x.nbytes)

    def check(self, rows: tuple[Tensor, ...], start: int, stop: int) -> None:
        """Raise `BadValue` if a row of ``start:stop`` differs from the sample that was read alone."""
        first = next(iter(self.rows.values()))
        for x, one in zip(rows, first, strict=True):
            if x.shape[1:] != one.shape[1:] or x.dtype != one.dtype:
                raise BadValue(
                    f"source: the samples {start} … {stop - 1} are {x.dtype} {list(x.shape[1:])}, but sample "
                    f"{next(iter(self.rows))} is {one.dtype} {list(one.shape[1:])}. All must be alike: pad or "
                    "crop them before, and store them in one dtype."
                )
        for i in range(start, stop):
            if i in self.rows and _checksum([x[i - start : i - start + 1] for x in rows]) != _checksum(self.rows[i]):
                raise BadValue(
                    f"source: sample {i} read alone is not row {i - start} of the samples {start} … {stop - 1} read "
                    "together. Either the rows are not in the order of the samples, or reading is random (an "
                    "augmentation?). A run that can be continued needs the same sample every time; trust_source=True "
                    "(--trust-source) turns this check off."
                )


class Reading:
    """Reads chunks of a source, with these checks; with ``trust``, without them and without checksums."""

    def __init__(self, source: Source, results: Results, spot_samples: SpotSamples, trust: bool) -> None:
        self.source, self.results, self.spot_samples, self.trust = source, results, spot_samples, trust

    def stream(self, chunks: Sequence[int]) -> Generator[tuple[tuple[Tensor, ...], int], None, None]:
        """The inputs of one chunk after the other, each with its checksum."""
        spans = [self.results.span(c) for c in chunks]
        for (start, stop), rows in zip(spans, self.source.stream(spans), strict=True):
            yield rows, self._checked(rows, start, stop)

    def one(self, chunk: int) -> tuple[Tensor, ...]:
        """The inputs of one chunk."""
        return next(self.stream([chunk]))[0]

    def _checked(self, rows: tuple[Tensor, ...], start: int, stop: int) -> int:
        if self.trust:
            return UNKNOWN
        self.spot_samples.check(rows, start, stop)
        return _checksum(rows)

    def check_finished(self, chunks: Iterable[int]) -> None:
        """Read finished chunks again.  Raises `Mismatch` if they were computed from other samples than these."""
        if self.trust:
            return
        recorded = self._recorded_checksums()
        todo = [c for c in chunks if recorded.get(c, UNKNOWN) != UNKNOWN]
        changed: list[Span] = []
        for chunk, (_, fingerprint) in zip(todo, self.stream(todo), strict=True):
            if fingerprint != recorded[chunk]:
                changed.append(self.results.span(chunk))
        if changed:
            spans = ", ".join(f"{a} … {b - 1}" for a, b in changed[:SHOWN]) + (", …" if len(changed) > SHOWN else "")
            raise Mismatch(
                f"{self.results.place} belongs to another run, and nothing was changed: the samples {spans} have "
                "changed since their chunks were computed. Continue with the source that the store was made with, or "
                "choose another place (gradkern never deletes results)."
            )

    def _recorded_checksums(self) -> dict[int, int]:
        ledger = self.results.ledger
        return {
            chunk: int(value)
            for node, record in ledger.records().items()
            for chunk, value in zip(ledger.span(node), record.checks.get("source", ()), strict=False)
        }
