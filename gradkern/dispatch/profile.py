"""A model's profile: whether its batch may be cut, whether a forward changes buffers, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..util import rounding
from ..util.buffers import buffers_kept
from ..util.chunks import MOST_COTANGENTS, samples_per_chunk
from ..util.options import memory_budget
from ..util.random_state import RandomState
from .live_model import forward, leaves_of, outside_modes

LARGEST_CHUNK = 2048  # the most samples in one forward
LEAST_BATCHED = 8  # samples, at least, for all seeds to go back together


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


def profile_model(
    fn: Callable[..., Any], module: nn.Module | None, samples: Sequence[Tensor], wrt: Sequence[int]
) -> ModelProfile:
    """Measure the model by running a few samples (at least two) together, and one alone.

    Samples mix if the gradient of one sample's outputs reaches another sample, or if a sample alone gives other
    outputs than in a batch.  Afterwards the random state and the buffers are restored.
    """
    count, state = samples[0].shape[0], RandomState()
    together, alone = _SavedBytes(module), _SavedBytes(module)
    with outside_modes(), buffers_kept(module) as changed:
        leaves, arguments = leaves_of(samples, wrt)
        with together, _ReadsValues(module) as reads:
            y = forward(fn, module, arguments)
        random = state.changed
        reason = ""
        if y.requires_grad and leaves:
            gradients = torch.autograd.grad(y[0].sum(), leaves, allow_unused=True)
            if any(g is not None and g.shape[0] == count and bool((g[1:] != 0).any()) for g in gradients):
                reason = "samples of one batch depend on each other"
        y = y.detach()
        alone_arguments = leaves_of([x[:1] for x in samples], wrt)[1]
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
