"""Running a Program on a batch: by kernels or by plain torch, in pieces that fit the memory budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..codegen.support import NATIVE_DTYPES
from ..ir.calls import Params
from ..ir.program import Program
from ..runtime import executor, ops, parameters, reference
from ..util.chunks import element_counts, samples_per_chunk, spans, stepwise_bytes, stepwise_samples
from ..util.options import Engine, use
from ..util.progress import limit_for_progress
from .live_model import forward
from .request import JacobianResult, Request, allocate
from .targets import Seeds
from .watch import Watch

_AS_SET = nullcontext()


def plain_torch(engine: Engine, inputs: Sequence[Tensor]) -> bool:
    """Whether plain torch runs the steps of a Program: for the reference engine, or inputs that no kernel takes."""
    return engine == "reference" or not all(map(has_kernels, inputs))


def has_kernels(x: Tensor) -> bool:
    """Whether kernels take a tensor of this device and dtype."""
    return bool(ops.machine(x.device)) and not (x.is_floating_point() and x.dtype not in NATIVE_DTYPES)


class BatchRun:
    """One Program on one batch: whether plain torch runs its steps, and how many samples go together (``chunk``).

    ``params``: bound parameters.  ``torch_bytes``: bytes per sample that live autograd saves, if torch differentiates
    some of the steps.  ``extra_bytes``: bytes per sample that the caller allocates besides.
    """

    def __init__(
        self, program: Program, params: Params, inputs: Sequence[Tensor], seeds: Seeds, wrt: tuple[int, ...],
        engine: Engine, *, torch_bytes: int = 0, extra_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.program, self.params, self.wrt = program, params, wrt
        like, samples = parameters.leading(inputs), inputs[0].shape[0]
        device, size = like.device, like.dtype.itemsize
        torch_bytes *= 1 + seeds.count
        self.chunk = stepwise_samples(device, stepwise_bytes(program.shapes, seeds.count, size) + torch_bytes)
        self.by_reference = True
        if engine == "reference" or not ops.machine(device):
            return
        plan = executor.plan_for(program, seeds.count, like.dtype, device, wrt=wrt)
        casts = plan.cast_dtype is not None and len({x.dtype for x in inputs if x.is_floating_point()}) == 1
        self.by_reference = not casts and plain_torch(engine, inputs)
        if self.by_reference:
            return
        if not plan.single_chain:
            self.chunk = stepwise_samples(device, plan.bytes_per_sample + torch_bytes)
        elif samples <= self.chunk or parameters.all_finite(params):
            # With a weight that is not finite no kernel may skip zeros, and the steps run one by one.
            chunk = samples_per_chunk(device, self._chain_bytes(seeds, size, casts=casts) + extra_bytes)
            self.chunk = limit_for_progress(chunk, samples)  # a chain's results do not depend on where a batch is cut

    def _chain_bytes(self, seeds: Seeds, itemsize: int, *, casts: bool) -> int:
        """Bytes per sample, in addition to the result, of one kernel call."""
        counted = itemsize * self.program.outputs
        if seeds.per_sample:  # the rows of the last weight are gathered for each sample
            counted += seeds.count * itemsize * element_counts(self.program.shapes)[1]
        if casts:
            gradients = seeds.count * element_counts(tuple([self.program.inputs[w] for w in self.wrt]))[0]
            counted += 4 * (element_counts(self.program.inputs)[0] + gradients)
        return counted

    def __call__(self, inputs: Sequence[Tensor], seeds: Seeds, out: Sequence[Tensor]) -> Tensor:
        """Fill ``out``, one ``[n, S, *in]`` per differentiated input, for some of the samples; return their outputs."""
        differentiate = reference.jacobian if self.by_reference else executor.jacobian
        return differentiate(self.program, self.params, inputs, seeds.indices, self.wrt, out=out)[0]


def _using(engine: Engine) -> AbstractContextManager[None]:
    """The setting in which Programs run: the runtime asks whether a GPU's kernels are wanted."""
    return use(engine) if engine == "kernel" else _AS_SET


def jacobians(
    program: Program, params: Params, inputs: Sequence[Tensor], seeds: Seeds, wrt: tuple[int, ...], engine: Engine
) -> tuple[Tensor, ...]:
    """One ``[N, S, *in]`` per input in ``wrt``.  ``params``: bound parameters."""
    count = inputs[0].shape[0]
    with _using(engine), torch.inference_mode(False), torch.no_grad():
        out = tuple(inputs[w].new_empty(count, seeds.count, *inputs[w].shape[1:]) for w in wrt)
        run = BatchRun(program, params, inputs, seeds, wrt, engine)
        for a, b in spans(0, count, run.chunk):
            run([x[a:b].contiguous() for x in inputs], seeds.part(a, b), [o[a:b] for o in out])
    return out


def run(
    request: Request, program: Program, tensors: Params, engine: Engine, start: int = 0,
    partial: JacobianResult | None = None, *, torch_bytes: int = 0, watch: Watch | None = None,
) -> JacobianResult:  # fmt: skip
    """Differentiate the samples from ``start`` on with ``program``.  ``partial``: the results so far.

    ``tensors``: those that ``program`` names.  ``torch_bytes`` as for `BatchRun`.  ``watch`` looks at the outputs, and
    may raise `OutputsChanged`.
    """
    with _using(engine), torch.inference_mode(False), torch.no_grad():
        results = allocate(request, program.output_shape, partial)
        samples, inputs, seeds = request.samples, [x.detach() for x in request.inputs], results.seeds
        differentiate = BatchRun(
            program, parameters.bind(program, tensors), inputs, seeds, request.wrt, engine,
            torch_bytes=torch_bytes, extra_bytes=_extra_bytes(request, program, results),
        )  # fmt: skip
        if start == 0 and request.out is None:
            for fresh in results.jacobians:
                ops.on_huge_pages(fresh)
        watch = watch or Watch()
        due = watch.due()
        for a, b in spans(start, samples, differentiate.chunk):
            chunk_inputs = [x[a:b].contiguous() for x in inputs]
            if results.filled_by_outputs:
                results.fill_top_indices(a, b, forward(request.fn, request.module, [x.clone() for x in chunk_inputs]))
            rows = [j[a:b] for j in results.jacobians]  # each [n, S, *in]
            begin = time.perf_counter()
            y = differentiate(chunk_inputs, seeds.part(a, b), rows)
            watch.add(time.perf_counter() - begin)
            if due and a == start:
                watch.compare(request.fn, request.module, chunk_inputs, y)
            if request.keep_outputs:
                results.kept.append(y)
            del y  # frees its memory before the next chunk
    return results


def _extra_bytes(request: Request, program: Program, results: JacobianResult) -> int:
    """Bytes per sample that `run` allocates beside a kernel call."""
    x, extra = request.inputs[request.wrt[0]], 0
    if results.filled_by_outputs:
        extra += 2 * x.dtype.itemsize * element_counts(program.shapes)[1]  # the forward pass that chooses
    if not all(x.is_contiguous() for x in request.inputs):
        extra += request.sample_bytes
    if any(not r.is_contiguous() or r.dtype != x.dtype for r in results.jacobians):
        extra += request.gradient_bytes * results.seeds.count
    return extra
