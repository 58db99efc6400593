"""Local seeds: a one-hot seed at a position reaches, layer by layer, only the positions of its receptive field.

`reaches` says for every record of a backward pass which positions of its destination it reaches from those of its
source.  The kernels follow these rules from the targets of each tile of seeds (csrc/cpu/local.cpp), and leave out
every position that they do not come to; `Reaches.share` follows them for seeds in the middle of the output, to see
what that saves and how many seeds should share a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .emitters import Emitter
from .records import (
    Accumulate,
    Along,
    ElementwiseT,
    LinesT,
    MatMulT,
    MoveT,
    MultiplyT,
    PatternRef,
    PatternT,
    Place,
    Reach,
    Record,
    Rectify,
    SeedOneHot,
    StencilT,
    StoreT,
    WindowT,
    Zero,
)
from .scratch import Buffer
from .units import Node

MOST_LIVE_SHARE = 0.9  # if a larger share of the multiply-adds is left, the search for positions does not pay
TILES = (6, 12, 24, 48)  # the numbers of seeds per tile that are tried, as far as they fit
PER_TILE = 0.4  # the overhead of a tile, in seeds: lists of live channels, and the search for positions

LANES = 16  # work is counted in vectors of about this many elements

Taps = tuple[int, list[int]]  # a step and offsets: source position q reaches q · step + offset


@dataclass(frozen=True)
class Slot:
    """The storage of a cotangent; a value with one position has an element wherever others have a position."""

    H: int
    W: int
    C: int
    row: int
    interior: int

    @classmethod
    def of(cls, node: Node) -> Slot:
        if node.P == 1:
            return cls(1, node.C, 1, node.C, node.interior)
        return cls(node.H, node.W, node.C, node.row, node.interior)

    def positions(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of elements at these offsets from the interior."""
        return offsets // self.row, offsets % self.row // self.C


@dataclass(frozen=True)
class ReachRule:
    """What a record reaches, from slot ``src`` to slot ``dst`` of `Reaches.slots`; `Reach` defines ``axes``."""

    reach: Reach
    src: int
    dst: int
    axes: tuple[list[int], list[int]] = ([], [])
    macs: float = 0.0  # multiply-adds of one seed


@dataclass
class Reaches:
    """The rules of a chain's backward pass."""

    slots: list[Slot]
    rules: list[ReachRule]
    records: list[Record]
    start: int  # the slot of the seeds
    integers: list[int]  # the chain's tables

    def table(self, base: int) -> list[int]:
        """The rules as csrc/cpu/local.cpp reads them, placed at offset ``base`` of the tables."""
        header = [len(self.slots), len(self.rules), self.start]
        header += [x for s in self.slots for x in (s.H, s.W, s.C, s.row, s.interior)]
        payload: list[int] = []
        rows: list[int] = []
        for rule in self.rules:
            rows += [rule.reach, rule.src, rule.dst, base + len(header) + 4 * len(self.rules) + len(payload)]
            payload += [*rule.axes[0], *rule.axes[1]]
        return [*header, *rows, *payload]

    def share(self, seeds: int) -> float:
        """The share of the multiply-adds left for a tile of ``seeds`` neighbours in the middle of the output."""
        first = self.slots[self.start]
        masks = [(torch.zeros(s.H, dtype=torch.bool), torch.zeros(s.W, dtype=torch.bool)) for s in self.slots]
        rows = 1 if first.H == 1 else min(first.H, math.isqrt(seeds))
        columns = min(first.W, math.ceil(seeds / rows))
        for mask, count in zip(masks[self.start], (rows, columns), strict=True):
            middle = (len(mask) - count) // 2
            mask[middle : middle + count] = True
        left = 0.0
        for rule, record in zip(self.rules, self.records, strict=True):
            src, dst = masks[rule.src], masks[rule.dst]
            live = 1.0 if rule.reach == Reach.All else src[0].float().mean().item() * src[1].float().mean().item()
            left += rule.macs * live * bool(src[0].any() and src[1].any())
            if rule.src != rule.dst and src[0].any() and src[1].any():
                self.mark(rule, record, src, dst)
        return left / max(sum(rule.macs for rule in self.rules), 1.0)

    def mark(self, rule: ReachRule, record: Record, src: tuple[Tensor, Tensor], dst: tuple[Tensor, Tensor]) -> None:
        """Mark what the record reaches from ``src`` in ``dst``: masks of rows and of columns."""
        match rule.reach:
            case Reach.All:
                for mask in dst:
                    mask[:] = True
            case Reach.Same:
                for mask, of in zip(dst, src, strict=True):
                    mask |= of
            case Reach.Taps:
                for mask, of, (step, _, *offsets) in zip(dst, src, rule.axes, strict=True):
                    reached = (of.nonzero() * step + integer_tensor(offsets)).reshape(-1)
                    mask[reached[(reached >= 0) & (reached < len(mask))]] = True
            case Reach.Ranges:
                for mask, of, ranges in zip(dst, src, rule.axes, strict=True):
                    for q in of.nonzero().reshape(-1).tolist():
                        mask[ranges[2 * q] : ranges[2 * q + 1]] = True
            case Reach.Moves:
                assert isinstance(record, MoveT)
                to, of_run = expand_runs(self.integers[record.run_table : record.run_table + 5 * record.runs])
                h, w = self.slots[rule.src].positions(of_run)
                live = src[0][h] & src[1][w]
                for mask, at in zip(dst, self.slots[rule.dst].positions(to[live]), strict=True):
                    mask[at] = True


def integer_tensor(numbers: list[int]) -> Tensor:
    """A tensor of integers even if the list is empty, for which torch would choose its default dtype."""
    return torch.tensor(numbers, dtype=torch.int64)


def expand_runs(runs: list[int]) -> tuple[Tensor, Tensor]:
    """The offsets of all elements that the runs of the transposed action move: destinations and sources."""
    table = integer_tensor(runs).reshape(-1, 5)
    count = table[:, 2]
    k = torch.arange(int(count.sum())) - torch.repeat_interleave(count.cumsum(0) - count, count)
    first = torch.repeat_interleave(table, count, dim=0)
    return first[:, 0] + k * first[:, 3], first[:, 1] + k * first[:, 4]


def best_tile(rules: Reaches, most: int) -> tuple[int, float]:
    """How many seeds, at most ``most``, should share a tile, and the share of the multiply-adds that is then left."""
    shares = {tile: rules.share(tile) for tile in (*(t for t in TILES if t < most), most)}
    tile = min(shares, key=lambda t: shares[t] * (1 + PER_TILE / t))
    return tile, shares[tile]


# ---- rules


def reaches(e: Emitter) -> Reaches | None:
    """The rules of the backward pass; None if the seeds are not one-hot at positions."""
    starts = [r.dst.buffer for r in e.backward if isinstance(r, SeedOneHot)]
    if len(starts) != 1 or starts[0] is None:
        return None
    nodes = {buffer: node for node, buffer in e.buffers.cotangents.items()}
    numbers = {buffer: k for k, buffer in enumerate(nodes)}
    whole = {buffer for buffer, node in nodes.items() if e.layouts.interleaved_rows(node) > 1}
    maker = ReachRules(nodes, numbers, whole, e.tables.integers)
    slots = [Slot.of(node) for node in nodes.values()]
    start = slots[numbers[starts[0]]]
    if start.H * start.W == 1:
        return None
    return Reaches(slots, [maker.rule(r) for r in e.backward], e.backward, numbers[starts[0]], e.tables.integers)


@dataclass
class ReachRules:
    """Makes the rule of each record."""

    nodes: dict[Buffer, Node]
    numbers: dict[Buffer, int]
    whole: set[Buffer]  # cotangents whose storage has no positions
    integers: list[int]

    def rule(self, record: Record) -> ReachRule:
        match record:
            case Zero(dst=Place(buffer=b)) | Rectify(dst=Place(buffer=b)) | SeedOneHot(dst=Place(buffer=b)):
                return self.one(b)
            case StoreT(src=Place(buffer=b)):
                return self.one(b)
            case MatMulT(left=left, right=right):
                seeded = left if left.buffer is not None and left.buffer.cotangent else right
                macs = record.matrices * record.rows * record.columns * record.terms / LANES
                return self.between(seeded.buffer, record.dst.buffer, Reach.All, macs=macs)
            case WindowT():
                macs = record.H * record.W * record.O * record.window_vectors
                if record.whole_block or not self.by_positions(record.src.buffer, record.dst.buffer):
                    return self.between(record.src.buffer, record.dst.buffer, Reach.All, macs=macs)
                return self.between(record.src.buffer, record.dst.buffer, Reach.Taps, self.window_taps(record), macs)
            case PatternT(pattern=pattern) if self.by_positions(record.src.buffer, record.dst.buffer):
                rows, columns = pool_taps(pattern)
                return self.between(record.src.buffer, record.dst.buffer, Reach.Taps, (encode(rows), encode(columns)))
            case StencilT() if self.by_positions(record.src.buffer, record.dst.buffer):
                ranges, entries = self.stencil_ranges(record)
                macs = entries * record.C / LANES
                return self.between(record.src.buffer, record.dst.buffer, Reach.Ranges, ranges, macs)
            case ElementwiseT() | Accumulate():
                return self.between(record.src.buffer, record.dst.buffer, Reach.Same)
            case MoveT():
                return self.between(record.src.buffer, record.dst.buffer, Reach.Moves)
            case LinesT(lines=lines) if lines.along == Along.Channels and self.by_positions(record.src.buffer):
                return self.between(record.src.buffer, record.dst.buffer, Reach.Same)
            case MultiplyT(dst=dst) if self.by_positions(record.src.buffer, dst.buffer) and dst.row and dst.position:
                return self.between(record.src.buffer, dst.buffer, Reach.Same)
            case PatternT() | StencilT() | LinesT() | MultiplyT():
                return self.between(record.src.buffer, record.dst.buffer, Reach.All)
        raise TypeError(f"{type(record).__name__} is not a record of a backward pass with one-hot seeds")

    def one(self, buffer: Buffer | None) -> ReachRule:
        assert buffer is not None
        return ReachRule(Reach.Nothing, self.numbers[buffer], self.numbers[buffer])

    def between(
        self,
        src: Buffer | None,
        dst: Buffer | None,
        reach: Reach,
        axes: tuple[list[int], list[int]] = ([], []),
        macs: float = 0.0,
    ) -> ReachRule:
        assert src is not None and dst is not None
        if not self.whole.isdisjoint((src, dst)):
            reach, axes = Reach.All, ([], [])
        return ReachRule(reach, self.numbers[src], self.numbers[dst], axes, macs)

    def by_positions(self, *buffers: Buffer | None) -> bool:
        """Whether these cotangents have more than one position each."""
        return all(b is not None and self.nodes[b].P > 1 for b in buffers)

    def window_taps(self, record: WindowT) -> tuple[list[int], list[int]]:
        """The positions of a transposed convolution's window, through the taps of the pool before it."""
        assert record.dst.buffer is not None
        node = self.nodes[record.dst.buffer]
        top, left = node.halo[0], node.halo[2]
        table = self.integers[record.window_table : record.window_table + 2 * record.window_vectors]
        down: set[int] = set()
        along: set[int] = set()
        for offset, lanes in zip(table[::2], table[1::2], strict=True):
            h, rest = divmod(record.dst.offset + offset, node.row)  # from the start of the border
            down.add(h - top)
            along.update(range(rest // node.C - left, (rest + lanes - 1) // node.C - left + 1))
        rows = (record.dst.row // node.row, sorted(down))
        columns = (record.dst.position // node.C, sorted(along))
        if record.pattern is not None and not record.merged:
            rows, columns = (then(a, b) for a, b in zip(pool_taps(record.pattern), (rows, columns), strict=True))
        return encode(rows), encode(columns)

    def stencil_ranges(self, record: StencilT) -> tuple[tuple[list[int], list[int]], int]:
        """The rows and the columns that each of the source's comes from, and the number of reads."""
        assert record.src.buffer is not None and record.dst.buffer is not None
        src, dst = self.nodes[record.src.buffer], self.nodes[record.dst.buffer]
        s = record.stencil
        blocks = integer_tensor(self.integers[s.block_table : s.block_table + 7 * s.blocks]).reshape(-1, 7)
        entries = integer_tensor(self.integers[s.entry_table :: 2])  # offsets, of this and of later tables
        reads, places = [integer_tensor([])], [integer_tensor([])]
        for first, place, count, read_step, place_step, entry, number in blocks.tolist():
            k = torch.arange(count)
            reads.append((first + k[:, None] * read_step + entries[entry : entry + number]).reshape(-1))
            places.append((place + k * place_step).repeat_interleave(number))
        read, to = torch.cat(reads), torch.cat(places)
        rows = hull(read // src.row, to // dst.row, src.H)
        return (rows, hull(read % src.row // src.C, to % dst.row // dst.C, src.W)), len(read)


def hull(source: Tensor, reached: Tensor, size: int) -> list[int]:
    """For each of ``size`` source positions, the first position that it reaches and the one after the last."""
    first = torch.full((size,), torch.iinfo(torch.int64).max).scatter_reduce_(0, source, reached, "amin")
    last = torch.zeros(size, dtype=torch.int64).scatter_reduce_(0, source, reached + 1, "amax")
    return torch.stack([torch.minimum(first, last), last], dim=1).reshape(-1).tolist()


def pool_taps(p: PatternRef) -> tuple[Taps, Taps]:
    """The taps of a pattern's windows, by rows and by columns."""
    return (p.sh, [j * p.dh - p.ph for j in range(p.kh)]), (p.sw, [j * p.dw - p.pw for j in range(p.kw)])


def then(first: Taps, second: Taps) -> Taps:
    """The positions that the second reaches from those that the first reaches."""
    return first[0] * second[0], sorted({a * second[0] + b for a in first[1] for b in second[1]})


def encode(taps: Taps) -> list[int]:
    return [taps[0], len(taps[1]), *taps[1]]
