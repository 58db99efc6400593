"""`gradkern.run`: reading, computing and writing at the same time, chunk by chunk, until all chunks are finished.

One thread reads ahead, the caller's thread computes (its number of torch threads is pinned), two threads write.  A
chunk is finished when its record is in the ledger; whatever happens before that, the chunk is computed again.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from ...util import options as choices
from ...util.memory import give_back
from ...util.options import GradkernWarning
from ...util.progress import progress_bar, showing_progress
from ..sources.padding import Pad
from ..store import locks
from ..store.results import Results
from .opening import open_run
from .settings import RunOptions, Settings, settings_of
from .shards import Shard, owned_chunks
from .task import Computed, Task
from .transfer import Ready
from .writing import to_stored, with_checksums

log = logging.getLogger("gradkern.data")

AHEAD = 2
WRITERS = 2


class DiskFull(OSError):
    """No space is left; everything finished so far is kept."""


def run(
    model: nn.Module, source: Any, out: str | Path, method: str | None = None, targets: Any = None, *,
    settings: Settings | None = None, columns: Any = None, input_dtype: torch.dtype | None = None,
    pad: Pad | None = None, shard: Shard = (0, 1), progress: bool | None = None,
    made_by: Mapping[str, Any] | None = None, **options: Unpack[RunOptions],
) -> Results:  # fmt: skip
    """Attribute every sample of ``source`` and stream the results to a zarr store at ``out``.

    A call with an existing store continues it: finished chunks are kept, at most the chunks in flight are computed
    again, and the result is bit-equal to that of an uninterrupted run.  A store of another model, method or source is
    left unchanged, and `gradkern.data.Mismatch` says what differs.

    Parameters
    ----------
    model
        A `torch.nn.Module` in eval mode, on the device to compute on.
    source
        A tensor, numpy array or memmap, zarr array, h5py dataset, torch Dataset or DataLoader (in order), Hugging
        Face dataset, a tuple of arrays (one per input), a path (.npy, .zarr, .h5:name, .parquet, …), or anything
        that a class of your own accepts (`gradkern.data.register_source`).
    out
        A folder, or an address that fsspec knows.
    method
        ``"saliency"`` (\\|gradient\\|, the default), ``"jacobian"``, ``"input_x_gradient"``, or the name of a class
        in `gradkern.attr` that has ``attribute_all``; ``arguments`` go to that.
    targets
        As in `gradkern.jacobian`: None (all), a list of outputs, ``TopK(k)``, or a tensor ``[N, S]``.
    settings
        ``method``, ``targets`` and all of ``options`` as one value, `gradkern.data.Settings`, in place of keywords.
        A keyword that is None counts as not given.  The arguments below are not among the settings: they concern the
        source, or this process alone.
    columns, input_dtype
        The fields of a sample that are the model's inputs; the dtype that inputs are cast to.
    pad
        A number with which samples of different shapes are padded at their ends, up to the longest; ``(number,
        length)`` up to that length.  All samples are read once before the run to find out.  The maps are 0 where a
        sample was padded, ``.mask(start, stop)`` of the store says where, and a model whose ``forward`` takes
        ``lengths``, ``mask`` (True for data) or ``padding_mask`` (True for padding) after its inputs gets them.
    shard
        ``(i, n)``: only the i-th of n ranges of chunks, for job arrays.  The last shard to finish completes the
        store.
    progress
        True or False; None shows a bar in a terminal only.
    made_by
        Text about the run's origin by name, such as ``{"model": "net.pt2", "source": "x.npy"}``, which the store keeps
        and the report shows.  It does not affect the run.
    **options
        ``maps=True``: store the maps themselves.
        ``reductions=()``: statistics over samples (``"mean_abs"``, ``"mean"``, ``"variance"``, ``"max_abs"``,
        ``"ranks"``, ``"importance"``).
        ``top_features=0``: per sample, the k features with the largest \\|attribution\\|.
        ``dtype="float32"`` of the stored maps, or float64, float16, bfloat16; ``compression="none"``, or ``"zstd"``,
        ``"blosc"``.
        ``chunk``, ``batch``, ``threads``, ``engine``: samples per chunk and per call of the engine, torch threads, and
        the engine; chosen if they are None, then recorded and pinned.
        ``output``: which of several outputs of the model, as in `gradkern.jacobian`.
        ``arguments``: of the method.  Tensors with a row per sample are cut with the samples.
        ``nonfinite``: what becomes of samples with NaN or Inf among their attributions.  ``"error"`` stops, and names
        them (the default if there are statistics); ``"skip"`` leaves them out of the statistics; ``"keep"`` counts
        them in (the default for maps alone).  The store says how many there were.
        ``ids``, ``names``: of the samples, and of the model's outputs (or of the targets).  The store keeps them, and
        shows them in errors, reports and rankings.
        ``trust_source=False``: do not check, while reading, that the samples are those of the finished chunks.

    Returns
    -------
    Results
        The open store: ``.array("attributions")``, ``.reduction("mean_abs")``, ``.finished``, ``.exact``, ``.notes``.
    """
    settings = settings_of("run", settings, {"method": method, "targets": targets, **options})
    owned_chunks(1, shard)  # an invalid shard is refused before anything is created
    if tuple(shard) != (0, 1) and choices.engine(settings.engine) == "auto":
        settings = replace(settings, engine="kernel")  # shards in separate stores must all use the same engine
    with disk_full(out):
        task = open_run(
            model, source, out, settings, columns=columns, input_dtype=input_dtype, made_by=made_by, pad=pad
        )
        task.results.check_files()
        work(task, owned_chunks(task.results.chunks, shard), progress)
        task.results.complete()
    results = Results.open(out)
    for words in results.losses():
        warnings.warn(f"{out}: {words}", GradkernWarning, stacklevel=2)
    return results


@contextmanager
def disk_full(out: str | Path) -> Iterator[None]:
    """`DiskFull` in place of the system's error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, DiskFull):
            raise
        finished = ""
        try:
            results = Results.open(out)
            finished = f" with {results.finished_chunks} of {results.chunks} chunks finished. They are kept"
        except (OSError, ValueError):  # there was not even the space to create the store
            finished = ", nothing was computed yet"
        raise DiskFull(
            error.errno, f"no space left at {out}{finished}: free some space and run the same again"
        ) from error


def work(task: Task, owned_chunks: range, progress: bool | None = None) -> int:
    """Compute the chunks of ``owned_chunks`` that are not finished; return their number.

    Raises `locks.Busy` if another run is computing some of them, and `Mismatch` if a finished one was computed from
    other samples.
    """
    task.reading.check_finished(task.results.ledger.finished() & set(owned_chunks))
    if task.results.ledger.finished().issuperset(owned_chunks):
        return 0
    with locks.hold(task.results.store, owned_chunks):
        return compute_missing(task, owned_chunks, progress)


def compute_missing(
    task: Task, owned_chunks: range, progress: bool | None = None, only: Collection[int] | None = None
) -> int:
    """`work` without its checks, for the holder of the chunks; of the missing ones, ``only`` these."""
    results = task.results
    done = results.ledger.finished()
    todo = [c for c in owned_chunks if c not in done and (only is None or c in only)]
    results.remove_partial(todo)
    results.ledger.adopt(owned_chunks)
    plan = task.forecast(todo)
    log.info(
        "event=start out=%s samples=%d chunks=%d finished=%d chunk=%d batch=%d engine=%s write_bytes=%d "
        "seconds=%.1f", results.place, results.samples, len(todo), len(owned_chunks) - len(todo),
        plan.chunk, plan.batch, task.pinned["engine"], plan.write_bytes, plan.seconds,
    )  # fmt: skip
    if not todo:
        return 0
    finished = sum(b - a for a, b in (results.span(c) for c in owned_chunks if c in done))
    total = finished + plan.samples
    begin = time.perf_counter()
    with progress_bar(str(plan), total, finished, progress) as advance, task.ready(), showing_progress(False):
        _fill(task, todo, advance)
    seconds = time.perf_counter() - begin
    give_back()
    log.info("event=end samples=%d seconds=%.2f rate=%.0f", plan.samples, seconds, plan.samples / seconds)
    return len(todo)


def _fill(task: Task, todo: Sequence[int], advance: Callable[[int], object]) -> None:
    """Read ahead, compute, and write.  An error stops everything, but chunks that are being written are finished."""
    results, lock = task.results, threading.Lock()
    stream = task.reading.stream(todo)

    def read() -> tuple[Ready, int]:
        rows, checksum = next(stream)
        return task.transfer.upload(rows), checksum

    def write(computed: Computed, checksum: int) -> None:
        stored, lost = to_stored(computed.rows(), task.maps_dtype)
        record = with_checksums(computed.record, stored, checksum, lost)
        results.write(computed.chunk, stored)
        computed.release()
        with lock:
            results.ledger.add(computed.chunk, record)
            advance(record.facts["samples"])

    reader = ThreadPoolExecutor(1, "gradkern-read")
    writers = ThreadPoolExecutor(WRITERS, "gradkern-write")
    try:
        reading = deque(reader.submit(read) for _ in todo[:AHEAD])
        writing: deque[Future[None]] = deque()
        for i, chunk in enumerate(todo):
            ready, checksum = reading.popleft().result()
            if i + AHEAD < len(todo):
                reading.append(reader.submit(read))
            writing.append(writers.submit(write, task.compute(chunk, ready), checksum))
            if len(writing) > WRITERS:
                writing.popleft().result()
        for written in writing:
            written.result()
    finally:
        for pool in (reader, writers):
            pool.shutdown(cancel_futures=True)
        stream.close()  # the source's worker processes, if it has any
