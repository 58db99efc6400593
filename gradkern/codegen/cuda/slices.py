"""Slices: a wide linear layer's backward pass, computed and consumed a few positions at a time.

The cotangent before a wide linear layer is the largest buffer that a sample keeps on the chip: 1792 elements per seed
in `cnn1d`, and the convolutions before it produce twice as many.  All of them are linear, so a slice of positions can
be computed and passed on to the input's cotangent before the next one; windows that reach over a slice's edge are
simply added up.  Memory per sample falls to a slice and its halo, and more samples share each weight that is read from
L2.  Only the halo is computed twice.

This rewrites records and needs no new kinds: every slice has its own records, with shifted offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..records import DenseT, Place, Record, ScatterT, Zero
from ..scratch import Buffer

COUNTS = (2, 3, 4, 5, 6, 7, 8)  # the numbers of slices that are tried


@dataclass(frozen=True)
class Stage:
    """A transposed convolution as a map along one axis: from positions of its source to elements of its target."""

    index: int  # the number of its record
    axis: Literal["H", "W"]
    positions: int
    source: int  # elements of the source from one position to the next
    first: int  # offset of the source's position 0
    target: int  # elements of the target from one position to the next
    low: int  # offset of the lowest element of the target that position 0 adds to
    reach: int  # elements of the target from the lowest to behind the highest that one position adds to
    bits: int  # bytes of the pattern per position

    @classmethod
    def of(cls, index: int, op: Record, tables: Sequence[int]) -> Stage | None:
        """None if a position's part cannot be computed from its index, which happens for pools that leave the input."""
        if not isinstance(op, ScatterT) or op.seed_rows:
            return None
        axis: Literal["H", "W"] = "H" if op.H > 1 else "W"
        window = tables[op.window_table : op.window_table + op.window_elements]
        p, reach, step, bits = op.pattern, 0, {"H": op.dst.row, "W": op.dst.position}, 0
        if p is not None and not op.merged:
            axes = (("H", op.H, p.H, p.kh, p.sh, p.ph, p.dh), ("W", op.W, p.W, p.kw, p.sw, p.pw, p.dw))
            for name, positions, extent, kernel, stride, padding, dilation in axes:
                if padding or (positions - 1) * stride + (kernel - 1) * dilation >= extent:
                    return None
                reach += (kernel - 1) * dilation * step[name]
                step[name] *= stride
        if p is not None:
            bits = p.taps * p.plane_bytes * (op.W if axis == "H" else 1)
        reach += (op.W - 1) * step["W"] if axis == "H" else (op.H - 1) * step["H"]
        reach += max(window) - min(window) + 1
        reach += (op.groups - 1) * op.C  # the window is the first group's
        positions, source = (op.H, op.src.row) if axis == "H" else (op.W, op.src.position)
        return cls(index, axis, positions, source, op.src.offset, step[axis], op.dst.offset + min(window), reach, bits)

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Elements of the target that positions begin … end - 1 add to, from a multiple of four on."""
        low = self.low + begin * self.target
        return low // 4 * 4, self.low + (end - 1) * self.target + self.reach

    def readers(self, low: int, high: int) -> tuple[int, int]:
        """The positions of which a source element lies in [low, high)."""
        begin, end = (low - self.first) // self.source, -((self.first - high) // self.source)
        return max(0, begin), min(self.positions, end)


def variants(backward: list[Record], tables: Sequence[int]) -> list[list[Record]]:
    """The backward pass with its last wide layer whole, and in slices; those that need the least memory come last."""
    cut = (slice_linear(backward, tables, count) for count in COUNTS)
    return [backward, *(ops for ops in cut if ops is not None)]


def slice_linear(backward: list[Record], tables: Sequence[int], count: int) -> list[Record] | None:
    """The records with the last wide linear layer in ``count`` slices; None if that is impossible.

    The cotangent of the linear layer must have a transposed convolution as its only reader.  All such convolutions that
    follow each other run slice by slice; the target of the last one is whole.
    """
    wide_and_stages = wide_layer_and_stages(backward, tables)
    if wide_and_stages is None:
        return None
    wide, stages = wide_and_stages
    if stages[0].positions < 2 * count:
        return None
    first, done = stages[0], {s.index for s in stages}
    skipped = {wide, *done} | set(zeros_of(backward, stages))
    start, rest = min(skipped), max(done) + 1
    if any(i not in skipped for i in range(start, rest)):
        return None
    out = backward[:start] + [backward[i] for i in zeros_of(backward, stages[-1:])]
    for k in range(count):
        begin, end = (first.positions * i // count for i in (k, k + 1))
        out += slice_of(backward, wide, stages, begin, end)
    return out + backward[rest:]


def wide_layer_and_stages(backward: list[Record], tables: Sequence[int]) -> tuple[int, list[Stage]] | None:
    """The record of the last wide linear layer, and the chain of transposed convolutions that read from it."""
    for wide in reversed(range(len(backward))):
        op = backward[wide]
        if isinstance(op, DenseT) and op.assign and op.joined:
            break
    else:
        return None
    stages: list[Stage] = []
    buffer = target_of(op)
    while (reader := only_reader(backward, buffer)) is not None:
        stage = Stage.of(reader, backward[reader], tables)
        if stage is None or (stages and (stage.index < stages[-1].index or stage.axis != stages[0].axis)):
            break
        stages.append(stage)
        buffer = target_of(backward[reader])
    if not stages or stages[0].source % 4 or stages[0].first:
        return None
    return (wide, stages) if op.window_elements == stages[0].positions * stages[0].source else None


def target_of(op: Record) -> Buffer:
    """The buffer that a transposed contraction adds to."""
    assert isinstance(op, DenseT | ScatterT) and op.dst.buffer is not None
    return op.dst.buffer


def only_reader(ops: list[Record], buffer: Buffer) -> int | None:
    """The only reader of a cotangent, if one other record writes it and only its zeroing touches it besides."""
    readers = [i for i, op in enumerate(ops) if op.reads(buffer)]
    writers = [op for op in ops if op.writes(buffer) and not isinstance(op, Zero)]
    return readers[0] if len(readers) == len(writers) == 1 else None


def zeros_of(ops: list[Record], stages: Sequence[Stage]) -> list[int]:
    """The records that zero the targets of these stages."""
    targets = [target_of(ops[s.index]) for s in stages]
    return [i for i, op in enumerate(ops) if isinstance(op, Zero) and any(op.writes(b) for b in targets)]


def slice_of(backward: list[Record], wide: int, stages: list[Stage], begin: int, end: int) -> list[Record]:
    """The records for positions begin … end - 1 of the linear layer's cotangent; none if they have no effect."""
    op, first = backward[wide], stages[0]
    assert isinstance(op, DenseT)
    low, high = begin * first.source, end * first.source
    source = Buffer(high - low, cotangent=True)
    dst = replace(op.dst, buffer=source, offset=0)
    out: list[Record] = [replace(op, dst=dst, window_elements=high - low, weights=op.weights + low)]
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        record = backward[stage.index]
        assert isinstance(record, ScatterT)
        target, shift = target_of(record), 0
        if following is not None:
            shift, far = stage.span(begin, end)
            after = following.readers(shift, far)
            if after[0] >= after[1]:
                return []  # the slice adds only to a border
            # Records read whole positions, so a slice's row may begin before the window that reaches it.
            shift = min(shift, (following.first + after[0] * following.source) // 4 * 4)
            far = max(far, following.first + after[1] * following.source)
            target = Buffer((far - shift + 3) // 4 * 4, cotangent=True)
            out.append(Zero(dst=Place(target, 0), elements=target.elements))
        src = replace(record.src, buffer=source, offset=record.src.offset + begin * stage.source - low)
        dst = replace(record.dst, buffer=target, offset=record.dst.offset + begin * stage.target - shift)
        pattern = record.pattern and replace(record.pattern, bits=record.pattern.bits + begin * stage.bits)
        part = replace(record, src=src, dst=dst, pattern=pattern)
        out.append(replace(part, H=end - begin) if stage.axis == "H" else replace(part, W=end - begin))
        if following is not None:
            source, low, (begin, end) = target, shift, after
    return out
