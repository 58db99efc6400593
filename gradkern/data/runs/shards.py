"""Shards: the chunks of each, and merging their stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...util.options import BadValue
from ..store import durable, locks
from ..store.layout import chunk_key
from ..store.results import Results
from . import fingerprint, pins

Shard = tuple[int, int]


def owned_chunks(chunks: int, shard: Shard) -> range:
    """The chunks of shard ``(i, n)``.  They are consecutive; the shards are disjoint and together cover all chunks."""
    ok = isinstance(shard, (tuple, list)) and len(shard) == 2 and all(type(v) is int for v in shard)
    if not ok or not 0 <= shard[0] < shard[1]:
        raise BadValue(f"shard: got {shard!r}, expected (i, n) with 0 <= i < n, such as (0, 4).")
    i, n = shard
    return range(chunks * i // n, chunks * (i + 1) // n)


def merge(out: str | Path, parts: Sequence[str | Path] = ()) -> Results:
    """Complete a store, after copying the finished chunks of ``parts`` to it.

    ``parts`` are stores of the same run made elsewhere (each shard on its own disk).  Raises `Mismatch` if one belongs
    to another run, and `BadValue` if chunks are missing.  Parts that were computed with other threads, versions or
    instructions, or another way, are equal within rounding: the store then says so, as after a resume.
    """
    results = Results.open(out, read_only=False)
    others, notes = [Results.open(p) for p in parts], {}
    for other in others:
        same_keys = fingerprint.keys_version(other.about) == fingerprint.keys_version(results.about)
        fingerprint.check_same(other.place, results.about["fingerprint"], other.about["fingerprint"], graph=same_keys)
        if (other.pinned["chunk"], other.pinned["batch"]) != (results.pinned["chunk"], results.pinned["batch"]):
            raise fingerprint.Mismatch(
                f"{other.place} has another chunk grid than {results.place}. Give all shards one chunk= and batch=."
            )
        both = [r.about for r in (results, other)]
        if len({about.get("numerics", 1) for about in both}) > 1:
            raise fingerprint.Mismatch(
                f"{other.place} and {results.place} are of versions whose kernels round differently. Run that shard "
                "again."
            )
        if results.reductions and len(set(map(fingerprint.sums_squares, both))) > 1:
            raise fingerprint.Mismatch(
                f"{other.place} and {results.place} are of versions with other statistics. Run that shard again."
            )
        if (other.ids, other.names) != (results.ids, results.names):
            raise fingerprint.Mismatch(f"{other.place} has other ids or names than {results.place}.")
        notes[other.place] = pins.unlike(results.pinned, other.pinned, plan=same_keys)
    if others:
        with locks.hold(results.store, range(results.chunks)):
            for other in others:
                _take(results, other, notes[other.place])
    if not results.complete():
        missing = sorted(set(range(results.chunks)) - results.ledger.finished())
        raise BadValue(
            f"{results.place}: {len(missing)} of {results.chunks} chunks are not finished (the first is {missing[0]}, "
            f"samples {results.span(missing[0])[0]} on). Run the missing shards, or without shard=."
        )
    return Results.open(out)


def _take(results: Results, other: Results, notes: Sequence[str]) -> None:
    """Copy finished chunks that are missing here: data first, then the records that make them finished, with notes."""
    finished = results.ledger.finished()
    for node in sorted(other.ledger.nodes()):
        chunks = set(results.ledger.span(node))
        if chunks <= finished:
            continue
        if chunks & finished:
            raise BadValue(
                f"{other.place} and {results.place} share some, but not all, of the chunks {min(chunks)} … "
                f"{max(chunks)}: they are not shards of one run. Run it again without shard=."
            )
        for name in other.arrays():
            array = other.array(name)
            for chunk in sorted(chunks):
                key = chunk_key(name, chunk, array.ndim)
                content = durable.get(other.store, key)
                if content is None:
                    raise BadValue(f"{other.place} has lost {key}. Run that shard again.")
                durable.put(results.store, key, content)
        record = other.ledger.read(node)
        facts = {**record.facts, "notes": sorted({*record.facts["notes"], *notes})}
        durable.put(results.store, results.ledger.key(node), replace(record, facts=facts).to_bytes())
        finished |= chunks
