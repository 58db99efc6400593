"""Code shared by every ``attribute_all``: its type, reading ``targets``, the shape of results, the fallback to Captum.

Every ``attribute_all`` returns ``[N, C, *attribution]``, for all outputs from one forward.  If a model has no Program
(because of hooks, or samples that mix), Captum's own method runs once per output, and a warning says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..codegen.support import NATIVE_DTYPES
from ..dispatch.checks import check_output
from ..dispatch.route import one_call
from ..dispatch.targets import Seeds, Targets, TopK, TopSeeds, jacobian_choice
from ..ir.program import Shape
from ..util.buffers import buffers_kept
from ..util.callables import modules_behind
from ..util.options import BadType, debugging
from ..util.progress import with_progress
from ..util.random_state import RandomState
from .call import PublicMethod, keep_buffers
from .captum_compat import format_input_baseline, format_tensor_into_tuples, is_tuple, stock
from .plug import can_handle_call, route_is_supported
from .points import Points, Tensors, with_arguments

Options = dict[str, Any]  # a method's own options, by Captum's names
Inputs = Tensor | Tensors
Yes = Literal[True]


class AttributeAll(Protocol):
    """``attribute_all(inputs, baselines, *, targets, …)`` of every method (without ``baselines`` if it has none).

    Returns attributions (a tuple if the inputs are one), then the convergence delta if requested, then the indices
    of `TopK`.
    """

    # fmt: off
    @overload
    def __call__(self, inputs: Tensor, *a: Any, targets: TopK, return_convergence_delta: Yes, **k: Any) -> tuple[Tensor, Tensor, Tensor]: ...  # noqa: E501
    @overload
    def __call__(self, inputs: Tensor, *a: Any, targets: Targets = None, return_convergence_delta: Yes, **k: Any) -> tuple[Tensor, Tensor]: ...  # noqa: E501
    @overload
    def __call__(self, inputs: Tensor, *a: Any, targets: TopK, **k: Any) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(self, inputs: Tensor, *a: Any, targets: Targets = None, **k: Any) -> Tensor: ...
    @overload
    def __call__(self, inputs: Tensors, *a: Any, targets: TopK, return_convergence_delta: Yes, **k: Any) -> tuple[Tensors, Tensor, Tensor]: ...  # noqa: E501
    @overload
    def __call__(self, inputs: Tensors, *a: Any, targets: Targets = None, return_convergence_delta: Yes, **k: Any) -> tuple[Tensors, Tensor]: ...  # noqa: E501
    @overload
    def __call__(self, inputs: Tensors, *a: Any, targets: TopK, **k: Any) -> tuple[Tensors, Tensor]: ...
    @overload
    def __call__(self, inputs: Tensors, *a: Any, targets: Targets = None, **k: Any) -> Tensors: ...
    # fmt: on


def as_attribute_all(attribute_all: Callable[..., Any]) -> AttributeAll:
    """The method unchanged, with the types of its results."""
    return cast(AttributeAll, attribute_all)


def check_distribution(method: Any, baselines: Any) -> None:
    """Raise if no baselines were given to a method that averages over them."""
    if baselines is None:
        raise BadType(
            f"baselines: got none, but {type(method).__name__} averages over them. Pass a tensor of several rows: "
            "attribute_all(inputs, baselines)."
        )


def points_for(attribution: Any, inputs: tuple[Tensor, ...], extra: Any, *, integers: bool = False) -> Points | None:
    """The engine for this method's model at these inputs; None if Captum takes the call (a warning says why).

    ``integers`` as in `can_handle_call`.
    """
    engine = getattr(attribution.gradient_func, "engine", None)
    if not can_handle_call(attribution.forward_func, inputs, engine, integers=integers):
        return None
    if any(x.is_floating_point() and x.dtype not in NATIVE_DTYPES for x in inputs):
        return None
    fn, more = with_arguments(attribution.forward_func, inputs, extra)
    points = Points(fn, inputs, more, engine)
    try:
        return points if route_is_supported(points.route) and not points.couples_batch else None
    except Exception:  # the model cannot run some of its samples, which Captum may still manage, or raise its own error
        if debugging():
            raise
        return None


def resolve_targets(fn: Callable[..., Any], inputs: Sequence[Tensor], extra: Any, targets: Any) -> tuple[Seeds, Shape]:
    """``targets`` as `gradkern.jacobian` reads them, for the model's output at these inputs."""
    more = extra if isinstance(extra, tuple) else () if extra is None else (extra,)
    keep_buffers(fn)
    with torch.no_grad():
        probe = inputs if isinstance(targets, TopK) or more else [x[:2] for x in inputs]
        y = check_output(fn(*[x.detach().clone() for x in probe], *more), probe[0].shape[0])
    out = tuple(y.shape[1:])
    return jacobian_choice(targets)(inputs[0].shape[0], out).chosen_by(y), out


def one_by_one(
    fn: Callable[..., Any], inputs: Any, extra: Any, targets: Any, attribute: Callable[[Any], Any], delta: bool = False
) -> Any:
    """``attribute_all`` by Captum: ``attribute(target)`` per output, each with the same random numbers and buffers.

    ``delta``: the last value that ``attribute`` returns is the convergence delta.
    """
    rows = format_tensor_into_tuples(inputs)
    seeds, out = resolve_targets(fn, rows, extra, targets)
    torch_state, numpy_state = RandomState(), np.random.get_state()
    results = []
    for s in with_progress(range(seeds.count), seeds.count, "outputs", lambda s: 1):
        torch_state.restore()
        np.random.set_state(numpy_state)
        column = torch.tensor(s) if seeds.indices is None else seeds.indices[..., s]  # [] or [N]
        with buffers_kept(nn.ModuleList(modules_behind(fn))):
            results.append(attribute(captum_target(column, out)))
    tree = split_seed_axis(pytree.tree_map(lambda *xs: torch.stack(xs, dim=1), *results), seeds)
    if not isinstance(seeds, TopSeeds):
        return tree
    return (*(tree if delta else (tree,)), seeds.indices_per_sample())


def captum_target(flat: Tensor, out: Shape) -> Any:
    """A flat output index, or one per sample, in the form that Captum takes."""
    if not out:
        return None
    if len(out) == 1:
        return flat.tolist()
    axes = torch.stack(torch.unravel_index(flat, out), dim=-1).tolist()
    return tuple(axes) if flat.dim() == 0 else [tuple(a) for a in axes]


def split_seed_axis(tree: Any, seeds: Seeds) -> Any:
    """Reshape every ``[N, S, ...]`` to ``[N, *axes, ...]``."""
    return pytree.tree_map(lambda x: x.reshape(x.shape[0], *seeds.axes, *x.shape[2:]), tree)


def answer(parts: Sequence[Tensor], as_tuple: bool, seeds: Seeds, delta: Tensor | None = None) -> Any:
    """The result of ``attribute_all``: attributions, the convergence delta if requested, and the indices of `TopK`."""
    items: list[Any] = [split_seed_axis(tuple(parts) if as_tuple else parts[0], seeds)]
    if delta is not None:
        items.append(split_seed_axis(delta, seeds))
    if isinstance(seeds, TopSeeds):
        items.append(seeds.indices_per_sample())
    return items[0] if len(items) == 1 else tuple(items)


def completeness(points: Points, parts: Sequence[Tensor], start: Sequence[Any], seeds: Seeds) -> Tensor:
    """``Σ attribution - (F(end) - F(start))`` per sample and output, ``[N, S]``, as Captum's convergence delta.

    ``points``: the end.  ``parts``: one attribution ``[N, S, *in]`` per input.  ``start``: per input a number, one row,
    or a row for each sample.
    """
    end, n = points.inputs, points.samples
    sums = [p.reshape(n, seeds.count, -1).sum(2) for p in parts]  # [N, S] each
    before = [b if isinstance(b, Tensor) else torch.full_like(x[:1], float(b)) for b, x in zip(start, end, strict=True)]
    before = [b.expand(n, *b.shape[1:]) if b.shape[0] == 1 else b for b in before]
    with torch.no_grad():
        difference = rows_out(points) - rows_out(points.at(before, points.more))  # [N, C]
    return sum(sums[1:], sums[0]).detach() - pick_outputs(difference, seeds.indices)


def pick_outputs(outputs: Tensor, targets: Tensor | None) -> Tensor:
    """The outputs ``[N, *out]`` at the flat indices ``targets`` (None, ``[S]`` or ``[N, S]``): ``[N, S]``."""
    outputs = outputs.unsqueeze(-1).flatten(1)  # [N] is one number per sample
    if targets is None:
        return outputs
    targets = targets.to(outputs.device)
    return outputs[:, targets] if targets.dim() == 1 else outputs.gather(1, targets)


def rows_out(points: Points, rows: int = 1024) -> Tensor:
    """The model's outputs as ``[N, C]``, computed some rows at a time."""
    starts, inputs = range(0, max(points.samples, 1), rows), points.base_request.inputs
    pieces = [points.fn(*[x[a : a + rows].detach().clone() for x in inputs]) for a in starts]
    return torch.cat([y.reshape(y.shape[0], math.prod(y.shape[1:])) for y in pieces])


class RowMethod(PublicMethod, stock.GradientAttribution):
    """An input method whose attribution of a row depends on that row alone.

    A subclass provides ``row_maps``, the attributions of every seed at given points.  `NoiseTunnel` then averages them
    over noise, without keeping the noisy samples.
    """

    def row_maps(self, points: Points, seeds: Seeds, options: Options) -> Tensors | None:
        """Attributions of the outputs ``seeds``, one ``[R, S, *in]`` per input.

        None if the model has no Program and the method needs one.
        """
        raise NotImplementedError

    def _indivisible(self) -> bool:
        """Whether ``attribute`` has side effects, so that one call cannot be split into several."""
        return False

    def _row_delta(self, parts: Tensors, points: Points, seeds: Seeds, options: Options) -> Tensor:
        """The convergence delta of `row_maps`, ``[R, S]``."""
        _, start = format_input_baseline(points.inputs, options.get("baselines"))
        return completeness(points, parts, start, seeds)

    @one_call()
    def _all_on_engine(self, inputs: Any, targets: Any, extra: Any, options: Options, delta: bool) -> Any:
        """``attribute_all`` on the engine; None if Captum takes the call."""
        points = points_for(self, format_tensor_into_tuples(inputs), extra)
        if points is None:
            return None
        seeds, _ = points.choose(jacobian_choice(targets))
        parts = self.row_maps(points, seeds, options)
        if parts is None:
            return None
        off = self._row_delta(parts, points, seeds, options) if delta else None
        return answer(parts, is_tuple(inputs), seeds, off)

    def _all(self, inputs: Any, targets: Any, extra: Any, options: Options, delta: bool = False) -> Any:
        """``attribute_all``; with ``delta`` also the convergence delta."""
        result = self._all_on_engine(inputs, targets, extra, options, delta)
        if result is not None:
            return result
        more = options | ({"return_convergence_delta": True} if delta else {})

        def attribute(target: Any) -> Any:
            return self.attribute(inputs, target=target, additional_forward_args=extra, **more)

        return one_by_one(self.forward_func, inputs, extra, targets, attribute, delta)
