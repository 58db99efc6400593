"""A network that is one chain: calls need its packed weights, but do not go through its steps."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..codegen.caches import HOT_BYTES, SPILLED_BYTES
from ..codegen.chain import Chain
from ..codegen.encoding import CpuSizes
from ..codegen.machine import TooLarge
from ..ir.calls import Params
from ..ir.program import Program, Shape
from ..util.chunks import samples_per_chunk, spans
from ..util.progress import limit_for_progress
from . import ops
from .call_plan import CallPlan, GroupedCallPlan, call_plan_for
from .confirmation import comparison_size
from .execution import run_chain
from .executor import jacobian
from .parameters import Packed, all_output_indices, bind, content_of, leading, weight_cache


class WholeChain:
    """The chain that is a whole network, for the seeds ``targets [S]`` of all samples.  It holds no weights.

    It serves inputs and parameters of the dtypes and devices that it was made with.
    """

    def __init__(
        self, program: Program, call_plan: CallPlan, chain: Chain, like: Tensor, wrt: tuple[int, ...], targets: Tensor,
        axes: Shape,
    ) -> None:  # fmt: skip
        self.program, self.plan, self.chain = program, call_plan.plan, chain
        self.targets = targets
        self._latest: tuple[int | None, weakref.ref[Packed] | None] = None, None  # the packed weights of the last call
        self.axes = axes  # the axes of the results in place of S
        self.like, self.device = like.new_empty(0), like.device
        self.outputs = program.outputs
        self.output_bytes = program.outputs * like.element_size()  # per sample
        self.order = [chain.wrt.index(v) for v in wrt]
        numbers = targets.shape[0] * sum(math.prod(program.inputs[v]) for v in wrt)
        self.gradient_bytes = numbers * like.element_size()  # per sample

    def packed(self, tensors: Params) -> Packed | None:
        """The packed weights for the live ``tensors`` as they are now; None if no kernel may run with them."""
        content = content_of([tensors[name] for name in self.plan.live_names])
        before, latest = self._latest
        packed = latest() if latest is not None and before == content else None
        if packed is None:
            entry = weight_cache.entry(self.plan, content, self.like)
            with torch.inference_mode(False), torch.no_grad():
                packed = weight_cache.packed(entry, self.chain, bind(self.program, tensors), self.like)
            self._latest = content, weakref.ref(packed)
        return packed if packed.finite else None

    def rows(self, packed: Packed) -> Tensor | None:
        """The rows of the last weight, if the seeds start with them; else None."""
        return packed.seed_rows(self.targets, self.outputs, constant=True)

    def __call__(self, packed: Packed, rows: Tensor | None, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The gradients ``[N, S, *in]`` of each input that is differentiated."""
        n, seeds = inputs[0].shape[0], self.targets.shape[0]
        results = [inputs[v].new_empty((n, seeds, *inputs[v].shape[1:])) for v in self.chain.wrt]
        if n * self.gradient_bytes >= ops.HUGE:
            for fresh in results:
                ops.on_huge_pages(fresh)
        # One sample is never cut, so the sizes need not be asked for.
        chunk = limit_for_progress(samples_per_chunk(self.device, self.output_bytes), n) if n > 1 else 1
        if 0 < n <= chunk:
            self._fill(packed, rows, inputs, results)
        else:
            for a, b in spans(0, n, chunk):
                self._fill(packed, rows, [x[a:b] for x in inputs], [r[a:b] for r in results])
        return [results[k] for k in self.order]

    def add_to(self, sums: ops.Statistics, packed: Packed, rows: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        """The outputs ``[N, *out]``; the Jacobians of the one input that is differentiated are added to ``sums``.

        Works on a CPU only.  A few samples are computed at a time, so that their Jacobians stay in the cache.
        """
        chain, threads, (wrt,) = self.chain, torch.get_num_threads(), self.chain.wrt
        n, x = inputs[0].shape[0], inputs[wrt]
        assert isinstance(chain.sizes, CpuSizes)
        block = max(1, min(chain.sizes.block, SPILLED_BYTES // self.gradient_bytes))
        most = threads * block * max(1, HOT_BYTES // (block * self.gradient_bytes))
        room = x.new_empty(min(most, n), self.targets.shape[0], *x.shape[1:])
        outputs = [x.new_empty(n, size) for size in chain.output_sizes]
        reads = [inputs[v].contiguous() for v in chain.inputs]
        records = packed.weights, packed.tables, packed.forward, packed.backward
        ops.chain_statistics(reads, records, chain.sizes, outputs, self.targets, rows, chain.seed_tile, room, sums)
        return outputs[0].view(n, *self.program.output_shape)

    def shaped(self, jacobians: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Jacobians ``[N, S, *in]`` as ``[N, *axes, *in]``."""
        if len(self.axes) == 1:
            return tuple(jacobians)
        return tuple([j.view(j.shape[0], *self.axes, *j.shape[2:]) for j in jacobians])

    def _fill(self, packed: Packed, rows: Tensor | None, inputs: Sequence[Tensor], results: list[Tensor]) -> None:
        reads = [inputs[v].contiguous() for v in self.chain.inputs]
        run_chain(packed, reads, self.targets, rows, [], results)


def whole_chain(
    program: Program,
    params: Params,
    inputs: Sequence[Tensor],
    targets: Tensor | None,
    axes: Shape,
    wrt: tuple[int, ...],
) -> WholeChain | None:
    """The chain for inputs and bound parameters like these; None if one chain is not the whole network.

    ``targets [S]``: flat output indices, never written to; None is every output.  ``axes``: the shape that the results
    have in place of S.
    """
    like = leading(inputs)
    targets = all_output_indices(program.outputs, like.device) if targets is None else targets.to(like.device)
    call_plan = call_plan_for(program, targets.shape[-1], like, wrt)
    if not isinstance(call_plan, GroupedCallPlan) or call_plan.plan.cast_dtype is not None:
        return None
    if not call_plan.targets_enter or len(call_plan.groups) != 1:
        return None
    if call_plan.groups[0].only_reader_of != set(wrt):
        return None
    if not call_plan.confirmed:
        with torch.inference_mode(False), torch.no_grad():
            few = [x.detach()[: comparison_size(call_plan).trial] for x in inputs]
            jacobian(program, params, few, targets, wrt)  # compares the first results with torch's
        if not call_plan.confirmed:
            return None
    try:
        chain = call_plan.chain(call_plan.groups[0], backward=True, onehot=True)
    except TooLarge:
        return None
    reads = [*(inputs[v] for v in chain.inputs), *(params[name] for name in call_plan.plan.packed_names)]
    if set(chain.wrt) != set(wrt) or any(x.dtype != like.dtype or x.device != like.device for x in reads):
        return None
    return WholeChain(program, call_plan, chain, like, wrt, targets, axes)
