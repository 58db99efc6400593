"""Live autograd on the model itself.  It works for every network, and Programs are compared with it.

All seeds share one forward.  The batch is cut into chunks unless its samples depend on each other.  Buffers are
restored, and no ``.grad`` is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ir.program import Shape
from ..runtime import ops
from ..util import rounding
from ..util.buffers import buffers_kept
from ..util.callables import model_of
from ..util.chunks import MOST_COTANGENTS, samples_per_chunk, spans
from ..util.memo import on_reset
from ..util.options import BadValue, InputError, memory_budget
from ..util.random_state import RandomState
from ..util.torch_compat import without_fallback_warning
from .request import JacobianResult, Request, allocate, check_devices, check_output, check_reached, explain_failure

LARGEST_CHUNK = 2048  # the most samples in one forward
LEAST_BATCHED = 8  # samples, at least, for all seeds to go back together
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


@dataclass(frozen=True)
class ModelProfile:
    """Measurements of one model on a few samples: whether the batch may be cut, and how much memory a sample takes.

    ``whole_batch_reason``: why one forward must see the whole batch; empty if not.  ``one_piece``: one forward gets the
    whole batch, since nothing was measured.  ``mutates``: a forward changes buffers.  ``fixed`` and ``per_sample``
    are the bytes that autograd saves for the backward pass, ``largest`` those of the largest tensor among them, per
    sample.
    """

    whole_batch_reason: str = ""
    mutates: bool = False
    fixed: int = 0
    per_sample: int = 0
    one_piece: bool = False
    largest: int = 0

    def chunk(self, samples: int, per_input: int, device: torch.device, seeds: int = 1) -> int:
        """Samples per forward.  ``per_input``: bytes of one sample's inputs.  ``seeds``: that go back together."""
        if self.whole_batch_reason or self.one_piece:
            return samples
        # The saved activations, and about as much again for the live activations and cotangents of a sweep.
        peak, cached = 2 * self.per_sample + 4 * per_input + 1, self.per_sample + per_input + 1
        peak += (seeds - 1) * self.cotangents(per_input)
        return min(samples_per_chunk(device, peak, cached, fixed=self.fixed), LARGEST_CHUNK)

    def cotangents(self, per_input: int) -> int:
        """Bytes of the cotangents of one sample that are alive together, for one seed."""
        return MOST_COTANGENTS * max(self.largest, per_input)

    def seeds_together(self, seeds: int, samples: int, per_input: int, device: torch.device) -> int:
        """How many seeds to send back together, which are fewer than all if a few samples with all do not fit."""
        each = self.cotangents(per_input) * min(samples, LEAST_BATCHED) + 1
        return max(1, min(seeds, memory_budget(device) // 2 // each))


@contextmanager
def outside_modes() -> Iterator[None]:
    """Grad mode on and inference mode off, whatever modes the caller has set."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _leaves(inputs: Sequence[Tensor], wrt: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh leaves for the differentiated inputs, and copies as the model's arguments, as it may work in place."""
    leaves, arguments = [], []
    for i, x in enumerate(inputs):
        x = x.clone() if x.is_inference() else x.detach()
        if i in wrt:
            x = x.requires_grad_()
        arguments.append(x.clone())
        leaves.append(x)
    return [leaves[w] for w in wrt], arguments


def forward(fn: Callable[..., Any], module: nn.Module | None, arguments: Sequence[Tensor]) -> Tensor:
    """Run the model; if it fails because of a dtype or a device, the error explains that."""
    try:
        y = fn(*arguments)
    except InputError:
        raise
    except Exception as error:
        clearer = explain_failure(error, module, arguments)
        if clearer is error:
            raise
        raise clearer from error
    return check_output(y, arguments[0].shape[0])


# ---------------------------------------------------------------------------------------------------------------
# Measuring a model


def probe(
    fn: Callable[..., Any], module: nn.Module | None, samples: Sequence[Tensor], wrt: Sequence[int]
) -> ModelProfile:
    """Measure the model by running a few samples (at least two) together, and one alone.

    Samples mix if the gradient of one sample's outputs reaches another sample, or if a sample alone gives other
    outputs than in a batch.  Afterwards the random state and the buffers are restored.
    """
    count, state = samples[0].shape[0], RandomState()
    together, alone = _SavedBytes(module), _SavedBytes(module)
    with outside_modes(), buffers_kept(module) as changed:
        leaves, arguments = _leaves(samples, wrt)
        with together, _ReadsValues(module) as reads:
            y = forward(fn, module, arguments)
        random = state.changed
        reason = ""
        if y.requires_grad and leaves:
            gradients = torch.autograd.grad(y[0].sum(), leaves, allow_unused=True)
            if any(g is not None and g.shape[0] == count and bool((g[1:] != 0).any()) for g in gradients):
                reason = "samples of one batch depend on each other"
        y = y.detach()
        alone_arguments = _leaves([x[:1] for x in samples], wrt)[1]
        with alone:
            try:
                single = fn(*alone_arguments)
            except Exception:  # the model cannot run one sample (batch norm in training mode)
                single = None
        if not reason and not rounding.close_elements(single, y[:1], rounding.for_batch(y.dtype)):
            reason = "a sample alone gives other outputs than among others"
        del single, y
    if reads.seen:
        reason = reason or "the model's code reads values of the batch as Python numbers"
    if random:
        state.restore()
        reason = "the model draws random numbers"
    if changed:
        reason = reason or "the model changes its buffers"
    per_sample = max(together.bytes - alone.bytes, 0) // (count - 1)
    fixed = max(alone.bytes - per_sample, 0)
    return ModelProfile(reason, bool(changed), fixed, per_sample, largest=together.largest // count)


class _ReadsValues(TorchDispatchMode):
    """Notes whether the model's code reads a number from a tensor (``if x.mean() > 0``) other than its parameters.

    Such a decision may depend on all samples of the batch, and a few samples do not show it.
    """

    READS = frozenset({"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"})

    def __init__(self, module: nn.Module | None) -> None:
        super().__init__()
        self.seen = False
        self.model_storages = _storages(module)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func._schema.name in self.READS:
            self.seen |= args[0].untyped_storage().data_ptr() not in self.model_storages
        return func(*args, **(kwargs or {}))


def _storages(module: nn.Module | None) -> set[int]:
    if module is None:
        return set()
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves: each storage once, and the model's own tensors not at all."""

    def __init__(self, module: nn.Module | None) -> None:
        self.bytes, self.largest, self.seen = 0, 0, _storages(module)
        super().__init__(self._count, lambda x: x)

    def _count(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return x.detach()  # the tensor itself would be a reference cycle


# ---------------------------------------------------------------------------------------------------------------
# Jacobians


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
        leaves, arguments = _leaves(request.inputs if whole else [x[start:stop] for x in request.inputs], request.wrt)
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
            check_reached(request, _none_of(request, gradients))
            for row, gradient in zip(rows, gradients, strict=True):
                if batched:
                    row[:, first:last] = gradient.movedim(0, 1)
                else:
                    row.select(1, first).copy_(gradient)
    return results


def measured_output_shape(request: Request) -> Shape:
    """Per-sample shape of the model's output, from a run of one or two samples."""
    probe = tuple(
        x[:2] if request.samples else torch.zeros(2, *x.shape[1:], dtype=x.dtype, device=x.device)
        for x in request.inputs
    )
    with torch.inference_mode(False), torch.no_grad(), buffers_kept(request.module), torch.random.fork_rng([]):
        return tuple(forward(request.fn, request.module, [x.detach().clone() for x in probe]).shape[1:])


def check_runs(fn: Callable[..., Any], samples: Sequence[Tensor]) -> None:
    """Raise at once if the model fails, or does not return a tensor."""
    with outside_modes(), torch.random.fork_rng([]):
        wrt = [i for i, x in enumerate(samples) if x.is_floating_point()]
        forward(fn, model_of(fn), _leaves(samples, wrt)[1])


def _check_followed(request: Request, y: Tensor) -> None:
    if not y.requires_grad:  # the output does not even depend on a parameter
        check_reached(request, request.wrt)


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
        check_reached(request, _none_of(request, gradients))
        for column, gradient in zip(columns, gradients, strict=True):
            column.append(gradient)
    flat = tuple(torch.stack(column, dim=1) for column in columns)  # each [N, S, *in]
    shaped = tuple(j.view(request.samples, *seeds.axes, *j.shape[2:]) for j in flat)
    return JacobianResult(seeds, shape, flat, shaped)
