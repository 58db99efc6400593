"""Chains on a GPU: records (:mod:`gradkern.codegen.chain`) laid out for a thread block.

A block takes a tile of samples through the whole chain in shared memory, which holds, in this order,

* the *workspace*: scratch for buffers that live within one run of per-sample records, for as many samples as are
  *resident* at a time; a record that takes all samples at once (a linear layer) uses it for its temporary matrices;
* for every sample, the buffers that outlive a run; those with disjoint lifetimes overlap;
* for every sample, its bits.

Everything is known to the byte when the chain is lowered.  `lay_out` takes the cheapest tiling that fits.  If none
fits, it raises `TooLarge`, and the plan splits the chain or leaves the step to ATen.  Nothing ever spills to global
memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from .. import limits
from ..buffers import Buffers
from ..chain import EncodedRecord, LaidOut
from ..emitters import Emitter
from ..encoding import CudaSizes, encode
from ..lowering import CPU, Backend, lower_to_chain
from ..machine import Device, Machine, TooLarge
from ..records import Record, ScatterT
from ..spec import ChainSpec
from . import clock_model, slices
from .emitters import DeviceEmitter, DeviceLayouts
from .fuse import fuse_patterns
from .shared_memory import Arrangement, Passes
from .tiling import Tiler, Tiling, band_options


def emitter(spec: ChainSpec) -> DeviceEmitter:
    device = spec.machine
    assert isinstance(device, Device)
    if max(len(spec.graph.inputs), len(spec.graph.outputs)) > limits.PORTS:
        raise TooLarge(device.shared_bytes + 1, device.shared_bytes)
    return DeviceEmitter(spec, DeviceLayouts(spec), Buffers(slack=0, multiple=4))


def lay_out(e: Emitter) -> LaidOut:
    """The records for the cheapest way to cut the work."""
    spec, buffers = e.spec, e.buffers
    assert isinstance(spec.machine, Device)
    options = band_options(e.backward, e.layouts)
    tiler = Tiler(spec.machine, spec.itemsize, spec.seeds, buffers.bit_bytes, options)
    best: tuple[Passes, Arrangement, Tiling] | None = None
    least = 0
    forward = fuse_patterns(e.forward, e.backward)
    for backward in slices.variants(e.backward, e.tables.integers):
        passes = Passes.of(forward, backward, buffers.values.values(), buffers.saved.values())
        for tile in tiler.seed_tiles():
            arrangement = Arrangement.of(passes, tile)
            least = tiler.least_bytes(passes, arrangement, tile)
            tiling = tiler.best(passes, arrangement, tile)
            if tiling and (best is None or tiling.cost < best[2].cost):
                best = passes, arrangement, tiling
    if best is None:
        raise TooLarge(least, spec.machine.shared_bytes)
    return place_buffers(e, tiler, *best)


def place_buffers(e: Emitter, tiler: Tiler, passes: Passes, arrangement: Arrangement, tiling: Tiling) -> LaidOut:
    """The records with the places of buffers, and with how workers share the work."""
    for buffer, lifetime in passes.lifetimes.items():
        buffer.per_sample = lifetime.run is None
        buffer.base = arrangement.bases[buffer] + (tiling.workspace if buffer.per_sample else 0)
    ops: list[Record] = []
    encoded: list[EncodedRecord] = []
    clocks: list[float] = []
    for op, run, forward in passes.numbered():
        resident = tiling.resident[run]
        work = tiler.work(resident, tiling.block, tiling.seed_tile)
        if isinstance(op, ScatterT):
            _, lanes, bands = work.transposed(op)
            op = replace(op, lanes=lanes, bands=bands)
        ops.append(op)
        # A negative stride between samples means scratch; it is negative even if one sample is resident.
        encoded.append(encode(op, arrangement.sample, -max(arrangement.strides[run], 4), resident))
        clocks.append(tiler.clocks(op, forward, resident, tiling) * (1 if forward else tiler.rounds(tiling.seed_tile)))
    # Idle lanes and prefetches of weights may read up to a row past the last one.
    row_length = max((x.row_length for x in e.layouts.made.values()), default=0)
    slack = 8 * row_length + clock_model.WARP * 4 * max(limits.QUADS)
    n = len(passes.forward)
    return LaidOut(
        forward=tuple(ops[:n]),
        backward=tuple(ops[n:]),
        encoded_forward=tuple(encoded[:n]),
        encoded_backward=tuple(encoded[n:]),
        sizes=CudaSizes(
            workspace=tiling.workspace,
            sample=arrangement.sample,
            bits=tiler.bit_bytes,
            samples=max(tiling.resident, default=1),
            bytes=tiling.bytes,
            block=tiling.block,
        ),
        packed_size=e.layouts.size + slack,
        seed_tile=tiling.seed_tile,
        scratch=tiling.bytes,
        local_share=1.0,
        clocks=tuple(clocks),
    )


GPU = Backend(emitter, lay_out)
lower_device = partial(lower_to_chain, backend=GPU)  # raises `TooLarge`


def backend_for(machine: Machine) -> Backend:
    """How records are made and laid out for a machine."""
    return GPU if isinstance(machine, Device) else CPU
