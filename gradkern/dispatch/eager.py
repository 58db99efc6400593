"""Live autograd on the model itself.  It works for every network, and Programs are compared with it.

All seeds share one forward.  The batch is cut into chunks unless its samples depend on each other.  Buffers are
restored, and no ``.grad`` is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..ir.program import Shape
from ..runtime import ops
from ..util.chunks import spans
from ..util.memo import on_reset
from ..util.options import BadValue, memory_budget
from ..util.torch_compat import without_fallback_warning
from .checks import check_devices, check_reached
from .live_model import forward, leaves_of, outside_modes
from .profile import ModelProfile
from .request import JacobianResult, Request, allocate

SMALL_COTANGENTS = 1 << 16  # elements; up to this many, the cotangents of all seeds are one tensor

# Nodes whose backward has a batching rule in autograd's own vmap; with any other node, a loop over seeds is faster.
BATCHED_NODES = frozenset(
    name + "Backward0"
    for name in (
        *("Addmm", "Mm", "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Clone", "Unsqueeze"),
        *("Squeeze", "Relu", "LeakyRelu", "Elu", "Tanh", "Sigmoid", "Add", "Sub", "Mul", "Neg", "Alias", "Expand"),
        *("Softmax", "LogSoftmax"),
    )
) | {"torch::autograd::AccumulateGrad"}


def pieces(request: Request, profile: ModelProfile, start: int = 0) -> Iterator[tuple[int, int]]:
    """The samples from ``start`` on, as many at a time as one forward may take."""
    chunk = profile.chunk(request.samples, request.sample_bytes, request.inputs[0].device)
    return spans(start, request.samples, chunk)


def run(
    request: Request,
    profile: ModelProfile,
    start: int = 0,
    partial: JacobianResult | None = None,
) -> JacobianResult:
    """Differentiate the samples from ``start`` on.  ``partial``: the results so far."""
    for a, b in pieces(request, profile, start):
        partial = fill(request, partial, a, b)
    assert partial is not None
    return partial


def run_as_measured(
    request: Request, profile: ModelProfile, start: int, partial: JacobianResult | None, seeds: int, *, batched: bool
) -> JacobianResult:
    """`run` for a model whose samples do not mix: all ``seeds`` in one backward (``batched``), or one by one."""
    device, together = request.inputs[0].device, 1
    if batched:
        together = profile.seeds_together(seeds, request.samples, request.sample_bytes, device)
    chunk = profile.chunk(request.samples, request.sample_bytes, device, together)
    with without_fallback_warning():
        if partial is None and chunk >= request.samples:  # one piece, of which no progress is shown
            return fill(request, None, 0, request.samples, together)
        for a, b in spans(start, request.samples, chunk):
            partial = fill(request, partial, a, b, together)
    assert partial is not None
    return partial


def fill(
    request: Request, partial: JacobianResult | None, start: int, stop: int, together: int | None = None
) -> JacobianResult:
    """Differentiate the samples ``start:stop`` in one forward and write their rows of the results.

    ``together``: how many seeds to send back at a time; by default, as many as torch is known to batch well.
    """
    with outside_modes():
        whole = stop - start == request.samples
        leaves, arguments = leaves_of(request.inputs if whole else [x[start:stop] for x in request.inputs], request.wrt)
        y = forward(request.fn, request.module, arguments)  # [n, *out]
        results = allocate(request, tuple(y.shape[1:]), partial)
        if start == 0 and request.out is None:
            for fresh in results.jacobians:
                ops.on_huge_pages(fresh)
        _check_followed(request, y)
        if request.keep_outputs:
            results.kept.append(y.detach())
        results.fill_top_indices(start, stop, y)
        seeds = results.seeds
        index = seeds.indices if whole else seeds.part(start, stop).indices
        rows = results.jacobians if whole else [r[start:stop] for r in results.jacobians]  # each [n, S, *in]
        group = together or _group_size(y, leaves, seeds.count, memory_budget(y.device) // 2)
        batched, small = group > 1, seeds.count * y.numel() <= SMALL_COTANGENTS
        every = None
        if small and (index is None or index.dim() == 1):
            every = _known_cotangents(index, seeds.count, y.shape, y.dtype, y.device)  # [S, n, *out]
        elif small:
            every = _cotangents(y, index, 0, seeds.count)
        for first in range(0, seeds.count, group):
            last = min(first + group, seeds.count)
            sent = _cotangents(y, index, first, last) if every is None else every[first:last]  # [s, n, *out]
            gradients = torch.autograd.grad(
                y, leaves, sent if batched else sent[0],
                retain_graph=last < seeds.count, allow_unused=True, is_grads_batched=batched,
            )  # fmt: skip
            check_reached(request.wrt, _none_of(request, gradients))
            for row, gradient in zip(rows, gradients, strict=True):
                if batched:
                    row[:, first:last] = gradient.movedim(0, 1)
                else:
                    row.select(1, first).copy_(gradient)
    return results


def _check_followed(request: Request, y: Tensor) -> None:
    if not y.requires_grad:  # the output does not even depend on a parameter
        check_reached(request.wrt, request.wrt)


def _none_of(request: Request, gradients: Sequence[Tensor | None]) -> list[int]:
    return [w for w, gradient in zip(request.wrt, gradients, strict=True) if gradient is None]


def _cotangents(y: Tensor, index: Tensor | None, first: int, last: int) -> Tensor:
    """One-hot cotangents ``[s, n, *out]`` for the seeds ``first:last``."""
    samples, width = y.shape[0], y[0].numel()
    seeds = torch.arange(first, last) if index is None else index[..., first:last]  # [s] or [n, s]
    seeds = seeds.to(y.device).expand(samples, last - first).t()[..., None]  # [s, n, 1]
    hot = torch.zeros(last - first, samples, width, dtype=y.dtype, device=y.device)
    return hot.scatter_(2, seeds, 1).view(last - first, *y.shape)


@lru_cache(maxsize=16)
def _known_cotangents(
    index: Tensor | None, seeds: int, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`_cotangents` of all seeds for outputs of this shape, remembered because small calls would notice the cost."""
    return _cotangents(torch.empty(shape, dtype=dtype, device=device), index, 0, seeds)


on_reset(_known_cotangents.cache_clear)


def _group_size(y: Tensor, leaves: Sequence[Tensor], seeds: int, budget: int) -> int:
    """How many seeds to send back together; 1 if some node of the graph has no batching rule."""
    if seeds < 2:
        return 1
    widest = max(y[0].numel(), max(x[0].numel() for x in leaves))
    seen = set()
    stack = [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() not in BATCHED_NODES:
            return 1
        weight = getattr(node, "_saved_mat2", None)
        if isinstance(weight, Tensor):
            widest = max(widest, max(weight.shape))
        stack.extend(n for n, _ in node.next_functions)
    return max(1, min(seeds, budget // (8 * y.shape[0] * widest * y.element_size() + 1)))


def with_graph(request: Request) -> JacobianResult:
    """The Jacobian as a differentiable function of the caller's own inputs and of the parameters (unchunked)."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise BadValue("create_graph: got True under torch.no_grad or inference_mode, expected grad mode on.")
    check_devices(request.module, request.inputs)
    inputs = [
        x.detach().clone().requires_grad_() if i in request.wrt and not x.requires_grad else x
        for i, x in enumerate(request.inputs)
    ]
    y = forward(request.fn, request.module, inputs)
    shape = tuple(y.shape[1:])
    seeds = request.resolve_seeds(request.samples, shape).chosen_by(y)
    _check_followed(request, y)
    index = seeds.indices
    leaves = [inputs[w] for w in request.wrt]
    columns: list[list[Tensor]] = [[] for _ in leaves]
    for s in range(seeds.count):
        hot = _cotangents(y, index, s, s + 1)[0]
        gradients = torch.autograd.grad(y, leaves, hot, create_graph=True, allow_unused=True)
        check_reached(request.wrt, _none_of(request, gradients))
        for column, gradient in zip(columns, gradients, strict=True):
            column.append(gradient)
    flat = tuple(torch.stack(column, dim=1) for column in columns)  # each [N, S, *in]
    shaped = tuple(j.view(request.samples, *seeds.axes, *j.shape[2:]) for j in flat)
    return JacobianResult(seeds, shape, flat, shaped)
