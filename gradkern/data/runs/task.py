"""A run as one object, and the computation of one chunk."""

from __future__ import annotations

import copy
import logging
import math
import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...util.options import BadType, BadValue
from ...util.outputs import OneOutput
from .. import methods, statistics
from ..sources import Source, open_source
from ..sources.padding import Pad
from ..store.checks import checksum
from ..store.layout import dtype_name, map_names
from ..store.ledger import NAMED, ChunkRecord
from ..store.results import TOLERANCE, Results
from . import contents, fingerprint, forecast
from .pins import differences, pin_isa, pinning
from .probe import Probe, device_of, probe_run, targets_of
from .reading import Reading, SpotSamples
from .settings import Settings
from .transfer import Ready, Transfer

log = logging.getLogger("gradkern.data")

LOST = ("overflow", "underflow", "narrowed")
LOOKED_AT = 1 << 18  # values of maps that are compared with their narrower ones at a time


class Task:
    """A run, with everything needed to compute a chunk.  `Task.prepare` makes or opens the store."""

    def __init__(
        self, model: nn.Module, source: Source, settings: Settings, results: Results, probe: Probe, notes: list[str]
    ) -> None:
        self.model, self.source, self.settings, self.results = model, source, settings, results
        self.probe, self.notes = probe, notes
        self.method = methods.find(settings.method, settings.arguments)
        self.device = device_of(model)
        self.transfer = Transfer(self.device)
        self.pinned = results.about["pinned"]
        self.nonfinite = results.about.get("nonfinite", "keep")
        self.batch = int(self.pinned["batch"])
        self.sums_only = contents.sums_only(source, probe)
        self.reading = Reading(source, results, probe.alone, settings.trust_source)
        self.pool: Pool | None = None
        maps = probe.outcome.maps
        if settings.maps and self.device.type == "cpu" and probe.outcome.outputs.dim() == 2:
            self.pool = Pool([(results.chunk, *m.shape[1:]) for m in maps], [m.dtype for m in maps])

    # ---- making

    @classmethod
    def prepare(
        cls, model: Any, source: Any, out: str | Path, settings: Settings, *, columns: Any = None,
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
        pinned = dict(results.about["pinned"]) if results else {}
        pin_isa(pinned.get("isa"))
        alone, code = SpotSamples.of(rows), fingerprint.code_before(model, settings)
        with pinning(pinned, settings):
            probe = probe_run(model, alone, rows.samples, settings, pinned.get("engine"))
        asked = fingerprint.of_run(
            model, fingerprint.of_source(rows.samples, alone.rows), settings, probe.program, code
        )
        if results is None:
            about = contents.attributes(asked, rows, settings, probe, made_by)
            arrays = contents.arrays(rows, settings, probe, about)
            results = Results.create(out, arrays, about, settings.compression)
        same_keys = fingerprint.keys_version(results.about) == fingerprint.keys_version()
        fingerprint.check_same(str(out), results.about["fingerprint"], asked, graph=same_keys)
        check_pinned(results, settings)
        check_labels(results, settings)
        task = cls(model, rows, settings, results, probe, differences(results.about["pinned"], probe, plan=same_keys))
        if not same_keys:
            task.check_earlier(asked)
        return task

    def check_earlier(self, asked: Mapping[str, Any]) -> None:
        """Check whether a store with keys of another version belongs to this run, by repeating one finished chunk.

        Raises `fingerprint.Mismatch` if it belongs to another run; adds a note if only the last bits differ.
        """
        about = self.results.about
        if (about["fingerprint"]["model"]["graph"], self.pinned["plan"]) == (
            asked["model"]["graph"], self.probe.plan_key()
        ):  # fmt: skip
            return
        ledger = self.results.ledger
        node = min(ledger.nodes(), default=None)  # the record of a single chunk, if there is one
        if node is None:
            return
        chunk = node[1] << node[0]
        start, stop = self.results.span(chunk)
        with self.ready():
            computed = self.compute(chunk, self.transfer.upload(self.reading.one(chunk)))
        rows = computed.rows()
        before, now = self.results.maps(start, stop, "predictions").double(), rows["predictions"]
        tolerance = TOLERANCE[dtype_name(now.dtype)]
        if not torch.allclose(
            before, now.double(), rtol=tolerance, atol=tolerance * float(before.abs().max()), equal_nan=True
        ):
            raise fingerprint.Mismatch(
                f"{self.results.place} holds another run, and nothing was changed: the model now predicts something "
                f"else for the samples {start} … {stop - 1}. Choose another place, or the model of the store."
            )
        same = self.settings.maps or node[0] == 0
        for name, value in self.stored(rows)[0].items():
            same &= value.tobytes() == np.asarray(self.results.array(name)[start:stop]).tobytes()
        if node[0] == 0:
            sums = ledger.read(node).sums
            same &= all(value.tobytes() == computed.record.sums[name].tobytes() for name, value in sums.items())
        computed.release()
        if not same:
            self.notes.append("another version of gradkern began the store")

    def forecast(self, chunks: Sequence[int]) -> forecast.Forecast:
        """The forecast for computing these chunks, without the memory, which `data.plan` measures."""
        samples = sum(b - a for a, b in map(self.results.span, chunks))
        written = self.probe.map_elements * forecast.itemsize(self.settings.dtype) * samples * self.settings.maps
        return forecast.Forecast(samples, len(chunks), self.results.chunk, self.batch, written, self.probe.rate)

    def try_batch(self, samples: int) -> None:
        """Compute a batch of samples that were read before, for its time and memory alone."""
        rows = [torch.cat(parts) for parts in zip(*self.probe.alone.rows.values(), strict=True)]
        inputs = tuple(x[torch.arange(samples) % len(x)].to(self.device) for x in rows)
        trial = copy.copy(self)
        trial.nonfinite = "keep"  # the run itself says which samples are not finite
        with self.ready():
            trial._batch(inputs, 0, self._accumulators(), None, [])

    # ---- computing

    def ready(self) -> AbstractContextManager[None]:
        """The threads and memory budget that the store pins, for the computing thread."""
        return pinning(self.pinned, self.settings)

    def compute(self, chunk: int, upload: Ready) -> Computed:
        """Compute one chunk, from inputs on the device to the arrays to be written."""
        begin = time.perf_counter()
        inputs = upload()
        memory = self.pool.take() if self.pool and self.batch >= self.results.chunk else None
        while True:
            try:
                reducers, kept, counts = self._batches(chunk, inputs, memory)
                break
            except Exception as error:
                if not forecast.out_of_memory(error) or self.batch == 1:
                    raise
                self._back_off()  # and restart the chunk, because its sums so far are incomplete
        facts = {"samples": inputs[0].shape[0], "seconds": time.perf_counter() - begin, "batches": [self.batch]}
        sums = {k: v for name, r in reducers.items() for k, v in r.result(name).items()}
        names = list(kept)
        joined = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in kept.values()]
        download = self.transfer.download(joined)
        computed = Computed(
            chunk,
            lambda: dict(zip(names, download(), strict=True)),
            ChunkRecord(sums, facts | {"notes": list(self.notes)} | counts),
        )
        pool = self.pool
        return computed if memory is None or pool is None else replace(computed, release=lambda: pool.give(memory))

    def _batches(
        self, chunk: int, inputs: tuple[Tensor, ...], memory: tuple[Tensor, ...] | None
    ) -> tuple[dict[str, statistics.Accumulator], dict[str, list[Tensor]], dict[str, Any]]:
        """The chunk's statistics by input, its rows by array, in pieces, and the count of its non-finite samples."""
        first, stop = self.results.span(chunk)
        reducers = self._accumulators()
        kept: dict[str, list[Tensor]] = {}
        bad: list[int] = []
        for at in range(0, stop - first, self.batch):
            part = tuple(x[at : at + self.batch] for x in inputs)
            out = None if memory is None else tuple(m[at : at + len(part[0])] for m in memory)
            for name, rows in self._batch(part, first + at, reducers, out, bad).items():
                kept.setdefault(name, []).append(rows)
        return reducers, kept, {"nonfinite": len(bad), "nonfinite_first": bad[:NAMED]} if bad else {}

    def _back_off(self) -> None:
        self.batch = max(1, self.batch // 2)
        note = "batches were halved for lack of memory"
        if note not in self.notes:
            self.notes.append(note)
        log.warning("event=back_off batch=%d", self.batch)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _accumulators(self) -> dict[str, statistics.Accumulator]:
        if not self.settings.reductions:
            return {}
        shapes = [tuple(self.probe.inputs[i].shape[1:]) for i in self.probe.floating]
        wanted, classes = self.settings.reductions, self.probe.classes
        squares = fingerprint.sums_squares(self.results.about)
        accumulators = [statistics.Accumulator(wanted, classes, shape, squares) for shape in shapes]
        return dict(zip(map_names(len(accumulators)), accumulators, strict=True))

    def _batch(
        self, inputs: tuple[Tensor, ...], first: int, reducers: Mapping[str, statistics.Accumulator],
        out: tuple[Tensor, ...] | None, bad: list[int],
    ) -> dict[str, Tensor]:  # fmt: skip
        """The rows of one batch to be stored; its statistics go to ``reducers``, but only if there was no error.

        ``bad`` gets the numbers of its samples with attributions that are not finite.
        """
        which, samples = slice(first, first + inputs[0].shape[0]), self.results.samples
        targets = targets_of(self.settings.targets, which, samples)
        arguments = methods.arguments_of(self.method, self.settings.arguments, which, samples, inputs)
        batch = methods.Batch(self.model, inputs, targets, self.pinned["engine"], arguments, first, out)
        if self.sums_only and (outputs := self._summed(batch, reducers, bad)) is not None:
            return {"predictions": outputs}
        outcome = self._without_padding(self.method(batch), which)
        finite = self._finite_inputs(inputs) & ~outcome.outputs.reshape(len(inputs[0]), -1).isnan().any(1).cpu()
        for maps in outcome.maps:
            finite &= finite_rows(maps).cpu()
        keep = self._count(finite, first, bad)
        rows = {"predictions": outcome.outputs}
        if outcome.targets is not None:
            rows["targets"] = outcome.targets
        if outcome.deltas is not None:
            rows["deltas"] = outcome.deltas
        floating = self.probe.floating
        for i, name, maps in zip(floating, map_names(len(floating)), outcome.maps, strict=True):
            if self.settings.maps:
                rows[name] = maps
            if k := self.settings.top_features:
                top = maps.abs().reshape(*maps.shape[:2], -1).topk(k, dim=2).indices
                rows[name.replace("attributions", "top_features")] = top
            if name in reducers:
                where = None if outcome.targets is None else outcome.targets.cpu()
                reducers[name].add(first, maps.detach().cpu(), inputs[i].detach().cpu(), where, keep)
        return rows

    def _without_padding(self, outcome: methods.Outcome, which: slice) -> methods.Outcome:
        """The outcome with maps that are 0 where a sample was padded, since padding has no attribution."""
        padding = self.source.padding
        if padding is None:
            return outcome
        masks = [padding.mask(which.start, which.stop, i).to(self.device) for i in self.probe.floating]
        maps = tuple(m.masked_fill(~mask[:, None], 0) for m, mask in zip(outcome.maps, masks, strict=True))
        return replace(outcome, maps=maps)

    def _summed(
        self, batch: methods.Batch, reducers: Mapping[str, statistics.Accumulator], bad: list[int]
    ) -> Tensor | None:
        """The outputs of a batch, whose maps the kernels add to the statistics.

        None, with nothing added, if the kernels cannot do that.
        """
        (reducer,), (i,) = reducers.values(), self.probe.floating
        finite = self._finite_inputs(batch.inputs)
        sums = reducer.running(batch.first, finite, self.nonfinite == "skip")
        outputs = methods.add_to_sums(self.method, batch, sums)
        if outputs is not None:
            reducer.add_counts(batch.first, batch.inputs[i].detach(), self._count(finite, batch.first, bad))
        return outputs

    def _finite_inputs(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Which samples have finite inputs, bool ``[n]``; all, if no statistics of the inputs are taken."""
        finite = torch.ones(len(inputs[0]), dtype=torch.bool)
        if "importance" in self.settings.reductions:
            for i in self.probe.floating:
                finite &= finite_rows(inputs[i]).cpu()
        return finite

    def _count(self, finite: Tensor, first: int, bad: list[int]) -> Tensor | None:
        """The indices of the samples in a batch that statistics count; None for all.

        The settings say what becomes of samples that are not finite.
        """
        if bool(finite.all()):
            return None
        new = [first + int(i) for i in (~finite).nonzero()[:, 0]]
        if self.nonfinite == "error":
            raise BadValue(
                f"the attributions of sample {self.results.sample_name(new[0])} are not finite (NaN or Inf), or its "
                f"prediction is NaN; so are {len(new) - 1} others of the "
                f"samples {first} … {first + len(finite) - 1}{_named(new[1:])}. Fix the data or the model; or "
                "nonfinite='skip' leaves such samples out of the statistics, and 'keep' counts them in. What is "
                "finished is kept."
            )
        bad += new
        return finite.nonzero()[:, 0] if self.nonfinite == "skip" else None

    def stored(self, rows: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Rows as the store's arrays take them, and the losses in a narrower dtype.

        The losses are the numbers of values that ``overflow`` to Inf or ``underflow`` to 0, and the number of values
        ``narrowed`` that are finite and not 0.
        """
        dtype = getattr(torch, self.settings.dtype)
        stored, lost = {}, dict.fromkeys(LOST, 0)
        for name, value in rows.items():
            if name.startswith("attributions") and dtype != value.dtype:
                narrow = value.to(dtype)
                if dtype.itemsize < value.dtype.itemsize:
                    lost = {k: lost[k] + v for k, v in _lost(value, narrow).items()}
                value = narrow
            value = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
            stored[name] = value.detach().numpy()
        return stored, lost if lost["narrowed"] else {}

    def record(
        self, computed: Computed, stored: Mapping[str, np.ndarray], read: int, lost: Mapping[str, int]
    ) -> ChunkRecord:
        """The record of a computed chunk; ``read`` is the checksum of what was read."""
        checks = {"source": read} | {name: checksum([rows]) for name, rows in stored.items()}
        entered = {name: np.array([value], np.uint32) for name, value in checks.items()}
        record = computed.record
        return replace(record, checks=entered, facts={**record.facts, **lost})


def finite_rows(values: Tensor) -> Tensor:
    """Which samples of ``[n, ...]`` have finite values only, ``[n]``."""
    if not values.is_floating_point() or values.numel() == 0:
        return torch.ones(values.shape[0], dtype=torch.bool, device=values.device)
    flat = values.detach().reshape(len(values), -1)
    finite = flat.sum(1).isfinite()  # one pass without a copy; a sum may overflow, so the others are looked at closely
    suspects = (~finite).nonzero()[:, 0]
    finite[suspects] = flat[suspects].isfinite().all(1)
    return finite


def _named(samples: Sequence[int]) -> str:
    return f": {', '.join(map(str, samples[:NAMED]))}" + (", …" if len(samples) > NAMED else "") if samples else ""


def _lost(value: Tensor, narrow: Tensor) -> dict[str, int]:
    lost = dict.fromkeys(LOST, 0)
    few = max(1, LOOKED_AT // max(1, value[:1].numel()))  # the comparisons below make several copies
    for v, n in zip(value.split(few), narrow.split(few), strict=True):
        counted = v.isfinite() & (v != 0)
        for name, where in zip(LOST, (n.isinf() & counted, (n == 0) & counted, counted), strict=True):
            lost[name] += int(where.sum())
    return lost


def check_pinned(results: Results, settings: Settings) -> None:
    """Raise `fingerprint.Mismatch` if the caller asks for another chunk, batch, engine, number of threads or treatment
    of samples that are not finite than the store's."""
    pinned = results.about["pinned"]
    asked = {
        "chunk": settings.chunk and min(settings.chunk, results.samples),
        "batch": settings.batch and min(settings.batch, results.chunk),
        "threads": settings.threads,
        "engine": None if settings.engine == "auto" else settings.engine,
    }
    if settings.engine == "kernel" and results.about["program"] is None and results.about.get("engine") != "autograd":
        asked["engine"] = None  # kernels were asked for, and the network has none
    differing = [f"{k} {pinned[k]}, this call asks for {v}" for k, v in asked.items() if v and v != pinned[k]]
    before, now = results.about.get("nonfinite", "keep"), settings.nonfinite
    if now and now != before:
        if before != "error":  # a run that stopped at an error may continue with another: it has counted no such sample
            differing.append(f"nonfinite {before}, this call asks for {now}")
        elif not results.about["finished"] and not differing:
            results.about["nonfinite"] = now
            results.write_attributes()
    if differing:
        raise fingerprint.Mismatch(
            f"{results.place} was begun with {'; '.join(differing)}; nothing was changed. A run keeps what it was "
            "begun with, so that its result is the same to the last bit: leave these arguments out, or choose another "
            "place."
        )


def check_labels(results: Results, settings: Settings) -> None:
    """Raise `fingerprint.Mismatch` if the caller gives other names than the store's."""
    for what, given, stored in (("ids", settings.ids, results.ids), ("names", settings.names, results.names)):
        if given is not None and given != stored:
            has = "none" if stored is None else "others"
            raise fingerprint.Mismatch(
                f"{what}: {results.place} was begun with {has}; nothing was changed. Leave {what} out, or "
                "choose another place."
            )


@dataclass(frozen=True)
class Computed:
    """A chunk's results, on their way to the CPU, and its record."""

    chunk: int
    rows: Callable[[], dict[str, Tensor]]
    record: ChunkRecord
    release: Callable[[], None] = lambda: None  # called when the rows are written


class Pool:
    """Page-aligned memory for maps, which is reused: fresh memory costs a page fault for every 4 KiB of it."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
        self.shapes, self.dtypes = shapes, dtypes
        self.free: list[tuple[Tensor, ...]] = []

    def take(self) -> tuple[Tensor, ...]:
        try:
            return self.free.pop()
        except IndexError:
            pairs = zip(self.shapes, self.dtypes, strict=True)
            return tuple(torch.frombuffer(mmap.mmap(-1, math.prod(s) * d.itemsize), dtype=d).view(s) for s, d in pairs)

    def give(self, memory: tuple[Tensor, ...]) -> None:
        self.free.append(memory)
