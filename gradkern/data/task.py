"""A run as data: what is computed and stored, what is pinned; and the computing of one chunk."""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import api, ops, options
from ..job import Job, jacobian_choice
from ..narrow import narrowed
from ..options import BadType, BadValue
from ..plan import plan as make_plan
from ..program import Program
from . import fingerprint, forecast, methods, statistics
from .ledger import Record
from .results import FORMAT, NAMES, Array, Results, codecs
from .sources import Source, open_source
from .transfer import Ready, Transfer

log = logging.getLogger("gradkern.data")

PROBED = 4
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Settings:
    """What a run is asked for, as `gradkern.run` takes it; plain data, so that it can travel to other processes."""

    method: str = "saliency"
    targets: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    maps: bool = True
    reductions: tuple[str, ...] = ()
    top_features: int = 0
    dtype: str = "float32"
    compression: str = "none"
    chunk: int | None = None
    batch: int | None = None
    threads: int | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in NAMES:
            raise BadValue(f"dtype: got {self.dtype!r}, expected one of {', '.join(NAMES)}.")
        codecs(self.compression)
        object.__setattr__(self, "reductions", statistics.check(self.reductions))
        for name in ("chunk", "batch", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BadValue(f"{name}: got {value!r}, expected a positive number, or None.")
        if not self.maps and not self.reductions and not self.top_features:
            raise BadValue("maps: got False without reductions or top_features, so nothing but predictions is left.")


@dataclass(frozen=True)
class Probe:
    """What a few samples showed: shapes of the outcome, and the samples per second of a first try."""

    program: Program | None
    engine: str
    outcome: methods.Outcome
    inputs: tuple[Tensor, ...]
    rate: float

    @property
    def seeds(self) -> int:
        return self.outcome.maps[0].shape[1]


class Task:
    """A run with everything that computing a chunk needs.  `Task.prepare` makes or opens the store."""

    def __init__(
        self, model: nn.Module, source: Source, settings: Settings, results: Results, probe: Probe, notes: list[str]
    ) -> None:
        self.model, self.source, self.settings, self.results = model, source, settings, results
        self.probe, self.notes = probe, notes
        self.method = methods.find(settings.method, settings.arguments)
        self.device = _device(model)
        self.transfer = Transfer(self.device)
        self.pinned = results.about["pinned"]
        self.batch = int(self.pinned["batch"])
        self.floating = [i for i, x in enumerate(probe.inputs) if x.is_floating_point()]
        self.pool: Pool | None = None
        maps = probe.outcome.maps
        if settings.maps and self.device.type == "cpu" and probe.outcome.outputs.dim() == 2:
            self.pool = Pool([(results.chunk, *m.shape[1:]) for m in maps], [m.dtype for m in maps])

    # ---- making

    @classmethod
    def prepare(
        cls, model: Any, source: Any, out: str | Path, settings: Settings, *, columns: Any = None,
        input_dtype: torch.dtype | None = None, made_by: Mapping[str, Any] | None = None,
    ) -> Task:  # fmt: skip
        """Look at model and source, and make the store, or open the one that is there and check that it is this run's.

        Raises `fingerprint.Mismatch` where it is another run's.
        """
        if not isinstance(model, nn.Module):
            raise BadType(f"model: got {type(model).__name__}, expected a torch.nn.Module.")
        rows = open_source(source, columns, input_dtype)
        known = Results.open(out, read_only=False) if Results.exists(out) else None
        pinned = dict(known.about["pinned"]) if known else {}
        _pin_isa(pinned.get("isa"))
        with pinning(pinned, settings):
            probe = _probe(model, rows, settings, pinned.get("engine"))
        asked = _fingerprint(model, rows, settings, probe)
        if known is None:
            about = _about(asked, rows, settings, probe, made_by)
            arrays = _arrays(rows, settings, probe, about)
            known = Results.create(out, arrays, about, settings.compression)
        fingerprint.check_same(str(out), known.about["fingerprint"], asked)
        return cls(model, rows, settings, known, probe, _differences(known.about, probe, settings))

    def forecast(self, chunks: Sequence[int]) -> forecast.Forecast:
        """What computing these chunks will take."""
        samples = sum(b - a for a, b in map(self.results.span, chunks))
        row = sum(a[:1].nbytes for a in self.probe.outcome.maps)
        stored = sum(a[:1].numel() for a in self.probe.outcome.maps) * itemsize(self.settings.dtype)
        held = row if self.settings.maps else 0
        reads = sum(x[:1].nbytes for x in self.probe.inputs)
        memory = forecast.QUEUED * self.results.chunk * (held + reads) + options.memory_budget()
        return forecast.Forecast(
            samples, len(chunks), self.results.chunk, self.batch, stored * samples * self.settings.maps, memory,
            self.probe.rate,
        )  # fmt: skip

    # ---- computing

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Threads and memory budget as the store pins them, for the thread that computes."""
        with pinning(self.pinned, self.settings):
            yield

    def compute(self, chunk: int, upload: Ready) -> Computed:
        """One chunk, from inputs on the device to what is to be written."""
        begin = time.perf_counter()
        inputs = upload()
        memory = self.pool.take() if self.pool and self.batch >= self.results.chunk else None
        while True:
            try:
                reducers, kept = self._batches(chunk, inputs, memory)
                break
            except Exception as error:
                if not forecast.out_of_memory(error) or self.batch == 1:
                    raise
                self._back_off()  # and do the chunk afresh: what it has summed up so far is not complete
        facts = {
            "samples": inputs[0].shape[0],
            "seconds": time.perf_counter() - begin,
            "batches": [self.batch],
            "notes": list(self.notes),
        }
        sums = {k: v for name, r in reducers.items() for k, v in r.result(name).items()}
        names = list(kept)
        whole = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in kept.values()]
        download = self.transfer.download(whole)
        rows = Computed(chunk, lambda: dict(zip(names, download(), strict=True)), Record(sums, facts))
        return rows if memory is None else replace(rows, release=lambda: self.pool.give(memory))

    def _batches(
        self, chunk: int, inputs: tuple[Tensor, ...], memory: tuple[Tensor, ...] | None
    ) -> tuple[dict[str, statistics.Accumulator], dict[str, list[Tensor]]]:
        """The chunk's statistics by input, and its rows by array, in pieces."""
        first, stop = self.results.span(chunk)
        reducers, kept = self._accumulators(), {}
        for at in range(0, stop - first, self.batch):
            part = tuple(x[at : at + self.batch] for x in inputs)
            out = None if memory is None else tuple(m[at : at + len(part[0])] for m in memory)
            for name, rows in self._batch(part, first + at, reducers, out).items():
                kept.setdefault(name, []).append(rows)
        return reducers, kept

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
        outputs = math.prod(self.probe.outcome.outputs.shape[1:])
        classes = self.probe.seeds if self.probe.outcome.rows is None else outputs
        return {
            name: statistics.Accumulator(self.settings.reductions, classes, tuple(self.probe.inputs[i].shape[1:]))
            for i, name in zip(self.floating, map_names(self.floating), strict=True)
        }

    def _batch(
        self, inputs: tuple[Tensor, ...], first: int, reducers: Mapping[str, statistics.Accumulator],
        out: tuple[Tensor, ...] | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The rows to be stored of one batch; its statistics go to ``reducers``, and only if all went well."""
        targets = self.settings.targets
        if self.probe.outcome.rows is not None and isinstance(targets, (Tensor, np.ndarray, list)):
            targets = torch.as_tensor(targets)[first : first + inputs[0].shape[0]]
        engine = self.pinned["engine"]
        batch = methods.Batch(self.model, inputs, targets, engine, self.settings.arguments, first, out)
        found = self.method(batch)
        rows = {"predictions": found.outputs}
        if found.rows is not None:
            rows["targets"] = found.rows
        if found.deltas is not None:
            rows["deltas"] = found.deltas
        names = map_names(self.floating)
        if self.settings.maps:
            rows |= dict(zip(names, found.maps, strict=True))
        if self.settings.top_features:
            for name, maps in zip(names, found.maps, strict=True):
                top = maps.abs().flatten(2).topk(self.settings.top_features, dim=2).indices
                rows[name.replace("attributions", "top_features")] = top
        for i, name, maps in zip(self.floating, names, found.maps, strict=True):
            if name in reducers:
                where = None if found.rows is None else found.rows.cpu()
                reducers[name].add(first, maps.detach().cpu(), inputs[i].detach().cpu(), where)
        return rows

    def stored(self, rows: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Rows as the store's arrays take them."""
        dtype = getattr(torch, self.settings.dtype)
        found = {}
        for name, value in rows.items():
            value = value.to(dtype) if name.startswith("attributions") else value
            if value.dtype == torch.bfloat16:
                value = value.view(torch.uint16)
            found[name] = value.detach().numpy()
        return found

    def finish(self) -> bool:
        """Where every chunk is finished: the reductions, once.  Safe to be called by several at a time."""
        return finish(self.results)


@dataclass(frozen=True)
class Computed:
    """A chunk's results, on their way to the CPU, and its record."""

    chunk: int
    rows: Callable[[], dict[str, Tensor]]
    record: Record
    release: Callable[[], None] = lambda: None  # called when the rows are written


class Pool:
    """Page-aligned memory for maps, used again and again: fresh memory costs a page fault for every 4 KiB of it."""

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


def finish(results: Results) -> bool:
    """Write the reductions and mark the store complete; False where chunks are missing."""
    if results.about.get("finished"):
        return True
    total = results.ledger.total()
    if total is None:
        return False
    names = results.about["inputs"]
    for i, name in enumerate(names):
        for reduction, value in statistics.finish(results.about["reductions"], total.sums, name).items():
            results.set(f"reductions/{reduction}" if len(names) == 1 else f"reductions/{reduction}_{i}", value)
    notes = total.facts["notes"]
    exact = {"exact": not notes, "notes": notes}
    if notes:
        exact["tolerance"] = TOLERANCE[results.about["arrays"]["dtype"]]
    results.note(finished=True, **exact)
    return True


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def map_names(floating: Sequence[int]) -> list[str]:
    """Names of the arrays of maps, one per differentiated input."""
    return ["attributions"] if len(floating) == 1 else [f"attributions_{i}" for i in range(len(floating))]


# ---------------------------------------------------------------------------------------------------------------
# Looking


def _device(model: nn.Module) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _probe(model: nn.Module, source: Source, settings: Settings, engine: str | None) -> Probe:
    """Trace, and run the method on a few samples."""
    count = min(PROBED, source.samples)
    inputs = tuple(x.to(_device(model)) for x in source.read(0, count))
    engine = engine or options.engine(settings.engine)
    program = None
    if engine != "autograd":
        program = api.prepare(model, inputs)
        engine = "autograd" if program is None else "kernel" if engine == "auto" else engine
    if program is None and count > 1:
        floating = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())
        reason = api.why_whole(Job(model, inputs, floating, jacobian_choice(None)))
        if reason:
            raise BadValue(
                f"model: {reason}, so a sample's result would depend on the chunk that it is in. Use model.eval(), or "
                "gradkern.jacobian on the whole batch."
            )
    method = methods.find(settings.method, settings.arguments)
    targets = settings.targets
    if isinstance(targets, list) and targets and isinstance(targets[0], list):
        targets = torch.tensor(targets)
    if isinstance(targets, (Tensor, np.ndarray)) and np.ndim(targets) == 2:
        if len(targets) != source.samples:
            raise BadValue(f"targets: got {len(targets)} rows, expected one for each of {source.samples} samples.")
        targets = torch.as_tensor(targets)[:count]
    batch = methods.Batch(model, inputs, targets, engine, settings.arguments)
    outcome = method(batch)  # warms up
    begin = time.perf_counter()
    method(batch)
    return Probe(program, engine, outcome, inputs, count / (time.perf_counter() - begin))


def _fingerprint(model: nn.Module, source: Source, settings: Settings, probe: Probe) -> dict[str, Any]:
    return {
        "model": fingerprint.of_model(model, probe.program),
        "method": {
            "method": settings.method,
            "targets": fingerprint.of_targets(settings.targets),
            "arguments": fingerprint.of_arguments(settings.arguments),
        },
        "source": fingerprint.of_source(source),
        "stored": {
            "maps": settings.maps,
            "reductions": list(settings.reductions),
            "top_features": settings.top_features,
            "dtype": settings.dtype,
            "compression": settings.compression,
        },
    }


def _about(
    asked: dict[str, Any], source: Source, settings: Settings, probe: Probe, made_by: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The store's attributes.  Everything that decides about the last bits is under ``pinned``."""
    budget = options.memory_budget()
    row = sum(m[:1].nbytes for m in probe.outcome.maps)
    elements = sum(m[:1].numel() for m in probe.outcome.maps)
    reads = sum(x[:1].nbytes for x in probe.inputs)
    chunk = settings.chunk or forecast.chunk_size(
        source.samples, elements * itemsize(settings.dtype) if settings.maps else 0, reads
    )
    chunk = min(chunk, source.samples)
    batch = min(settings.batch or forecast.batch_size(chunk, row, settings.maps, budget), chunk)
    floating = [i for i, x in enumerate(probe.inputs) if x.is_floating_point()]
    about = {
        "format": FORMAT,
        "fingerprint": asked,
        "pinned": {
            "chunk": chunk,
            "batch": batch,
            "threads": settings.threads or torch.get_num_threads(),
            "memory_budget": budget,
            "engine": probe.engine,
            "precision": torch.get_float32_matmul_precision(),
            "plan": _plan_key(probe),
            **fingerprint.of_machine(),
        },
        "inputs": map_names(floating),
        "reductions": list(settings.reductions),
        "arrays": {"dtype": settings.dtype, "compression": settings.compression},
        "output": list(probe.outcome.outputs.shape[1:]),
        "program": str(probe.program) if probe.program else None,
        "finished": False,
    }
    return about | ({"made_by": dict(made_by)} if made_by else {})


def _plan_key(probe: Probe) -> str | None:
    """A hash of the plan: which way each step goes."""
    if probe.program is None or probe.engine != "kernel":
        return None
    text = str(make_plan(narrowed(probe.program), seeds=probe.seeds, dtype=probe.inputs[0].dtype))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _differences(about: Mapping[str, Any], probe: Probe, settings: Settings) -> list[str]:
    """What of the pinned facts cannot be had here, in words: the result is then equal within rounding only."""
    pinned = about["pinned"]
    now = fingerprint.of_machine() | {"engine": probe.engine}
    if now["isa"] == pinned["isa"]:
        now["plan"] = _plan_key(probe)
    return [f"{k} {now[k]} instead of {pinned[k]}" for k in now if k != "python" and now[k] != pinned[k]]


def _arrays(source: Source, settings: Settings, probe: Probe, about: Mapping[str, Any]) -> list[Array]:
    n, seeds, chunk = source.samples, probe.seeds, about["pinned"]["chunk"]
    out, found = tuple(about["output"]), []
    outcome = probe.outcome
    for name, maps in zip(about["inputs"], outcome.maps, strict=True):
        shape = tuple(maps.shape[2:])
        axes = tuple(f"{name.replace('attributions', 'input')}_axis{i}" for i in range(len(shape)))
        if settings.maps:
            found.append(Array(name, (n, seeds, *shape), settings.dtype, ("sample", "target", *axes), chunk, True))
        if settings.top_features:
            k = settings.top_features
            if k > math.prod(shape):
                raise BadValue(f"top_features: got {k}, but a sample has {math.prod(shape)} features.")
            top = name.replace("attributions", "top_features")
            found.append(Array(top, (n, seeds, k), "int64", ("sample", "target", "place"), chunk))
        classes = seeds if outcome.rows is None else math.prod(out)
        for reduction in settings.reductions:
            at = reduction if len(about["inputs"]) == 1 else f"{reduction}_{about['inputs'].index(name)}"
            last, kind = ((statistics.RANK_BINS,), "int64") if reduction == "ranks" else ((), "float64")
            text = statistics.REDUCTIONS[reduction].about
            found.append(Array(
                f"reductions/{at}", (classes, *shape, *last), kind,
                ("class", *axes, *(("rank",) if last else ())), 1, attributes={"about": text},
            ))  # fmt: skip
    predicted = str(outcome.outputs.dtype).removeprefix("torch.")
    axes = tuple(f"output_axis{i}" for i in range(len(out)))
    found.append(Array("predictions", (n, *out), predicted, ("sample", *axes), chunk))
    if outcome.rows is not None:
        found.append(Array("targets", (n, seeds), "int64", ("sample", "target"), chunk))
    else:
        numbers = jacobian_choice(settings.targets)(1, out).indices
        numbers = torch.arange(seeds) if numbers is None else numbers
        found.append(Array("targets", (seeds,), "int64", ("target",), content=numbers.numpy()))
    if outcome.deltas is not None:
        found.append(Array("deltas", (n, seeds), str(outcome.deltas.dtype)[6:], ("sample", "target"), chunk))
    edges = np.arange(0, n, chunk)
    content = np.stack([edges, np.minimum(edges + chunk, n)], axis=1)  # [K, 2]
    found.append(Array("chunks", content.shape, "int64", ("chunk", "edge"), content=content))
    return found


# ---------------------------------------------------------------------------------------------------------------
# Pinning


@contextmanager
def pinning(pinned: Mapping[str, Any], settings: Settings) -> Iterator[None]:
    """The store's number of threads, memory budget and precision (else the caller's), put back afterwards."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        if pinned:
            stack.enter_context(options.use(memory_budget=pinned["memory_budget"]))
        stack.callback(torch.set_num_threads, threads)
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_num_threads(pinned.get("threads") or settings.threads or threads)
        torch.set_float32_matmul_precision(pinned.get("precision") or precision)
        yield


def _pin_isa(wanted: str | None) -> None:
    """Ask for the store's instruction set, where none has been chosen yet: the choice is made once per process."""
    if wanted in (None, "none") or os.environ.get("GRADKERN_ISA"):
        return
    extension = ops.extension()
    if extension is None or ops.isa_is_chosen():
        return
    os.environ["GRADKERN_ISA"] = wanted
    try:
        ops.machine()
    except RuntimeError:  # this processor does not have it: the difference is noted in the store
        pass
    finally:
        del os.environ["GRADKERN_ISA"]


__all__ = ["Computed", "Probe", "Settings", "Task", "finish", "map_names", "replace"]
