"""`gradkern.data.plan`: the size and time of a run, before anything is written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..sources.padding import Pad
from ..store.results import Results
from .forecast import Forecast
from .settings import settings_of
from .shards import Shard, owned_chunks
from .task import Task


def plan(
    model: nn.Module, source: Any, out: str | Path | None = None, method: str | None = None, targets: Any = None, *,
    columns: Any = None, input_dtype: torch.dtype | None = None, pad: Pad | None = None, shard: Shard = (0, 1),
    **options: Any,
) -> Forecast:  # fmt: skip
    """The samples, chunks, bytes and seconds of `gradkern.run` with the same arguments, from running a few samples.

    Nothing is written to ``out``.  If a store exists there, its finished chunks are not counted.
    """
    settings = settings_of("plan", None, {"method": method, "targets": targets, **options})
    with tempfile.TemporaryDirectory(prefix="gradkern-") as folder:
        place = out if out is not None and Results.exists(out) else Path(folder, "plan.zarr")
        task = Task.prepare(model, source, place, settings, columns=columns, input_dtype=input_dtype, pad=pad)
        done = task.results.ledger.finished()
        return task.forecast([c for c in owned_chunks(task.results.chunks, shard) if c not in done])
