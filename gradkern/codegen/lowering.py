"""Lowering: from the units of a native group to its :class:`~gradkern.codegen.chain.Chain`.

`lower` decides everything that does not depend on tensor data: which cotangents are materialised and which are
read through a pattern, where each buffer lies, what is zeroed, how many seeds and samples are worked on at a time.
It is pure: equal arguments give equal chains.
"""

from __future__ import annotations

import math
from typing import Any

from ..ir.program import Program
from .chain import FIELDS, Chain, Machine
from .emitters import UnitRecords
from .grouping import Builder
from .scratch import block_size, mark_lives, padded, place, seed_tile, stacked
from .units import Node, Unit


class Lowering(UnitRecords):
    """One group on one machine, for ``seeds`` seeds of element size ``itemsize``.

    The layout of weights and arena is the machine's: :mod:`gradkern.codegen.cuda.lowering` has the GPU's.
    """

    forward_blocks = True  # whether the forward pass says how many samples go together

    # ---- forward

    def load_slopes(self) -> None:
        """All that a linear group's backward pass needs: the given slopes, put where a forward pass would have."""
        order = list(self.graph.inputs)
        self.forward_blocks = False
        for unit in self.graph.units:
            if unit.kind == "scale":
                buffer, interior = self.slope(unit)["aux"]
                out, fields = unit.out, {"dst": (buffer, interior), "dst_row": unit.out.row, "dst_px": unit.out.C}
                extent = self.extent(out)
                if unit.turned:  # storage order is the tensor's own
                    fields["dst_px"], extent = 1, {"C": 1, "H": out.H, "W": out.W * out.C}
                self.emit(self.forward, "Load", ext=order.index(unit.slope), **fields, **extent)

    def run_forward(self) -> None:
        order = list(self.graph.inputs)
        for unit in self.graph.units:
            out = unit.out
            self.prepare(unit)
            fields = self.at("dst", out, self.store(out)) | self.extent(out)
            if unit.reads:
                fields |= self.at("src", unit.reads[0], self.store(unit.reads[0]))
            getattr(self, f"forward_{unit.kind}")(unit, fields)
            if unit.kind == "load":
                value = next(v for v in order if self.graph.inputs[v] is out)
                self.forward[-1] |= self.outside("dst", value, out, self.store(out)) | {"ext": order.index(value)}
        for k, (value, node) in enumerate(self.graph.outputs.items()):
            self.emit(self.forward, "Store", ext=k, **self.outside("src", value, node, self.store(node)))

    def prepare(self, unit: Unit) -> None:
        """Before a unit's record: the CPU's arena starts out as zeros, and borders stay so."""

    # ---- backward

    def run_backward(self) -> None:
        cotangents = self.cotangents
        for node in cotangents.outputs:  # decide from the end, so that expressions see what is behind them
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
        behind = self.cotangents.of(unit.out)
        if behind is None:
            return
        if unit.rectify and not behind.rows:
            buffer = self.grad(behind.node)
            self.emit(self.backward, "Rectify", dst=(buffer, 0), size=buffer.elements)
        for node in unit.reads:
            if node.id in self.cotangents.needs:
                getattr(self, f"backward_{unit.kind}")(unit, node, behind)

    def store_cotangent(self, k: int, value: int) -> None:
        """The ``k``-th wanted cotangent, that of the external ``value``, goes to the caller."""
        node = self.graph.inputs[value]
        source = self.cotangents.of(node)
        if source is None:
            return
        if source.node is node:
            self.first_touch(node)  # zeros where nothing was added
        fields = self.outside("src", value, source.node, self.grad(source.node))
        if (fold := self.folded.get(source.node.id, 1)) > 1:
            fields |= {"src": (self.grad(node), 0), "fold": fold, "Hi": node.halo[0], "Wi": node.halo[2]}
        self.emit(self.backward, "StoreT", ext=k, **fields)

    def seed(self, k: int, value: int, node: Node) -> None:
        self.first_touch(node)
        kind = "SeedOneHot" if self.onehot else "SeedDense"
        self.emit(self.backward, kind, ext=k, **self.outside("dst", value, node, self.grad(node)))

    def backward_rows(self, unit: Unit) -> None:
        node = unit.reads[0]
        expression = self.cotangents.of(node)
        if expression is None or expression.rows:
            return
        self.first_touch(node)
        self.emit(self.backward, "SeedRows", **self.at("dst", node, self.grad(node)), size=node.C * node.P)

    # ---- layout of the arena

    def finish(self) -> tuple[tuple[int, ...], int]:
        """Place all buffers; returns the arena sizes and the seed tile."""
        mark_lives((self.forward, self.backward))
        for buffer in (*self.stores.values(), *self.grads.values()):
            buffer.per_sample = len(buffer.stages) > 1
        grads = list(self.grads.values())
        per_seed = stacked(grads)
        tile = seed_tile(self.seeds, sum(per_seed) * self.itemsize)
        shared, sample = place([*self.stores.values(), *self.slopes.values()], grads, per_seed, tile)
        blocked = any(op["block"] for op in (self.forward if self.forward_blocks else self.backward))
        each, lists = sample * self.itemsize + self.bit_bytes, 2 * self.idx + 32 * self.segs
        block = block_size(blocked, shared * self.itemsize, each, lists)
        sizes = (shared, sample, self.bit_bytes, self.idx * block, self.segs * block, block)
        return sizes, tile

    def scratch(self, sizes: tuple[int, ...]) -> int:
        """Bytes of scratch per thread."""
        shared, sample, bits, idx, segs, block = sizes
        return (shared + sample * block) * self.itemsize + bits * block + idx * 4 + segs * 32

    def clocks(self) -> tuple[float, ...]:
        """What each record is estimated to take, where the machine's planner estimates that."""
        return ()

    def resolve(self, op: dict[str, Any], sample: int) -> tuple[int, ...]:
        """A symbolic record → numbers in the order of `FIELDS`."""
        out = dict.fromkeys(FIELDS, 0)
        for key, value in op.items():
            if isinstance(value, tuple):
                buffer, offset = value
                out[key] = buffer.base + offset
                out[f"{key}_n"] = sample if buffer.per_sample else 0
                if f"{key}_s" in out and any(buffer is b for b in self.grads.values()):
                    out[f"{key}_s"] = padded(buffer.elements)
            else:
                out[key] = value
        out["bits_n"] = self.bit_bytes
        return tuple(int(out[f]) for f in FIELDS)


def lower(
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
    graph = Builder(program, steps, live_out).build()
    low = lowering(graph, machine, itemsize, seeds, wrt, onehot)
    low.load_slopes() if linear else low.run_forward()
    if seeds:
        low.run_backward()
    sizes, tile = low.finish()
    rows, rows_unit = low.rows, low.cotangents.rows_unit
    return Chain(
        forward=tuple(low.resolve(op, sizes[1]) for op in low.forward),
        backward=tuple(low.resolve(op, sizes[1]) for op in low.backward),
        tables=tuple(low.tables),
        layouts=tuple(low.layouts),
        sizes=sizes,
        packed_size=low.packed,
        inputs=tuple(graph.inputs),
        outputs=tuple(live_out),
        output_sizes=tuple(math.prod(program.shape(v)) for v in live_out),
        wrt=low.wrt,
        seed_tile=tile,
        rows=None if rows is None else (rows.wb, rows.ldw),
        rectify_rows=rows_unit is not None and rows_unit.reads[0].producer.rectify,  # type: ignore[union-attr]
        scratch=low.scratch(sizes),
        clocks=low.clocks(),
    )
