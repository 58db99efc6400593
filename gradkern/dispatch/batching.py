"""Running a Program for a job: live values bound, the batch cut to the memory budget, rows of the result filled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..codegen.support import NATIVE_DTYPES
from ..ir.program import Opaque, Program
from ..runtime import binding, executor, ops, reference
from ..util import options
from ..util.chunks import spans, stepwise_bytes
from ..util.options import BadValue
from . import guards
from . import state as cache
from .eager import buffers_kept, forward
from .request import Job
from .targets import Seeds, Shape

# Steps that run one by one write every value to memory: pieces of this size (as estimated; the peak is about twice
# that) are no slower than larger ones, measured over five networks.
STEPWISE_TARGET = 24 << 20  # bytes


def run(job: Job, program: Program, start: int, name: str, *, strict: bool = False, saved: int = 0) -> None:
    """Fill ``job.results`` from sample ``start`` on, with the engine ``name`` (``"reference"`` or a faster one).

    ``saved``: bytes per sample that live autograd saves, where some steps are torch's to differentiate.
    """
    assert job.module is not None
    if strict:
        for w in job.wrt:
            if not program.consumers[w] and program.output != w:
                raise BadValue(f"the output does not depend on input {w}.")
    with torch.inference_mode(False), torch.no_grad():
        seeds = job.open(program.output_shape)
        params = binding.bind(program, job.module)
        plain = name == "reference" or (any(map(not_native, job.inputs)) and not _casts(job, program, seeds))
        for a, b in spans(start, job.samples, _chunk(job, program, params, seeds, plain, saved)):
            inputs = tuple(_plain(x[a:b], plain) for x in job.inputs)
            index = seeds.rows(a, b, _logits(job, inputs) if seeds.needs_logits else None)
            rows = tuple(r[a:b] for r in job.results)  # each [n, S, *in]
            if plain:
                y, found = reference.jacobian(program, params, inputs, index, job.wrt)
                for row, jac in zip(rows, found, strict=True):
                    row.copy_(jac)
            else:
                y, _ = executor.jacobian(program, params, inputs, index, job.wrt, out=rows)
            job.note(a, y)
            del y  # before the next one is made


def _plain(x: Tensor, copies: bool) -> Tensor:
    """The values alone, in one piece; with ``copies`` also fit for autograd, which refuses inference tensors."""
    x = x.detach().contiguous()
    return x.clone() if copies and x.is_inference() else x


def not_native(x: Tensor) -> bool:
    """Whether no kernel takes a tensor of this device and dtype."""
    return ops.machine(x.device) is None or (x.is_floating_point() and x.dtype not in NATIVE_DTYPES)


def _casts(job: Job, program: Program, seeds: Seeds) -> bool:
    """Whether the engine takes these inputs by way of float32."""
    x = job.inputs[job.wrt[0]]
    if ops.machine(x.device) is None or len({y.dtype for y in job.inputs if y.is_floating_point()}) > 1:
        return False
    return executor.plan_for(program, seeds.count, x.dtype, x.device).cast_dtype is not None


def _chunk(job: Job, program: Program, params: Mapping[str, Tensor], seeds: Seeds, plain: bool, saved: int) -> int:
    """Samples at a time, so that what is allocated beside the result stays within the budget."""
    dtype = job.inputs[job.wrt[0]].dtype
    budget = options.memory_budget(job.inputs[0].device)
    largest = dtype.itemsize * max(map(math.prod, program.shapes))
    rows = seeds.count * largest  # one cotangent of a sample
    need = stepwise_bytes(program.shapes, seeds.count, dtype.itemsize) + saved * (1 + seeds.count)
    target = STEPWISE_TARGET if job.inputs[0].device.type == "cpu" else budget  # a GPU wants large pieces
    stepwise = max(1, min(budget // 3, target) // max(need, 1))
    if plain:
        return stepwise
    plan = executor.plan_for(program, seeds.count, dtype, job.inputs[0].device)
    if not plan.single_chain:
        return stepwise
    if job.samples > stepwise and not _finite(params):
        return stepwise  # no kernel may skip zeros then, and the steps run one by one
    need = dtype.itemsize * program.outputs  # the outputs themselves
    if plan.cast_dtype is not None:
        need += 4 * (sum(map(math.prod, program.inputs)) + seeds.count * sum(job.inputs[w][0].numel() for w in job.wrt))
    if seeds.indices is not None and seeds.indices.dim() == 2:
        need += rows  # the rows of the last weight, gathered for each sample
    if seeds.needs_logits:
        need += rows + 2 * largest
    if not all(x.is_contiguous() for x in job.inputs):
        need += job.sample_bytes
    if any(not r.is_contiguous() or r.dtype != dtype for r in job.results):
        need += sum(job.inputs[w][0].numel() for w in job.wrt) * seeds.count * dtype.itemsize
    return max(1, budget // need)


def _finite(params: Mapping[str, Tensor]) -> bool:
    """No NaN or Inf (a sum that overflows counts as one)."""
    return all(bool(torch.isfinite(p.sum())) for p in params.values() if p.is_floating_point())


def _logits(job: Job, inputs: tuple[Tensor, ...]) -> Tensor:
    """The model's own outputs ``[n, *out]``, by which the k highest are chosen."""
    return forward(job.fn, job.module, [x.clone() for x in inputs])


def output_shape(job: Job) -> Shape:
    """Per-sample shape of the model's output: as known from its Program, else from a run of one or two samples."""
    if job.module is not None and guards.at_once(job.fn, job.inputs) is None:
        verdict = cache.entry(job.module).verdict(cache.key_of(job.module, job.inputs))
        if verdict is not None and verdict.program is not None:
            return verdict.program.output_shape
    few = tuple(
        x[:2] if job.samples else torch.zeros(2, *x.shape[1:], dtype=x.dtype, device=x.device) for x in job.inputs
    )
    state = torch.get_rng_state()
    with torch.inference_mode(False), torch.no_grad(), buffers_kept(job.module):
        y = forward(job.fn, job.module, [x.detach().clone() for x in few])
    if not torch.equal(state, torch.get_rng_state()):
        torch.set_rng_state(state)
    return tuple(y.shape[1:])


class MacCounter(TorchDispatchMode):
    """Counts multiply-adds by torch's table of flops.

    `FlopCounterMode` would do, but it registers global module hooks, which other threads would see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.macs += flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
        elif packet is torch.ops.aten.mkldnn_rnn_layer:  # not in the table: [T, N, I], [G, I], [G, H]
            self.macs += math.prod(args[0].shape[:2]) * (args[1].numel() + args[2].numel())
        return out


def opaque_macs(program: Program, params: Mapping[str, Tensor], samples: Sequence[Tensor]) -> dict[int, int]:
    """Multiply-adds of the forward pass per sample of each `Opaque` step, by step, measured on ``samples``.

    A step of which torch's table knows nothing is left out: the plan then counts its elements.
    """
    values = list(samples)
    found: dict[int, int] = {}
    for i, step in enumerate(program.steps):
        with MacCounter() as counter:
            values.append(reference.forward_step(program, i, [values[v] for v in step.inputs], params))
        if isinstance(step.form, Opaque) and counter.macs:
            found[i] = max(1, counter.macs // samples[0].shape[0])
    return found
