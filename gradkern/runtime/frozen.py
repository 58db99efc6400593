"""A network in one chain whose weights are packed once, for calls that look at nothing but their inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..codegen.chain import Chain
from ..codegen.machine import TooLarge
from ..ir.calls import Params
from ..ir.program import Program
from . import executor
from .parameters import KernelsUnavailable, Packed, PlanWeights, every

FEW = 1024  # samples whose first results are compared with torch's on a GPU


class FrozenChain:
    """``chain`` with its packed weights, and the seeds ``targets [S]`` of all samples."""

    def __init__(self, chain: Chain, packed: Packed, wrt: tuple[int, ...], targets: Tensor, outputs: int) -> None:
        self.chain, self.packed, self.targets = chain, packed, targets
        self.rows = packed.seed_rows(targets, outputs)
        self.order = [wrt.index(v) for v in chain.wrt]

    def __call__(self, inputs: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Fill ``out``: contiguous tensors ``[N, S, *in]``, one for each input that is differentiated."""
        reads = [inputs[v].contiguous() for v in self.chain.inputs]
        executor.run_chain(self.packed, reads, self.targets, self.rows, [], [out[k] for k in self.order])


def frozen_chain(
    program: Program, params: Params, inputs: Sequence[Tensor], targets: Tensor | None, wrt: tuple[int, ...]
) -> FrozenChain | None:
    """The chain for inputs like these, with ``params`` as they are now; None if one chain is not the whole network.

    ``targets [S]``: flat output indices; None is every output.
    """
    like = executor.leading(inputs)
    if targets is None:
        targets = every(program.outputs, like.device)
    targets = targets.to(like.device)
    call_plan = executor.call_plan_for(program, targets.shape[-1], like, wrt)
    whole = call_plan.native and call_plan.targets_enter and len(call_plan.groups) == 1
    if not whole or call_plan.parts is not None or call_plan.plan.cast_dtype is not None:
        return None
    if call_plan.groups[0].alone != set(wrt):
        return None
    if not call_plan.confirmed:
        few = [x[:FEW] for x in inputs]
        executor.jacobian(program, params, few, targets, wrt)  # which compares
    try:
        chain = call_plan.chain(call_plan.groups[0], backward=True, onehot=True)
        packed = PlanWeights(call_plan.plan, params, like).packed(chain)
    except (KernelsUnavailable, TooLarge):
        return None
    if set(chain.wrt) != set(wrt) or any(inputs[v].dtype != like.dtype for v in chain.inputs):
        return None
    return FrozenChain(chain, packed, wrt, targets, call_plan.outputs)
