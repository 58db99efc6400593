"""Integer tables of a chain's records: runs of copies, and stencils.

Both are computed once, when a chain is lowered, from element offsets into the storage of nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.indexing import indices
from ..ir.program import Part
from . import units
from .units import MoveEnd, Node

Entries = list[tuple[int, int]]  # (offset of the read, row of weights)
Runs = list[int]  # five integers each: source offset, destination offset, count, source step, destination step


class Tables:
    """The tables of one chain, one after another; equal tables are stored once."""

    def __init__(self) -> None:
        self.integers: list[int] = []
        self.offsets: dict[tuple[int, ...], int] = {}

    def add(self, entries: list[int]) -> int:
        """The offset of a table with these entries."""
        key = tuple(entries)
        if key not in self.offsets:
            self.offsets[key] = len(self.integers)
            self.integers += entries
        return self.offsets[key]


# ---- moves


def offsets(node: Node, side: MoveEnd) -> Tensor:
    """The offset from the node's interior of every element of a value, in the value's own shape."""
    h, w, c = torch.arange(node.H) * node.row, torch.arange(node.W) * node.C, torch.arange(node.C)
    if side.channels_last:
        return (h[:, None, None] + w[:, None] + c).reshape(side.shape)
    return (c[:, None, None] + h[:, None] + w).reshape(side.shape)


def move_runs(unit: units.Move, out: Node) -> list[Runs]:
    """The runs of every source to the elements of ``out``, which is the result or the node of its cotangent."""
    parts = unit.parts or [None] * len(unit.reads)
    each = zip(unit.reads, unit.sources, parts, strict=True)
    return [runs_between(source, side, out, unit.result, part) for source, side, part in each]


def runs_between(source: Node, from_: MoveEnd, out: Node, to: MoveEnd, part: Part | None) -> Runs:
    """The runs that copy ``source`` to ``out``.

    ``part`` says which element goes where (None: every element to its own place in row-major order).
    """
    read, write = offsets(source, from_), offsets(out, to)
    if part is None:
        return strided(read.reshape(-1), write.reshape(-1))
    read = read.permute(part.order)
    for a, axis in enumerate(part.axes):
        wanted = torch.tensor(indices(axis), dtype=torch.int64)
        live = (wanted >= 0).nonzero().reshape(-1)
        read = read.index_select(a, wanted[live])
        write = write.index_select(a, live)
    return strided(read.reshape(-1), write.reshape(-1))


def strided(read: Tensor, write: Tensor) -> Runs:
    """Pairs of offsets as arithmetic progressions, in the order of the destination."""
    if read.numel() == 0:
        return []
    if read.numel() == 1:
        return [int(read[0]), int(write[0]), 1, 1, 1]
    if bool((write.diff() < 0).any()):
        order = torch.argsort(write)
        read, write = read[order], write[order]
    dr, dw = read.diff(), write.diff()
    # A run ends where a step differs from the one before it; the step to the start of a new run belongs to neither.
    changes = ((dr[1:] != dr[:-1]) | (dw[1:] != dw[:-1])).nonzero().reshape(-1) + 1
    ends = torch.cat([changes, torch.tensor([len(dr)])])  # where equal steps end
    starts, start = [], 0
    for end, unit in zip(ends.tolist(), (dw[ends - 1] == 1).tolist(), strict=True):
        if start < end:
            starts.append(start)
            lone = end - start == 1 and end < len(dr) and not unit  # a lone leap: leave its end to the next run
            start = end if lone else end + 1
    if start < len(read):
        starts.append(start)
    begin = torch.tensor(starts)
    counts = torch.tensor([*starts[1:], len(read)]) - begin
    step = begin.clamp_max(len(dr) - 1)
    single = counts == 1
    columns = (read[begin], write[begin], counts, dr[step].masked_fill(single, 1), dw[step].masked_fill(single, 1))
    runs: Runs = torch.stack(columns, dim=1).reshape(-1).tolist()
    return runs


# ---- stencils


def positions(node: Node) -> list[int]:
    """The offset of every position from the interior, row by row."""
    return [h * node.row + w * node.C for h in range(node.H) for w in range(node.W)]


def transpose_entries(entries: list[Entries], out: Node, source: Node) -> list[Entries]:
    """For each position of the source, the results that read it."""
    readers: dict[int, Entries] = {q: [] for q in positions(source)}
    for place, reads in zip(positions(out), entries, strict=True):
        for offset, row in reads:
            readers[offset].append((place, row))
    return list(readers.values())


def stencil(entries: list[Entries], places: list[int], keep_empty: bool) -> tuple[list[int], list[int]]:
    """Blocks of positions with the same reads, and their entries.

    A block is ``(read offset, place, count, read step, place step, first entry, entries)``: its ``k``-th position,
    at ``place + k · place step``, reads its entries ``k · read step`` further on.
    """
    blocks: list[list[int]] = []
    table: list[int] = []
    entry_starts: dict[tuple, int] = {}
    shape: tuple = ()
    for reads, place in zip(entries, places, strict=True):
        if not reads and not keep_empty:
            shape = ()
            continue
        first = reads[0][0] if reads else 0
        relative = tuple(x for offset, row in reads for x in (offset - first, row))
        block = blocks[-1] if blocks else None
        if block is not None and relative == shape:
            count = block[2]
            steps = (first - block[0], place - block[1])
            if count == 1 or steps == (block[3] * count, block[4] * count):
                if count == 1:
                    block[3:5] = steps
                block[2] += 1
                continue
        if relative not in entry_starts:
            entry_starts[relative] = len(table) // 2
            table += relative
        shape = relative
        blocks.append([first, place, 1, 0, 0, entry_starts[relative], len(reads)])
    return [x for b in blocks for x in b], table
