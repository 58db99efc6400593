"""The first results of a program's kernels on a GPU are compared with torch's own kernels before they are handed out.

What only a GPU can tell is whether its compiler and its hardware do with the kernels what the tests on the host saw.
So some samples of the first call run step by step as well, in float64 where torch can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ir.program import Opaque
from ..util import rounding
from .parameters import PlanWeights, leading

if TYPE_CHECKING:
    from .call_plan import CallPlan

SAMPLES = 8  # that are compared, spread over the batch
MOVED = 2048  # samples of the second comparison
MOVE = 1e-2  # of the spread of the inputs
SLACK = 10.0  # times the error of torch's own kernels, if that is larger than the tolerance


class KernelsDiffer(RuntimeError):
    """gradkern's kernels and torch's own give different gradients on this GPU; nothing was returned."""


#: Results, one ``[N, ...]`` each, of a call with tensors ``[N, ...]``.
Folded = Callable[[Sequence[Tensor], torch.dtype], Sequence[Tensor]]
Run = Callable[["CallPlan", PlanWeights, Sequence[Tensor]], Sequence[Tensor]]


def confirm(
    call_plan: CallPlan, weights: PlanWeights, given: Sequence[Tensor], got: Sequence[Tensor], run: Run
) -> None:
    """Raise `KernelsDiffer` if ``got``, which ``run`` made from tensors ``given``, is not what torch makes of them.

    Rounding may decide between equal maxima, or flip a ReLU at zero.  So half of the samples may differ; and if more
    do, the inputs are moved a little, and the kernels run once more.  If nothing is finite, the next call is compared.
    """
    program, like = call_plan.program, weights.like
    opaque = any(isinstance(step.form, Opaque) for step in program.steps)  # a call that torch runs may name a dtype

    def folded(few: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() and not opaque else t

        params = {name: cast(p) for name, p in weights.params.items()}
        few = [cast(t) for t in few]
        return run(call_plan.folded, PlanWeights(call_plan.folded.plan, params, leading(few)), few)

    call_plan.confirmed = True  # for the runs inside
    try:
        error = _error(given, got, folded)
        if error is not None and error > 1.0:
            generator = torch.Generator().manual_seed(0)
            moved = [_moved(x[:MOVED], generator) for x in given]
            error = _error(moved, run(call_plan, weights, moved), folded)
        if error is not None and error > 1.0:
            raise KernelsDiffer(
                f"gradkern's kernels give other results than torch's own for a network of {len(program.steps)} steps "
                f"with outputs of shape {list(program.output_shape)} on {like.device}: the median error of a sample is "
                f"{error:.3g} times what rounding may cause. Nothing was returned. Set GRADKERN_CUDA=0 to run torch's "
                "kernels instead, and please report this with the output of gradkern.show_versions()."
            )
    except BaseException:
        call_plan.confirmed = False
        raise
    call_plan.confirmed = error is not None


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_floating_point():
        return x
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    spread = float(x.double().std()) if x.numel() > 1 else 0.0
    return x + noise * (MOVE * (spread or 1.0))


def _error(inputs: Sequence[Tensor], got: Sequence[Tensor], folded: Folded) -> float | None:
    """The median over some samples of the largest error of their results, in units of the tolerance; None if it is not
    finite."""
    n = inputs[0].shape[0]
    rows = torch.linspace(0, n - 1, min(n, SAMPLES)).round().long().to(inputs[0].device)
    few, dtype = [x[rows] for x in inputs], got[0].dtype
    want = folded(few, torch.float64)
    errors = torch.stack([rounding.sample_errors(g[rows], w) for g, w in zip(got, want, strict=True)])  # [results, n]
    errors = errors[:, torch.isfinite(errors).all(0)].amax(0)
    if not len(errors):
        return None
    tolerance = rounding.for_program(dtype)
    if errors.median() > tolerance and dtype != torch.float64:
        plain = folded(few, dtype)
        theirs = torch.stack([rounding.sample_errors(p, w) for p, w in zip(plain, want, strict=True)]).amax(0)
        tolerance = max(tolerance, SLACK * float(theirs.nan_to_num(0.0).median()))
    return float(errors.median()) / tolerance
