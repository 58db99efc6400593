"""Units and nodes: a native group of steps, regrouped the way the kernels run it.

Between the :class:`~gradkern.ir.program.Program` and its records (:mod:`.records`) there are two kinds of objects:

* a **node** is a piece of storage: one value, or several that are views of each other.  Inside a chain every node
  is *channels-last*, ``[H][W][C]`` per sample, because then the window of a convolution is a few contiguous runs;
* a **unit** is the work of one kernel: a contraction with the batch norms after it folded in, a ReLU and max pool
  as one bit pattern, …

:mod:`gradkern.codegen.grouping` builds them from the steps of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..ir.program import Contract, Dense, Form, Windows

Pair = tuple[int, int]
UnitKind = Literal["load", "window", "stencil", "pattern", "elementwise", "add", "move", "lines", "multiply", "matmul"]

POINT = Windows((1,), (1,), ((0, 0),), (1,))  # one position: the window of a bare ReLU, or of a linear layer per token


def geometry(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """``(C, H, W)`` of a per-sample shape whose first axis is the channels; None if it has more than 3 axes."""
    if len(shape) > 3:
        return None
    c, *rest = shape or (1,)
    h, w = (1, 1, *rest)[-2:]
    return c, h, w


def tokens(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """``(C, H, W)`` of a shape whose last axis is the channels."""
    first = geometry(shape)
    if first is None or len(shape) < 2:
        return first
    return (shape[1], 1, shape[0]) if len(shape) == 2 else (shape[2], shape[0], shape[1])


def storage_axes(rank: int, channels_last: bool) -> str:
    """The storage axis of each axis of a value."""
    first = {0: "C", 1: "C", 2: "CW", 3: "CHW"}[rank]
    return first[1:] + first[0] if channels_last and rank > 1 else first


@dataclass
class Node:
    """Storage of one value (and its views): channels-last ``[H][W][C]``, with a zero halo if windows need one."""

    id: int
    C: int
    H: int
    W: int
    producer: Unit = field(init=False)
    readers: list[Unit] = field(default_factory=list)  # once per read
    halo: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # top, bottom, left, right
    store: int = -1  # nodes of equal `store` share forward memory (a ReLU in place)

    @property
    def row(self) -> int:
        return (self.W + self.halo[2] + self.halo[3]) * self.C

    @property
    def size(self) -> int:
        return (self.H + self.halo[0] + self.halo[1]) * self.row

    @property
    def interior(self) -> int:
        """Offset of position (0, 0) from the start of the storage."""
        return self.halo[0] * self.row + self.halo[2] * self.C

    @property
    def P(self) -> int:
        return self.H * self.W

    @property
    def trivial(self) -> bool:
        """Whether channels-last and row-major order agree."""
        return self.C == 1 or self.P == 1

    def is_a(self, geometry: tuple[int, int, int] | None) -> bool:
        return geometry == (self.C, self.H, self.W)


@dataclass(frozen=True)
class Fold:
    """A batch norm after a window, folded into its weights: channels ``first``, … of the norm's own."""

    form: Contract
    first: int = 0


@dataclass(frozen=True)
class Side:
    """One side of a move: a value's shape, and whether its last axis is the channels."""

    shape: tuple[int, ...]
    channels_last: bool


@dataclass
class Unit:
    """The work of one kernel, which reads ``reads`` and writes ``out``.  ``steps`` are the program's step indices."""

    kind: UnitKind
    reads: list[Node]
    out: Node
    steps: list[int]
    form: Form | None = None
    windows: Windows | None = None  # of a pattern: its pool; None for a bare ReLU
    relu: bool = False
    rectify: bool = False  # of a pattern with a guided or opened ReLU: negative cotangents stop here
    opened: bool = False  # all other cotangents pass, even where the ReLU is off: the bits are not read
    slope: int = -1  # of a given scale: the external value that holds its slopes
    folds: list[Fold] = field(default_factory=list)  # batch norms folded into a window unit
    first: int = 0  # of a batch norm over some of its channels: the first of them
    storage_order: bool = False  # of a linear layer or given scale: its input is flat in storage order
    sides: list[Side] = field(default_factory=list)  # of a move: its sources, and at the end its destination
    along: str = "C"  # of a norm or softmax: the storage axis that it works along

    @property
    def dense(self) -> bool:
        return self.kind == "window" and isinstance(self.contraction.map, Dense)

    @property
    def contraction(self) -> Contract:
        assert isinstance(self.form, Contract)
        return self.form

    @property
    def convolution(self) -> Windows:
        """The windows of a contraction, which must have them."""
        assert isinstance(self.contraction.map, Windows)
        return self.contraction.map


@dataclass
class UnitGraph:
    """The units of one group in forward order, with the nodes of its external inputs and outputs."""

    units: list[Unit]
    inputs: dict[int, Node]  # external value → node
    outputs: dict[int, Node]
    channels_last: set[int]  # external values whose storage is in their own row-major order


def planar(w: Windows) -> tuple[Pair, Pair, tuple[Pair, Pair], Pair]:
    """``(kernel, stride, padding, dilation)`` of a 1-D or 2-D window as 2-D pairs."""
    (kh, kw), (sh, sw) = (1, *w.kernel)[-2:], (1, *w.stride)[-2:]
    (dh, dw), (above, before) = (1, *w.dilation)[-2:], ((0, 0), *w.padding)[-2:]
    return (kh, kw), (sh, sw), (above, before), (dh, dw)


def overlaps(w: Windows) -> bool:
    """Whether windows share positions, so that a pool's cotangents add up before they reach the step below."""
    return any(s < (k - 1) * d + 1 for s, k, d in zip(w.stride, w.kernel, w.dilation, strict=True))
