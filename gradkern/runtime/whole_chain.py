"""A network that kernels compute as a whole: calls need its packed weights, but do not go through its steps.

Most such networks are one chain; those in forward mode (`whole_forward`) are two.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

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
from .call_plan import CallPlan, GroupedCallPlan
from .confirmation import comparison_size
from .execution import run_chain
from .executor import jacobian
from .parameters import Packed, bind, content_of, weight_cache

Packs = TypeVar("Packs")


class Whole(ABC, Generic[Packs]):
    """A whole network, for the seeds ``targets [S]`` of all samples.  It holds no weights.

    It serves inputs and parameters of the dtypes and devices that it was made with.  ``axes``: the axes of the results
    in place of S.
    """

    def __init__(self, program: Program, call_plan: CallPlan, like: Tensor, targets: Tensor, axes: Shape) -> None:
        self.program, self.plan, self.wrt = program, call_plan.plan, call_plan.wrt
        self.targets, self.axes = targets, axes
        self.like, self.device = like.new_empty(0), like.device
        numbers = targets.shape[0] * sum(math.prod(program.inputs[v]) for v in self.wrt)
        self.gradient_bytes = numbers * like.element_size()  # per sample

    @abstractmethod
    def packed(self, tensors: Params) -> Packs | None:
        """The packed weights for the live ``tensors`` as they are now; None if no kernel may run with them."""

    @abstractmethod
    def __call__(self, packs: Packs, inputs: Sequence[Tensor], out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The gradients ``[N, S, *in]`` of each input that is differentiated; ``out``: memory for them."""

    @abstractmethod
    def repeat(
        self, tensors: Params, inputs: Sequence[Tensor], out: Sequence[Tensor] | None = None
    ) -> list[Tensor] | None:
        """The same if the live ``tensors`` are as in the last call; None, with nothing written, if they are not, or if
        such calls are not served."""

    def shaped(self, jacobians: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Jacobians ``[N, S, *in]`` as ``[N, *axes, *in]``."""
        if len(self.axes) == 1:
            return tuple(jacobians)
        return tuple([j.view(j.shape[0], *self.axes, *j.shape[2:]) for j in jacobians])

    def can_fill(self, out: Sequence[Tensor]) -> bool:
        """Whether the kernels write to this memory."""
        return all(o.is_contiguous() and o.dtype == self.like.dtype and o.device == self.device for o in out)

    def room(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """New memory for the gradients."""
        n, seeds = inputs[0].shape[0], self.targets.shape[0]
        results = [inputs[v].new_empty((n, seeds, *inputs[v].shape[1:])) for v in self.wrt]
        if n * self.gradient_bytes >= ops.HUGE:
            for fresh in results:
                ops.on_huge_pages(fresh)
        return results


class WholeChain(Whole[Packed]):
    """A network that is one chain: a call is one op."""

    def __init__(
        self, program: Program, call_plan: GroupedCallPlan, chain: Chain, like: Tensor, targets: Tensor, axes: Shape,
        on_cpu: bool,
    ) -> None:  # fmt: skip
        super().__init__(program, call_plan, like, targets, axes)
        self.chain = chain
        self._latest: tuple[int | None, weakref.ref[Packed] | None] = None, None  # the packed weights of the last call
        self.outputs = program.outputs
        self.output_bytes = program.outputs * like.element_size()  # per sample
        self.order = [call_plan.wrt.index(v) for v in chain.wrt]
        self.on_cpu = on_cpu  # the kernels, and all live tensors

    def packed(self, tensors: Params) -> Packed | None:
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

    def __call__(self, packed: Packed, inputs: Sequence[Tensor], out: Sequence[Tensor] | None = None) -> list[Tensor]:
        given = self.room(inputs) if out is None else list(out)
        n, rows, results = inputs[0].shape[0], self.rows(packed), [given[k] for k in self.order]
        chunk = self._chunk(n)
        if 0 < n <= chunk:
            self._fill(packed, rows, inputs, results)
        else:
            for a, b in spans(0, n, chunk):
                self._fill(packed, rows, [x[a:b] for x in inputs], [r[a:b] for r in results])
        return given

    def repeat(
        self, tensors: Params, inputs: Sequence[Tensor], out: Sequence[Tensor] | None = None
    ) -> list[Tensor] | None:
        content, latest = self._latest
        packed, n = latest() if latest is not None else None, inputs[0].shape[0]
        if packed is None or content is None or not packed.finite or not self.on_cpu or not 0 < n <= self._chunk(n):
            return None
        chain, given = self.chain, self.room(inputs) if out is None else list(out)
        live, reads = [tensors[name] for name in self.plan.live_names], [inputs[v].contiguous() for v in chain.inputs]
        seeds, results = (self.targets, self.rows(packed), chain.seed_tile), [given[k] for k in self.order]
        same = ops.chain_vjp_if(live, content, reads, packed.records, chain.sizes, chain.output_sizes, *seeds, results)
        return given if same else None

    def _chunk(self, n: int) -> int:
        """How many samples run at a time.  One sample is never cut, so the sizes need not be asked for."""
        return limit_for_progress(samples_per_chunk(self.device, self.output_bytes), n) if n > 1 else 1

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
        ops.chain_statistics(
            reads, packed.records, chain.sizes, outputs, self.targets, rows, chain.seed_tile, room, sums
        )
        return outputs[0].view(n, *self.program.output_shape)

    def _fill(self, packed: Packed, rows: Tensor | None, inputs: Sequence[Tensor], results: list[Tensor]) -> None:
        reads = [inputs[v].contiguous() for v in self.chain.inputs]
        run_chain(packed, reads, self.targets, rows, [], results)


def confirmed(program: Program, call_plan: CallPlan, params: Params, inputs: Sequence[Tensor], targets: Tensor) -> bool:
    """Whether the kernels' results are those of torch; compared now if they have not been."""
    if not call_plan.confirmed:
        with torch.inference_mode(False), torch.no_grad():
            few = [x.detach()[: comparison_size(call_plan).trial] for x in inputs]
            jacobian(program, params, few, targets, call_plan.wrt)  # compares its first results
    return call_plan.confirmed


def whole_chain(
    program: Program, call_plan: GroupedCallPlan, params: Params, inputs: Sequence[Tensor], like: Tensor,
    targets: Tensor, axes: Shape,
) -> WholeChain | None:  # fmt: skip
    """The chain for inputs and bound parameters like these; None if one chain is not the whole network."""
    if not call_plan.targets_enter or len(call_plan.groups) != 1:
        return None
    wrt = set(call_plan.wrt)
    if call_plan.groups[0].only_reader_of != wrt:
        return None
    if not confirmed(program, call_plan, params, inputs, targets):
        return None
    try:
        chain = call_plan.chain(call_plan.groups[0], backward=True, onehot=True)
    except TooLarge:
        return None
    reads = [*(inputs[v] for v in chain.inputs), *(params[name] for name in call_plan.plan.packed_names)]
    if set(chain.wrt) != wrt or any(x.dtype != like.dtype or x.device != like.device for x in reads):
        return None
    on_cpu = isinstance(chain.sizes, CpuSizes) and all(params[name].is_cpu for name in call_plan.plan.live_names)
    return WholeChain(program, call_plan, chain, like, targets, axes, on_cpu)
