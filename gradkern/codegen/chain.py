"""Chain: a native group of steps as records for the compiled interpreter.

:mod:`gradkern.codegen.lowering` makes one; :mod:`gradkern.runtime.ops` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .encoding import Sizes
from .records import Record
from .weights import Layout

EncodedRecord = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LaidOut:
    """The records of both passes once scratch memory is laid out."""

    forward: tuple[Record, ...]
    backward: tuple[Record, ...]
    encoded_forward: tuple[EncodedRecord, ...]
    encoded_backward: tuple[EncodedRecord, ...]
    sizes: Sizes  # the sizes of scratch memory: CpuSizes or CudaSizes
    packed_size: int  # elements of the packed weights
    seed_tile: int  # seeds that are processed at a time
    scratch: int  # bytes per thread, or per block of a GPU
    local_share: float  # the share of the multiply-adds that local seeds reach; 1 if seeds are not local
    clocks: tuple[float, ...]  # on a GPU: the estimated clocks of a multiprocessor for each record, per sample


@dataclass(frozen=True, eq=False)
class Chain(LaidOut):
    """Records, tables and layouts of one group.  Read-only; shared by every call with the same plan."""

    tables: tuple[int, ...]
    layouts: tuple[Layout, ...]
    inputs: tuple[int, ...]  # external values, in the order that Load counts them
    outputs: tuple[int, ...]
    output_sizes: tuple[int, ...]
    wrt: tuple[int, ...]  # external inputs whose cotangents are stored, in the order that StoreT counts them
    seed_rows: tuple[int, int] | None  # the seed rows' offset and row length in the packed weights
    rectify_seed_rows: bool  # the seed rows pass a guided ReLU, which removes their negative part
