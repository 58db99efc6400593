"""Reads ``targets``, the outputs to differentiate, as flat output indices.

An output of shape ``[N, *out]`` is seen as ``C = prod(out)`` numbers per sample, numbered row-major.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ir.program import Shape
from ..util.integers import as_int
from ..util.options import BadType, BadValue

Targets = int | Sequence[Any] | Tensor | np.ndarray | None
ACCEPTED = "None, an int, a list of ints, a tensor [N, S], a tuple of ints, or TopK(k)"
FAR = 2**62  # larger than any output's index; stands for integers that do not fit in 64 bits
MOST_IN_KEY = 64  # the most targets of a list that becomes a key, which takes about 0.1 µs per target at every call
PER_SAMPLE = "For one output per sample pass a tensor [N, 1]: torch.as_tensor(targets)[:, None]."


@dataclass(frozen=True)
class TopK:
    """A value for ``targets``: the ``k`` highest outputs of each sample, highest first.  The call also returns them.

    ``J, indices = jacobian(model, x, TopK(3))``: J is ``[N, k, *in]`` and indices ``[N, k]`` (``[N, k, axes]``
    if the output has several axes), int64.  A NaN output counts as the highest, as in `torch.topk`.
    """

    k: int

    def __post_init__(self) -> None:
        k = as_int(self.k)
        if k is None or k < 1:
            raise BadValue(f"TopK(k): got {self.k!r}, expected an int of at least 1.")
        object.__setattr__(self, "k", k)


@dataclass(frozen=True, eq=False)
class Seeds:
    """The outputs that one call differentiates, resolved against the output's shape.

    ``count`` is S, the seeds per sample; ``axes`` are the axes that stand for them in the result, between N and
    the input's own; ``indices`` is None (all C), ``[S]`` (for all samples) or ``[N, S]``, flat, int64, on the CPU.
    """

    count: int
    axes: Shape
    indices: Tensor | None

    @classmethod
    def of(cls, indices: Tensor) -> Seeds:
        """Seeds at flat ``indices``, ``[S]`` or ``[N, S]``."""
        return cls(indices.shape[-1], (indices.shape[-1],), indices)

    @property
    def per_sample(self) -> bool:
        """Whether samples differ in their seeds."""
        return self.indices is not None and self.indices.dim() == 2

    @property
    def awaits_outputs(self) -> bool:
        """Whether the model's outputs still have to choose the seeds."""
        return False

    def part(self, start: int, stop: int) -> Seeds:
        """These seeds for the samples ``start:stop`` alone."""
        if not self.per_sample or (start == 0 and self.indices is not None and stop >= len(self.indices)):
            return self
        return self._each(lambda indices: indices[start:stop])

    def repeat(self, times: int) -> Seeds:
        """These seeds for ``times`` copies of the batch, one batch after the other."""
        return self._each(lambda indices: indices.repeat(times, 1))

    def repeat_interleave(self, times: int) -> Seeds:
        """These seeds for ``times`` copies of every sample, one sample after the other."""
        return self._each(lambda indices: indices.repeat_interleave(times, 0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Seeds:
        """These seeds with indices ``[N, S]`` changed; those that all samples share stay as they are."""
        return replace(self, indices=change(self.indices)) if self.per_sample and self.indices is not None else self

    def targets(self, outputs: int, device: torch.device) -> Tensor:
        """Flat indices of the outputs on ``device``, ``[S]`` or ``[N, S]``, out of ``outputs`` per sample."""
        return torch.arange(outputs, device=device) if self.indices is None else self.indices.to(device)

    def chosen_by(self, outputs: Tensor) -> Seeds:
        """These seeds once the model's ``outputs [N, *out]`` are known."""
        return self


@dataclass(frozen=True, eq=False)
class TopSeeds(Seeds):
    """The k highest outputs of each sample: ``indices`` is None until the outputs are known, then ``[N, k]``."""

    out: Shape

    @property
    def awaits_outputs(self) -> bool:
        return self.indices is None

    def highest(self, outputs: Tensor) -> Tensor:
        """Flat indices ``[n, k]`` of the highest of each sample's ``outputs [n, *out]``."""
        flat = outputs.detach().reshape(outputs.shape[0], math.prod(self.out))  # [n, C]
        return flat.topk(self.count, dim=1).indices.cpu()

    def chosen_by(self, outputs: Tensor) -> TopSeeds:
        return replace(self, indices=self.highest(outputs))

    def indices_per_sample(self) -> Tensor:
        """``[N, k]``, or ``[N, k, axes]`` if the output has several axes; the outputs must be known."""
        assert self.indices is not None
        if len(self.out) < 2:
            return self.indices
        return torch.stack(torch.unravel_index(self.indices, self.out), dim=-1)


SeedChoice = Callable[[int, Shape], Seeds]
"""From the number of samples and the output's shape per sample to the seeds."""


class TargetChoice:
    """Reads ``targets`` as `gradkern.jacobian` does, once the output's shape is known.

    ``key`` is equal for choices that give the same seeds whatever the samples are; it is None if the seeds depend on
    the samples, or if that is not known.
    """

    def __init__(self, targets: Any) -> None:
        self.targets, self.key = targets, targets_key(targets)

    def __call__(self, samples: int, output_shape: Shape) -> Seeds:
        if self.targets is None:
            return Seeds(math.prod(output_shape), output_shape, None)
        return resolve(self.targets, samples, output_shape)


def targets_key(targets: Any) -> Hashable:
    """The ``key`` of a `TargetChoice`."""
    if targets is None or type(targets) is int:
        return ("all" if targets is None else targets,)
    if isinstance(targets, list) and len(targets) <= MOST_IN_KEY and all(type(t) is int for t in targets):
        return ("list", *targets)
    return None


def jacobian_choice(targets: Any) -> SeedChoice:
    """Reads ``targets`` as `gradkern.jacobian` does, once the output's shape is known."""
    return _ALL if targets is None else TargetChoice(targets)


_ALL = TargetChoice(None)


def resolve(targets: Any, samples: int, out: Shape) -> Seeds:
    """Read ``targets`` for ``samples`` samples of an output ``[N, *out]``.  Raises `BadValue` and `BadType`."""
    if isinstance(targets, list) and all(type(t) is int for t in targets):
        return _resolved_list(tuple(targets), tuple(out))
    return _resolve(targets, samples, out)


@lru_cache(maxsize=256)
def _resolved_list(targets: tuple[int, ...], out: Shape) -> Seeds:
    """The seeds of a list of numbers, remembered because small calls would spend much of their time here."""
    with torch.inference_mode(False):
        return _resolve(list(targets), 0, out)


def _resolve(targets: Any, samples: int, out: Shape) -> Seeds:
    total = math.prod(out)
    if targets is None:
        return Seeds(total, out, None)
    if not out:
        raise BadValue(
            f"targets: got {_brief(targets)}, but the model gives one number per sample (output [N]), so there is "
            "nothing to choose. Pass targets=None."
        )
    if isinstance(targets, TopK):
        if targets.k > total:
            raise BadValue(f"targets: got TopK({targets.k}), but the model has {total} outputs per sample.")
        return TopSeeds(targets.k, (targets.k,), None, out)
    flat = _flat_indices(targets, samples, out)
    if flat.dim() == 1:
        _distinct(flat, targets, out)
    elif out == flat.shape[1:]:
        _no_one_hot(flat)
    return Seeds(flat.shape[-1], (flat.shape[-1],), flat)


def _distinct(flat: Tensor, targets: Any, out: Shape) -> None:
    """Refuse outputs for all samples that name one twice: most often they are labels, one per sample."""
    values, counts = flat.unique(return_counts=True)
    if len(values) < len(flat):
        repeated = int(values[counts > 1][0])
        name = str(repeated) if len(out) < 2 else str(tuple(int(i) for i in np.unravel_index(repeated, out)))
        raise BadValue(
            f"targets: got {_brief(targets)}, which names output {name} more than once; a list gives these outputs for "
            f"all samples, so each may stand in it once. {PER_SAMPLE}"
        )


def _no_one_hot(flat: Tensor) -> None:
    """Refuse one-hot labels ``[N, C]``: read as indices, they would mean the outputs 0 and 1."""
    if flat.shape[1] > 2 and len(flat) and bool(((flat == 1).sum(1) == 1).all() & (flat <= 1).all()):
        raise BadValue(
            f"targets: got one-hot labels {list(flat.shape)}, expected the indices of outputs. Use "
            "targets.argmax(1, keepdim=True), one output per sample."
        )


def _flat_indices(targets: Any, samples: int, out: Shape) -> Tensor:
    """Flat indices ``[S]`` or ``[N, S]`` of any targets except None and TopK."""
    if isinstance(targets, tuple):
        return _ravel(torch.tensor([_index_tuple(targets, out)]), out)
    if isinstance(targets, range):
        targets = list(targets)
    if isinstance(targets, list):
        return _from_list(targets, samples, out)
    if isinstance(targets, Tensor) and targets.dtype == torch.uint64:
        targets = targets.cpu().numpy()
    if hasattr(targets, "__array__") and not isinstance(targets, (Tensor, np.generic)):  # a column of a table, too
        targets = _from_array(np.asarray(targets))
    if isinstance(targets, Tensor):
        return _from_tensor(targets, samples, out)
    number = _as_index(targets)
    if number is None:
        raise BadType(f"targets: got {_brief(targets)}, expected {ACCEPTED}.")
    if len(out) > 1:
        raise BadValue(_needs_tuples(targets, out))
    return _ravel(torch.tensor([[number]]), out)


def _from_list(targets: list[Any], samples: int, out: Shape) -> Tensor:
    if not targets:
        raise BadValue("targets: got an empty list, expected at least one output. Pass None for all outputs.")
    if all(isinstance(t, tuple) for t in targets):
        return _ravel(torch.tensor([_index_tuple(t, out) for t in targets]), out)  # [S, axes]
    if all(isinstance(t, Sequence) and not isinstance(t, (tuple, str)) for t in targets):
        if len({len(t) for t in targets}) != 1:
            raise BadValue("targets: got lists of different lengths, expected the same number for every sample.")
        if len(targets) != samples:
            raise BadValue(f"targets: got {len(targets)} lists, expected one for each of the {samples} samples.")
        return torch.stack([_from_list(list(t), samples, out) for t in targets])  # [N, S]
    indices = [_as_index(t) for t in targets]
    if any(n is None for n in indices):
        wrong = next(t for t, n in zip(targets, indices, strict=True) if n is None)
        raise BadType(f"targets: got a list with {_brief(wrong)} in it, expected {ACCEPTED}.")
    if len(out) > 1:
        raise BadValue(_needs_tuples(targets, out))
    return _ravel(torch.tensor(indices)[:, None], out)


def _from_array(targets: np.ndarray) -> Tensor:
    if targets.dtype.kind not in "iu":
        raise BadType(f"targets: got an array of {targets.dtype}, expected integers. Use targets.astype(int).")
    if targets.dtype == np.uint64:
        targets = np.minimum(targets, np.uint64(FAR))
    return torch.from_numpy(targets.astype(np.int64, order="C"))


def _from_tensor(targets: Tensor, samples: int, out: Shape) -> Tensor:
    if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise BadType(
            f"targets: got a tensor of {targets.dtype}, expected integers. Use targets.long(), or, if it is a second "
            "input of the model, pass the inputs as a tuple: jacobian(model, (x, y))."
        )
    targets = targets.detach().cpu().long()
    if targets.numel() == 0 and not (targets.dim() >= 2 and samples == 0):
        raise BadValue("targets: got an empty tensor, expected at least one output. Pass None for all outputs.")
    if targets.dim() == 1:
        raise BadValue(
            f"targets: got {_brief(targets)} with one axis, which may mean outputs for all samples or one output per "
            "sample. For these outputs in every sample pass a list of distinct ones: targets.tolist(). "
            + (PER_SAMPLE if len(out) == 1 else "For each sample its own, pass a tensor [N, S, axes].")
        )
    if len(out) == 1:
        if targets.dim() == 0:
            return _ravel(targets[None, None], out)
        if targets.dim() == 2:
            _same_samples(targets, samples)
            return _ravel(targets[..., None], out)
        raise BadValue(f"targets: got a tensor {list(targets.shape)}, expected [N, S] = [{samples}, S].")
    if targets.dim() == 3 and targets.shape[-1] == len(out):
        _same_samples(targets, samples)
        return _ravel(targets, out)
    raise BadValue(_needs_tuples(targets, out))


def _same_samples(targets: Tensor, samples: int) -> None:
    if targets.shape[0] != samples:
        raise BadValue(
            f"targets: got a tensor {list(targets.shape)} for {samples} samples, expected [N, S] = [{samples}, S]. "
            "For the same outputs in every sample pass a list."
        )


def _ravel(index: Tensor, out: Shape) -> Tensor:
    """Indices ``[..., axes]``, negative ones as in Python, to flat indices ``[...]``; checks the range."""
    sizes = torch.tensor(out)  # [axes]
    bad = (index < -sizes) | (index >= sizes)
    if bool(bad.any()):
        where = bad.nonzero()[0]
        axis = int(where[-1])
        size = out[axis]
        place = "" if len(out) == 1 else f" on axis {axis} of the output [N, {', '.join(map(str, out))}]"
        raise BadValue(f"targets: got index {int(index[tuple(where)])}{place}, expected -{size} … {size - 1}.")
    index = torch.where(index < 0, index + sizes, index)
    strides = torch.tensor([math.prod(out[a + 1 :]) for a in range(len(out))])  # [axes]
    return (index * strides).sum(-1)


def _index_tuple(target: tuple[Any, ...], out: Shape) -> list[int]:
    indices = [_as_index(t) for t in target]
    if any(n is None for n in indices):
        raise BadType(f"targets: got {_brief(target)}, expected a tuple of ints. For several outputs pass a list.")
    if len(indices) != len(out):
        raise BadValue(
            f"targets: got the tuple {target} of {len(target)}, expected {len(out)} indices for an output "
            f"[N, {', '.join(map(str, out))}]. For several outputs pass a list."
        )
    return [n for n in indices if n is not None]


def _needs_tuples(targets: Any, out: Shape) -> str:
    return (
        f"targets: got {_brief(targets)} for an output [N, {', '.join(map(str, out))}], expected a tuple of "
        f"{len(out)} indices such as {(0,) * len(out)}, a list of such tuples, or a tensor [N, S, {len(out)}]."
    )


def _as_index(value: Any) -> int | None:
    """`as_int`, in 64 bits."""
    number = as_int(value)
    return None if number is None else max(-FAR, min(number, FAR))


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
