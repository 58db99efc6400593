"""Records and sizes as the compiled kernels read them: rows of integers, worked out by hand."""

from __future__ import annotations

import struct
from dataclasses import fields

from gradkern.codegen import encoding, records
from gradkern.codegen.encoding import HEADER, WIDTH, CpuSizes, c_type, encode, width_of
from gradkern.codegen.records import KINDS, Extent, PatternRef, Place
from gradkern.codegen.scratch import Buffer


def test_a_place_resolves_to_its_buffer_and_strides():
    shared, own = Buffer(100, base=32), Buffer(50, cotangent=True, base=500, per_sample=True)
    src, dst = Place(shared, 3, row=20, position=2), Place(own, 4, row=10, position=1)
    row = encode(records.Accumulate(src=src, dst=dst, extent=Extent(2, 5, 10)), sample=1000, samples=7)
    assert len(row) == WIDTH and row[: len(HEADER)] == (KINDS.index(records.Accumulate), 0, 7)
    assert row[3:16] == (35, 0, 0, 20, 2, 504, 1000, 50, 10, 1, 2, 5, 10)
    assert not any(row[16:])


def test_doubles_are_their_bits_and_missing_parts_zeros():
    b = Buffer(10, base=0)
    scale = records.Elementwise(
        src=Place(b, 0), dst=Place(b, 0), slope=Place(b, 0), extent=Extent(1, 1, 1), function=2, p0=0.1, p1=1, p2=-2.5
    )
    doubles = struct.unpack("<3d", struct.pack("<3q", *encode(scale, 0)[22:25]))
    assert doubles == (0.1, 1.0, -2.5)
    dense = records.DenseT(
        whole_block=True, src=Place(None, 0), seed_rows=True, dst=Place(b, 0), O=4, pattern=None, weights=1,
        row_length=8, window_table=9, window_elements=6, joined=True, assign=False,
    )  # fmt: skip
    row = encode(dense, 0)
    pattern = 3 + 5 + 1 + 5 + 1
    assert row[1] == 1 and row[pattern - 1] == 4
    assert row[pattern : pattern + len(fields(PatternRef)) + 1] == (0,) * len(fields(PatternRef)) + (1,)


def test_the_fingerprint_follows_the_fields(monkeypatch):
    before = encoding.layout_fingerprint()
    monkeypatch.setattr(encoding, "KINDS", KINDS[::-1])
    assert encoding.layout_fingerprint() != before


def test_fields_are_one_integer_each_but_places_and_parts():
    assert [width_of(t) for t in (int, bool, float, records.Along, Place, Extent)] == [1, 1, 1, 1, 5, 3]
    assert [c_type(t) for t in (int, bool, float, records.Along, Extent)] == [
        "int64_t", "int64_t", "double", "Along", "Extent",
    ]  # fmt: skip


def test_sizes_are_integers_in_the_order_of_their_fields():
    sizes = CpuSizes(shared=1, sample=2, bits=3, entries=4, segments=5, block=6)
    assert sizes.integers == [1, 2, 3, 4, 5, 6, 0]
