"""References per sample: several other inputs that each sample is compared with, given or drawn.

Captum's baselines are the same for all samples, or one for each.  A baseline with one more axis than its input is
``[N, R, *in]``: R references for each sample.  A function ``(inputs, n, random_state)`` draws them, with the signature
of `tangermeme.ersatz`.  Its argument ``n`` distinguishes it from a function for Captum, which takes at most the inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..util.integers import as_int
from ..util.options import BadType, BadValue

Tensors = tuple[Tensor, ...]
Draw = Callable[..., Any]


@dataclass(frozen=True)
class References:
    """``count`` references for each sample of ``inputs [N, *in]``.

    ``given``: one ``[N, R, *in]`` per input, or ``[R, *in]`` if they are ``shared`` by all samples.  ``draw``: a
    function that makes them, with ``random_state`` as its seed (see `drawn`).
    """

    inputs: Tensors
    count: int
    given: Tensors = ()
    draw: Draw | None = None
    random_state: int | None = None
    shared: bool = False

    @classmethod
    def of_all(cls, inputs: Tensors, given: Tensors) -> References:
        """References that all samples share, one ``[R, *in]`` per input."""
        given = tuple(g.detach().to(x) for g, x in zip(given, inputs, strict=True))
        return cls(inputs, given[0].shape[0], given, shared=True)

    def of(self, a: int, b: int) -> Tensors:
        """The references of the samples ``a:b``, one ``[b - a, R, *in]`` per input, in the dtype of the input."""
        if self.draw is not None:
            return drawn(self.draw, self.inputs, self.count, self.random_state, a, b)
        if self.shared:
            return tuple(g.expand(b - a, *g.shape) for g in self.given)
        return tuple(g[a:b] for g in self.given)


def draws_per_sample(baselines: Any) -> bool:
    """Whether this is a function that draws ``n`` references for each sample."""
    if not callable(baselines) or isinstance(baselines, Tensor):
        return False
    try:
        return "n" in inspect.signature(baselines).parameters
    except (TypeError, ValueError):  # a builtin
        return False


def per_sample(baselines: Any, inputs: Tensors, n: int, random_state: int | None) -> References | None:
    """``baselines`` as references per sample; None if they are Captum's.  Raises `BadValue` for a shape that fits
    neither."""
    if draws_per_sample(baselines):
        count = as_int(n)
        if count is None or count < 1:
            raise BadValue(f"n_references: got {n!r}, expected a positive number.")
        return References(inputs, count, draw=baselines, random_state=random_state)
    parts = baselines if isinstance(baselines, tuple) else (baselines,)
    if len(parts) != len(inputs) or not any(_has_more_axes(p, x) for p, x in zip(parts, inputs, strict=True)):
        return None
    for part, x in zip(parts, inputs, strict=True):
        if not _has_more_axes(part, x) or part.shape[2:] != x.shape[1:] or len(part) != len(x) or not part.shape[1]:
            got = list(part.shape) if isinstance(part, Tensor) else repr(part)
            raise BadValue(
                f"baselines: got {got}, expected references per sample [N, R, *in] = [{len(x)}, R, "
                f"{', '.join(map(str, x.shape[1:]))}], as another input or the number of axes says. References that "
                "all samples share are [R, *in]."
            )
    counts = {p.shape[1] for p in parts}
    if len(counts) > 1:
        raise BadValue(f"baselines: got {sorted(counts)} references per sample, expected one number for all inputs.")
    given = tuple(p.detach().to(x) for p, x in zip(parts, inputs, strict=True))
    return References(inputs, counts.pop(), given)


def _has_more_axes(part: Any, x: Tensor) -> bool:
    return isinstance(part, Tensor) and part.dim() == x.dim() + 1


def seed_of(random_state: int, number: int) -> int:
    """The seed of sample ``number``, mixed from both, so that samples draw independently: ``0 … 2³¹ - 1``."""
    return int(np.random.SeedSequence((random_state, number)).generate_state(1)[0] >> 1)


def drawn(draw: Draw, inputs: Tensors, n: int, random_state: int | None, a: int, b: int, first: int = 0) -> Tensors:
    """References of the samples ``a:b``, one ``[b - a, n, *in]`` per input.

    With a ``random_state`` each sample is drawn alone, by its number (``first`` is that of the first of ``inputs``), so
    that its references depend on no other sample.  Raises `BadValue` if ``draw`` returns another shape.
    """
    if random_state is None:
        return _check_references(draw(_argument(inputs, a, b), n=n, random_state=None), inputs, n, a, b)
    state = as_int(random_state)
    if state is None or state < 0:
        raise BadType(f"random_state: got {random_state!r}, expected an int that is not negative, or None.")
    alone = []
    for i in range(a, b):
        seed = seed_of(state, first + i)
        alone.append(_check_references(draw(_argument(inputs, i, i + 1), n=n, random_state=seed), inputs, n, i, i + 1))
    return tuple(torch.cat(parts) for parts in zip(*alone, strict=True))


def _argument(inputs: Tensors, a: int, b: int) -> Any:
    rows = tuple(x[a:b].detach() for x in inputs)
    return rows[0] if len(rows) == 1 else rows


def _check_references(result: Any, inputs: Tensors, n: int, a: int, b: int) -> Tensors:
    parts = result if isinstance(result, tuple) else (result,)
    for x, part in zip(inputs, parts, strict=False):
        wanted = (b - a, n, *x.shape[1:])
        if len(parts) != len(inputs) or not isinstance(part, Tensor) or tuple(part.shape) != wanted:
            got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise BadValue(
                f"baselines: the function returned {len(parts)} part(s), one of them {got}; expected a tensor "
                f"[N, n, *in] = {list(wanted)} for each of the {len(inputs)} inputs."
            )
    return tuple(part.detach().to(x) for x, part in zip(inputs, parts, strict=True))


def hypothetical(multipliers: Tensors, inputs: Tensors, baselines: Tensors) -> Tensors:
    """Hypothetical contributions to one-hot sequences ``[N, bases, length]``: of every base at every position.

    Base ``i`` would add ``m[i]`` in place of the reference's ``Σ_c m[c] ref[c]``, so its contribution is
    ``m[i] - Σ_c m[c] ref[c]`` (Shrikumar et al., arXiv:1811.00416; tangermeme and ChromBPNet).  Times the one-hot
    input, this is the contribution of the base in the sequence.  Usable as Captum's ``custom_attribution_func``.
    """
    return tuple(of_bases(m, base, 1) for m, base in zip(multipliers, baselines, strict=True))


def of_bases(multipliers: Tensor, reference: Tensor, axis: int) -> Tensor:
    """`hypothetical` for one tensor, with the bases on ``axis``."""
    return multipliers - (multipliers * reference).sum(axis, keepdim=True)


def check_hypothetical(inputs: Tensors, custom: Any) -> None:
    """Raise `BadValue` if hypothetical contributions are not defined for these arguments."""
    if custom is not None:
        raise BadValue("hypothetical: got True together with custom_attribution_func; pass only one of them.")
    for x in inputs:
        if x.dim() < 3:
            raise BadValue(
                f"hypothetical: got an input {list(x.shape)}, expected one-hot sequences [N, bases, length]."
            )
