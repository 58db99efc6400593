"""A batch in pieces: the memory of a sample, the number of samples per piece, and their ranges.

`samples_per_chunk` cuts a batch to the memory budget.  Other pieces are sized differently, for these reasons:

* A store's chunks (:mod:`gradkern.data.runs.forecast`) depend only on shapes, because every machine that works on a
  store, or continues it, needs the same ones.
* Pieces that should stay in a cache have a fixed number of bytes: the Jacobians of `WholeChain.add_to`, the slopes of a
  recurrent layer (csrc/cpu/recurrent.cpp).
* The outputs behind a convergence delta (`gradkern.attr.attribute_all.rows_out`) come from the live model, whose memory
  is not measured, so their number of rows is fixed.
* Autograd takes at most `gradkern.dispatch.profile.LARGEST_CHUNK` samples, whatever the budget.
* Arrays that are only held or copied (the orders of features in :mod:`gradkern.data.ranking`, the rows of
  :mod:`gradkern.data.export`) have fixed bounds.

A value that the caller gives (``chunk=``) is used unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .options import memory_budget
from .progress import with_progress

MOST_COTANGENTS = 3  # cotangents that exist together: of a step, of its input, and of a value that is still summed
STEPWISE_PEAK = 3  # bytes of the budget per byte that `stepwise_bytes` estimates; peaks were measured at about twice it
# On a CPU a piece stays in the caches, which makes small networks up to a tenth faster.  But large networks read their
# weights again for each piece, and each operation has its overhead per piece, so pieces of a few samples took up to
# twice as long.  On a GPU pieces should be as large as its memory allows.
CPU_CACHED_BYTES = 24 << 20
CPU_LEAST_SAMPLES = 32


def samples_per_chunk(
    device: torch.device, peak: int, cached: int = 0, *, fixed: int = 0, least: int = CPU_LEAST_SAMPLES
) -> int:
    """How many samples to process at a time, at least one.

    ``peak``: the most bytes that a sample takes in addition to the result; all samples, and ``fixed`` bytes, fit in the
    memory budget of the device.  ``cached``: bytes per sample that are read repeatedly; on a CPU they fit in its
    caches, unless that is fewer than ``least`` samples.
    """
    samples = (memory_budget(device) - fixed) // max(peak, 1)
    if device.type == "cpu" and cached:
        samples = min(samples, max(least, CPU_CACHED_BYTES // cached))
    return max(1, samples)


def stepwise_samples(device: torch.device, estimate: int) -> int:
    """`samples_per_chunk` for steps that run one by one and take as many bytes as `stepwise_bytes` estimates."""
    return samples_per_chunk(device, STEPWISE_PEAK * estimate, estimate)


def forward_samples(device: torch.device, estimate: int) -> int:
    """`stepwise_samples` for a forward pass whose steps may be kernels, which write only their results."""
    return samples_per_chunk(device, STEPWISE_PEAK * estimate)


def stepwise_bytes(shapes: Sequence[Sequence[int]], seeds: int, itemsize: int) -> int:
    """Bytes per sample, besides the result, if steps run one by one: all values, and cotangents of all seeds.

    ``shapes``: the shape of every value, per sample.
    """
    every, largest = element_counts(tuple(shapes))
    return max(1, itemsize * (every + MOST_COTANGENTS * seeds * largest))


@lru_cache(maxsize=1024)
def element_counts(shapes: tuple[Sequence[int], ...]) -> tuple[int, int]:
    """The number of elements of tensors of these shapes: in all, and in the largest of them."""
    sizes = [math.prod(shape) for shape in shapes]
    return sum(sizes), max(sizes)


def spans(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Even pieces of at most ``chunk``, without a small remainder at the end.  A progress bar follows them."""
    count = stop - start
    pieces = -(-count // chunk) if count else 0
    ends = [start + count * i // max(pieces, 1) for i in range(pieces + 1)]
    return with_progress(pairwise(ends), stop, "samples", lambda span: span[1] - span[0], initial=start)


class RowBlock(NamedTuple):
    """The copies ``first:last`` of each of the samples ``a:b``, as rows ``[R = (b - a) · copies, ...]``."""

    a: int
    b: int
    first: int
    last: int

    @property
    def copies(self) -> int:
        return self.last - self.first

    def copies_of(self, x: Tensor) -> Tensor:
        return x[self.a : self.b].repeat_interleave(self.copies, dim=0)


def row_blocks(samples: int, copies: int, rows: int) -> Iterator[RowBlock]:
    """Blocks of at most ``rows`` copies: several samples with all of their copies, or some copies of one sample."""
    if copies <= rows:
        step = max(1, rows // max(copies, 1))
        for a in range(0, samples, step):
            yield RowBlock(a, min(a + step, samples), 0, copies)
        return
    for a in range(samples):
        for first in range(0, copies, rows):
            yield RowBlock(a, a + 1, first, min(first + rows, copies))
