"""A run as one object, which computes its chunks."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...util.options import BadValue
from .. import methods, statistics
from ..sources import Source
from ..store.layout import map_names
from ..store.ledger import NAMED, ChunkRecord
from ..store.results import Results
from . import contents, fingerprint, forecast
from .pins import pinning
from .probe import Probe, device_of, targets_of_samples
from .reading import Reading
from .settings import Settings
from .transfer import MapBuffers, Ready, Transfer

log = logging.getLogger("gradkern.data")


class Task:
    """A run, with everything needed to compute a chunk.  `opening.open_run` makes it."""

    def __init__(
        self, model: nn.Module, source: Source, settings: Settings, results: Results, probe: Probe, notes: list[str]
    ) -> None:
        self.model, self.source, self.settings, self.results = model, source, settings, results
        self.probe, self.notes = probe, notes
        self.method = methods.find(settings.method, settings.arguments)
        self.device = device_of(model)
        self.transfer = Transfer(self.device)
        self.pinned = results.pinned
        self.nonfinite = results.about.get("nonfinite", "keep")
        self.batch = int(self.pinned["batch"])
        self.sums_only = contents.sums_only(source, probe)
        self.reading = Reading(source, results, probe.spot_samples, settings.trust_source)
        self.buffers: MapBuffers | None = None
        maps = probe.outcome.maps
        if settings.maps and self.device.type == "cpu" and probe.outcome.outputs.dim() == 2:
            self.buffers = MapBuffers([(results.chunk, *m.shape[1:]) for m in maps], [m.dtype for m in maps])

    @property
    def maps_dtype(self) -> torch.dtype:
        return getattr(torch, self.settings.dtype)

    def forecast(self, chunks: Sequence[int]) -> forecast.Forecast:
        """The forecast for computing these chunks, without the memory, which `data.plan` measures."""
        samples = sum(b - a for a, b in map(self.results.span, chunks))
        written = self.probe.map_elements * forecast.itemsize(self.settings.dtype) * samples * self.settings.maps
        return forecast.Forecast(samples, len(chunks), self.results.chunk, self.batch, written, self.probe.rate)

    def try_batch(self, samples: int) -> None:
        """Compute a batch of samples that were read before, for its time and memory alone."""
        rows = [torch.cat(parts) for parts in zip(*self.probe.spot_samples.rows.values(), strict=True)]
        inputs = tuple(x[torch.arange(samples) % len(x)].to(self.device) for x in rows)
        trial = copy.copy(self)
        trial.nonfinite = "keep"  # the run itself says which samples are not finite
        with self.ready():
            trial._batch(inputs, 0, self._accumulators(), None, [])

    def ready(self) -> AbstractContextManager[None]:
        """The threads and memory budget that the store pins, for the computing thread."""
        return pinning(self.pinned, self.settings)

    def compute(self, chunk: int, upload: Ready) -> Computed:
        """Compute one chunk, from inputs on the device to the arrays to be written."""
        begin = time.perf_counter()
        inputs = upload()
        memory = self.buffers.take() if self.buffers and self.batch >= self.results.chunk else None
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
        buffers = self.buffers
        if memory is None or buffers is None:
            return computed
        return replace(computed, release=lambda: buffers.give(memory))

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
        targets = targets_of_samples(self.settings.targets, which, samples)
        arguments = methods.arguments_of(self.method, self.settings.arguments, which, samples, inputs)
        batch = methods.Batch(self.model, inputs, targets, self.pinned["engine"], arguments, first, out)
        if self.sums_only and (outputs := self._summed(batch, reducers, bad)) is not None:
            return {"predictions": outputs}
        outcome = self._without_padding(self.method(batch), which)
        finite = self._finite_inputs(inputs) & ~outcome.outputs.reshape(len(inputs[0]), -1).isnan().any(1).cpu()
        for maps in outcome.maps:
            finite &= statistics.finite_rows(maps).cpu()
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
                finite &= statistics.finite_rows(inputs[i]).cpu()
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


def _named(samples: Sequence[int]) -> str:
    return f": {', '.join(map(str, samples[:NAMED]))}" + (", …" if len(samples) > NAMED else "") if samples else ""


@dataclass(frozen=True)
class Computed:
    """A chunk's results, on their way to the CPU, and its record."""

    chunk: int
    rows: Callable[[], dict[str, Tensor]]
    record: ChunkRecord
    release: Callable[[], None] = lambda: None  # called when the rows are written
