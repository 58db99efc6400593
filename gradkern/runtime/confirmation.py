"""The first results of a plan's kernels are compared with torch's own kernels before they are handed out.

A plan folds, merges and tiles a network in ways that no test has seen, and a compiler may have its own faults.  So a
few samples and seeds of a plan's first call run step by step as well, in float64 where torch can.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..codegen.machine import Device
from ..ir.program import Opaque
from ..util import rounding
from ..util.samples import perturbed, spread_of, spread_rows
from .parameters import KernelsUnavailable, PlanWeights, leading

if TYPE_CHECKING:
    from .call_plan import CallPlan


class ComparisonSize(NamedTuple):
    """How much is compared."""

    samples: int  # spread over the batch
    seeds: int  # seeds of each sample
    perturbed: int  # samples of the second comparison, which are perturbed first
    trial: int  # samples of a call that is made only to compare its results


#: A GPU's threads take their shares by the number of seeds and samples.
_CPU, _GPU = ComparisonSize(3, 4, 3, 16), ComparisonSize(8, 1 << 30, 2048, 1024)
MOVE = 1e-2  # the perturbation of the second comparison's inputs, as a share of their spread
DRAWS = 3  # runs of torch's kernels with inputs and weights rounded at random, which show the error of rounding alone
SLACK = 10.0  # errors may be this many times those of these runs
CANCELLED = 1e3  # a gradient of fewer units of rounding (of output / input) may be what is left when terms cancel


class KernelsDiffer(RuntimeError):
    """gradkern's kernels and torch's own give different gradients on this GPU; nothing was returned."""


#: Results, one ``[N, ...]`` each, of a call with tensors ``[N, ...]``; those with an axis of seeds have fewer of them.
#: With a number, inputs and weights are off by a unit of rounding, drawn by that seed.
Folded = Callable[[Sequence[Tensor], torch.dtype, int | None], Sequence[Tensor]]
Run = Callable[["CallPlan", PlanWeights, Sequence[Tensor]], Sequence[Tensor]]


def confirm(
    call_plan: CallPlan, weights: PlanWeights, given: Sequence[Tensor], got: Sequence[Tensor], run: Run
) -> None:
    """Raise `KernelsDiffer` if ``got``, which ``run`` made from tensors ``given``, is not what torch makes of them.

    On a CPU it is `KernelsUnavailable`, so that plain torch takes the place of the kernels.  Rounding may decide
    between equal maxima, or flip a ReLU at zero.  So half of the samples may differ; if more do, or all gradients
    are zero, the inputs are moved a little, and the kernels run once more.  If nothing is finite, the next call is
    compared.  ``run`` must not compare anything itself.
    """
    # An opaque step may name a dtype among its arguments, so the tensors of such a program are not cast.
    opaque = any(isinstance(step.form, Opaque) for step in call_plan.program.steps)
    size = comparison_size(call_plan)
    plain = call_plan.without_kernels(min(call_plan.plan.seeds, size.seeds))

    def folded(few: Sequence[Tensor], dtype: torch.dtype, draw: int | None) -> Sequence[Tensor]:
        generator, eps = torch.Generator().manual_seed(draw or 0), torch.finfo(dtype).eps

        def cast(t: Tensor) -> Tensor:
            if not opaque and (t.is_floating_point() or t.is_complex()):
                t = t.to(dtype.to_complex() if t.is_complex() else dtype)
            return t if draw is None or not t.is_floating_point() else perturbed(t, eps * t.abs(), generator)

        params = {name: cast(p) for name, p in weights.params.items()}
        few = [cast(t) for t in few]
        return run(plain, PlanWeights(plain.plan, params, leading(few)), few)

    gradients = bool(call_plan.plan.seeds) and not call_plan.linear  # behind the output
    error = _error(size, weights.like.dtype, given, got, folded, gradients)
    dead = not any(bool(g.any()) for g in got[1:] or got)
    if dead or error is None or error > 1.0:
        generator = torch.Generator().manual_seed(0)
        few = [x[: size.perturbed] for x in given]
        moved = [perturbed(x, MOVE * spread_of(x), generator) for x in few]
        error = _error(size, weights.like.dtype, moved, run(call_plan, weights, moved), folded, gradients)
    if error is None:
        return
    if error > 1.0:
        raise refusal(call_plan, weights.like.device, error)
    call_plan.confirmed = True  # only now: other threads may use the same plan, and compare results of their own


def comparison_size(call_plan: CallPlan) -> ComparisonSize:
    return _GPU if isinstance(call_plan.plan.machine, Device) else _CPU


def refusal(call_plan: CallPlan, device: torch.device, error: float) -> Exception:
    program = call_plan.program
    what = f"the median error of a sample is {error:.3g} times what rounding may cause"
    if not isinstance(call_plan.plan.machine, Device):
        return KernelsUnavailable(f"their first results are not torch's own ({what}); please report this")
    return KernelsDiffer(
        f"gradkern's kernels give other results than torch's own for a network of {len(program.steps)} steps "
        f"with outputs of shape {list(program.output_shape)} on {device}: {what}. Nothing was returned. Set "
        "GRADKERN_CUDA=0 to run torch's kernels instead, and please report this with the output of "
        "gradkern.show_versions()."
    )


def few_seeds(t: Tensor, count: int) -> Tensor:
    """``count`` of the seeds of ``t [N, S, ...]``, spread over all of them."""
    if t.shape[1] != count:
        t = t[:, spread_rows(t.shape[1], count).to(t.device)]
    return t.contiguous()


def _error(
    size: ComparisonSize, dtype: torch.dtype, inputs: Sequence[Tensor], got: Sequence[Tensor], folded: Folded,
    gradients: bool,
) -> float | None:  # fmt: skip
    """The median over some samples of the largest error of their results, in units of the tolerance; None if none of
    their results are finite.  ``gradients``: the results are an output and its gradients."""
    rows = spread_rows(len(inputs[0]), size.samples).to(inputs[0].device)
    few = [x[rows] for x in inputs]
    want = folded(few, torch.float64, None)
    slack = [0.0, *[_cancelled(few, want[0], dtype) if gradients else 0.0] * (len(want) - 1)]

    def errors(results: Sequence[Tensor]) -> Tensor:  # [n]; NaN for a sample whose results are all not finite
        each = [rounding.sample_errors(r, w, small) for r, w, small in zip(results, want, slack, strict=True)]
        return functools.reduce(torch.fmax, each)

    chosen = list(zip([g[rows] for g in got], want, strict=True))
    mine = errors([g if g.shape == w.shape else few_seeds(g, w.shape[1]) for g, w in chosen])
    if mine.isinf().any():  # a number of float64 may be too large for the kernels' dtype, and for torch's own kernels
        mine = mine.masked_fill(errors(folded(few, dtype, None)).isinf(), torch.nan)
    told = ~mine.isnan()
    if not told.any():
        return None
    error, tolerance = mine[told].median(), rounding.for_program(dtype)
    if error > tolerance:  # where terms cancel, torch's own results are as wrong
        theirs = [float(errors(folded(few, dtype, draw))[told].nan_to_num(0.0, 0.0).median()) for draw in range(DRAWS)]
        tolerance = max(tolerance, SLACK * max(theirs))
    return float(error) / tolerance


def _cancelled(inputs: Sequence[Tensor], y: Tensor, dtype: torch.dtype) -> Tensor:
    """Per sample, the size of a gradient that may be rounding alone, ``[N]``."""

    def norm(x: Tensor) -> Tensor:
        return x.double().reshape(len(x), -1).norm(dim=1)

    size = torch.stack([norm(x) for x in inputs if x.is_floating_point()]).norm(dim=0)
    scale = norm(y) / size.where(size > 0, 1.0)
    return CANCELLED * torch.finfo(dtype).eps * scale.nan_to_num(0.0, 0.0, 0.0)
