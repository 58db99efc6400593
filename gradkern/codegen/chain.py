"""Chain: a native group of steps as records for the compiled interpreter (`csrc/program.h` is the mirror).

:mod:`gradkern.codegen.lowering` makes one; :mod:`gradkern.runtime.ops` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .weights import MixLayout, ScatterLayout, WindowLayout

#: The record layout; `gradkern.runtime.ops` compares it with the compiled one when it loads.
_FIELDS = (
    "kind block src src_n src_s src_row src_px aux aux_n aux_row aux_px dst dst_n dst_s dst_row dst_px H W Hi Wi C O "
    "groups K R L slots sh sw kh kw ph pw dh dw wf bias wb ldw table table2 entries bits bits_n nb taps relu fn "
    "p0 p1 p2 ext rows assign outer merged fold size"
)
_KINDS = (
    "Load Window Stencil Pattern Scale Sum Move Product Lines Store SeedRows SeedOneHot SeedDense Zero WindowT "
    "StencilT Expand MulD Add MoveT ProductT LinesT StoreT Rectify MatMul MatMulT"
)
FIELDS, KINDS = tuple(_FIELDS.split()), tuple(_KINDS.split())


@dataclass(frozen=True)
class Machine:
    """What the kernels' layout depends on."""

    isa: str
    vector_bytes: int


@dataclass(frozen=True)
class Chain:
    """Records, tables and layouts of one group.  Read-only; shared by every call with the same plan."""

    forward: tuple[tuple[int, ...], ...]
    backward: tuple[tuple[int, ...], ...]
    tables: tuple[int, ...]
    layouts: tuple[WindowLayout | ScatterLayout | MixLayout, ...]
    sizes: tuple[int, ...]  # arena: shared, per sample, bit bytes per sample, list, segments, block
    packed_size: int
    inputs: tuple[int, ...]  # external values, in the order of the records' `ext`
    outputs: tuple[int, ...]
    output_sizes: tuple[int, ...]
    wrt: tuple[int, ...]  # external inputs whose cotangents are stored, in the order of StoreT's `ext`
    seed_tile: int
    rows: tuple[int, int] | None  # (offset, row length) in the packed weights of the seed rows
    rectify_rows: bool  # the rows pass a guided ReLU: without their negative part
    scratch: int  # bytes per thread
    clocks: tuple[float, ...] = ()  # on a GPU: what each record is estimated to take of a multiprocessor, per sample
