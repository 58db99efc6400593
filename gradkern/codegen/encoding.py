"""Encoding: records and sizes as the compiled kernels read them.

A record becomes a row of `WIDTH` integers, shorter kinds padded with zeros: an ``int``, ``bool`` or enum is one int64,
a ``float`` one double, a `RecordPart` its fields in order (zeros if it is None), and a `Place` the integers of
`PLACE`.  csrc/records.h and record_parts.h have the same as structs.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cache, cached_property
from types import NoneType
from typing import Any, get_args, get_type_hints

from .limits import LIMITS
from .records import ENUMS, KINDS, PARTS, Place, Record, RecordPart

# ---- sizes


@dataclass(frozen=True)
class Sizes:
    """The sizes of a chain's scratch memory for one backend, one int64 each."""

    @cached_property
    def integers(self) -> list[int]:
        """The sizes as the compiled ops take them."""
        return [getattr(self, f.name) for f in fields(self)]


@dataclass(frozen=True)
class CpuSizes(Sizes):
    """Scratch memory of one thread."""

    shared: int  # elements that all samples share
    sample: int  # elements of each sample
    bits: int  # bytes of each sample's bits
    entries: int  # of the lists of live channels
    segments: int  # of those lists
    block: int  # samples that are processed together
    local: int = 0  # offset in the tables of the table of local seeds, plus one; 0: seeds are not local


@dataclass(frozen=True)
class CudaSizes(Sizes):
    """Shared memory of one thread block."""

    workspace: int  # elements that a few samples at a time share
    sample: int  # elements of each sample
    bits: int  # bytes of each sample's bits
    samples: int  # the most in the workspace at a time
    bytes: int  # of shared memory in all
    block: int  # samples of a block


SIZES = (CpuSizes, CudaSizes)

# ---- encoding

#: The integers that every row begins with; `samples`: on a GPU, how many samples take the record's run together.
HEADER = ("kind", "whole_block", "samples")
#: A place in C++.
PLACE = (
    ("offset", "of the first element, of the first sample and seed"),
    (
        "sample",
        "stride between samples; 0: samples share the memory; < 0, on a GPU: minus that of current samples",
    ),
    ("seed", "stride between seeds; 0: no cotangent"),
    ("row", "elements from one row of positions to the next"),
    ("position", "elements from one position to the next"),
)


@cache
def layout_of(cls: type) -> tuple[tuple[str, Any], ...]:
    """Names and types of a class's own fields, `X | None` as X; the common ones of records are the header's."""
    hints, common = get_type_hints(cls), HEADER if issubclass(cls, Record) else ()

    def plain(t: Any) -> Any:
        return next((a for a in get_args(t) if a is not NoneType), t)

    return tuple((f.name, plain(hints[f.name])) for f in fields(cls) if f.name not in common)


def width_of(t: Any) -> int:
    """Numbers that a field of this type takes in a row."""
    if t is Place:
        return len(PLACE)
    return sum(width_of(inner) for _, inner in layout_of(t)) if issubclass(t, RecordPart | Record) else 1


#: Integers in a row.
WIDTH = len(HEADER) + max(width_of(kind) for kind in KINDS)


def encode(record: Record, sample: int, shared: int = 0, samples: int = 0) -> tuple[int, ...]:
    """A record as a row, once every buffer has its base.

    ``sample``: the stride between samples in buffers that each sample has for itself; ``shared``: that in the others.
    """

    def integers(value: Any, t: Any) -> Iterator[int]:
        if value is None:
            yield from [0] * width_of(t)
        elif isinstance(value, Place):
            b = value.buffer
            if b is None:
                yield from (value.offset, 0, 0, value.row, value.position)
            else:
                stride = sample if b.per_sample else shared
                yield from (b.base + value.offset, stride, b.elements * b.cotangent, value.row, value.position)
        elif issubclass(t, RecordPart | Record):
            for name, inner in layout_of(t):
                yield from integers(getattr(value, name), inner)
        elif t is float:
            yield struct.unpack("<q", struct.pack("<d", value))[0]
        else:
            yield int(value)

    row = [KINDS.index(type(record)), int(record.whole_block), samples, *integers(record, type(record))]
    return tuple(row + [0] * (WIDTH - len(row)))


def c_type(t: type) -> str:
    if issubclass(t, RecordPart | IntEnum):
        return t.__name__
    return "double" if t is float else "int64_t"


def layout_fingerprint() -> str:
    """A hash of everything on which kernels and `encode` must agree: kinds, fields, types, order, limits."""
    text = [f"{HEADER} {[name for name, _ in PLACE]}"]
    text += [f"{name} {limit}" for name, limit in LIMITS.items()]
    text += [f"{e.__name__} {[(m.name, m.value) for m in e]}" for e in ENUMS]
    text += [f"{c.__name__} {[(n, c_type(t)) for n, t in layout_of(c)]}" for c in (*PARTS, *KINDS, *SIZES)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]
