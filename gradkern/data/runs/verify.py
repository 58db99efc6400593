"""`verify` finds damaged data in a store by checksums, and `repair` recomputes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...dispatch.targets import TopK
from ...util.options import BadValue
from ...util.renamed import renamed_argument
from .. import statistics
from ..sources import Source, Span, open_source
from ..store import checks, durable, labels, layout, locks
from ..store.attributes import Attributes
from ..store.durable import Damaged
from ..store.ledger import ChunkRecord, RecordLost, TreeNode
from ..store.results import Results
from .fingerprint import Mismatch
from .opening import open_run
from .runner import compute_missing, disk_full
from .settings import Settings
from .task import Task
from .writing import to_stored

ROOT = "zarr.json"
SPANS = "chunks/c.0.0"
SHOWN = 8


@dataclass(frozen=True)
class Verdict:
    """The findings of `verify`.

    ``files``: damaged or missing metadata files and constant arrays.  Everything else is checked only if these are
    intact.  ``records``: damaged records of the ledger, with the chunks that they covered.  ``chunks``: the arrays
    whose rows are damaged, by chunk.  ``reductions``: damaged results of statistics.  ``unfinished``: the number of
    chunks that were never finished, or whose record is missing.  ``unchecked``: the number of chunks without checksums,
    written by an earlier version; they are only read.
    """

    place: str
    files: tuple[str, ...] = ()
    records: Mapping[TreeNode, range] = field(default_factory=dict)
    chunks: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    reductions: tuple[str, ...] = ()
    unfinished: int = 0
    unchecked: int = 0
    finished: bool = False
    spans: tuple[Span, ...] = ()  # the samples whose chunks have to be recomputed

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged; chunks may be missing in an unfinished store."""
        lost = self.finished and self.unfinished
        return not (self.files or self.records or self.chunks or self.reductions or lost)

    def __str__(self) -> str:
        lines = []
        if self.files:
            lines.append(f"damaged or missing: {_few(list(self.files))}")
        if self.records:
            lines.append(f"damaged records of the ledger: {len(self.records)}")
        if self.chunks:
            named = sorted({name for names in self.chunks.values() for name in names})
            lines.append(f"damaged chunks: {_few(sorted(self.chunks))} ({', '.join(named)})")
        if self.reductions:
            lines.append(f"damaged statistics: {', '.join(self.reductions)}")
        if self.spans:
            lines.append(f"samples to recompute: {_few([f'{a} … {b - 1}' for a, b in self.spans])}")
        if self.unfinished:
            lost = ", though the store was complete" if self.finished else ""
            lines.append(f"{self.unfinished} chunks are not finished{lost}")
        if self.unchecked:
            lines.append(f"{self.unchecked} chunks have no checksums (an earlier version wrote them): they can be read")
        if self.ok:
            lines.insert(0, "everything that is finished is as it was written")
        return "\n".join(f"{self.place}: {line}" for line in lines)


def _few(items: list[Any]) -> str:
    return ", ".join(map(str, items[:SHOWN])) + (f", … ({len(items)})" if len(items) > SHOWN else "")


# ---------------------------------------------------------------------------------------------------------------
# Verifying


@renamed_argument("place", "store")
def verify(store: str | Path) -> Verdict:
    """Read a whole store and compare it with the checksums that were taken when it was written.

    The store is not changed; `repair` recomputes what is damaged.  Raises `BadValue` if there is no store.
    """
    text = str(store)
    if not Results.exists(text):
        raise BadValue(f"there is no store at {text}.")
    files = _damaged_files(durable.store_at(text, read_only=True))
    if set(files) - {checks.BACKUP}:
        return Verdict(text, files)
    results = Results.open(text)
    records, lost = _records(results)
    chunks, unchecked = _damaged_chunks(results, records)
    finished = results.finished
    unfinished = results.chunks - sum(len(results.ledger.span(n)) for n in (*records, *lost))
    reductions = () if lost or unfinished or not finished else _damaged_reductions(results)
    again = sorted({*chunks, *(c for span in lost.values() for c in span)})
    if finished and unfinished:
        again = sorted({*again, *set(range(results.chunks)).difference(*map(results.ledger.span, records))})
    spans = _join_spans([results.span(c) for c in again])
    return Verdict(text, files, lost, chunks, reductions, unfinished, unchecked, finished, spans)


def _damaged_files(store: Any) -> tuple[str, ...]:
    """The files that differ from their state at creation; a store of an earlier version does not tell."""
    backup, root = checks.read_backup(store), durable.get(store, ROOT)
    if backup is None:
        about = _description(root)
        if "checksum" not in about:
            return () if about else (ROOT,)
        if about["checksum"] != checks.of_attributes(about):
            return (checks.BACKUP, ROOT)
        listed = _listed(root).items()
        return (checks.BACKUP, *(key for key, wanted in listed if not _says(durable.get(store, key), wanted)))
    damaged = [key for key, content in backup.items() if key != ROOT and durable.get(store, key) != content]
    if not _root_is_whole(root, backup):
        damaged.append(ROOT)
    return tuple(sorted(damaged))


def _description(content: bytes | None) -> dict[str, Any]:
    """The attributes of gradkern in a ``zarr.json``; empty if they cannot be read."""
    try:
        about = json.loads(content or b"")["attributes"]["gradkern"]
    except (ValueError, KeyError, TypeError):
        return {}
    return about if isinstance(about, dict) else {}


def _listed(root: bytes | None) -> dict[str, Any]:
    """The arrays' and groups' descriptions that the root repeats, by the key of their own file."""
    metadata = (json.loads(root or b"{}").get("consolidated_metadata") or {}).get("metadata", {})
    return {f"{name}/{ROOT}": _without_consolidated(described) for name, described in metadata.items()}


def _says(content: bytes | None, wanted: Any) -> bool:
    try:
        return _without_consolidated(json.loads(content or b"")) == wanted
    except (ValueError, AttributeError):
        return False


def _root_is_whole(content: bytes | None, backup: Mapping[str, bytes]) -> bool:
    """The root's attributes change when a run is completed, and have a checksum; the rest is as at creation."""
    about = _description(content)
    if not about or about.get("checksum") != checks.of_attributes(about):
        return False
    now, before = json.loads(content or b""), json.loads(backup[ROOT])
    for described in (now, before):
        described.pop("attributes", None)
        described.pop("consolidated_metadata", None)
    arrays = {k: _without_consolidated(json.loads(v)) for k, v in backup.items() if k.endswith(f"/{ROOT}")}
    return now == before and _listed(content) == arrays


def _without_consolidated(described: Any) -> Any:
    return {k: v for k, v in described.items() if k != "consolidated_metadata"}


def _records(results: Results) -> tuple[dict[TreeNode, ChunkRecord], dict[TreeNode, range]]:
    """The records that can be read, without their statistics, and the chunks of those that cannot."""
    ledger = results.ledger
    nodes, before = ledger.nodes(), None
    while True:
        records, lost, missing = {}, {}, False
        for node in sorted(nodes):
            try:
                record = ledger.read(node)
                records[node] = ChunkRecord({}, record.facts, record.checks, record.chunks)
            except Damaged as error:
                lost[node], missing = ledger.span(node), missing or isinstance(error, RecordLost)
        if not missing or nodes == before:
            return records, lost
        before, nodes = nodes, ledger.nodes()  # a concurrent run may have merged them


def _damaged_chunks(
    results: Results, records: Mapping[TreeNode, ChunkRecord]
) -> tuple[dict[int, tuple[str, ...]], int]:
    """The damaged arrays by chunk, and how many chunks have no checksums."""
    damaged, unchecked = {}, 0
    short = results.short_files()
    for node, record in records.items():
        for i, chunk in enumerate(results.ledger.span(node)):
            recorded = {name: int(value[i]) for name, value in record.checks.items()}
            unchecked += all(value == checks.UNKNOWN for name, value in recorded.items() if name != "source")
            names = tuple(
                name
                for name in results.arrays()
                if (name, chunk) in short or not _as_written(results, name, chunk, recorded.get(name, checks.UNKNOWN))
            )
            if names:
                damaged[chunk] = names
    return damaged, unchecked


def _as_written(results: Results, name: str, chunk: int, recorded: int) -> bool:
    start, stop = results.span(chunk)
    try:
        rows = np.asarray(results.array(name)[start:stop])
    except Exception:  # whatever a codec raises for corrupt bytes
        return False
    return recorded in (checks.UNKNOWN, checks.checksum([rows]))


def _damaged_reductions(results: Results) -> tuple[str, ...]:
    total, names = results.ledger.total(), results.inputs
    assert total is not None
    damaged = []
    for i, name in enumerate(names):
        for reduction, value in statistics.finish(results.reductions, total.sums, name).items():
            key = layout.reduction_key(reduction, names, i)
            try:
                array = results.array(key)
                whole = np.asarray(array[...]).tobytes() == value.astype(array.dtype).tobytes()
            except Exception:
                whole = False
            if not whole:
                damaged.append(key)
    return tuple(damaged)


def _join_spans(spans: list[Span]) -> tuple[Span, ...]:
    """Neighbouring spans as one."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


# ---------------------------------------------------------------------------------------------------------------
# Repairing


@renamed_argument("place", "store")
def repair(
    store: str | Path, model: nn.Module, source: Any, *, settings: Settings | None = None, columns: Any = None,
    input_dtype: torch.dtype | None = None, progress: bool | None = None,
) -> Results:  # fmt: skip
    """Recompute what `verify` finds damaged, from the run's own model and source; intact data is not touched.

    ``settings``: the settings of the run, needed if the store holds only a hash of its targets or arguments.  The
    recomputed data is bit-equal to the original, which the checksums confirm; if it is not, a note in the store says
    so.  Raises `fingerprint.Mismatch` for another model or source, and `store.locks.Busy` while a run is writing.
    """
    text = str(store)
    with disk_full(text):
        _restore_files(text)
        verdict = verify(text)
        results = Results.open(text, read_only=False)
        with locks.hold(results.store, range(results.chunks)):
            if not verdict.ok:
                _redo(results, verdict, model, as_padded(source, columns, input_dtype, results), settings, progress)
        results = Results.open(text, read_only=False)
        results.complete()
    return Results.open(text)


def as_padded(source: Any, columns: Any, input_dtype: torch.dtype | None, results: Results) -> Source:
    """The source, padded as it was in the run of ``results``."""
    padding = results.about.get("padding")
    rows = open_source(source, columns, input_dtype)
    if padding is None or rows.padding is not None:
        return rows
    rows = rows.pad_with(padding["value"] if padding["length"] is None else (padding["value"], padding["length"]))
    if rows.padding is not None:
        rows.padding = replace(rows.padding, gives=tuple(padding["gives"]))
    return rows


def _restore_files(place: str) -> None:
    if not Results.exists(place):
        raise BadValue(f"there is no store at {place}.")
    store = durable.store_at(place)
    backup, damaged = checks.read_backup(store), _damaged_files(store)
    if backup is None and ROOT in damaged:
        raise Damaged(f"{place}: {_few(list(damaged))} is damaged and has no copy. Make the store again elsewhere.")
    if backup is None and damaged:
        listed = _listed(durable.get(store, ROOT))
        for key in set(damaged) - {checks.BACKUP}:
            durable.put(store, key, json.dumps(listed[key], indent=2).encode())
        opened = Results.open(place, read_only=False)
        constant = {"targets/c.0"} if opened.array("targets").ndim == 1 else set()
        constant |= {layout.chunk_key(name, 0, opened.array(name).ndim) for name in labels.LABELS if name in opened}
        if durable.size(store, SPANS) < 0:
            opened.array("chunks")[...] = layout.spans(opened.samples, opened.chunk)
        checks.write_backup(store, {ROOT, *listed, SPANS, *constant})
    elif backup is not None:
        for key in damaged:
            durable.put(store, key, backup[key])


def _redo(
    results: Results, verdict: Verdict, model: nn.Module, source: Any, settings: Settings | None, progress: bool | None
) -> None:
    lost = {c for span in verdict.records.values() for c in span}
    if verdict.finished:
        lost |= set(range(results.chunks)) - results.ledger.finished()
    task = open_run(model, source, results.place, settings or settings_of_store(results.about))
    results = task.results
    for node in verdict.records:
        durable.delete(results.store, results.ledger.key(node))
    if results.finished:
        results.about["finished"] = False  # until `complete` has written the reductions again
        results.write_attributes()
    with task.ready():
        for chunk, names in verdict.chunks.items():
            _rewrite(task, chunk, names)
    if lost:
        compute_missing(task, range(results.chunks), progress, lost)


def _rewrite(task: Task, chunk: int, names: tuple[str, ...]) -> None:
    """Recompute a chunk, and write those of its arrays that are damaged."""
    ledger = task.results.ledger
    node = next(n for n in ledger.nodes() if chunk in ledger.span(n))
    record, at = ledger.read(node), chunk - ledger.span(node)[0]
    recorded = {name: int(value[at]) for name, value in record.checks.items()}
    rows, read = next(task.reading.stream([chunk]))
    if checks.UNKNOWN not in (read, recorded.get("source", checks.UNKNOWN)) and read != recorded["source"]:
        start, stop = task.results.span(chunk)
        raise Mismatch(f"{task.results.place}: the samples {start} … {stop - 1} have changed since they were computed.")
    computed = task.compute(chunk, task.transfer.upload(rows))
    stored, _ = to_stored(computed.rows(), task.maps_dtype)
    task.results.write(chunk, {name: stored[name] for name in names})
    checksums = {name: checks.checksum([stored[name]]) for name in names}
    computed.release()
    others = {name: value for name, value in checksums.items() if value != recorded.get(name, checks.UNKNOWN)}
    if others:
        differs = any(recorded.get(name, checks.UNKNOWN) != checks.UNKNOWN for name in others)
        ledger.amend(chunk, others, task.notes or (["repaired, other bits"] if differs else []))


def settings_of_store(about: Attributes) -> Settings:
    """The settings that a store was made with, as far as it holds them.  Raises `BadValue` if it has only a hash."""
    fingerprint, pinned = about["fingerprint"], about["pinned"]
    of_method = fingerprint["method"]
    targets, arguments = of_method["targets"], of_method["arguments"]
    output = of_method.get("output")
    hashed = "output_code" in of_method
    if hashed or isinstance(targets, dict) or any(isinstance(v, (list, dict)) for v in arguments.values()):
        raise BadValue(
            "the store holds only a hash of its run's targets, arguments or output. Call gradkern.data.repair(store, "
            "model, source, settings=gradkern.data.Settings(...)) with those of the run."
        )
    if isinstance(targets, str) and targets.startswith("TopK("):
        targets = TopK(int(targets[5:-1]))
    return Settings(
        of_method["method"], targets, arguments, **fingerprint["stored"], nonfinite=about.get("nonfinite"),
        output=output, chunk=pinned["chunk"],
    )  # fmt: skip
