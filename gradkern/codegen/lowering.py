"""Lowering: from the units of a native group to its :class:`~gradkern.codegen.chain.Chain`.

`lower_to_chain` decides everything that does not depend on tensor data: which cotangents are materialised and which are
read through a pattern, the place of each buffer, which buffers are zeroed, and how many seeds and samples are processed
at a time.
It is pure: equal arguments give equal chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.program import Program
from . import records
from .chain import Chain, Row
from .emitters import UnitRecords
from .encoding import CpuSizes, Sizes, encode
from .grouping import GraphBuilder
from .machine import Machine
from .recording import extent
from .records import Extent, Place, Record
from .scratch import block_size, mark_lives, place, seed_tile, stacked
from .units import Node, Unit


@dataclass(frozen=True)
class LaidOut:
    """The records of both passes once scratch memory is laid out, as their `Chain` has them."""

    forward: tuple[Record, ...]
    backward: tuple[Record, ...]
    forward_rows: tuple[Row, ...]
    backward_rows: tuple[Row, ...]
    sizes: Sizes
    packed_size: int
    seed_tile: int
    scratch: int
    clocks: tuple[float, ...] = ()


class Lowering(UnitRecords):
    """One group on one machine, for ``seeds`` seeds of element size ``itemsize``.

    The layout of weights and scratch memory is the machine's: :mod:`gradkern.codegen.cuda.lowering` has the GPU's.
    """

    block_from_forward = True  # whether the forward pass determines how many samples are processed together

    # ---- forward

    def load_slopes(self) -> None:
        """Load the given slopes, which are all that a linear group's backward pass needs, where a forward would."""
        order = list(self.graph.inputs)
        self.block_from_forward = False
        for unit in self.graph.units:
            if unit.kind == "elementwise":
                dst, shape, out = self.slope(unit), extent(unit.out), unit.out
                if unit.storage_order:  # storage order is the tensor's own
                    dst, shape = Place(dst.buffer, dst.offset, dst.row, 1), Extent(1, out.H, out.W * out.C)
                self.forward.append(records.Load(input=order.index(unit.slope), dst=dst, extent=shape))

    def run_forward(self) -> None:
        for unit in self.graph.units:
            self.prepare(unit)
            getattr(self, f"forward_{unit.kind}")(unit)
        for k, (value, node) in enumerate(self.graph.outputs.items()):
            src, shape = self.outside(value, node, self.store(node))
            self.forward.append(records.Store(src=src, output=k, extent=shape))

    def prepare(self, unit: Unit) -> None:
        """Called before a unit's record.  The CPU's scratch memory starts out as zeros, and borders stay zero."""

    # ---- backward

    def run_backward(self) -> None:
        cotangents = self.cotangents
        for node in cotangents.outputs:  # decide from the end, so that each decision knows its readers
            cotangents.of(node)
        for k, (value, node) in enumerate(self.graph.outputs.items()):
            if node.id in cotangents.needs and node.producer is not cotangents.rows_unit:
                self.seed(k, value, node)
        for unit in reversed(self.graph.units):
            if unit.kind == "load" or unit.out.id not in cotangents.needs:
                continue
            if unit is cotangents.rows_unit:
                self.backward_rows(unit)
            else:
                self.backward_unit(unit)
        for k, value in enumerate(self.wrt):
            self.store_cotangent(k, value)

    def backward_unit(self, unit: Unit) -> None:
        upstream = self.cotangents.of(unit.out)
        if upstream is None:
            return
        if unit.rectify and not upstream.rows:
            buffer = self.grad(upstream.node)
            self.backward.append(records.Rectify(dst=Place(buffer, 0), elements=buffer.elements))
        for operand, node in enumerate(unit.reads):  # a unit may read one node twice
            if node.id in self.cotangents.needs:
                getattr(self, f"backward_{unit.kind}")(unit, operand, upstream)

    def store_cotangent(self, k: int, value: int) -> None:
        """Store the ``k``-th wanted cotangent, that of the external ``value``, in the caller's tensor."""
        node = self.graph.inputs[value]
        source = self.cotangents.of(node)
        if source is None:
            return
        if source.node is node:
            self.first_touch(node)  # zeros if nothing was added
        src, shape = self.outside(value, source.node, self.grad(source.node))
        border: tuple[int, ...] = ()
        if (fold := self.folded.get(source.node.id, 1)) > 1:
            src, border = Place(self.grad(node), 0, src.row, src.position), (fold, node.halo[0], node.halo[2])
        self.backward.append(records.StoreT(src, k, shape, *border))

    def seed(self, k: int, value: int, node: Node) -> None:
        self.first_touch(node)
        dst, shape = self.outside(value, node, self.grad(node))
        self.backward.append(records.SeedOneHot(dst, shape) if self.onehot else records.SeedDense(dst, k, shape))

    def backward_rows(self, unit: Unit) -> None:
        node = unit.reads[0]
        expression = self.cotangents.of(node)
        if expression is None or expression.rows:
            return
        self.backward.append(records.SeedRows(dst=self.accumulated(node), elements=node.C * node.P))

    # ---- layout of scratch memory

    def finish(self) -> LaidOut:
        """Place all buffers."""
        mark_lives((self.forward, self.backward))
        for buffer in (*self.stores.values(), *self.grads.values()):
            buffer.per_sample = len(buffer.stages) > 1
        grads = list(self.grads.values())
        per_seed = stacked(grads)
        tile = seed_tile(self.seeds, sum(per_seed) * self.itemsize)
        shared, sample = place([*self.stores.values(), *self.saved.values()], grads, per_seed, tile)
        whole_block = any(r.whole_block for r in (self.forward if self.block_from_forward else self.backward))
        each, lists = sample * self.itemsize + self.bit_bytes, 2 * self.entries + 32 * self.segments
        block = block_size(whole_block, shared * self.itemsize, each, lists)
        entries, segments = self.entries * block, self.segments * block
        elements, bits = shared + sample * block, self.bit_bytes * block
        return LaidOut(
            forward=tuple(self.forward),
            backward=tuple(self.backward),
            forward_rows=tuple(encode(op, sample) for op in self.forward),
            backward_rows=tuple(encode(op, sample) for op in self.backward),
            sizes=CpuSizes(shared, sample, self.bit_bytes, entries, segments, block),
            packed_size=self.packed,
            seed_tile=tile,
            scratch=elements * self.itemsize + bits + entries * 4 + segments * 32,
        )


def lower_to_chain(
    program: Program,
    steps: list[int],
    live_out: list[int],
    machine: Machine,
    itemsize: int,
    seeds: int,
    wrt: tuple[int, ...],
    onehot: bool = True,
    lowering: type[Lowering] = Lowering,
    linear: bool = False,
) -> Chain:
    """Lower the native steps ``steps`` of a program.

    ``live_out``: values wanted from the group; ``wrt``: external values whose cotangents are wanted; ``onehot``:
    the seeds are one-hot at the single output (else dense cotangents are given for every output).  ``linear``: no
    value is computed, as every scale of the group is `Given` (its slopes are external values).
    """
    graph = GraphBuilder(program, steps, live_out).build()
    lowered = lowering(graph, machine, itemsize, seeds, wrt, onehot)
    lowered.load_slopes() if linear else lowered.run_forward()
    if seeds:
        lowered.run_backward()
    laid_out = lowered.finish()
    rows, rows_unit = lowered.rows, lowered.cotangents.rows_unit
    return Chain(
        **vars(laid_out),
        tables=tuple(lowered.tables),
        layouts=tuple(lowered.layouts),
        inputs=tuple(graph.inputs),
        outputs=tuple(live_out),
        output_sizes=tuple(math.prod(program.shape(v)) for v in live_out),
        wrt=lowered.wrt,
        rows=None if rows is None else (rows.weights, rows.row_length),
        rectify_rows=rows_unit is not None and rows_unit.reads[0].producer.rectify,
    )
