"""Units and nodes: a native group of steps, regrouped the way the kernels run it.

Between the :class:`~gradkern.ir.program.Program` and its records (:mod:`.records`) there are two kinds of objects:

* a **node** is a piece of storage: one value, or several that are views of each other.  Inside a chain every node
  is *channels-last*, ``[H][W][C]`` per sample, because then the window of a convolution is a few contiguous runs;
* a **unit** is the work of one kernel: a contraction with the batch norms after it folded in, a ReLU and max pool
  as one bit pattern, …  There is one class per kind.

:mod:`gradkern.codegen.unit_graph` builds them from the steps of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..ir.program import MOST_AXES, Contract, Dense, LowRank, Part, Scale, Windows

POINT = Windows((1,), (1,), ((0, 0),), (1,))  # one position: the window of a bare ReLU, or of a linear layer per token


def geometry(shape: tuple[int, ...], channels_last: bool = False) -> tuple[int, int, int] | None:
    """``(C, H, W)`` of a per-sample shape; None if it has more than `MOST_AXES`.

    Its first axis is the channels or, with ``channels_last``, its last one (tokens, a transposed signal).
    """
    if len(shape) > MOST_AXES:
        return None
    if channels_last:
        shape = shape[-1:] + shape[:-1]
    c, *rest = shape or (1,)
    h, w = (1, 1, *rest)[-2:]
    return c, h, w


def storage_axes(rank: int, channels_last: bool) -> str:
    """The storage axis (a letter of ``"CHW"``) of each axis of a value."""
    first = {0: "C", 1: "C", 2: "CW", 3: "CHW"}[rank]
    return first[1:] + first[0] if channels_last and rank > 1 else first


@dataclass(eq=False)
class Node:
    """Storage of one value (and its views): channels-last ``[H][W][C]``, with a zero halo if windows need one."""

    id: int
    C: int
    H: int
    W: int
    producer: Unit = field(init=False)
    readers: list[Unit] = field(default_factory=list)  # once per read
    halo: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # top, bottom, left, right
    memory: int = -1  # nodes of equal `memory` share a buffer in the forward pass (a ReLU in place)

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
    """A batch norm after a window, folded into its weights.  The window's first channel is the norm's ``first``."""

    form: Contract
    first: int = 0


@dataclass(frozen=True)
class MoveEnd:
    """One side of a move: a value's shape, and whether its last axis is the channels."""

    shape: tuple[int, ...]
    channels_last: bool


@dataclass(frozen=True, eq=False)
class Unit:
    """The work of one kernel, which reads ``reads`` and writes ``out``.  ``steps`` are the program's step indices."""

    reads: tuple[Node, ...]
    out: Node
    steps: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Load(Unit):
    """Loads the external value ``value``."""

    value: int


@dataclass(frozen=True, eq=False)
class Window(Unit):
    """A convolution, or a linear layer (a window over everything), with the batch norms after it."""

    form: Contract
    folds: tuple[Fold, ...] = ()
    storage_order: bool = False  # a linear layer whose input is flattened in storage order

    @property
    def dense(self) -> bool:
        return isinstance(self.form.map, Dense)


@dataclass(frozen=True, eq=False)
class Stencil(Unit):
    """A map over positions, channel by channel: average pool, depthwise convolution, a norm that is not folded."""

    form: Contract
    first: int = 0  # the first channel, for a norm over some of its channels


@dataclass(frozen=True, eq=False)
class Pattern(Unit):
    """ReLU, max pool, or both: one bit per unit and tap."""

    pool: Windows | None  # None: a bare ReLU
    relu: bool
    rectify: bool = False  # a guided or an opened ReLU, where negative cotangents stop
    opened: bool = False  # an opened ReLU: other cotangents pass even where it is off, so the bits are not read

    @property
    def windows(self) -> Windows2d:
        """The windows that have bits."""
        return Windows2d.of(self.pool or POINT)


@dataclass(frozen=True, eq=False)
class Elementwise(Unit):
    """Multiplies cotangents by a derivative, element by element."""


@dataclass(frozen=True, eq=False)
class Function(Elementwise):
    """An elementwise function, which also computes the derivative."""

    form: Scale


@dataclass(frozen=True, eq=False)
class GivenDerivative(Elementwise):
    """A derivative that is given."""

    slope: int  # the external value that holds it
    storage_order: bool  # its input is flattened in storage order


@dataclass(frozen=True, eq=False)
class Derivative(GivenDerivative):
    """The derivative of the function ``form``, whose argument is the external value."""

    form: Scale


@dataclass(frozen=True, eq=False)
class GivenPattern(Pattern):
    """The bits of a ReLU that read the external value ``slope``."""

    slope: int = -1
    storage_order: bool = False  # its input is flattened in storage order


@dataclass(frozen=True, eq=False)
class Add(Unit):
    """The sum of two values."""


@dataclass(frozen=True, eq=False)
class Move(Unit):
    """Copies elements of its sources."""

    sources: tuple[MoveEnd, ...]
    result: MoveEnd
    parts: tuple[Part, ...] | None = None  # per source; None: every element keeps its place in row-major order


@dataclass(frozen=True, eq=False)
class Lines(Unit):
    """Softmax or a norm along one axis."""

    form: LowRank
    along: str  # the storage axis: "C", "H" or "W"


@dataclass(frozen=True, eq=False)
class Multiply(Unit):
    """The elementwise product of two values."""


@dataclass(frozen=True, eq=False)
class MatMul(Unit):
    """The matrix product of two values."""


@dataclass
class UnitGraph:
    """The units of one group in forward order, with the nodes of its external inputs and outputs."""

    units: list[Unit]
    inputs: dict[int, Node]  # external value → node
    outputs: dict[int, Node]
    row_major: set[int]  # external values that lie in memory in their own row-major order


class RowsColumns(NamedTuple):
    """One number for rows and one for columns."""

    h: int
    w: int


class Windows2d(NamedTuple):
    """The geometry of windows in two dimensions; windows of one dimension have one row."""

    kernel: RowsColumns
    stride: RowsColumns
    before: RowsColumns  # padding above and on the left
    dilation: RowsColumns

    @classmethod
    def of(cls, w: Windows) -> Windows2d:
        before = tuple(first for first, _ in w.padding)
        return cls(
            kernel=RowsColumns(*(1, *w.kernel)[-2:]),
            stride=RowsColumns(*(1, *w.stride)[-2:]),
            before=RowsColumns(*(0, *before)[-2:]),
            dilation=RowsColumns(*(1, *w.dilation)[-2:]),
        )


def rectifies_cotangent(unit: Unit) -> bool:
    """Whether negative cotangents stop at the unit's result."""
    return isinstance(unit, Pattern) and unit.rectify
