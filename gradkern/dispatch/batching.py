"""Running a Program for a request: the batch cut to the memory budget, live values bound, rows of the result filled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from ..codegen.support import NATIVE_DTYPES
from ..ir.program import Program
from ..runtime import executor, ops, parameters, reference
from ..util import options
from ..util.chunks import spans, stepwise_bytes
from ..util.options import BadValue, Engine
from .eager import forward
from .request import JacobianResult, Request, allocate
from .targets import TopSeeds

# Steps that run one by one write every value to memory: pieces of this size (as estimated; the peak is about twice
# that) are no slower than larger ones, measured over five networks.
STEPWISE_TARGET = 24 << 20  # bytes


def run(
    request: Request, program: Program, engine: Engine, start: int = 0, known: JacobianResult | None = None, *,
    strict: bool = False, saved: int = 0,
) -> JacobianResult:  # fmt: skip
    """Differentiate the samples from ``start`` on with ``program``.  ``known``: the results so far.

    ``saved``: bytes per sample that live autograd saves, where some steps are torch's to differentiate.
    """
    assert request.module is not None
    if strict:
        for w in request.wrt:
            if not program.consumers[w] and program.output != w:
                raise BadValue(f"the output does not depend on input {w}.")
    with torch.inference_mode(False), torch.no_grad():
        results = allocate(request, program.output_shape, known)
        chunks = _chunks(request, program, results, saved)
        inputs = [x.detach() for x in request.inputs]
        seeds, x = results.seeds, request.inputs[request.wrt[0]]
        samples, devices = request.samples, {x.device for x in inputs}
        floating = {x.dtype for x in inputs if x.is_floating_point()}
        # From here on the work is the runtime's, and nothing of dispatch is called but for chosen outputs.
        if known is None and request.out is None:
            for fresh in results.jacobians:
                ops.on_huge_pages(fresh)
        params = parameters.bind(program, request.module)
        plain = engine == "reference" or not all(map(ops.machine, devices))
        chunk = chunks.stepwise
        if not plain:
            plan = executor.plan_for(program, seeds.count, x.dtype, x.device)
            casts = plan.cast_dtype is not None and len(floating) == 1
            plain = not casts and not floating.issubset(NATIVE_DTYPES)
            # Where a weight is not finite no kernel may skip zeros, and the steps run one by one.
            if not plain and plan.single_chain and (samples <= chunk or parameters.all_finite(params)):
                chunk = chunks.cast if casts else chunks.fused
        for a, b in spans(start, samples, chunk):
            cut = itemgetter(slice(a, b))
            here = [x.contiguous() for x in map(cut, inputs)]
            index = seeds.indices
            if isinstance(seeds, TopSeeds):  # chosen by the model's own outputs
                index = seeds.rows(a, b, forward(request.fn, request.module, [x.clone() for x in here]))
            elif index is not None and index.dim() == 2:
                index = index[a:b]
            rows = tuple(map(cut, results.jacobians))  # each [n, S, *in]
            if plain:
                here = [x.clone() if x.is_inference() else x for x in here]  # autograd refuses inference tensors
                y, jacobians = reference.jacobian(program, params, here, index, request.wrt)
                for row, jacobian in zip(rows, jacobians, strict=True):
                    row.copy_(jacobian)
            else:
                y, _ = executor.jacobian(program, params, here, index, request.wrt, out=rows)
            if request.keep_outputs:
                results.kept.append(y)
            del y  # before the next one is made
    return results


def not_native(x: Tensor) -> bool:
    """Whether no kernel takes a tensor of this device and dtype."""
    return ops.machine(x.device) is None or (x.is_floating_point() and x.dtype not in NATIVE_DTYPES)


@dataclass(frozen=True)
class Chunks:
    """Samples at a time, so that what is allocated beside the result stays within the budget.

    ``stepwise``: every value is a tensor of its own.  ``fused``: one kernel call, whatever the number of samples.
    ``cast``: the same by way of float32.
    """

    stepwise: int
    fused: int
    cast: int


def _chunks(request: Request, program: Program, results: JacobianResult, saved: int) -> Chunks:
    x = request.inputs[request.wrt[0]]
    seeds, size = results.seeds, x.dtype.itemsize
    budget = options.memory_budget(request.inputs[0].device)
    largest = size * max(map(math.prod, program.shapes))
    rows = seeds.count * largest  # one cotangent of a sample
    need = stepwise_bytes(program.shapes, seeds.count, size) + saved * (1 + seeds.count)
    target = STEPWISE_TARGET if request.inputs[0].device.type == "cpu" else budget  # a GPU wants large pieces
    stepwise = max(1, min(budget // 3, target) // max(need, 1))
    gradients = seeds.count * sum(request.inputs[w][:1].numel() for w in request.wrt)  # numbers of a sample
    need = size * program.outputs
    if seeds.indices is not None and seeds.indices.dim() == 2:
        need += rows  # the rows of the last weight, gathered for each sample
    if isinstance(seeds, TopSeeds):
        need += rows + 2 * largest
    if not all(x.is_contiguous() for x in request.inputs):
        need += request.sample_bytes
    if any(not r.is_contiguous() or r.dtype != x.dtype for r in results.jacobians):
        need += gradients * size
    cast = need + 4 * (sum(map(math.prod, program.inputs)) + gradients)
    return Chunks(stepwise, max(1, budget // max(need, 1)), max(1, budget // max(cast, 1)))
