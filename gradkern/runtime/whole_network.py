"""Which kernels compute a whole network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ir.calls import Params
from ..ir.program import Program, Shape
from .call_plan import ForwardCallPlan, GroupedCallPlan, call_plan_for
from .parameters import all_output_indices, leading
from .whole_chain import Whole, whole_chain
from .whole_forward import whole_forward


def whole_network(
    program: Program,
    params: Params,
    inputs: Sequence[Tensor],
    targets: Tensor | None,
    axes: Shape,
    wrt: tuple[int, ...],
) -> Whole[Any] | None:
    """The kernels for inputs and bound parameters like these; None if a call needs more than one chain, or than two
    in forward mode.

    ``targets [S]``: flat output indices, never written to; None is every output.  ``axes``: the shape that the results
    have in place of S.
    """
    like = leading(inputs)
    targets = all_output_indices(program.outputs, like.device) if targets is None else targets.to(like.device)
    call_plan = call_plan_for(program, targets.shape[-1], like, wrt)
    if call_plan.plan.cast_dtype is not None:
        return None
    match call_plan:
        case GroupedCallPlan():
            return whole_chain(program, call_plan, params, inputs, like, targets, axes)
        case ForwardCallPlan():
            return whole_forward(program, call_plan, params, inputs, like, targets, axes)
    return None
