"""What ``attribute_all`` shares: reading ``targets``, the shape of the answer, and the way without a Program.

Every ``attribute_all`` gives ``[N, C, *attribution]``: one forward, all outputs.  Where a model has no Program (a
plain function, hooks, samples that mix), Captum's own method runs once per output, and a warning says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from captum._utils.common import _format_tensor_into_tuples, _is_tuple
from captum.attr._utils.common import _format_input_baseline
from torch import Tensor
from torch.utils import _pytree as pytree

from ..dispatch.request import jacobian_choice
from ..dispatch.targets import Seeds, Shape, TopK, TopSeeds
from .plug import not_ours, say
from .points import Points, part, row_tensors

NATIVE = (torch.float32, torch.float64)


def points_for(attribution: Any, inputs: tuple[Tensor, ...], extra: Any) -> Points | None:
    """The engine for this method's model at these inputs; None where the call is Captum's (a warning says why)."""
    engine = getattr(attribution.gradient_func, "engine", None)
    fn = attribution.forward_func
    why = not_ours(fn, inputs, extra, engine)
    if why:
        say(fn, why)
    if why is None or why or any(x.dtype not in NATIVE for x in inputs):
        return None
    points = Points(fn, inputs, row_tensors(extra, inputs[0].shape[0]) or (), engine)
    try:
        return None if points.mixes else points
    except Exception:  # the model cannot run some of its samples: Captum's own error, or Captum's to manage
        return None


def resolved(fn: Callable[..., Any], inputs: Sequence[Tensor], extra: Any, targets: Any) -> tuple[Seeds, Shape]:
    """``targets`` as `gradkern.jacobian` reads them, for the model's output at these inputs."""
    more = extra if isinstance(extra, tuple) else () if extra is None else (extra,)
    with torch.no_grad():
        few = inputs if isinstance(targets, TopK) or more else [x[:2] for x in inputs]
        y = fn(*[x.detach().clone() for x in few], *more)
    out = tuple(y.shape[1:])
    seeds = jacobian_choice(targets)(inputs[0].shape[0], out)
    if isinstance(seeds, TopSeeds):
        seeds.rows(0, inputs[0].shape[0], y)
    return seeds, out


def each_output(attribute: Callable[[Any], Any], seeds: Seeds, out: Shape, samples: int) -> Any:
    """Call ``attribute(target)`` once per output, with the same random numbers, and stack along axis 1."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    index = part(seeds, 0, samples)
    found = []
    for s in range(seeds.count):
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        column = torch.tensor(s) if index is None else index[..., s]  # [] or [N]
        found.append(attribute(captum_target(column, out)))
    return pytree.tree_map(lambda *xs: torch.stack(xs, dim=1), *found)


def captum_target(flat: Tensor, out: Shape) -> Any:
    """A flat output number, or one per sample, as Captum wants it."""
    if not out:
        return None
    if len(out) == 1:
        return flat.tolist()
    axes = torch.stack(torch.unravel_index(flat, out), dim=-1).tolist()
    return tuple(axes) if flat.dim() == 0 else [tuple(a) for a in axes]


def shaped(tree: Any, seeds: Seeds) -> Any:
    """``[N, S, ...]`` everywhere as ``[N, *axes, ...]``."""
    return pytree.tree_map(lambda x: x.reshape(x.shape[0], *seeds.axes, *x.shape[2:]), tree)


def answer(parts: Sequence[Tensor], many: bool, seeds: Seeds, delta: Tensor | None = None) -> Any:
    """What ``attribute_all`` returns: the attributions, the convergence delta if asked for, the indices of `TopK`."""
    found: list[Any] = [shaped(tuple(parts) if many else parts[0], seeds)]
    if delta is not None:
        found.append(shaped(delta, seeds))
    if isinstance(seeds, TopSeeds):
        found.append(seeds.found())
    return found[0] if len(found) == 1 else tuple(found)


def with_indices(tree: Any, seeds: Seeds) -> Any:
    """The same for results that Captum has put together."""
    tree = shaped(tree, seeds)
    return (tree, seeds.found()) if isinstance(seeds, TopSeeds) else tree


def completeness(
    fn: Callable[..., Any],
    parts: Sequence[Tensor],
    start: Sequence[Any],
    end: Sequence[Tensor],
    more: Sequence[Tensor],
    seeds: Seeds,
) -> Tensor:
    """``Σ attribution - (F(end) - F(start))`` per sample and output, ``[N, S]``, as Captum's convergence delta.

    ``parts``: one ``[N, S, *in]`` per input; ``start``: a number, one row, or a row for each sample.
    """
    n = end[0].shape[0]
    total = sum(p.reshape(n, seeds.count, -1).sum(2) for p in parts)  # [N, S]
    before = [b if isinstance(b, Tensor) else torch.full_like(x[:1], float(b)) for b, x in zip(start, end, strict=True)]
    before = [b.expand(n, *b.shape[1:]) if b.shape[0] == 1 else b for b in before]
    with torch.no_grad():
        difference = rows_out(fn, end, more) - rows_out(fn, before, more)  # [N, C]
        index = part(seeds, 0, n)
        if index is None:
            picked = difference
        elif index.dim() == 1:
            picked = difference[:, index]
        else:
            picked = difference.gather(1, index.to(difference.device))
    return total.detach() - picked


def rows_out(fn: Callable[..., Any], inputs: Sequence[Tensor], more: Sequence[Tensor], rows: int = 1024) -> Tensor:
    """The model's outputs, flat, ``[N, C]``, some rows at a time."""
    n = inputs[0].shape[0]
    pieces = [fn(*[x[a : a + rows].detach().clone() for x in (*inputs, *more)]) for a in range(0, max(n, 1), rows)]
    return torch.cat([y.reshape(y.shape[0], math.prod(y.shape[1:])) for y in pieces])


class RowMethod:
    """An input method whose attribution of a row depends on that row alone.

    ``_rows`` is all that it has to bring: the attributions of every seed at given rows.  With it come
    ``attribute_all`` and, in `NoiseTunnel`, the average over noise without holding the samples.
    """

    def _rows(
        self,
        rows: tuple[Tensor, ...],
        more: tuple[Tensor, ...],
        index: Tensor | None,
        seeds: int,
        given: dict[str, Any],
    ) -> tuple[Tensor, ...] | None:
        """One ``[R, S, *in]`` per input.  ``index``: None, ``[S]`` or ``[R, S]``; ``given``: the method's options.

        None where the model has no Program and the method needs one.
        """
        raise NotImplementedError

    def _row_delta(
        self, parts: Sequence[Tensor], rows: tuple[Tensor, ...], more: Sequence[Tensor], seeds: Seeds, given: dict
    ) -> Tensor:
        """The convergence delta of `_rows`, ``[R, S]``."""
        _, start = _format_input_baseline(rows, given.get("baselines"))
        return completeness(self.forward_func, parts, start, rows, more, seeds)  # type: ignore[attr-defined]

    def _fast(self, inputs: Any, targets: Any, extra: Any, given: dict[str, Any], delta: bool) -> Any:
        """``attribute_all`` on the engine; None where the call is Captum's."""
        many, rows = _is_tuple(inputs), _format_tensor_into_tuples(inputs)
        points = points_for(self, rows, extra)
        if points is None:
            return None
        seeds, _ = points.choose(jacobian_choice(targets))
        parts = self._rows(rows, points.more, part(seeds, 0, points.samples), seeds.count, given)
        if parts is None:
            return None
        off = self._row_delta(parts, rows, points.more, seeds, given) if delta else None
        return answer(parts, many, seeds, off)

    def _every(self, inputs: Any, targets: Any, extra: Any, given: dict[str, Any], delta: bool = False) -> Any:
        """``attribute_all``; with ``delta`` also the convergence delta."""
        found = self._fast(inputs, targets, extra, given, delta)
        if found is not None:
            return found
        rows = _format_tensor_into_tuples(inputs)
        seeds, out = resolved(self.forward_func, rows, extra, targets)  # type: ignore[attr-defined]
        options = given | ({"return_convergence_delta": True} if delta else {})

        def attribute(target: Any) -> Any:
            return self.attribute(inputs, target=target, additional_forward_args=extra, **options)  # type: ignore[attr-defined]

        return with_indices(each_output(attribute, seeds, out, rows[0].shape[0]), seeds)
