"""Limits of the kernels, which the lowering and its cost model also need.

csrc/records.h has them as constants (``NARROW_SEEDS`` is ``kNarrowSeeds<T>``), which are generated from this module.
After a change here, run ``python -m gradkern.codegen.records_header`` and rebuild the extension.
"""

from __future__ import annotations

from typing import NamedTuple


class ByType(NamedTuple):
    """A limit that depends on the element type, because of the registers of a thread."""

    float32: int
    float64: int

    def of(self, itemsize: int) -> int:
        return self.float32 if itemsize == 4 else self.float64


MAX_TAPS = 256  # taps of a pattern, each with a plane of bits
# The others are limits of the CUDA kernels.
PORTS = 16  # external inputs of a chain, and external outputs
# Transposed convolutions: walks over live channels, quads, and narrow windows.
WALK_ELEMENTS = 5  # elements of the window per lane
WALK_SEEDS = ByType(5, 2)  # seeds per walk
QUADS = ByType(6, 3)  # quads of the window per lane: 2, 3, 5 or 6
QUAD_SEEDS = 6  # seeds per visit
QUAD_SUMS = ByType(18, 4)  # quads times seeds of a lane
QUAD_PLANES = 4  # taps of a pool that share a window
NARROW = 8  # the most elements of a narrow window
NARROW_LANES = 4  # lanes of a worker
NARROW_SEEDS = ByType(5, 3)  # seeds per visit
# The other contractions.
POOLED = ByType(8, 4)  # positions of a thread if a convolution is joined with its pool
PART_ROWS = 12  # the least rows of a linear layer's weight for each warp that shares a sum

#: All of them by name.
LIMITS = {name: value for name, value in globals().items() if name.isupper()}
