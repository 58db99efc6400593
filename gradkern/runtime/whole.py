"""A network that kernels compute as a whole: calls need its packed weights, but do not go through its steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..ir.calls import Params
from ..ir.program import Program, Shape
from . import ops
from .call_plan import CallPlan
from .confirmation import comparison_size
from .executor import jacobian

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


def confirmed(program: Program, call_plan: CallPlan, params: Params, inputs: Sequence[Tensor], targets: Tensor) -> bool:
    """Whether the kernels' results are those of torch; compared now if they have not been."""
    if not call_plan.confirmed:
        with torch.inference_mode(False), torch.no_grad():
            few = [x.detach()[: comparison_size(call_plan).trial] for x in inputs]
            jacobian(program, params, few, targets, call_plan.wrt)  # compares its first results
    return call_plan.confirmed
