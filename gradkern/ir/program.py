"""Program: a network as an immutable DAG of steps in a handful of forms.

A :class:`Program` holds *structure* only: forms, shapes and parameter **names**.  It holds no tensor, so an
optimizer step never makes it stale, and two networks of one architecture share it.  Its tensors are kept by
:mod:`gradkern.runtime.parameters`, and a :class:`~gradkern.planner.plan.Plan` says how to run it.

Values are numbered: ``0 … len(inputs)-1`` are the network's inputs, and step ``i`` defines value
``len(inputs) + i``.  Every shape here is **per sample**, without the batch axis (which is always axis 0 of the
live tensor and always free).

A backward pass needs no knowledge of layers.  It asks each form for its transposed action on a cotangent:

=============  =====================================================  ==========================================
form           what it is                                             layers that lower to it
=============  =====================================================  ==========================================
`Contract`     a weight shared by all samples, plus an index map      linear, conv, average pool, batch norm eval
`Scale`        an elementwise function, a diagonal per sample         ReLU, ELU, tanh, sigmoid, …
`Select`       routing chosen per sample                              max pool, amax
`LowRank`      a diagonal plus a rank-k term, per sample              softmax, layer / group / instance norm
`Product`      two values, each the other's weight                    gates, squeeze-excite, attention's matmuls
`Index`        the same elements in other places, some more than once  permute, slice, pad, cat, split, repeat, upsample
`Given`        slopes that are given, elementwise                     none: it replaces `Scale` (rules, forward mode)
`View`         the same elements under another shape                   flatten, view, squeeze
`Sum`          fan-in                                                 residual add
`Opaque`       anything else: torch differentiates that one node      LSTM, custom ops
=============  =====================================================  ==========================================
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

Shape = tuple[int, ...]

# What kernels take.  Lowerings know it too, and merge or split axes where that makes a value fit.
MOST_AXES = 3  # of a value, per sample
MAX_CHANNELS = 65535  # of a value; lists of channels are uint16


# ---------------------------------------------------------------------------------------------------------------
# Leaves of expressions


@dataclass(frozen=True)
class Param:
    """A live tensor by name: a parameter, a buffer, a constant of the graph, or the name of a `Derived`."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Value:
    """The result of an earlier step (or an input) by number."""

    id: int

    def __repr__(self) -> str:
        return f"v{self.id}"


@dataclass(frozen=True)
class Batch:
    """``times`` times the number of samples, as an argument of a `Call` (a size that holds the batch axis)."""

    times: int = 1

    def __repr__(self) -> str:
        return "N" if self.times == 1 else f"{self.times}N"


@dataclass(frozen=True)
class Call:
    """One ATen call, as data.  ``op`` is the overload's full name, ``"aten.conv1d.default"``.

    Arguments are plain immutable Python values, `Param`, `Value`, `Batch`, further calls (whose results have no
    batch axis 0 and so are not values: an LSTM's zero state), or tuples of these.  ``index`` picks one
    of several results (``None`` if the op returns a single tensor).
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    index: int | None = None

    def __repr__(self) -> str:
        parts = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs]
        tail = "" if self.index is None else f"[{self.index}]"
        return f"{self.op}({', '.join(parts)}){tail}"


@dataclass(frozen=True)
class Derived:
    """A tensor computed from parameters alone (weight norm, a batch norm's scale); evaluated at every bind."""

    name: str
    call: Call


# ---------------------------------------------------------------------------------------------------------------
# Index maps of `Contract`


@dataclass(frozen=True)
class Dense:
    """``y[..., o] = Σ_i w[o, i] x[..., i] + b[o]``: weight ``[O, I]`` over the last axis."""


@dataclass(frozen=True)
class Windows:
    """Sliding windows over the trailing spatial axes of ``[C, *spatial]``; weight ``[O, C/groups, *kernel]``.

    ``padding`` holds ``(before, after)`` per axis, so that ``same`` with an even kernel is possible.  Padding is
    zeros.  `Select` uses the same geometry with ``-inf`` padding; there ``groups`` is 1 and unused.
    """

    kernel: Shape
    stride: Shape
    padding: tuple[tuple[int, int], ...]
    dilation: Shape
    groups: int = 1

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def overlap(self) -> bool:
        """Whether windows share positions."""
        return any(s < d * (k - 1) + 1 for s, k, d in zip(self.stride, self.kernel, self.dilation, strict=True))

    def outside(self, spatial: Shape) -> list[tuple[int, list[int]]]:
        """By axis, the windows over ``spatial`` that lie wholly in the padding."""
        found = []
        axes = zip(spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        for axis, (n, k, s, (before, after), d) in enumerate(axes):
            starts = range(-before, n + after - d * (k - 1), s)
            missing = [i for i, first in enumerate(starts) if not any(0 <= first + j * d < n for j in range(k))]
            found += [(axis, missing)] if missing else []
        return found

    def __repr__(self) -> str:
        text = "k" + "×".join(map(str, self.kernel))
        if any(s != 1 for s in self.stride):
            text += " s" + "×".join(map(str, self.stride))
        if any(p != (0, 0) for p in self.padding):
            text += " p" + "×".join(str(a) if a == b else f"{a}/{b}" for a, b in self.padding)
        if any(d != 1 for d in self.dilation):
            text += " d" + "×".join(map(str, self.dilation))
        return text + (f" g{self.groups}" if self.groups != 1 else "")


@dataclass(frozen=True)
class Positions:
    """A constant separable map over the spatial axes, the same for every channel; no weight.

    ``axes[a]`` lists, for each output index along spatial axis ``a``, ``(first input index, coefficients)``.
    The coefficient of an output position is the product over axes.  Average pooling (padding, ceil and
    ``count_include_pad`` included), adaptive average pooling and spatial means are of this kind.
    """

    axes: tuple[tuple[tuple[int, tuple[float, ...]], ...], ...]

    def __repr__(self) -> str:
        return "×".join(f"{len(rows)}<-{max(s + len(c) for s, c in rows)}" for rows in self.axes)


@dataclass(frozen=True)
class Channels:
    """``y[c, *] = w[c] x[c, *] + b[c]``: one factor and one shift per channel (batch norm in eval).

    ``w`` or ``b`` may be missing (1 and 0).  For a flat value ``[F]`` the features are the channels.  ``axis`` is
    the per-sample axis of the channels: 0, or the last axis if features come last (a layer norm's factors).
    """

    axis: int = 0


IndexMap = Dense | Windows | Positions | Channels


# ---------------------------------------------------------------------------------------------------------------
# Forms


@dataclass(frozen=True)
class Contract:
    """A weight shared by all samples, contracted through an index map.  Linear in x; its VJP ignores x."""

    map: IndexMap
    weight: Param | None = None
    bias: Param | None = None


@dataclass(frozen=True)
class Scale:
    """An elementwise function ``y = f(x)``; the VJP multiplies by ``f'(x)``.

    ``function`` is a name in :data:`gradkern.ir.functions.FUNCTIONS` and ``params`` its numbers (a slope, an α).
    """

    function: str
    params: tuple[float, ...] = ()


@dataclass(frozen=True)
class Select:
    """The maximum of each window, per channel: the first maximum wins, or the last NaN (as in torch's pools).

    ``ties`` is ``"split"`` for `amax`, which shares a cotangent between equal maxima; its windows span whole axes.
    """

    windows: Windows
    ties: str = "first"


@dataclass(frozen=True)
class LowRank:
    """A function along per-sample axis ``axis`` (non-negative), whose VJP is a diagonal plus a few dot products.

    ``softmax``, ``log_softmax``, or ``normalize`` with params (eps,): ``(x - mean) / sqrt(variance + eps)``.
    """

    function: str
    axis: int
    params: tuple[float, ...] = ()


@dataclass(frozen=True)
class Product:
    """A product of two values.  ``mul``: elementwise for equal ranks; axes of length one are broadcast.

    ``matmul``: ``[*B, M, K] @ [*B, K, P]``, with the same leading axes on both sides.
    """

    function: str = "mul"


@dataclass(frozen=True)
class Part:
    """How one input is copied to the result of an `Index`.

    The input's axes are put into ``order``; then ``axes[a]`` says, for each output index along axis ``a``, which
    index it reads, as runs ``(start, count, step)``.  A negative start is a run of zeros.
    """

    order: Shape
    axes: tuple[tuple[tuple[int, int, int], ...], ...]

    def __repr__(self) -> str:
        def text(start: int, count: int, step: int) -> str:
            end = start + count if step == 1 else f"{start}+{step}·{count}"
            return f"0·{count}" if start < 0 else f"{start}:{end}"

        rows = (" ".join(text(*run) for run in runs) for runs in self.axes)
        order = "" if self.order == tuple(range(len(self.order))) else "".join(map(str, self.order)) + " "
        return f"{order}[{', '.join(rows)}]"


@dataclass(frozen=True)
class Index:
    """Copies: every output element is one element of an input, or zero.  Linear, no weight, no arithmetic.

    Several inputs (one `Part` each) fill disjoint places: concatenation.
    """

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Given:
    """``y = slope ⊙ x``: the second input holds the slopes and is not differentiated.

    If ``of`` names a function, the second input holds the argument of that function instead, and the slopes are its
    derivative there.  Attribution rules and forward mode put this form in place of `Scale`; networks never have it.
    """

    of: Scale | None = None


@dataclass(frozen=True)
class View:
    """The same elements in the same row-major order under the step's shape."""


@dataclass(frozen=True)
class Sum:
    """The sum of all inputs, which have equal shapes."""


@dataclass(frozen=True)
class Opaque:
    """One node that torch itself runs and differentiates.  ``reason`` says why it has no form."""

    call: Call
    reason: str


Form = Contract | Scale | Select | LowRank | Product | Index | Given | View | Sum | Opaque


# ---------------------------------------------------------------------------------------------------------------
# Steps and programs


@dataclass(frozen=True)
class Step:
    """One step of the DAG: ``form`` applied to the values ``inputs``, giving a value of per-sample ``shape``."""

    form: Form
    inputs: tuple[int, ...]
    shape: Shape
    op: str = ""  # the ATen op that it came from, for messages
    module: str = ""  # the path of the module that it came from, for messages


@dataclass(frozen=True)
class Program:
    """A network as data.  ``inputs`` are per-sample input shapes, ``output`` is the index of the result value."""

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    output: int
    derived: tuple[Derived, ...] = ()

    def shape(self, value: int) -> Shape:
        """Per-sample shape of a value."""
        return self.shapes[value]

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Per-sample shapes of all values."""
        return (*self.inputs, *(step.shape for step in self.steps))

    @cached_property
    def output_shape(self) -> Shape:
        return self.shape(self.output)

    @cached_property
    def outputs(self) -> int:
        """The elements of the output per sample (C)."""
        return math.prod(self.output_shape)

    @cached_property
    def consumers(self) -> dict[int, tuple[int, ...]]:
        """For each value, the indices of the steps that read it (once per read)."""
        readers: dict[int, list[int]] = {v: [] for v in range(len(self.inputs) + len(self.steps))}
        for i, step in enumerate(self.steps):
            for v in step.inputs:
                readers[v].append(i)
        return {v: tuple(s) for v, s in readers.items()}

    @cached_property
    def slopes(self) -> frozenset[int]:
        """The values that `Given` steps multiply by.  A program that has any is linear: its backward pass needs no
        other values."""
        return frozenset(s.inputs[1] for s in self.steps if isinstance(s.form, Given))

    @cached_property
    def key(self) -> str:
        """A stable hash of the structure, equal across processes."""
        return hashlib.sha256(repr(_exact(self)).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        rows = ["input"] * len(self.inputs)
        for step in self.steps:
            reads = " ".join(f"v{j}" for j in step.inputs)
            rows.append(f"{describe(step.form)} {reads}    # {step.module or step.op}")
        sizes = ("×".join(map(str, shape)) or "()" for shape in self.shapes)
        lines = [f"  v{v:<3} {size:>12}  {row}" for v, (size, row) in enumerate(zip(sizes, rows, strict=True))]
        return "\n".join([f"program {self.key}", *lines, f"  return v{self.output}"])


def _exact(x: Any) -> Any:
    """Everything in a value, as nested tuples.  (The value's printed form leaves out coefficients.)"""
    if is_dataclass(x):
        return (type(x).__name__, *(_exact(getattr(x, f.name)) for f in fields(x)))
    return tuple(_exact(item) for item in x) if isinstance(x, tuple) else x


def describe(form: Form) -> str:
    """A form in a few words: ``Contract(k5 p2, %conv1.weight)``."""
    if isinstance(form, Opaque):
        return f"Opaque({form.call.op})"
    words = [repr(getattr(form, f.name)) for f in fields(form) if getattr(form, f.name) not in (None, ())]
    return f"{type(form).__name__}({', '.join(words)})"
