"""Running a Program for a request: cuts the batch to the memory budget, binds live values, fills rows of the result."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codegen.support import NATIVE_DTYPES
from ..ir.calls import Params
from ..ir.program import Program
from ..runtime import executor, ops, parameters, reference
from ..util.chunks import element_counts, samples_per_chunk, spans, stepwise_bytes, stepwise_samples
from ..util.options import Engine, use
from ..util.progress import limit_for_progress
from .eager import forward
from .request import JacobianResult, Request, allocate
from .targets import TopSeeds
from .watch import Watch

_AS_SET = nullcontext()


def run(
    request: Request, program: Program, tensors: Params, engine: Engine, start: int = 0,
    partial: JacobianResult | None = None, *, saved: int = 0, watch: Watch | None = None,
) -> JacobianResult:  # fmt: skip
    """Differentiate the samples from ``start`` on with ``program``.  ``partial``: the results so far.

    ``tensors``: those that ``program`` names.  ``saved``: bytes per sample that live autograd saves, if torch
    differentiates some of the steps.  ``watch`` looks at the outputs, and may raise `OutputsChanged`.
    """
    chosen = use(engine) if engine == "kernel" else _AS_SET  # the runtime asks whether a GPU's kernels are wanted
    with chosen, torch.inference_mode(False), torch.no_grad():
        results = allocate(request, program.output_shape, partial)
        samples, inputs, indices = request.samples, [x.detach() for x in request.inputs], results.indices
        params, by_reference, chunk = _settle(request, program, tensors, engine, results, saved)
        if start == 0 and request.out is None:
            for fresh in results.jacobians:
                ops.on_huge_pages(fresh)
        differentiate = reference.jacobian if by_reference else executor.jacobian
        watch = watch or Watch()
        due = watch.due()
        for a, b in spans(start, samples, chunk):
            chunk_inputs = [x[a:b].contiguous() for x in inputs]
            if isinstance(results.seeds, TopSeeds):
                results.fill_top_indices(a, b, forward(request.fn, request.module, [x.clone() for x in chunk_inputs]))
            index = indices[a:b] if indices is not None and indices.dim() == 2 else indices
            rows = [j[a:b] for j in results.jacobians]  # each [n, S, *in]
            begin = time.perf_counter()
            y, _ = differentiate(program, params, chunk_inputs, index, request.wrt, out=rows)
            watch.add(time.perf_counter() - begin)
            if due and a == start:
                watch.compare(request.fn, request.module, chunk_inputs, y)
            if request.keep_outputs:
                results.kept.append(y)
            del y  # frees its memory before the next chunk
    return results


def _settle(
    request: Request, program: Program, tensors: Params, engine: Engine, results: JacobianResult, saved: int
) -> tuple[Params, bool, int]:
    """The parameters, whether plain torch runs the steps, and how many samples go together."""
    x, inputs, samples = request.inputs[request.wrt[0]], request.inputs, request.samples
    each, device = _bytes_per_sample(request, program, results, saved), inputs[0].device
    chunk = stepwise_samples(device, each.stepwise)
    params = parameters.bind(program, tensors)
    if engine == "reference" or not all(ops.machine(i.device) for i in inputs):
        return params, True, chunk
    floating = {i.dtype for i in inputs if i.is_floating_point()}
    plan = executor.plan_for(program, results.seeds.count, x.dtype, x.device, wrt=request.wrt)
    casts = plan.cast_dtype is not None and len(floating) == 1
    if not casts and not floating.issubset(NATIVE_DTYPES):
        return params, True, chunk
    if plan.instead is not None or not plan.single_chain:
        each_by_torch = saved * (1 + results.seeds.count)
        return params, False, stepwise_samples(device, plan.bytes_per_sample + each_by_torch)
    # If a weight is not finite, no kernel may skip zeros, and the steps run one by one.
    if samples <= chunk or parameters.all_finite(params):
        chunk = samples_per_chunk(device, each.cast if casts else each.fused)
        chunk = limit_for_progress(chunk, samples)  # the results of a chain do not depend on where the batch is cut
    return params, False, chunk


def not_native(x: Tensor) -> bool:
    """Whether no kernel takes a tensor of this device and dtype."""
    return not ops.machine(x.device) or (x.is_floating_point() and x.dtype not in NATIVE_DTYPES)


@dataclass(frozen=True)
class BytesPerSample:
    """The bytes that are allocated for a sample in addition to the result.

    ``stepwise``: every value is a separate tensor.  ``fused``: one kernel call, for any number of samples.
    ``cast``: ``fused`` when inputs are cast to float32.
    """

    stepwise: int
    fused: int
    cast: int


def _bytes_per_sample(request: Request, program: Program, results: JacobianResult, saved: int) -> BytesPerSample:
    x = request.inputs[request.wrt[0]]
    seeds, size = results.seeds, x.dtype.itemsize
    stepwise = stepwise_bytes(program.shapes, seeds.count, size) + saved * (1 + seeds.count)
    largest = size * element_counts(program.shapes)[1]
    rows = seeds.count * largest  # one cotangent of a sample
    gradients = seeds.count * element_counts(tuple([request.inputs[w].shape[1:] for w in request.wrt]))[0]
    fused = size * program.outputs
    if results.indices is not None and results.indices.dim() == 2:
        fused += rows  # the rows of the last weight are gathered for each sample
    if isinstance(seeds, TopSeeds):
        fused += 2 * largest  # the forward pass that chooses
    if not all(x.is_contiguous() for x in request.inputs):
        fused += request.sample_bytes
    if any(not r.is_contiguous() or r.dtype != x.dtype for r in results.jacobians):
        fused += gradients * size
    cast = fused + 4 * (element_counts(program.inputs)[0] + gradients)
    return BytesPerSample(stepwise, fused, cast)
