"""Estimates before a run: samples per chunk and batch, bytes, seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...util.memory import out_of_memory as out_of_memory

CHUNK_BYTES = 16 << 20  # bytes of a chunk's stored maps, or of its inputs if no maps are stored
LARGEST_CHUNK = 16384  # the most samples in a chunk
CACHED_BYTES = 16 << 20  # bytes of a batch's maps if they are only reduced, so that they stay in a cache
SMALLEST_CACHED = 32  # the least samples in such a batch


@dataclass(frozen=True)
class Forecast:
    """The size of a run, and the time that it will take.

    ``memory_bytes``: the peak memory of the process, without model and source; None if it was not measured.
    """

    samples: int
    chunks: int
    chunk: int
    batch: int
    write_bytes: int
    rate: float
    memory_bytes: int | None = None

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def __str__(self) -> str:
        memory = "" if self.memory_bytes is None else f", {size(self.memory_bytes)} of memory besides model and source"
        return (
            f"{self.samples:,} samples in {self.chunks:,} chunks of {self.chunk:,} (batches of {self.batch:,}): "
            f"{size(self.write_bytes)} to write{memory}, about {duration(self.seconds)} at {self.rate:,.0f} samples/s"
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
    """Samples per call of the engine.

    ``maps``: bytes of a sample's maps; ``keeps``: the maps are stored, or kernels add them to statistics at once.
    """
    fits = _power(budget // max(maps, 1))
    cached = fits if keeps else max(SMALLEST_CACHED, _power(CACHED_BYTES // max(maps, 1)))
    return max(1, min(chunk, cached, fits))


def _power(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)


def size(count: float) -> str:
    """A number of bytes in readable units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """A number of seconds in readable units."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
