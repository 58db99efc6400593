"""Lowering: from the units of a native group to its :class:`~gradkern.codegen.chain.Chain`.

`lower_units` decides everything that does not depend on tensor data: which cotangents are materialized and which are
read through a pattern, the place of each buffer, which buffers are zeroed, and how many seeds and samples are processed
at a time.  It is pure: equal arguments give equal chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..ir.program import Program
from . import records, units
from .buffers import Buffers, extent
from .chain import Chain, LaidOut
from .emitters import Emitter
from .encoding import CpuSizes, encode
from .layouts import Layouts
from .local import MOST_LIVE_SHARE, Reaches, best_tile, reaches
from .machine import Machine
from .records import Extent, Place, Record, WindowT
from .scratch import assign_places, block_size, even_tile, mark_lifetimes, round_up, seed_tile, stack_cotangents
from .spec import ChainSpec
from .unit_graph import GraphBuilder
from .units import Node, Unit, UnitGraph, rectifies_cotangent

#: Up to this many seeds, samples share the weights of linear layers, which local seeds would not allow: reading them
#: again for every sample has to be paid back by several tiles of seeds.  The limit was not measured by itself.
FEW_SEEDS = 16


@dataclass(frozen=True)
class Backend:
    """How records are made and laid out for one kind of processor."""

    emitter: Callable[[ChainSpec], Emitter]
    lay_out: Callable[[Emitter], LaidOut]


# ---- forward


def emit_slopes(e: Emitter) -> None:
    """Load or compute the given slopes, which are all that a linear group's backward pass needs."""
    inputs = list(e.spec.graph.inputs)
    for unit in e.spec.graph.units:
        if isinstance(unit, units.GivenDerivative | units.GivenPattern):
            dst = e.slope(unit) if type(unit) is units.GivenDerivative else e.value(unit.out)
            covered, out = extent(unit.out), unit.out
            if unit.storage_order:  # the storage has the tensor's own order
                dst, covered = Place(dst.buffer, dst.offset, row=dst.row, position=1), Extent(1, out.H, out.W * out.C)
            e.forward.append(records.Load(input=inputs.index(unit.slope), dst=dst, extent=covered))
            e.emit_derivative(unit)


def emit_forward_pass(e: Emitter) -> None:
    for unit in e.spec.graph.units:
        e.zero_border(unit)
        e.emit_forward(unit)
    for k, (value, node) in enumerate(e.spec.graph.outputs.items()):
        src, covered = e.external(value, node, e.buffers.value(node))
        e.forward.append(records.Store(src=src, output=k, extent=covered))


# ---- backward


def emit_backward_pass(e: Emitter) -> None:
    graph, cotangents = e.spec.graph, e.spec.cotangents
    for k, (value, node) in enumerate(graph.outputs.items()):
        if node in cotangents.needs and node.producer is not cotangents.seed_rows_unit:
            emit_seeds(e, k, value, node)
    for unit in reversed(graph.units):
        if isinstance(unit, units.Load) or unit.out not in cotangents.needs:
            continue
        if unit is cotangents.seed_rows_unit:
            emit_seed_rows(e, unit.reads[0])
        else:
            emit_cotangents(e, unit)
    for k, value in enumerate(e.spec.wrt):
        store_cotangent(e, k, value)


def emit_seeds(e: Emitter, k: int, value: int, node: Node) -> None:
    """The seeds at the ``k``-th output of the group."""
    e.zero_once(node)
    dst, covered = e.external(value, node, e.cotangent_buffer(node))
    if e.spec.onehot:
        e.backward.append(records.SeedOneHot(dst=dst, extent=covered))
    else:
        e.backward.append(records.SeedDense(dst=dst, cotangent=k, extent=covered))


def emit_seed_rows(e: Emitter, node: Node) -> None:
    """Copy the seed rows into the cotangent of the last linear layer's input, unless its readers take them."""
    cotangent = e.spec.cotangents.of(node)
    if cotangent is not None and not cotangent.seed_rows:
        e.backward.append(records.SeedRows(dst=e.accumulated(node), elements=node.C * node.P))


def emit_cotangents(e: Emitter, unit: Unit) -> None:
    """The records for the cotangents of a unit's reads."""
    upstream = e.spec.cotangents.of(unit.out)
    if upstream is None:
        return
    if rectifies_cotangent(unit) and not upstream.seed_rows:
        buffer = e.cotangent_buffer(upstream.node)
        e.backward.append(records.Rectify(dst=Place(buffer, 0), elements=buffer.elements))
    for operand, node in enumerate(unit.reads):  # a unit may read one node twice
        if node in e.spec.cotangents.needs:
            e.emit_backward(unit, operand, upstream)


def store_cotangent(e: Emitter, k: int, value: int) -> None:
    """Store the ``k``-th wanted cotangent, that of the external ``value``, in the caller's tensor."""
    node = e.spec.graph.inputs[value]
    source = e.spec.cotangents.of(node)
    if source is None:
        return
    if source.node is node:
        e.zero_once(node)  # zeros if nothing was added
    src, covered = e.external(value, source.node, e.cotangent_buffer(source.node))
    rows = e.layouts.interleaved_rows(source.node)
    if rows == 1:
        e.backward.append(records.StoreT(src=src, result=k, extent=covered))
        return
    above, left = node.halo[0], node.halo[2]
    src = Place(src.buffer, 0, row=src.row, position=src.position)
    record = records.StoreT(src=src, result=k, extent=covered, fold=rows, halo_rows=above, halo_columns=left)
    e.backward.append(record)


# ---- on a CPU


def lay_out(e: Emitter) -> LaidOut:
    """Assign the places of all buffers in the scratch memory of a CPU's thread."""
    spec, buffers, bit_bytes = e.spec, e.buffers, e.buffers.bit_bytes
    mark_lifetimes(e.forward, e.backward)
    for buffer in (*buffers.values.values(), *buffers.cotangents.values()):
        buffer.per_sample = len(buffer.runs) > 1
    cotangents = list(buffers.cotangents.values())
    per_seed = stack_cotangents(cotangents)
    tile = seed_tile(spec.seeds, sum(per_seed) * spec.itemsize)
    whole_block = any(r.whole_block for r in (e.backward if spec.linear else e.forward))
    local, tile, share = local_seeds(e, tile, whole_block)
    values = [*buffers.values.values(), *buffers.saved.values()]
    shared, sample = assign_places(values, cotangents, per_seed, tile)
    entries, segments = live_lists(e.backward)
    block = block_size(
        whole_block,
        shared=shared * spec.itemsize,
        sample=sample * spec.itemsize + bit_bytes,
        lists=2 * entries + 32 * segments,
    )
    if local is not None:
        block = 1
    sizes = CpuSizes(
        shared=shared, sample=sample, bits=bit_bytes, entries=entries * block, segments=segments * block, block=block,
        local=0 if local is None else e.tables.add(local.table(len(e.tables.integers))) + 1,
    )  # fmt: skip
    scratch = (shared + sample * block) * spec.itemsize + bit_bytes * block + sizes.entries * 4 + sizes.segments * 32
    return LaidOut(
        forward=tuple(e.forward),
        backward=tuple(e.backward),
        encoded_forward=tuple(encode(op, sample) for op in e.forward),
        encoded_backward=tuple(encode(op, sample) for op in e.backward),
        sizes=sizes,
        packed_size=e.layouts.size,
        seed_tile=tile,
        scratch=scratch,
        clocks=(),
        local_share=share,
    )


def local_seeds(e: Emitter, tile: int, whole_block: bool) -> tuple[Reaches | None, int, float]:
    """What local seeds reach, how many should share a tile, and the share of the multiply-adds that is then left.

    The first is None if local seeds do not pay.  With them, samples go one by one, because each may have other targets.
    So the weights of linear layers (``whole_block``) are read again for each sample, which does not pay for few seeds.
    """
    seeds = e.spec.seeds
    rules = reaches(e) if seeds >= (FEW_SEEDS if whole_block else 1) else None
    if rules is None:
        return None, tile, 1.0
    most, share = best_tile(rules, tile)
    return (None, tile, 1.0) if share > MOST_LIVE_SHARE else (rules, even_tile(seeds, most), share)


def live_lists(backward: list[Record]) -> tuple[int, int]:
    """The most entries and segments that a sample's lists of live channels have."""
    entries = segments = 64
    for op in backward:
        if isinstance(op, WindowT):
            positions = op.H * op.W
            of_op = positions if op.pattern is None else positions * op.pattern.taps + 1
            segments = max(segments, of_op)
            listed = of_op if op.pattern else min(op.sweep, positions) + 1  # one of them shared
            entries = max(entries, listed * round_up(op.O) + 64)
    return entries, segments


CPU = Backend(lambda spec: Emitter(spec, Layouts(spec), Buffers()), lay_out)


def lower_to_chain(program: Program, steps: list[int], live_out: list[int], *args: Any, **kwargs: Any) -> Chain:
    """`lower_units` of the native steps ``steps`` of a program, with the values ``live_out`` wanted from them."""
    return lower_units(program, GraphBuilder(program, steps, live_out).build(), *args, **kwargs)


def lower_units(
    program: Program,
    graph: UnitGraph,
    machine: Machine,
    itemsize: int,
    seeds: int,
    wrt: tuple[int, ...],
    onehot: bool = True,
    linear: bool = False,
    backend: Backend = CPU,
) -> Chain:
    """Lower the units of a native group of a program's steps.

    ``wrt``: external values whose cotangents are wanted; ``onehot``:
    the seeds are one-hot at the single output (else dense cotangents are given for every output).  ``linear``: no
    value is computed, as every scale of the group is `Given` (its slopes are external values).
    """
    wrt = tuple(v for v in graph.inputs if v in wrt)
    spec = ChainSpec(graph, machine, itemsize, seeds, wrt, onehot, linear)
    emitter = backend.emitter(spec)
    rows_unit = spec.cotangents.seed_rows_unit
    rows = None if rows_unit is None else emitter.layouts.scatter(rows_unit, None)
    if linear:
        emit_slopes(emitter)
    else:
        emit_forward_pass(emitter)
    if seeds:
        emit_backward_pass(emitter)
    return Chain(
        **vars(backend.lay_out(emitter)),
        tables=tuple(emitter.tables.integers),
        layouts=tuple(emitter.layouts.made.values()),
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
        output_sizes=tuple(math.prod(program.shape(v)) for v in graph.outputs),
        wrt=wrt,
        seed_rows=None if rows is None else (rows.weights, rows.row_length),
        rectify_seed_rows=rows_unit is not None and rectifies_cotangent(rows_unit.reads[0].producer),
    )
