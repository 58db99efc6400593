"""Layers that are too large for a chain: one contraction each, as a matrix product over samples, seeds and places.

`find` looks at the steps of a Program that run one by one on a GPU and says which contractions the step kernel
(csrc/cuda/step.cuh) takes, and what it does on the way: forward the norms, the sum and the ReLU behind a contraction;
backward, before the result leaves the chip, the sum with what other readers sent, the mask of the ReLU and the way
back through the max pool in front.  Everything here is pure: shapes in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...ir.program import Channels, Contract, Dense, Program, Scale, Select, Sum, View, Windows
from ..units import geometry, planar
from .lowering import BF16, PLAIN, TF32, TF32X3, Device

SLICE, WIDE, NARROW = 16, 64, 16  # csrc/cuda/step.cuh: terms of a slice, results of a block
MOST_BLOCKS, MOST_NUMBERS = 65535, (1 << 31) - 1  # of a grid along z; of a sample, for 32-bit offsets
MAX_POOL_TAPS = 254  # a byte says which tap was chosen

# Multiply-adds per second of an H200, by arithmetic, and bytes per second of a copy: data sheet.
PEAK = {PLAIN: 33.5e12, TF32: 247e12, BF16: 494e12, TF32X3: 247e12 / 3}
BYTES = 4.0e12
# Shares of those peaks that the step kernel and ATen's libraries are taken to reach.  UNMEASURED, and set so that ATen
# keeps what is bound by arithmetic; benchmarks/gpu.py times both ways, and its first run settles these two lines.
OWN_SHARE = {PLAIN: 0.5, TF32: 0.3, BF16: 0.2, TF32X3: 0.35}
ATEN_SHARE = 0.75
# Numbers in a weight from which a contraction leaves its chain.  A block reads the weight for its own few samples: a
# mebibyte from L2 takes a multiprocessor about 40,000 clocks.  UNMEASURED.
CHAIN_WEIGHT = 1 << 18


@dataclass(frozen=True)
class Matrix:
    """One direction of a contraction.  The names are those of csrc/cuda/step.h."""

    groups: int
    K: int
    O: int  # noqa: E741
    source: tuple[int, int]  # extent of what is read
    step: tuple[int, int]  # places read, from one place to the next
    extent: tuple[int, int]  # of what is written
    out: tuple[int, int]  # places written, from one place to the next
    phases: tuple[tuple[int, ...], ...]  # height, width, first row, first column, first tap, taps
    taps: tuple[tuple[int, int, int], ...]  # row, column, number in the weight
    all_taps: int
    inner: int = 1  # rows of the matrix in one sample (and seed): a linear layer over the last of several axes
    linear: bool = False

    @property
    def ldw(self) -> int:
        return (self.O + 3) // 4 * 4

    @property
    def places(self) -> int:
        return max(p[0] * p[1] for p in self.phases)

    @property
    def weights(self) -> int:
        return self.groups * self.all_taps * self.K * self.ldw

    @property
    def narrow(self) -> bool:
        return self.O <= NARROW

    @cached_property
    def tables(self) -> tuple[int, ...]:
        return tuple(x for row in (*self.phases, *self.taps) for x in row)

    def sizes(self, rows: int, seeds: int, relu: bool, pool: tuple[int, int, int, int]) -> list[int]:
        """The op's integers, in the order of `StepArgs` from ``rows`` on."""
        head = [rows, seeds, self.inner, self.groups, self.K, self.O, self.ldw, self.all_taps]
        places = [*self.source, *self.step, *self.extent, *self.out]
        return [*head, *places, int(self.linear), int(relu), *pool, len(self.phases), self.places]

    @property
    def macs(self) -> int:
        """Multiply-adds of a row, with what tiles add."""
        tile = NARROW if self.narrow else WIDE
        terms = math.ceil(self.K / SLICE) * SLICE
        columns = math.ceil(self.O / tile) * tile
        return self.inner * self.groups * columns * terms * sum(h * w * taps for h, w, *_, taps in self.phases)


def forward_matrix(program: Program, i: int) -> Matrix:
    step = program.steps[i]
    form, shape = step.form, program.shape(step.inputs[0])
    assert isinstance(form, Contract)
    if isinstance(form.map, Dense):
        return dense(shape[-1], step.shape[-1], math.prod(shape[:-1]))
    w = form.map
    assert isinstance(w, Windows)
    (kh, kw), stride, (ph, pw), (dh, dw) = planar(w)
    c, *source = geometry(shape)  # type: ignore[misc]
    o, *out = geometry(step.shape)  # type: ignore[misc]
    taps = tuple((y * dh - ph[0], x * dw - pw[0], y * kw + x) for y in range(kh) for x in range(kw))
    phase = (*out, 0, 0, 0, len(taps))
    return Matrix(
        w.groups, c // w.groups, o // w.groups, tuple(source), tuple(stride), tuple(out), (1, 1), (phase,), taps,
        len(taps),
    )  # type: ignore[arg-type]  # fmt: skip


def backward_matrix(program: Program, i: int) -> Matrix:
    """The transpose.  Behind a stride only some taps meet a place: places fall into phases by their remainder."""
    step = program.steps[i]
    form, shape = step.form, program.shape(step.inputs[0])
    assert isinstance(form, Contract)
    if isinstance(form.map, Dense):
        return dense(step.shape[-1], shape[-1], math.prod(shape[:-1]))
    w = form.map
    assert isinstance(w, Windows)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = planar(w)
    c, height, width = geometry(shape)  # type: ignore[misc]
    o, *source = geometry(step.shape)  # type: ignore[misc]
    phases: list[tuple[int, ...]] = []
    taps: list[tuple[int, int, int]] = []
    for y0 in range(min(sh, height)):
        for x0 in range(min(sw, width)):
            rows = [(y0 + ph[0] - y * dh, y) for y in range(kh) if (y0 + ph[0] - y * dh) % sh == 0]
            columns = [(x0 + pw[0] - x * dw, x) for x in range(kw) if (x0 + pw[0] - x * dw) % sw == 0]
            found = [(a // sh, b // sw, y * kw + x) for a, y in rows for b, x in columns]
            extent = (math.ceil((height - y0) / sh), math.ceil((width - x0) / sw))
            phases.append((*extent, y0, x0, len(taps), len(found)))
            taps += found
    return Matrix(
        w.groups, o // w.groups, c // w.groups, tuple(source), (1, 1), (height, width), (sh, sw), tuple(phases),
        tuple(taps) or ((0, 0, 0),), kh * kw,
    )  # type: ignore[arg-type]  # fmt: skip


def dense(k: int, o: int, inner: int) -> Matrix:
    one = (1, 1)
    return Matrix(1, k, o, one, one, one, one, ((1, 1, 0, 0, 0, 1),), ((0, 0, 0),), 1, inner, True)


@dataclass(frozen=True)
class Layer:
    """A contraction that the step kernel runs, with what it does on the way.  Numbers of steps and of values."""

    contraction: int
    norms: tuple[int, ...]  # folded into the weights
    behind: tuple[int, ...]  # a sum, a ReLU: done forward
    source: int  # the value that is read
    cotangent: int  # the value whose cotangent the backward pass reads: behind the norms
    value: int  # the value that the forward pass writes: behind everything
    add: int | None  # the sum's other value
    relu: bool
    last: bool  # every other reader of the source has sent its cotangent before: they are added in here
    target: int  # the value whose cotangent the backward pass writes
    mask: int | None  # the value of the ReLU on the way to it
    pool: int | None  # the max pool on the way to it, a step
    forward: Matrix
    backward: Matrix

    @property
    def at(self) -> int:
        """The step at whose turn the forward pass runs: by then everything that it reads is there."""
        return max((self.contraction, *self.behind))


def find(
    program: Program, groups: Sequence[tuple[bool, tuple[int, ...]]], large: set[int], seeds: int, machine: Device
) -> tuple[Layer, ...]:
    """The layers among the steps ``large``.  ``groups``: whether native, and the steps, in execution order."""
    if machine.steps == "aten":
        return ()
    finder = Finder(program, groups)
    found = [layer for i in sorted(large, reverse=True) if (layer := finder.layer(i)) is not None]
    chosen = [x for x in found if machine.steps == "kernel" or pays(program, x, seeds, machine)]
    return tuple(reversed(chosen))


class Finder:
    def __init__(self, program: Program, groups: Sequence[tuple[bool, tuple[int, ...]]]):
        self.program, self.base = program, len(program.inputs)
        self.group = {i: (k, native) for k, (native, steps) in enumerate(groups) for i in steps}
        self.taken: set[int] = set()  # sums that a layer does

    def layer(self, i: int) -> Layer | None:
        """The layer around contraction ``i``.  Later ones are asked first: they have everything that a sum adds."""
        program, step = self.program, self.program.steps[i]
        form, value = step.form, self.base + i
        if not isinstance(form, Contract) or form.weight is None or not isinstance(form.map, Dense | Windows):
            return None
        axis = len(step.shape) - 1 if isinstance(form.map, Dense) else 0
        norms: list[int] = []
        while (j := self.reader(value, i)) is not None and program.steps[j].form == self.norm(j, axis):
            norms.append(j)
            value = self.base + j
        cotangent, behind, add, relu = value, [], None, False
        j = self.reader(value, i)
        if j is not None and self.two(j) and j not in self.taken:
            self.taken.add(j)
            behind.append(j)
            add = next(v for v in program.steps[j].inputs if v != value)
            value = self.base + j
            j = self.reader(value, i)
        if j is not None and program.steps[j].form == Scale("relu"):
            behind.append(j)
            relu, value = True, self.base + j
        source = step.inputs[0]
        last = self.is_last(source, i)
        target, mask, pool = self.way_back(source) if last else (source, None, None)
        forward, backward = forward_matrix(program, i), backward_matrix(program, i)
        extent = max(math.prod(step.shape), math.prod(program.shape(source)))
        if backward.groups * len(backward.phases) > MOST_BLOCKS or extent > MOST_NUMBERS:
            return None
        return Layer(
            i, tuple(norms), tuple(behind), source, cotangent, value, add, relu, last, target, mask, pool, forward,
            backward,
        )  # fmt: skip

    def reader(self, value: int, i: int) -> int | None:
        """The one step that reads a value which nobody else wants, if it runs beside step ``i``."""
        readers = self.program.consumers[value]
        if len(readers) != 1 or value == self.program.output or self.group[readers[0]] != self.group[i]:
            return None
        return readers[0]

    def norm(self, j: int, axis: int) -> object:
        form = self.program.steps[j].form
        return form if isinstance(form, Contract) and form.map == Channels(axis) else None

    def two(self, j: int) -> bool:
        step = self.program.steps[j]
        return isinstance(step.form, Sum) and len(step.inputs) == 2 == len(set(step.inputs))

    def is_last(self, value: int, i: int) -> bool:
        """Whether step ``i`` is the first reader of a value, so the last in the backward pass."""
        readers = self.program.consumers[value]
        return readers.count(i) == 1 and min(readers, key=lambda j: (self.group[j][0], j)) == i

    def producer(self, value: int) -> int | None:
        """The step that makes a value, if it runs on its own."""
        i = value - self.base
        return i if i >= 0 and not self.group[i][1] else None

    def alone(self, value: int) -> bool:
        return len(self.program.consumers[value]) == 1 and value != self.program.output

    def way_back(self, value: int) -> tuple[int, int | None, int | None]:
        """Through the ReLU and the pool that made a value: the value in front, the ReLU's value, the pool's step."""
        steps, start, through = self.program.steps, value, value
        while (i := self.producer(value)) is not None and isinstance(steps[i].form, View):
            if not self.alone(steps[i].inputs[0]):
                return start, None, None
            value = through = steps[i].inputs[0]
        if i is None:
            return start, None, None
        flat = through != start
        if steps[i].form == Scale("relu"):
            inside = steps[i].inputs[0]
            p = self.producer(inside)
            if p is not None and not flat and self.alone(inside) and self.plain_pool(p):
                return steps[p].inputs[0], value, p
            return inside, value, None
        if flat or not self.plain_pool(i):
            return start, None, None
        inside = steps[i].inputs[0]
        r = self.producer(inside)
        if r is not None and self.alone(inside) and steps[r].form == Scale("relu"):
            return steps[r].inputs[0], value, i
        return inside, None, i

    def plain_pool(self, i: int) -> bool:
        """A max pool whose windows lie side by side."""
        form = self.program.steps[i].form
        if not isinstance(form, Select) or form.ties != "first" or geometry(self.program.steps[i].shape) is None:
            return False
        w = form.windows
        if len(w.kernel) != len(self.program.steps[i].shape) - 1:
            return False
        plain = w.kernel == w.stride and not any(sum(p) for p in w.padding) and all(d == 1 for d in w.dilation)
        return plain and w.taps <= MAX_POOL_TAPS


def pool_extent(program: Program, pool: int) -> tuple[int, int, int, int]:
    """``(window height, width, height, width of what it read)`` of a pool."""
    form = program.steps[pool].form
    assert isinstance(form, Select)
    (kh, kw), *_ = planar(form.windows)
    _, h, w = geometry(program.shape(program.steps[pool].inputs[0]))  # type: ignore[misc]
    return kh, kw, h, w


def pays(program: Program, layer: Layer, seeds: int, machine: Device) -> bool:
    """Whether the step kernel is expected to be faster than ATen with the seeds folded into the batch."""
    form = program.steps[layer.contraction].form
    assert isinstance(form, Contract)
    few = isinstance(form.map, Windows) and form.map.groups > 1 and layer.backward.K < SLICE  # depthwise and the like
    own, aten = expected(program, layer, machine.math)
    return seeds > 0 and not few and own < aten


def expected(program: Program, layer: Layer, arithmetic: int) -> tuple[float, float]:
    """Seconds per sample and seed of a layer's backward pass on an H200, by the step kernel and by ATen.

    ATen's libraries make better use of the arithmetic; what they cannot do is keep a result on the chip for the mask,
    the sum or the pool, each of which they read and write again.
    """
    itemsize = 4
    read = math.prod(program.shape(layer.cotangent))
    written, target = math.prod(program.shape(layer.source)), math.prod(program.shape(layer.target))
    dense_macs = math.prod(program.steps[layer.contraction].shape) * layer.forward.K * layer.forward.all_taps
    passes = 3 * written * layer.last * (len(program.consumers[layer.source]) > 1)  # a sum reads two and writes one
    if layer.mask is not None:
        passes += 2 * written
    if layer.pool is not None:
        passes += written + 2 * target  # zeros, then the maxima
    own = max(layer.backward.macs / (PEAK[arithmetic] * OWN_SHARE[arithmetic]), itemsize * (read + target) / BYTES)
    library = PEAK[PLAIN] if arithmetic == PLAIN else PEAK[TF32]
    aten = max(dense_macs / (library * ATEN_SHARE), itemsize * (read + written) / BYTES) + itemsize * passes / BYTES
    return own, aten


def heavy(program: Program, i: int) -> str | None:
    """Why a contraction is no part of a chain although it might fit one; None where it is welcome there."""
    step = program.steps[i]
    form = step.form
    if not isinstance(form, Contract) or form.weight is None or not isinstance(form.map, Dense | Windows):
        return None
    c = program.shape(step.inputs[0])[-1 if isinstance(form.map, Dense) else 0]
    o = step.shape[-1 if isinstance(form.map, Dense) else 0]
    numbers = c * o if isinstance(form.map, Dense) else c * o // form.map.groups * form.map.taps
    if numbers <= CHAIN_WEIGHT:
        return None
    return f"a chain would read its {numbers / 1e6:.1f} million weights anew for every few samples"


def absorbable(program: Program, i: int) -> bool:
    """Whether a step is worth no chain of its own beside the step kernel, which does it on the way, or ATen does."""
    form = program.steps[i].form
    if isinstance(form, Contract):
        return isinstance(form.map, Channels)
    return isinstance(form, Sum | View | Select) or form == Scale("relu")
