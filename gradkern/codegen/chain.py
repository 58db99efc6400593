"""Chain: a native group of steps as records for the compiled interpreter.

:mod:`gradkern.codegen.lowering` makes one; :mod:`gradkern.runtime.ops` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .encoding import Sizes
from .records import Record
from .weights import Layout

Row = tuple[int, ...]  # an encoded record


@dataclass(frozen=True, eq=False)
class Chain:
    """Records, tables and layouts of one group.  Read-only; shared by every call with the same plan."""

    forward: tuple[Record, ...]
    backward: tuple[Record, ...]
    forward_rows: tuple[Row, ...]  # the same, encoded
    backward_rows: tuple[Row, ...]
    tables: tuple[int, ...]
    layouts: tuple[Layout, ...]
    sizes: Sizes  # of scratch memory: CpuSizes or CudaSizes
    packed_size: int
    inputs: tuple[int, ...]  # external values, in the order that Load counts them
    outputs: tuple[int, ...]
    output_sizes: tuple[int, ...]
    wrt: tuple[int, ...]  # external inputs whose cotangents are stored, in the order that StoreT counts them
    seed_tile: int
    seed_rows: tuple[int, int] | None  # their offset and row length in the packed weights
    rectify_seed_rows: bool  # the rows pass a guided ReLU: without their negative part
    scratch: int  # bytes per thread
    clocks: tuple[float, ...] = ()  # on a GPU: estimated clocks of a multiprocessor for each record, per sample
