"""Slices: a wide linear layer's backward pass made, and consumed, a few positions at a time.

The cotangent in front of a wide linear layer is the largest thing that a sample keeps on the chip: 1792 numbers per
seed in `cnn1d`, and the convolutions behind it make twice as many.  All of them are linear, so a slice of positions
can be made and sent on to the input's cotangent before the next one is made; windows that reach over a slice's edge
are simply added up.  Memory per sample falls to a slice and its halo, more samples share each weight on its way from
L2, and what is computed twice is the halo.

This is a rewriting of records, no new kind of them: every slice has records of its own, with shifted offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..scratch import Buffer
from .cost import WINDOW_T, ZERO

COUNTS = (2, 3, 4, 5, 6, 7, 8)  # slices that are tried

Op = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A transposed convolution as a map along one axis: from positions of its source to elements of its target."""

    place: int  # of its record
    axis: str  # "H" or "W"
    positions: int
    source: int  # elements of the source per position, and where position 0 lies
    first: int
    target: int  # likewise of the target, from the lowest element that position 0 adds to …
    low: int
    reach: int  # … and how many elements lie from there to behind its last
    bits: int  # bytes of the pattern per position

    @classmethod
    def of(cls, place: int, op: Op, tables: Sequence[int]) -> Stage | None:
        """None where a position's part cannot be told from its number: pools that hang over the edge."""
        if op["kind"] != WINDOW_T or op["block"] or op["rows"]:
            return None
        axis, other = ("H", "W") if op["H"] > 1 else ("W", "H")
        taps, slots = max(op["taps"], 1), tables[op["table2"] : op["table2"] + op["K"]]
        reach, step = 0, {"H": op["dst_row"], "W": op["dst_px"]}
        if op["taps"] and not op["merged"]:
            for name in "HW":
                s, k, d, p = (op[letter + name.lower()] for letter in "skdp")
                if p or (op[name] - 1) * s + (k - 1) * d >= op[f"{name}i"]:
                    return None
                reach += (k - 1) * d * step[name]
                step[name] *= s
        reach += (op[other] - 1) * step[other] + max(slots) - min(slots) + 1
        reach += (op["groups"] - 1) * op["C"]  # the slots are the first group's
        return cls(
            place,
            axis,
            op[axis],
            op["src_row"] if axis == "H" else op["src_px"],
            op["src"][1],
            step[axis],
            op["dst"][1] + min(slots),
            reach,
            taps * op["nb"] * (op["W"] if axis == "H" else 1) if op["taps"] else 0,
        )

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Elements of the target that positions begin … end - 1 add to, from a multiple of four on."""
        low = self.low + begin * self.target
        return low // 4 * 4, self.low + (end - 1) * self.target + self.reach

    def readers(self, low: int, high: int) -> tuple[int, int]:
        """The positions of which a source element lies in [low, high)."""
        begin, end = (low - self.first) // self.source, -((self.first - high) // self.source)
        return max(0, begin), min(self.positions, end)


def sliced(backward: list[Op], tables: Sequence[int], count: int) -> list[Op] | None:
    """The records with the last wide linear layer in ``count`` slices; None where that cannot be done.

    It needs a linear layer whose cotangent one transposed convolution alone reads.  As many of those as follow each
    other go slice by slice; what the last of them adds to is whole.
    """
    found = path(backward, tables)
    if found is None or found[1][0].positions < 2 * count:
        return None
    wide, stages = found
    first, done = stages[0], {s.place for s in stages}
    skipped = {wide, *done} | set(zeros_of(backward, stages))
    start, rest = min(skipped), max(done) + 1
    if any(i not in skipped for i in range(start, rest)):
        return None
    out = backward[:start] + [backward[i] for i in zeros_of(backward, stages[-1:])]
    for k in range(count):
        begin, end = (first.positions * i // count for i in (k, k + 1))
        out += slice_of(backward, wide, stages, begin, end)
    return out + backward[rest:]


def path(backward: list[Op], tables: Sequence[int]) -> tuple[int, list[Stage]] | None:
    """The record of the last wide linear layer, and the transposed convolutions behind it, one reading the other."""
    for wide in reversed(range(len(backward))):
        op = backward[wide]
        if op["kind"] == WINDOW_T and op["block"] and op["assign"] and op["size"]:
            break
    else:
        return None
    stages: list[Stage] = []
    buffer = op["dst"][0]
    while (reader := only_reader(backward, buffer)) is not None:
        stage = Stage.of(reader, backward[reader], tables)
        if stage is None or (stages and (stage.place < stages[-1].place or stage.axis != stages[0].axis)):
            break
        stages.append(stage)
        buffer = backward[reader]["dst"][0]
    if not stages or op["K"] != stages[0].positions * stages[0].source or stages[0].source % 4 or stages[0].first:
        return None
    return wide, stages


def only_reader(ops: list[Op], buffer: Buffer) -> int | None:
    """The one record that reads a cotangent, where one other writes it and nothing but its zeroing touches it."""
    readers = [i for i, op in enumerate(ops) if touches(op, "src", buffer) or touches(op, "aux", buffer)]
    writers = [i for i, op in enumerate(ops) if touches(op, "dst", buffer) and op["kind"] != ZERO]
    return readers[0] if len(readers) == len(writers) == 1 else None


def touches(op: Op, key: str, buffer: Buffer) -> bool:
    """Whether a record's field is a place in the buffer."""
    return isinstance(op.get(key), tuple) and op[key][0] is buffer


def zeros_of(ops: list[Op], stages: Sequence[Stage]) -> list[int]:
    """The records that zero what these stages add to."""
    targets = [ops[s.place]["dst"][0] for s in stages]
    return [i for i, op in enumerate(ops) if op["kind"] == ZERO and any(touches(op, "dst", b) for b in targets)]


def slice_of(backward: list[Op], wide: int, stages: list[Stage], begin: int, end: int) -> list[Op]:
    """The records for positions begin … end - 1 of what the linear layer makes; none where nothing comes of them."""
    op, first = backward[wide], stages[0]
    low, high = begin * first.source, end * first.source
    source = Buffer(high - low)
    out = [op | {"dst": (source, 0), "K": high - low, "wb": op["wb"] + low}]
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        record = backward[stage.place]
        target, shift = record["dst"][0], 0
        if following is not None:
            shift, far = stage.span(begin, end)
            after = following.readers(shift, far)
            if after[0] >= after[1]:
                return []  # all that the slice adds to is a border
            # What is read lies in whole positions: a row may begin before the window that reached it.
            shift = min(shift, (following.first + after[0] * following.source) // 4 * 4)
            far = max(far, following.first + after[1] * following.source)
            target = Buffer((far - shift + 3) // 4 * 4)
            zero = next(op for op in backward if op["kind"] == ZERO)
            out.append(zero | {"dst": (target, 0), "size": target.elements})
        out.append(
            record
            | {
                "src": (source, record["src"][1] + begin * stage.source - low),
                "dst": (target, record["dst"][1] + begin * stage.target - shift),
                "bits": record.get("bits", 0) + begin * stage.bits,
                stage.axis: end - begin,
            }
        )
        if following is not None:
            source, low, (begin, end) = target, shift, after
    return out
