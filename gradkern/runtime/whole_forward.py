"""A network in forward mode, in two chains: its forward pass, and its transpose for all tangents."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codegen.machine import TooLarge
from ..ir.calls import Params
from ..ir.program import Program, Shape
from ..passes.forward_mode import values_read
from ..planner.plan import ForwardPlan
from ..util.chunks import spans, stepwise_samples
from ..util.progress import limit_for_progress
from . import executor, forward_mode, ops
from .call_plan import ForwardCallPlan, GroupedCallPlan, grouped_call_plan
from .confirmation import comparison_size
from .execution import run_chain
from .parameters import KernelsUnavailable, LazyParams, Packed, PlanWeights, all_output_indices, bind, content_of
from .whole_chain import Whole, confirmed


@dataclass(frozen=True)
class ForwardPacks:
    """The packed weights of both chains, and the live tensors that they were made from.  ``values``: None if the
    network is linear, so that nothing of a forward pass is read."""

    values: Packed | None
    transposed: Packed
    tensors: Params


class WholeForward(Whole[ForwardPacks]):
    """A network in forward mode, whose forward pass and whose transpose are one chain each.

    Its forward pass ends at the last value that a slope is computed from.
    """

    def __init__(
        self, program: Program, call_plan: ForwardCallPlan, values: GroupedCallPlan | None, like: Tensor,
        targets: Tensor, axes: Shape,
    ) -> None:  # fmt: skip
        super().__init__(program, call_plan, like, targets, axes)
        self.call_plan, self.forward = call_plan, call_plan.forward
        self.values = None if values is None else (values, values.chain(values.groups[0], backward=False))
        (self.transposed_chain,) = call_plan.inner.backward_chains()
        self.tangents = all_output_indices(self.forward.transposed.tangents, like.device)
        self._latest: tuple[int, tuple[weakref.ref[Packed] | None, weakref.ref[Packed]]] | None = None

    def packed(self, tensors: Params) -> ForwardPacks | None:
        content = content_of([tensors[name] for name in self.plan.live_names])
        known = self._known(content, tensors)
        if known is not None:
            return known
        with torch.inference_mode(False), torch.no_grad():
            weights = PlanWeights(self.plan, bind(self.program, tensors), self.like)
            try:
                transposed = executor.transposed_weights(self.forward, weights).packed(self.transposed_chain)
                values = None
                if self.values is not None:
                    values_plan, chain = self.values
                    values = executor.values_weights(values_plan, weights).packed(chain)
            except KernelsUnavailable:
                return None
        self._latest = content, (None if values is None else weakref.ref(values), weakref.ref(transposed))
        return ForwardPacks(values, transposed, tensors)

    def _known(self, content: int, tensors: Params) -> ForwardPacks | None:
        """The packed weights of the last call, if they were made from the same bytes."""
        if self._latest is None or self._latest[0] != content:
            return None
        of_values, of_transposed = self._latest[1]
        values, transposed = None if of_values is None else of_values(), of_transposed()
        if transposed is None or (values is None) != (of_values is None):
            return None
        return ForwardPacks(values, transposed, tensors)

    def repeat(
        self, tensors: Params, inputs: Sequence[Tensor], out: Sequence[Tensor] | None = None
    ) -> list[Tensor] | None:
        packs = self._known(content_of([tensors[name] for name in self.plan.live_names]), tensors)
        return None if packs is None or not inputs[0].shape[0] else self(packs, inputs, out)

    def __call__(
        self, packs: ForwardPacks, inputs: Sequence[Tensor], out: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        n, results = inputs[0].shape[0], self.room(inputs) if out is None else list(out)
        chunk = 1 if n == 1 else limit_for_progress(stepwise_samples(self.device, self.plan.bytes_per_sample), n)
        with torch.inference_mode(False), torch.no_grad():
            if 0 < n <= chunk:
                self._fill(packs, inputs, results)
            else:
                for a, b in spans(0, n, chunk):
                    self._fill(packs, [x[a:b] for x in inputs], [r[a:b] for r in results])
        return results

    def _fill(self, packs: ForwardPacks, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        program, transposed = self.forward.program, self.forward.transposed
        params = LazyParams(self.program, packs.tensors)
        slopes = forward_mode.slope_tensors(program, params, self._values(packs.values, inputs), transposed.slopes)
        like = inputs[0]
        reads = [slopes[v - 1] for v in self.transposed_chain.inputs] or [like.contiguous()]
        rows = like.new_empty(like.shape[0], transposed.tangents, *program.output_shape)
        seeds = packs.transposed.seed_rows(self.tangents, transposed.tangents, constant=True)
        run_chain(packs.transposed, reads, self.tangents, seeds, [], [rows])
        executor.finish_forward_mode(self.call_plan, params, inputs, rows, self.targets, results)

    def _values(self, packed: Packed | None, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """The values that the slopes are computed from."""
        values = dict(enumerate(inputs))
        if self.values is not None and packed is not None:
            plan, chain = self.values
            reads, records = (
                [inputs[v].contiguous() for v in chain.inputs],
                (packed.weights, packed.tables, packed.forward),
            )
            made = ops.chain_forward(reads, *records, chain.sizes, chain.output_sizes)
            for v, y in zip(plan.groups[0].live_out, made, strict=True):
                values[v] = y.view(-1, *plan.shapes[v])
        return values


def _wanted(forward: ForwardPlan) -> tuple[int, ...]:
    """The values that the slopes are computed from; the output is one if the slopes of its step need it."""
    program, slopes = forward.program, forward.transposed.slopes
    base, read = len(program.inputs), values_read(program, slopes)
    of_output = any(base + s.of == program.output for s in slopes if s.kind not in ("value", "swapped"))
    return tuple(v for v in forward.read if v >= base and (v in read or of_output))


def whole_forward(
    program: Program, call_plan: ForwardCallPlan, params: Params, inputs: Sequence[Tensor], like: Tensor,
    targets: Tensor, axes: Shape,
) -> WholeForward | None:  # fmt: skip
    """Forward mode for inputs and bound parameters like these; None if the network is more than two chains."""
    inner, forward = call_plan.inner, call_plan.forward
    if not inner.linear or not inner.targets_enter or len(inner.groups) != 1:
        return None
    reads = [*inputs, *(params[name] for name in forward.live_names)]
    if any(x.dtype != like.dtype or x.device != like.device for x in reads):
        return None
    if not confirmed(program, call_plan, params, inputs, targets):
        return None
    wanted = _wanted(forward)
    values = grouped_call_plan(forward.values, 0, like, (), wanted) if wanted else None
    try:
        if values is not None:
            if not values.native or len(values.groups) != 1 or values.groups[0].live_out != tuple(sorted(wanted)):
                return None
            few = [x.detach()[: comparison_size(call_plan).trial] for x in inputs]
            with torch.inference_mode(False), torch.no_grad():  # compares its first results with torch's
                if not executor.forward_values(forward.values, LazyParams(forward.values, params), few, wanted):
                    return None
        return WholeForward(program, call_plan, values, like, targets, axes)
    except TooLarge:
        return None
