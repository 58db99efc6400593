"""Gradients at many points: the engine of every method that averages over a path, over noise or over baselines.

A path method uses ``steps`` points for each of N samples.  `Points` differentiates them block by block, all seeds at
once, so that memory does not grow with the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..dispatch import batching
from ..dispatch.autograd_call import output_shape, whole_batch_reason
from ..dispatch.request import Request
from ..dispatch.route import Route, shared_route
from ..dispatch.solve import solve
from ..dispatch.state import BoundProgram
from ..dispatch.targets import Seeds
from ..ir.program import Program, Shape
from ..util.callables import with_given
from ..util.chunks import samples_per_chunk
from ..util.options import Engine
from ..util.progress import with_progress
from .captum_compat import format_additional_forward_args
from .old_signatures import takes_seeds

Tensors = tuple[Tensor, ...]
LEAST_BLOCK = 64  # points per block at least: below that, the fixed cost of a call shows beside its kernel


class Points:
    """One model, to be differentiated with respect to its ``inputs`` at points like these.

    ``more``: tensors ``[N, ...]`` that the model takes after the inputs.  ``engine`` as in `gradkern.use`.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Tensor],
        more: Sequence[Tensor] = (),
        engine: Engine | None = None,
    ) -> None:
        self.engine = engine
        self.inputs, self.more = tuple(inputs), tuple(more)
        self.wrt = tuple(i for i, x in enumerate(self.inputs) if x.is_floating_point())
        self.samples = self.inputs[0].shape[0]
        self.most: int | None = None  # the most points at a time, if the caller limits them
        self.base_request = Request(fn, (*self.inputs, *self.more), self.wrt, lambda n, out: Seeds(0, (0,), None))
        self.fn, self.module = self.base_request.fn, self.base_request.module

    def at(self, inputs: Sequence[Tensor], more: Sequence[Tensor]) -> Points:
        """This model at other samples."""
        return Points(self.fn, inputs, more, self.engine)

    @cached_property
    def route(self) -> Route:
        """The route that all points of this call take."""
        return shared_route(self.base_request, self.engine)

    @cached_property
    def plain_torch(self) -> bool:
        """Whether plain torch runs the steps of the model's Program."""
        return batching.plain_torch(self.route.engine, self.base_request.inputs)

    @property
    def couples_batch(self) -> bool:
        """Whether one forward must see all points of a call (batch statistics, random draws)."""
        return bool(whole_batch_reason(self.base_request, self.route))

    def program(self) -> Program | None:
        """The model's Program, if it is known already."""
        return self.route.program

    def captured(self) -> Program | None:
        """The model's Program, captured now if it is not known; None if the model has none (a warning says why)."""
        bound = self.route.bound_program(self.base_request)
        return None if bound is None else bound.program

    @property
    def bound(self) -> BoundProgram:
        """The model's Program, which has been captured, and its live tensors."""
        assert self.route.bound is not None
        return self.route.bound

    def choose(self, choice: Callable[[int, Shape], Seeds]) -> tuple[Seeds, Shape]:
        """The outputs that ``choice`` picks for the samples themselves, and the output's shape per sample."""
        out = output_shape(self.base_request, self.route)
        seeds = choice(self.samples, out)
        if seeds.awaits_outputs:
            with torch.inference_mode(False), torch.no_grad():
                y = self.fn(*[x.detach().clone() for x in (*self.inputs, *self.more)])
            return seeds.chosen_by(y), out
        return seeds, out

    @takes_seeds(3)
    def gradients(
        self,
        points: Sequence[Tensor],
        more: Sequence[Tensor],
        seeds: Seeds,
        *,
        program: Program | None = None,
        ahead: int = 0,
    ) -> tuple[Tensor, ...]:
        """One ``[R, S, *in]`` per input at the points ``[R, *in]``.

        ``program`` takes the place of the model's own.  ``ahead``: points still to come, which count in the decision to
        capture.
        """
        request = Request(self.fn, (*points, *more), self.wrt, lambda n, out: seeds, ahead=ahead)
        route = self.route
        if not route.serves(request, route.engine):  # points of another dtype than the inputs
            route = shared_route(request, self.engine)
        if program is None:
            result = solve(request, route)
        else:
            route.check_reached(request)
            result = batching.run(request, program, self.bound.tensors, route.engine)
        return result.jacobians

    def blocks(self, steps: int, seed_count: int) -> Iterator[tuple[int, int, int, int]]:
        """Pieces ``(first sample, last, first step, last)`` whose gradients fit in a block."""
        point_bytes = gradient_bytes(self.inputs, seed_count)
        pieces = blocks(self.samples, steps, point_bytes, self.inputs[0].device, self.most)
        return with_progress(pieces, self.samples * steps, "points", lambda p: (p[1] - p[0]) * (p[3] - p[2]))


def gradient_bytes(inputs: Sequence[Tensor], seed_count: int) -> int:
    """Bytes of the gradients of all seeds at one point."""
    return max(1, max(1, seed_count) * sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in inputs))


def block_rows(point_bytes: int, device: torch.device) -> int:
    """Points per block, for ``point_bytes`` of gradients per point; memory also holds the points and their products."""
    return samples_per_chunk(device, 2 * point_bytes, 3 * point_bytes, least=LEAST_BLOCK)


def blocks(
    samples: int, steps: int, point_bytes: int, device: torch.device, most: int | None = None
) -> Iterator[tuple[int, int, int, int]]:
    """Pieces ``(first sample, last, first step, last)`` of a path's points whose gradients fit in a block.

    ``most``: the most points of a piece.
    """
    rows = block_rows(point_bytes, device)
    rows = rows if most is None else max(1, min(rows, most))
    size = max(1, min(samples, rows // steps))
    for a in range(0, samples, size):
        b = min(a + size, samples)
        count = max(1, rows // (b - a))
        for first in range(0, steps, count):
            yield a, b, first, min(first + count, steps)


def with_arguments(fn: Callable[..., Any], inputs: Sequence[Tensor], extra: Any) -> tuple[Callable[..., Any], Tensors]:
    """Split Captum's ``additional_forward_args``: ``fn`` with the fixed ones, and the tensors with a row per sample.

    ``fn`` takes these tensors after the inputs.
    """
    more = format_additional_forward_args(extra) or ()
    samples = inputs[0].shape[0]
    rows = {k: isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == samples for k, x in enumerate(more)}
    given = {len(inputs) + k: x for k, x in enumerate(more) if not rows[k]}
    return with_given(fn, given), tuple(x for k, x in enumerate(more) if rows[k])


def between(inputs: Sequence[Tensor], baselines: Sequence[Any], a: int, b: int, alphas: Tensor) -> list[Tensor]:
    """The points ``baseline + α (input - baseline)`` of the samples ``a:b``, ``[K (b - a), *in]``, steps first."""
    path = []
    for x, base in zip(inputs, baselines, strict=True):
        base = rows_of(base, a, b)
        samples = x[a:b].detach()
        steps = alphas.to(device=x.device, dtype=x.dtype).view(-1, *(1,) * samples.dim())
        points = base + steps * (samples - base)  # [K, b - a, *in]
        path.append(points.reshape(-1, *x.shape[1:]))
    return path


def repeat_rows(rows: Sequence[Tensor], a: int, b: int, steps: int) -> list[Tensor]:
    """The rows ``a:b`` that belong to the points of `between`: repeated for every step, ``[K (b - a), ...]``."""
    return [x[a:b].repeat(steps, *(1,) * (x.dim() - 1)) for x in rows]


def rows_of(baseline: Any, a: int, b: int) -> Any:
    """The rows ``a:b`` of a baseline: a number, one row for all samples, or a row for each."""
    if not isinstance(baseline, Tensor):
        return baseline
    baseline = baseline.detach()
    return baseline[a:b] if baseline.dim() and baseline.shape[0] > 1 else baseline


def weighted_sum(grads: Tensor, weights: Tensor) -> Tensor:
    """``Σ_k w_k g_k`` for ``grads [K · n, ...]``, steps first; scaled in place and added in Captum's order."""
    steps = len(weights)
    w = weights.to(device=grads.device, dtype=grads.dtype).view(steps, 1)
    return grads.view(steps, -1).mul_(w).view(steps, -1, *grads.shape[1:]).sum(0)


def path_sum(
    points: Points, baselines: Sequence[Any], seeds: Seeds, weights: Tensor, alphas: Tensor
) -> tuple[Tensor, ...]:
    """``Σ_k w_k ∂y_s/∂x (baseline + α_k (input - baseline))``: one ``[N, S, *in]`` per input.

    ``weights``, ``alphas``: ``[steps]``.  Steps of a block are summed as they come, and not kept.
    """
    totals = tuple(
        torch.zeros(x.shape[0], seeds.count, *x.shape[1:], dtype=x.dtype, device=x.device) for x in points.inputs
    )
    ahead = len(alphas) * points.samples
    with torch.no_grad():
        for a, b, first, last in points.blocks(len(alphas), seeds.count):
            at = between(points.inputs, baselines, a, b, alphas[first:last])
            more, steps = repeat_rows(points.more, a, b, last - first), last - first
            gradients = points.gradients(at, more, seeds.part(a, b).repeat(steps), ahead=ahead)
            ahead -= len(at[0])
            for total, g in zip(totals, gradients, strict=True):
                total[a:b] += weighted_sum(g, weights[first:last])
    return totals
