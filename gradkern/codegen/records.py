"""Kernel records: one frozen dataclass per kind.

A chain is a list of records for its forward and one for its backward pass.  Their buffers are symbolic until scratch
memory is laid out.  Then :mod:`gradkern.codegen.encoding` turns them into rows of integers, which the kernels read as
the C++ structs of their kinds.  The structs are generated from these classes.  After a change here, run
``python -m gradkern.codegen.records_header``, which rewrites csrc/record*.h, comments included, and rebuild the
extension.

Offsets and strides count elements, except those of bits, which count bytes.  Kinds that end in T are the transposed
actions, on the cotangents of all seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, fields
from enum import IntEnum
from typing import dataclass_transform

from .scratch import Buffer

# ---- parts


@dataclass_transform(frozen_default=True)
class Struct:
    """A frozen dataclass, like all its subclasses, with a struct in C++ for each."""

    def __init_subclass__(cls, order: bool = False) -> None:
        dataclass(frozen=True, order=order)(cls)


class RecordPart(Struct):
    """A part of records and sizes."""


class Place(RecordPart):
    """Where the channels-last interior of a value or cotangent begins in scratch memory."""

    buffer: Buffer | None  # None: not in scratch memory (the seed rows)
    offset: int  # of the first element
    row: int = 0  # elements from one row of positions to the next
    position: int = 0  # elements from one position to the next


class Extent(RecordPart):
    """Channels, rows and columns."""

    C: int
    H: int
    W: int


class PatternRef(RecordPart):
    """Bits of a ReLU, a max pool, or both, and the geometry of the pool (a kernel of 1 for a bare ReLU).

    Every position of the output has `taps` planes of bits with one bit per channel. A bit is set in the plane of the
    tap that the output came from, if the output is alive.
    """

    bits: int  # byte offset among a sample's bits
    taps: int  # planes per position; 0: no pattern
    plane_bytes: int  # bytes of one plane: a bit per channel, in whole 16-bit words
    H: int  # rows of the pool's input
    W: int  # columns of the pool's input
    kh: int  # kernel
    kw: int
    sh: int  # stride
    sw: int
    ph: int  # padding before
    pw: int
    dh: int  # dilation
    dw: int


class StencilTable(RecordPart):
    """Blocks of positions with the same reads; tables.py defines blocks and entries."""

    weights: int  # offset in the packed weights: rows of one weight per channel
    row_length: int  # elements of a row of weights
    blocks: int  # the number of blocks
    block_table: int  # offset of the blocks in the tables, 7 integers each
    entry_table: int  # offset of the entries in the tables, 2 integers each


class Along(IntEnum):
    """The axis of the storage along which lines run."""

    Channels = 0
    Columns = 1
    Rows = 2


class LineFunction(IntEnum):
    """The function that is applied to each line."""

    Softmax = 0
    LogSoftmax = 1
    Normalize = 2


class LineSet(RecordPart):
    """Softmax or normalization along one axis of the storage, and the values saved for the backward pass."""

    extent: Extent
    along: Along
    function: LineFunction
    epsilon: float  # added to the variance
    saved: Place  # the probabilities, or the normalized values
    deviations: int  # elements from `saved` to the lines' inverse standard deviations


class Bands(RecordPart, order=True):
    """Rectangles of positions that a GPU's workers own; rectangles of one colour touch different memory."""

    rows: int = 1  # of positions in a band
    columns: int = 1
    row_colours: int = 1
    column_colours: int = 1


class ScatterAlgorithm(IntEnum):
    """How a GPU's workers compute a transposed convolution."""

    Walk = 0  # live channel by live channel (csrc/cuda/scatter.cuh)
    Quads = 1  # all channels, four elements of the window at a time (csrc/cuda/quads.cuh)
    Narrow = 2  # narrow windows, four lanes for the channels (csrc/cuda/quads.cuh)


class Reach(IntEnum):
    """Which positions of its destination a record of the backward pass reaches from those of its source."""

    Nothing = 0  # none: the record has only one cotangent
    All = 1  # all positions
    Same = 2
    Taps = 3  # those of windows, by rows and by columns: a step, the number of offsets, the offsets
    Ranges = 4  # a range (first, end) for each row and each column of the source
    Moves = 5  # where the move's runs go


# ---- records


def places_of(value: Record | RecordPart) -> Iterator[tuple[str, Place]]:
    """The places in a record or part by their fields' names."""
    for f in fields(value):
        part = getattr(value, f.name)
        if isinstance(part, Place):
            yield f.name, part
        elif isinstance(part, RecordPart):
            yield from places_of(part)


class Record(Struct):
    """Common to all kinds."""

    _: KW_ONLY
    whole_block: bool = False  # takes all samples of a block at once, so that its weight is read once for all of them

    def buffers(self) -> list[Buffer]:
        """The buffers in scratch memory that the record reads or writes."""
        return [p.buffer for _, p in places_of(self) if p.buffer is not None]

    def reads(self, buffer: Buffer) -> bool:
        """Whether the record has a place in the buffer other than its destination."""
        return any(p.buffer is buffer and name != "dst" for name, p in places_of(self))

    def writes(self, buffer: Buffer) -> bool:
        """Whether the record's destination is in the buffer."""
        return any(p.buffer is buffer and name == "dst" for name, p in places_of(self))


class Load(Record):
    """An external input [C][H][W] → channels-last."""

    input: int  # which of the external inputs
    dst: Place
    extent: Extent


class Store(Record):
    """A value → an external output [C][H][W]."""

    src: Place
    output: int  # which of the external outputs
    extent: Extent


class Window(Record):
    """A convolution; or, over the whole block, a linear layer, whose positions are the samples.

    A window is `runs` contiguous pieces of `run_length` elements.  Each group's weights are [terms][O], the terms in
    the order of the window: on the CPU in tiles of output vectors (weights.py), on a GPU in rows of O rounded up to 4.
    """

    src: Place  # the start of the first window; row, position: from one window to the next
    dst: Place
    H: int  # positions of the output
    W: int
    C: int  # channels read per group
    O: int  # channels written per group  # noqa: E741
    groups: int
    runs: int  # per window
    run_length: int
    run_table: int  # offset of the runs' starts in the tables
    weights: int  # offset in the packed weights
    bias: int  # likewise


class PooledWindow(Window):
    """On a GPU: a convolution joined with the ReLU or pool that reads it; `dst` is the pattern's output.

    The pool's windows neither overlap nor leave the input; H and W are positions of the pool's output.
    """

    pattern: PatternRef
    relu: bool


class Stencil(Record):
    """A channelwise map over positions: y[q][c] = bias[c] + Σ_e x[q][e][c] · w[row_e][c]."""

    src: Place
    dst: Place
    C: int  # channels
    stencil: StencilTable
    bias: int  # offset in the packed weights


class Pattern(Record):
    """A ReLU, a max pool, or both: the values and their bits."""

    src: Place
    dst: Place
    extent: Extent  # of the output
    pattern: PatternRef
    relu: bool


class Elementwise(Record):
    """An elementwise function, and its derivative for the backward pass."""

    src: Place
    dst: Place
    slope: Place  # the derivative
    extent: Extent
    function: int  # which of csrc/elementwise.h's functions
    p0: float  # its parameters
    p1: float
    p2: float


class Add(Record):
    """The sum of two values."""

    left: Place
    right: Place
    dst: Place
    extent: Extent


class Move(Record):
    """Copies of strided runs."""

    src: Place
    dst: Place
    runs: int
    run_table: int  # offset in the tables; 5 integers each: source, destination, count, and the steps of both


class Multiply(Record):
    """The product of two values; a stride of 0 broadcasts a side along that axis."""

    left: Place
    right: Place
    dst: Place
    extent: Extent
    left_channel: int  # stride between channels: 1, or 0 if one element serves all
    right_channel: int


class Lines(Record):
    """Softmax, log-softmax or normalization."""

    src: Place
    dst: Place
    lines: LineSet


class MatMul(Record):
    """Products of matrices of values: left [rows][terms] · right [terms][columns], `matrices` of them per sample."""

    left: Place  # row: from one matrix to the next; position: from one row to the next
    right: Place  # row: from one matrix to the next; position: from one term to the next
    dst: Place  # row: from one matrix to the next; position: from one row to the next
    left_term: int  # stride between terms of the left side
    right_column: int  # stride between columns of the right side; 1 on the CPU
    matrices: int
    rows: int
    columns: int
    terms: int


# ---- backward


class Zero(Record):
    """Zeroes a buffer before something is added to it (a cotangent for all seeds), or to zero its border."""

    dst: Place
    elements: int


class Rectify(Record):
    """A cotangent without its negative part, in place."""

    dst: Place
    elements: int


class SeedRows(Record):
    """The rows of the last weight that the targets choose: the first cotangent."""

    dst: Place
    elements: int


class SeedOneHot(Record):
    """A one at each seed's target."""

    dst: Place
    extent: Extent


class SeedDense(Record):
    """Adds the caller's cotangent of an output, [C][H][W]."""

    dst: Place
    cotangent: int  # which of the external outputs
    extent: Extent


class ContractionT(Record):
    """Common to the transposed contractions: every live channel adds its weight row, times its cotangent."""

    src: Place  # the cotangent of the contraction's output, or of the pattern's output if there is a pattern
    seed_rows: bool  # the cotangent is the seed rows (the first gradient, which is free), not in scratch memory
    dst: Place  # the start of the first position's window; row, position: from one window to the next
    O: int  # channels of the cotangent, all groups  # noqa: E741
    pattern: PatternRef | None  # the ReLU or pool through whose bits the cotangent is read
    weights: int  # offset in the packed weights
    row_length: int  # elements of a row of weights
    window_table: int  # offset in the tables of the offsets of the window's elements


class WindowT(ContractionT):
    """On the CPU: a transposed convolution, or over the whole block a transposed linear layer."""

    H: int  # positions of the cotangent
    W: int
    C: int  # channels of a window, per group
    groups: int
    merged: bool  # the taps of the pool share one window, with one weight row per tap and channel
    window_vectors: int  # pairs (offset, live lanes) in the window table
    sweep: int  # positions per sweep over the weights
    assign: bool  # the first write of the destination: store instead of add


class ScatterT(ContractionT):
    """On a GPU: a transposed convolution."""

    H: int  # positions of the cotangent
    W: int
    C: int  # channels of a window, per group
    groups: int
    merged: bool  # the taps of the pool share one window
    window_elements: int  # offsets in the window table
    algorithm: ScatterAlgorithm
    tap_table: int = 0  # Quads: offset in the tables of the starts of each tap's weights
    lanes: int = 32  # lanes of a worker
    bands: Bands = Bands()


class DenseT(ContractionT):
    """On a GPU: a transposed linear layer, over the whole block."""

    window_elements: int  # columns of the weight
    joined: bool  # the destination is one contiguous run
    assign: bool  # the first write of the destination: store instead of add


class StencilT(Record):
    """The transposed channelwise map: y[q][c] += Σ_e x[q][e][c] · w[row_e][c]."""

    src: Place
    dst: Place
    C: int  # channels
    stencil: StencilTable


class PatternT(Record):
    """Adds a cotangent to the places that the pattern's bits select."""

    src: Place
    dst: Place
    extent: Extent  # of the pattern's output
    pattern: PatternRef


class ElementwiseT(Record):
    """Multiplies a cotangent by the derivative."""

    src: Place
    dst: Place
    slope: Place
    extent: Extent
    assign: bool  # store (in place) instead of add


class Accumulate(Record):
    """Adds one cotangent to another."""

    src: Place
    dst: Place
    extent: Extent


class MoveT(Record):
    """Adds a cotangent to the elements that the runs of a move have read."""

    src: Place
    dst: Place
    runs: int
    run_table: int  # the move's runs, with destinations and sources exchanged
    distinct: bool = False  # no element is read twice, so runs can be processed in parallel


class MultiplyT(Record):
    """Adds a cotangent times the product's other side, summed where `dst` was broadcast."""

    src: Place
    other: Place
    dst: Place
    extent: Extent
    dst_channel: int  # stride between channels: 1, or 0 if one element serves all
    other_channel: int


class LinesT(Record):
    """softmax: p ⊙ (g - ⟨g, p⟩);  log-softmax: g - p Σ g;  normalize: r (g - mean g - p mean(g p))."""

    src: Place
    dst: Place
    lines: LineSet


class MatMulT(MatMul):
    """The cotangent of one side for all seeds; one of left and right is a cotangent, the other a value."""

    assign: bool  # the first write of the destination: store instead of add


class StoreT(Record):
    """The cotangent of an input → the caller's [C][H][W]."""

    src: Place
    result: int  # which of the results
    extent: Extent
    fold: int = 1  # rows interleaved in the source, which then begins at its border (1: none)
    halo_rows: int = 0  # if rows are interleaved: rows of the border above
    halo_columns: int = 0  # and columns of the border on the left


#: A record's kind is its place in this list.
KINDS: tuple[type[Record], ...] = (
    Load, Store, Window, PooledWindow, Stencil, Pattern, Elementwise, Add, Move, Multiply, Lines, MatMul,
    Zero, Rectify, SeedRows, SeedOneHot, SeedDense, WindowT, ScatterT, DenseT, StencilT, PatternT, ElementwiseT,
    Accumulate, MoveT, MultiplyT, LinesT, MatMulT, StoreT,
)  # fmt: skip

PARTS = (Extent, PatternRef, StencilTable, LineSet, Bands)
ENUMS = (Along, LineFunction, ScatterAlgorithm, Reach)
