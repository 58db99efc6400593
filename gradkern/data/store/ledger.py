"""The ledger: the finished chunks, and the statistics of each, as a tree that merges exactly.

A finished chunk is a record at level 0.  Two records of neighbouring ranges become one at the next level, so a run
of K chunks leaves about log K records, whatever the number of features.  The tree's shape depends only on the chunks'
indices: sums taken in any order, by any number of processes, after any number of kills, are bit-equal.

A record is written atomically after all the data of its chunk, so the record itself marks the chunk as finished.  A
parent is written before its children are removed; a record below a finished parent is ignored.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from zarr.abc.store import Store

from ..statistics import merge
from . import durable, trust
from .checks import UNKNOWN
from .durable import Damaged

FOLDER = "chunks/finished"
RECORD = re.compile(r"([0-9]{2})\.([0-9]{8,18})\.npz")
CHECKS = "checks/"  # begins the names of the checksums in a record's file
KEPT_BYTES = 8 << 20  # records with more statistics are not kept in memory, but read from the store to be joined
NAMED = 8  # the most samples that a record names
TreeNode = tuple[int, int]  # level, number: the chunks number · 2^level … (number + 1) · 2^level - 1


class RecordLost(Damaged, FileNotFoundError):
    """A missing record; another process may have merged it with its neighbour since it was listed."""


@dataclass(frozen=True)
class ChunkRecord:
    """The record of a finished range of chunks.

    ``sums``: statistics by name.  ``facts``: samples, seconds of computing, the batches that were used, and notes
    on everything that makes the result differ in its last bits from an uninterrupted run; also counts, such as the
    number of samples with attributions that are not finite.  ``checks``: a checksum per chunk, uint32 ``[chunks]``, of
    the rows in each array, and of what was read from the ``source``; `checks.UNKNOWN` where there is none.
    """

    sums: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    checks: Mapping[str, np.ndarray] = field(default_factory=dict)
    chunks: int = 1

    def __add__(self, right: ChunkRecord) -> ChunkRecord:
        """The record of this range and the one right of it."""
        facts: dict[str, Any] = {}
        for key in {**self.facts, **right.facts}:
            values = [r.facts[key] for r in (self, right) if key in r.facts]
            if isinstance(values[0], list):
                facts[key] = sorted({v for value in values for v in value})
            else:
                facts[key] = sum(values)
        if "nonfinite_first" in facts:
            facts["nonfinite_first"] = facts["nonfinite_first"][:NAMED]
        checks = {
            name: np.concatenate([r.checks.get(name, np.full(r.chunks, UNKNOWN, np.uint32)) for r in (self, right)])
            for name in {**self.checks, **right.checks}
        }
        return ChunkRecord(merge(self.sums, right.sums), facts, checks, self.chunks + right.chunks)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.sums.values())

    def to_bytes(self) -> memoryview:
        buffer = io.BytesIO()
        text = np.frombuffer(json.dumps(dict(self.facts)).encode(), dtype=np.uint8)
        checks = {CHECKS + name: value for name, value in self.checks.items()}
        entries: dict[str, Any] = {"facts.json": text, **checks, **self.sums}
        np.savez(buffer, **entries)
        return buffer.getbuffer()

    @classmethod
    def from_bytes(cls, content: bytes, chunks: int = 1) -> ChunkRecord:
        sums, facts = trust.read_record(content)
        checks = {n.removeprefix(CHECKS): sums.pop(n) for n in list(sums) if n.startswith(CHECKS)}
        if any(value.shape != (chunks,) for value in checks.values()):
            raise ValueError(f"checksums of another number of chunks than {chunks}")
        return cls(sums, facts, checks, chunks)


class Ledger:
    """The records of a store.  One process adds its own chunks; other processes may do so at the same time."""

    def __init__(self, store: Store, chunks: int) -> None:
        self.store, self.chunks = store, chunks
        self.own_records: dict[TreeNode, ChunkRecord | None] = {}  # None: read it from the store

    def key(self, node: TreeNode) -> str:
        return f"{FOLDER}/{node[0]:02d}.{node[1]:08d}.npz"

    def nodes(self) -> set[TreeNode]:
        """Every record in the store, except those below another."""
        there = {n for n in map(node_of, durable.names(self.store, FOLDER)) if n is not None}
        return {n for n in there if not any(parent in there for parent in self.above(n))}

    def above(self, node: TreeNode) -> Iterable[TreeNode]:
        level, number = node
        while (1 << level) < self.chunks:
            level, number = level + 1, number // 2
            yield level, number

    def finished(self) -> set[int]:
        """The numbers of the finished chunks."""
        return {chunk for node in self.nodes() for chunk in self.span(node)}

    def span(self, node: TreeNode) -> range:
        """The chunks that a record covers."""
        level, number = node
        return range(number << level, min((number + 1) << level, self.chunks))

    def span_of(self, file: str) -> range:
        """The chunks that the record in a file of that name covers; none for other files."""
        node = node_of(file)
        return range(0) if node is None else self.span(node)

    def read(self, node: TreeNode) -> ChunkRecord:
        content = durable.get(self.store, self.key(node))
        if content is None:
            raise RecordLost(
                f"the record {self.key(node)} is missing. `gradkern verify` lists the samples that it covered."
            )
        try:
            return ChunkRecord.from_bytes(content, len(self.span(node)))
        except ValueError as error:
            raise Damaged(
                f"{self.key(node)} is damaged ({error}). `gradkern verify STORE --repair`, or gradkern.data.repair, "
                "recomputes the chunks that it covered."
            ) from error

    def _own(self, node: TreeNode) -> ChunkRecord:
        return self.own_records[node] or self.read(node)

    def _keep(self, node: TreeNode, record: ChunkRecord) -> None:
        self.own_records[node] = record if record.nbytes <= KEPT_BYTES else None

    def amend(self, chunk: int, checks: Mapping[str, int], notes: Iterable[str]) -> None:
        """Enter other checksums for a finished chunk that has been written again, and notes on why they differ."""
        node = next(n for n in self.nodes() if chunk in self.span(n))
        record = self.read(node)
        entered = {name: value.copy() for name, value in record.checks.items()}
        for name, value in checks.items():
            entries = entered.setdefault(name, np.full(record.chunks, UNKNOWN, np.uint32))
            entries[chunk - self.span(node)[0]] = value
        facts = {**record.facts, "notes": sorted({*record.facts["notes"], *notes})}
        durable.put(self.store, self.key(node), replace(record, checks=entered, facts=facts).to_bytes())

    def adopt(self, owned: range) -> None:
        """Take over the records of this process's own chunks that an earlier run has left."""
        top = self.nodes()
        for node in map(node_of, durable.names(self.store, FOLDER)):
            if node is None or not (self.span(node)[0] in owned and self.span(node)[-1] in owned):
                continue
            if node in top:
                self._keep(node, self.read(node))
            else:  # a kill came between writing the parent and removing this record
                durable.delete(self.store, self.key(node))

    def add(self, chunk: int, record: ChunkRecord) -> None:
        """Record a finished chunk; from this moment it counts as finished."""
        node: TreeNode = (0, chunk)
        fresh, stale = {node}, []
        joined = record
        self.own_records[node] = record
        while (pair := self._pair(node)) is not None:
            left, right = pair
            if right is not None:  # the last record of an odd level moves up alone
                joined = joined + self._own(right) if node == left else self._own(left) + joined
            for n in (left, right):
                if n is not None:
                    del self.own_records[n]
                    if n not in fresh:
                        stale.append(n)
            node = (left[0] + 1, left[1] // 2)
            fresh.add(node)
            self.own_records[node] = joined
        durable.put(self.store, self.key(node), joined.to_bytes())
        self._keep(node, joined)
        for n in stale:
            durable.delete(self.store, self.key(n))

    def _pair(self, node: TreeNode) -> tuple[TreeNode, TreeNode | None] | None:
        """The two records to join now that ``node`` exists; None if its neighbour is missing."""
        level, number = node
        if (1 << level) >= self.chunks:
            return None
        left, right = (level, number & ~1), (level, number | 1)
        if left not in self.own_records:
            return None
        if right[1] << level >= self.chunks:
            return left, None
        return (left, right) if right in self.own_records else None

    def records(self) -> dict[TreeNode, ChunkRecord]:
        """Every record that `nodes` lists, as of one moment.

        Another process may join two records between the listing and the reading, and so remove them; it has written
        their parent before.  Then the records are listed again.  A record that is still listed but missing is lost.
        """
        nodes = self.nodes()
        while True:
            try:
                return {n: self.read(n) for n in nodes}
            except RecordLost:
                before, nodes = nodes, self.nodes()
                if nodes == before:
                    raise

    def total(self) -> ChunkRecord | None:
        """The record of all chunks together; None as long as some are missing."""
        records = self.records()
        level = 0
        while True:
            count = -(-self.chunks // (1 << level))
            if count == 1:
                return records.get((level, 0))
            for number in range(0, count, 2):
                left, right = (level, number), (level, number + 1)
                if left in records and (right in records or number + 1 >= count):
                    first = records.pop(left)
                    records[(level + 1, number // 2)] = first + records.pop(right) if right in records else first
            level += 1


def node_of(name: str) -> TreeNode | None:
    parts = RECORD.fullmatch(name)
    return None if parts is None else (int(parts[1]), int(parts[2]))
