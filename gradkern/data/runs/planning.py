"""`gradkern.data.plan`: the size and time of a run, before anything is written."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import nn

from ...util.memory import Growth, out_of_memory
from ...util.options import memory_budget
from ..sources.padding import Pad
from ..store.layout import dtype_name
from ..store.results import Results
from .forecast import Forecast, itemsize
from .opening import open_run
from .settings import RunOptions, Settings, settings_of
from .shards import Shard, owned_chunks
from .task import Task

RECORDS = 6  # sets of statistics in memory: of the chunk at work, of those being written, of records joined or read
READ, KEPT, WRITTEN = 3, 3, 2  # chunks: of inputs (two read ahead), of maps (two being written), of these two
LEAST_TRIED, TRIAL_SECONDS = 32, 0.5


def plan(
    model: nn.Module, source: Any, out: str | Path | None = None, method: str | None = None, targets: Any = None, *,
    settings: Settings | None = None, columns: Any = None, input_dtype: torch.dtype | None = None,
    pad: Pad | None = None, shard: Shard = (0, 1), **options: Unpack[RunOptions],
) -> Forecast:  # fmt: skip
    """The samples, chunks, bytes and seconds of `gradkern.run` with the same arguments, from running a batch.

    ``memory_bytes`` of the result is by how much the process will grow during `gradkern.run`, at its peak: the measured
    memory of preparing the run and of computing a batch, plus the chunks that wait to be computed or written.

    Nothing is written to ``out``.  If a store exists there, its finished chunks are not counted.
    """
    settings = settings_of("plan", settings, {"method": method, "targets": targets, **options})
    with tempfile.TemporaryDirectory(prefix="gradkern-") as folder:
        place = out if out is not None and Results.exists(out) else Path(folder, "plan.zarr")
        with Growth() as making:
            task = open_run(model, source, place, settings, columns=columns, input_dtype=input_dtype, pad=pad)
            done = task.results.ledger.finished()
            todo = [c for c in owned_chunks(task.results.chunks, shard) if c not in done]
            forecast = task.forecast(todo)
            if not todo:
                return forecast
            task.try_batch(min(LEAST_TRIED, task.batch))  # may capture the model for more samples than were probed
        return _with_trial(task, forecast, making)


def _with_trial(task: Task, forecast: Forecast, making: Growth) -> Forecast:
    """The forecast with the speed and the memory of a batch, as seen in batches of more and more samples until one
    takes half a second."""
    samples = before = 0
    trial = last = Trial(0, 0.0, forecast.rate)
    while samples < task.batch and trial.cpu_seconds < TRIAL_SECONDS:
        more = min(task.batch, 2 * samples or LEAST_TRIED)
        try:
            tried = _try(task, more)
        except Exception as error:
            if not out_of_memory(error):
                raise
            break
        before, samples, trial, last = samples, more, tried, trial
    forecast = replace(forecast, rate=trial.rate)
    if making.peak is None or making.kept is None or not samples:
        return forecast
    slope = (trial.bytes - last.bytes) / (samples - before)
    needed = trial.bytes + min(max(0.0, (task.batch - samples) * slope), memory_budget(task.device))
    memory = max(making.peak, making.kept + int(needed) + _held_bytes(task, forecast.chunks))
    return replace(forecast, memory_bytes=memory)


class Trial(NamedTuple):
    """``bytes``: the peak memory of computing some samples, without what `_held_bytes` counts."""

    bytes: int
    cpu_seconds: float
    rate: float


def _try(task: Task, samples: int) -> Trial:
    wall, cpu = time.perf_counter(), time.process_time()
    with Growth() as growth:
        task.try_batch(samples)
    cpu, rate = time.process_time() - cpu, samples / (time.perf_counter() - wall)
    probe, settings = task.probe, task.settings
    held = samples * probe.map_bytes * settings.maps + probe.sums_bytes(settings.reductions)
    return Trial(max(0, (growth.peak or 0) - held), cpu, rate)


def _held_bytes(task: Task, chunks: int) -> int:
    """Bytes of chunks and statistics in memory while the engine computes."""
    probe, dtype = task.probe, task.settings.dtype
    each = min(chunks, READ) * probe.spot_samples.copied_bytes
    if task.settings.maps:
        each += (min(chunks, KEPT) + (task.buffers is None or task.batch < task.results.chunk)) * probe.map_bytes
        narrowed = sum(m[0].numel() for m in probe.outcome.maps if dtype_name(m.dtype) != dtype)
        each += min(chunks, WRITTEN) * narrowed * itemsize(dtype)
    return each * task.results.chunk + min(RECORDS, 3 + chunks) * probe.sums_bytes(task.settings.reductions)
