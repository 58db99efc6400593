"""Numbers that are both in the sources of the kernels and in Python, besides the generated ones of csrc/records.h."""

from __future__ import annotations

import re

import pytest

from gradkern.codegen import limits
from gradkern.codegen.cuda import clock_model
from gradkern.codegen.records_header import HEADER_FILE

CSRC = HEADER_FILE.parent
pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="no sources here")


def found(file: str, pattern: str) -> list[int]:
    return [int(n) for n in re.findall(pattern, (CSRC / file).read_text())]


def test_quads_of_a_lane_in_python_are_the_kernels():
    counts = clock_model.QUAD_COUNTS
    assert sorted({*found("cuda/quads.cuh", r"quads_of<T, (\d+)>")}) == list(counts)
    assert found("cuda/quads.cuh", r"each <= (\d+)") == list(counts[:-1])
    assert set(limits.QUADS) <= set(counts) and max(limits.QUADS) == counts[-1]


def test_warp_size_in_python_is_the_kernels():
    assert found("cuda/device.cuh", r"constexpr int kWarp = (\d+);") == [clock_model.WARP]
