"""Starts a run: creates its store, or opens an existing one and checks that it belongs to this run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...util import rounding
from ...util.options import BadType
from ...util.outputs import OneOutput
from ..sources import open_source
from ..sources.padding import Pad
from ..store.attributes import Fingerprint
from ..store.layout import dtype_name
from ..store.results import TOLERANCE, Results
from . import contents, fingerprint
from .pins import differences, pin_isa, pinning
from .probe import probe_run
from .reading import SpotSamples
from .settings import Settings
from .task import Task
from .writing import to_stored


def open_run(
    model: Any, source: Any, out: str | Path, settings: Settings, *, columns: Any = None,
    input_dtype: torch.dtype | None = None, made_by: Mapping[str, Any] | None = None, pad: Pad | None = None,
) -> Task:  # fmt: skip
    """Probe model and source, and create the store, or open an existing one and check that it belongs to this run.

    Raises `fingerprint.Mismatch` if it is another run's.
    """
    if not isinstance(model, nn.Module):
        raise BadType(f"model: got {type(model).__name__}, expected a torch.nn.Module.")
    rows = open_source(source, columns, input_dtype, pad).for_model(model)
    model = model if settings.output is None else OneOutput(model, settings.output)
    results = Results.open(out, read_only=False) if Results.exists(out) else None
    pinned = results.pinned if results else None
    pin_isa(pinned.get("isa") if pinned else None)
    spot_samples, code = SpotSamples.of(rows), fingerprint.code_before(model, settings)
    with pinning(pinned, settings):
        probe = probe_run(model, spot_samples, rows.samples, settings, pinned["engine"] if pinned else None)
    asked = fingerprint.of_run(
        model, fingerprint.of_source(rows.samples, spot_samples.rows), settings, probe.program, code
    )
    if results is None:
        about = contents.attributes(asked, rows, settings, probe, made_by)
        arrays = contents.arrays(rows, settings, probe, about)
        results = Results.create(out, arrays, about, settings.compression)
    same_keys = fingerprint.keys_version(results.about) == fingerprint.keys_version()
    fingerprint.check_same(str(out), results.about["fingerprint"], asked, graph=same_keys)
    fingerprint.check_numerics(str(out), results.about)
    _check_pinned(results, settings)
    _check_labels(results, settings)
    _adopt_nonfinite(results, settings)
    task = Task(model, rows, settings, results, probe, differences(results.pinned, probe, plan=same_keys))
    if not same_keys:
        _check_earlier(task, asked)
    return task


def _check_earlier(task: Task, asked: Fingerprint) -> None:
    """Check whether a store with keys of another version belongs to this run, by repeating one finished chunk.

    Raises `fingerprint.Mismatch` if it belongs to another run; adds a note if only the last bits differ.
    """
    about = task.results.about
    if (about["fingerprint"]["model"]["graph"], task.pinned.get("plan")) == (
        asked["model"]["graph"], task.probe.plan_key()
    ):  # fmt: skip
        return
    ledger = task.results.ledger
    node = min(ledger.nodes(), default=None)  # the record of a single chunk, if there is one
    if node is None:
        return
    chunk = node[1] << node[0]
    start, stop = task.results.span(chunk)
    with task.ready():
        computed = task.compute(chunk, task.transfer.upload(task.reading.one(chunk)))
    rows = computed.rows()
    before, now = task.results.maps(start, stop, "predictions").double(), rows["predictions"]
    tolerance = TOLERANCE[dtype_name(now.dtype)]
    if not rounding.close_elements(now.double(), before, tolerance):
        raise fingerprint.Mismatch(
            f"{task.results.place} belongs to another run, and nothing was changed: the model now predicts something "
            f"else for the samples {start} … {stop - 1}. Choose another place, or the model of the store."
        )
    same = task.settings.maps or node[0] == 0
    for name, value in to_stored(rows, task.maps_dtype)[0].items():
        same &= value.tobytes() == np.asarray(task.results.array(name)[start:stop]).tobytes()
    if node[0] == 0:
        sums = ledger.read(node).sums
        same &= all(value.tobytes() == computed.record.sums[name].tobytes() for name, value in sums.items())
    computed.release()
    if not same:
        task.notes.append("another version of gradkern began the store")


def _check_pinned(results: Results, settings: Settings) -> None:
    """Raise `fingerprint.Mismatch` if the store was made with another chunk, batch, engine, number of threads or
    ``nonfinite`` than the caller requests."""
    pinned, about = results.pinned, results.about
    no_kernels = (
        about.get("program") is None and about.get("engine") != "autograd"
    )  # though they may have been requested
    engine = None if settings.engine == "auto" or (settings.engine == "kernel" and no_kernels) else settings.engine
    before = about.get("nonfinite", "keep")
    nonfinite = None if before == "error" else settings.nonfinite  # `_adopt_nonfinite` takes another choice
    requested = {
        "chunk": (pinned["chunk"], settings.chunk and min(settings.chunk, results.samples)),
        "batch": (pinned["batch"], settings.batch and min(settings.batch, results.chunk)),
        "threads": (pinned["threads"], settings.threads),
        "engine": (pinned["engine"], engine),
        "nonfinite": (before, nonfinite),
    }
    differing = [f"{k} {old}, this call asks for {new}" for k, (old, new) in requested.items() if new and new != old]
    if differing:
        raise fingerprint.Mismatch(
            f"{results.place} was started with {'; '.join(differing)}; nothing was changed. A run keeps its "
            "settings, so that its result is the same to the last bit: omit these arguments, or choose another place."
        )


def _adopt_nonfinite(results: Results, settings: Settings) -> None:
    """Record another ``nonfinite`` for a run that stopped at an error, which has counted no such sample so far."""
    if settings.nonfinite and results.about.get("nonfinite") == "error" and not results.finished:
        results.about["nonfinite"] = settings.nonfinite
        results.write_attributes()


def _check_labels(results: Results, settings: Settings) -> None:
    """Raise `fingerprint.Mismatch` if the caller gives other names than the store's."""
    for what, given, stored in (("ids", settings.ids, results.ids), ("names", settings.names, results.names)):
        if given is not None and given != stored:
            has = "none" if stored is None else "others"
            raise fingerprint.Mismatch(
                f"{what}: {results.place} was started with {has}; nothing was changed. Leave {what} out, or "
                "choose another place."
            )
