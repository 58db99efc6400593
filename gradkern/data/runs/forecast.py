"""Estimates before the run (chunk, batch, bytes, seconds)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...util.memory import out_of_memory as out_of_memory

CHUNK_BYTES = 16 << 20  # of stored maps, or of inputs if no maps are stored
LARGEST_CHUNK = 16384
CACHED_BYTES = 16 << 20  # of a batch's maps, if they are reduced at once and not stored
SMALLEST_CACHED = 32
RECORDS = 6  # statistics alive at a time: of the chunk at work, of those being written, and of records being joined
QUEUED = 5  # chunks alive at a time: two read ahead, one computed, two being written


@dataclass(frozen=True)
class Forecast:
    """What a run will take.  ``seconds`` is None if nothing was measured."""

    samples: int
    chunks: int
    chunk: int
    batch: int
    write_bytes: int
    memory_bytes: int
    rate: float | None

    @property
    def seconds(self) -> float | None:
        return self.samples / self.rate if self.rate else None

    def __str__(self) -> str:
        time = "" if self.seconds is None else f", about {duration(self.seconds)} at {self.rate:,.0f} samples/s"
        return (
            f"{self.samples:,} samples in {self.chunks:,} chunks of {self.chunk:,} (batches of {self.batch:,}): "
            f"{size(self.write_bytes)} to write, {size(self.memory_bytes)} of memory beside model and source{time}"
        )


def itemsize(dtype: str) -> int:
    """Bytes of a number of the dtype ``"float32"``, ``"bfloat16"``, …"""
    return getattr(torch, dtype).itemsize


def chunk_size(samples: int, stored: int, read: int, sums: int = 0) -> int:
    """Samples per chunk: a power of two whose maps (``stored`` bytes per sample; else inputs) make `CHUNK_BYTES`, or as
    many bytes as the chunk's statistics (``sums``) if these are more.

    It depends only on shapes, so that every shard and every later run has the same grid.
    """
    fits = (CHUNK_BYTES if stored else max(CHUNK_BYTES, sums)) // max(stored or read, 1)
    return max(1, min(_power(fits), LARGEST_CHUNK, samples))


def batch_size(chunk: int, maps: int, keeps: bool, budget: int) -> int:
    """Samples per call of the engine.  ``maps``: bytes of a sample's maps; ``keeps``: stored, or never made."""
    fits = _power(budget // max(maps, 1))
    cached = fits if keeps else max(SMALLEST_CACHED, _power(CACHED_BYTES // max(maps, 1)))
    return max(1, min(chunk, cached, fits))


def _power(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
