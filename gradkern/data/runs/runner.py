"""`gradkern.run`: reading, computing and writing at the same time, chunk by chunk, until all chunks are finished.

One thread reads ahead, the caller's thread computes (its number of torch threads is pinned), two threads write.  A
chunk is finished when its record is in the ledger; whatever happens before that, the chunk is computed again.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from ..store.durable import DurableStore
from ..store.ledger import FOLDER
from ..store.results import Results
from .progress import Progress
from .settings import Options, Settings, settings_of
from .shards import Shard, owned
from .task import Computed, Task
from .transfer import Ready

log = logging.getLogger("gradkern.data")

AHEAD = 2
WRITERS = 2


class DiskFull(OSError):
    """No space is left; everything finished so far is kept."""


def run(
    model: nn.Module,
    source: Any,
    out: str | Path,
    method: str | None = None,
    targets: Any = None,
    *,
    settings: Settings | None = None,
    columns: Any = None,
    input_dtype: torch.dtype | None = None,
    shard: Shard = (0, 1),
    progress: bool | None = None,
    made_by: Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> Results:
    """Attribute every sample of ``source`` and stream the results to a zarr store at ``out``.

    A call with a store that is there continues it: finished chunks are kept, at most the chunks in flight are
    computed again, and the result is bit-equal to that of an uninterrupted run.  A store of another model, method
    or source is left alone, and `gradkern.data.Mismatch` says what differs.

    Parameters
    ----------
    model
        A `torch.nn.Module` in eval mode, on the device to compute on.
    source
        A tensor, numpy array or memmap, zarr array, h5py dataset, torch Dataset or DataLoader (in order), Hugging
        Face dataset, a tuple of arrays (one per input), a path (.npy, .zarr, .h5:name, .parquet, …), or what a class
        of your own accepts (`gradkern.data.register`).
    out
        A folder, or an address that fsspec knows.
    method
        ``"saliency"`` (\\|gradient\\|, the default), ``"jacobian"``, ``"input_x_gradient"``, or the name of a class
        in `gradkern.attr` that has ``attribute_all``; ``arguments`` go to that.
    targets
        As in `gradkern.jacobian`: None (all), a list of outputs, ``TopK(k)``, or a tensor ``[N, S]``.
    settings
        ``method``, ``targets`` and all of ``options`` as one value, `gradkern.data.Settings`, in place of keywords.
    columns, input_dtype
        Which fields of a sample are the model's inputs; a dtype to cast floating inputs and bytes to.
    shard
        ``(i, n)``: only the i-th of n ranges of chunks, for job arrays.  Whichever shard ends last completes the
        store.
    progress
        True or False; None shows a bar in a terminal only.
    **options
        ``maps=True``: store the maps themselves.
        ``reductions=()``: statistics over samples (``"mean_abs"``, ``"mean"``, ``"variance"``, ``"max_abs"``,
        ``"ranks"``, ``"importance"``).
        ``top_features=0``: per sample, the k features with the largest \\|attribution\\|.
        ``dtype="float32"`` of the stored maps, or float64, float16, bfloat16; ``compression="none"``, or ``"zstd"``,
        ``"blosc"``.
        ``chunk``, ``batch``, ``threads``, ``engine``: samples per chunk and per call of the engine, torch threads, and
        the engine; chosen where they are None, recorded and pinned.
        ``arguments``: of the method.

    Returns
    -------
    The open store: ``.array("attributions")``, ``.reduction("mean_abs")``, ``.about``.
    """
    settings = settings_of("run", settings, {"method": method, "targets": targets, **options})
    owned(1, shard)  # a shard that makes no sense is refused before anything is made
    task = Task.prepare(model, source, out, settings, columns=columns, input_dtype=input_dtype, made_by=made_by)
    work(task, owned(task.results.chunks, shard), progress)
    task.results.complete()
    return Results.open(out)


def work(task: Task, mine: range, progress: bool | None = None) -> int:
    """Compute the chunks of ``mine`` that are not finished; gives how many those were."""
    results = task.results
    done = results.ledger.finished()
    todo = [c for c in mine if c not in done]
    _tidy(results, todo)
    results.ledger.adopt(mine)
    plan = task.forecast(todo)
    log.info(
        "event=start out=%s samples=%d chunks=%d finished=%d chunk=%d batch=%d engine=%s write_bytes=%d "
        "memory_bytes=%d seconds=%.1f", results.place, results.samples, len(todo), len(mine) - len(todo), plan.chunk,
        plan.batch, task.pinned["engine"], plan.write_bytes, plan.memory_bytes, plan.seconds or 0.0,
    )  # fmt: skip
    if not todo:
        return 0
    finished = sum(b - a for a, b in (results.span(c) for c in mine if c in done))
    total = finished + plan.samples
    begin = time.perf_counter()
    with Progress(str(plan), total, finished, progress) as bar, task.ready():
        Pipeline(task, todo, bar).go()
    seconds = time.perf_counter() - begin
    log.info("event=end samples=%d seconds=%.2f rate=%.0f", plan.samples, seconds, plan.samples / seconds)
    return len(todo)


def _tidy(results: Results, todo: Sequence[int]) -> None:
    """Remove the half-written files of our own unfinished chunks, which a killed run has left."""
    if not isinstance(results.store, DurableStore):
        return
    ours = set(todo)
    for name in (*results.arrays(), FOLDER):
        results.store.clean(name, lambda file, ledger=name == FOLDER: bool(_chunks_of(file, ledger) & ours))


def _chunks_of(file: str, ledger: bool) -> set[int]:
    """``c.12.0.0.….partial`` → 12; a record's file ``01.00000003.npz.….partial`` → 6, 7."""
    parts = file.split(".")
    if len(parts) < 2 or not parts[1].isdigit():
        return set()
    if not ledger:
        return {int(parts[1])}
    level, number = int(parts[0]), int(parts[1])
    return set(range(number << level, (number + 1) << level))


class Pipeline:
    """The threads of one run.  An error in any of them stops all, and is raised by `go`."""

    def __init__(self, task: Task, todo: Sequence[int], bar: Progress) -> None:
        self.task, self.todo, self.bar = task, todo, bar
        self.read: queue.Queue[tuple[int, Ready] | None] = queue.Queue(AHEAD)
        self.computed: queue.Queue[Computed | None] = queue.Queue(1)
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.ledger = threading.Lock()

    def go(self) -> None:
        threads = [threading.Thread(target=self._guard, args=(self._reading,), name="gradkern-read", daemon=True)]
        for i in range(WRITERS):
            threads.append(
                threading.Thread(target=self._guard, args=(self._writing,), name=f"gradkern-write-{i}", daemon=True)
            )
        for t in threads:
            t.start()
        try:
            for chunk, ready in iter(lambda: self._get(self.read), None):
                self._put(self.computed, self.task.compute(chunk, ready))
        except BaseException as error:  # the caller's interrupt too: threads end before it is handed on
            self._fail(error)
        for _ in range(WRITERS):
            self._put(self.computed, None)
        for t in threads:
            t.join()
        if self.error is not None:
            raise self._explained(self.error)

    def _reading(self) -> None:
        spans = [self.task.results.span(c) for c in self.todo]
        stream: Iterator[Any] = self.task.source.stream(spans)
        for chunk, inputs in zip(self.todo, stream, strict=True):
            if not self._put(self.read, (chunk, self.task.transfer.upload(inputs))):
                return
        self._put(self.read, None)

    def _writing(self) -> None:
        results = self.task.results
        while (computed := self._get(self.computed)) is not None:
            results.write(computed.chunk, self.task.stored(computed.rows()))
            computed.release()
            with self.ledger:
                results.ledger.add(computed.chunk, computed.record)
                self.bar.add(computed.record.facts["samples"])

    def _guard(self, function: Any) -> None:
        try:
            function()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        self.stop.set()

    def _put(self, to: queue.Queue, item: Any) -> bool:
        """Hand on, waiting for room; False where everything stops."""
        while not self.stop.is_set():
            try:
                to.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _get(self, of: queue.Queue) -> Any:
        """The next item; None at the end and where everything stops."""
        while not self.stop.is_set():
            try:
                return of.get(timeout=0.2)
            except queue.Empty:
                continue
        return None

    def _explained(self, error: BaseException) -> BaseException:
        """The error to raise: a full disk says what is kept and what to do."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            results = self.task.results
            full = DiskFull(
                error.errno,
                f"no space left at {results.place} with {results.done} of {results.chunks} chunks finished. They are "
                "kept: free some space and run the same again",
            )
            full.__cause__ = error
            return full
        return error
