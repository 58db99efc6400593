"""The executor of plans: forward and all-seed backward, group by group.

It has the same contract as `reference.jacobian`, which is its oracle.  The forward pass runs group by group and keeps
the values that cross their borders; the backward pass hands cotangents ``[N, S, *shape]`` from group to group.  A
native group recomputes its forward instead of saving it, which costs one forward per S backwards.  The last group, in
which the seeds start, runs once for both passes, so a network that is one chain is a single call of the compiled op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..codegen.machine import TooLarge
from ..ir.calls import Params
from ..ir.program import Program
from ..planner.plan import ForwardPlan
from ..util.chunks import samples_per_chunk, spans, stepwise_bytes, stepwise_samples
from ..util.samples import rows_of_targets
from . import forward_mode, reference
from .call_plan import (
    CallPlan,
    ForwardCallPlan,
    GroupedCallPlan,
    ProductCallPlan,
    call_plan_for,
    grouped_call_plan,
    plan_for,
)
from .confirmation import confirm, few_seeds
from .execution import Execution, warn_once
from .parameters import KernelsUnavailable, LazyParams, PlanWeights, all_output_indices, leading

__all__ = ["fallback_reason", "forward_values", "jacobian", "plan_for", "transpose"]


# ---------------------------------------------------------------------------------------------------------------
# Entry points


def jacobian(
    program: Program,
    params: Params,
    inputs: Sequence[Tensor],
    targets: Tensor | None = None,
    wrt: Sequence[int] | None = None,
    *,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs ``[N, *out]`` and one Jacobian ``[N, S, *in]`` per input in ``wrt`` (default: all).

    ``targets``: flat output indices, int64 ``[S]`` shared by all samples or ``[N, S]``; None is every output.
    ``out``: tensors ``[N, S, *in]`` to fill, one per entry of ``wrt``.
    """
    wrt = tuple(range(len(inputs))) if wrt is None else tuple(wrt)
    like = leading(inputs)
    if targets is None:
        targets = all_output_indices(program.outputs, like.device)
    targets = targets.to(inputs[0].device).contiguous()
    n, seeds = inputs[0].shape[0], targets.shape[-1]
    if out is None:
        out = tuple(inputs[w].new_empty(n, seeds, *inputs[w].shape[1:]) for w in wrt)
    call_plan = call_plan_for(program, seeds, like, wrt)
    if call_plan.plan.cast_dtype is not None:
        return _in_float32(call_plan, params, inputs, targets, out), tuple(out)
    return _fill(call_plan, PlanWeights(call_plan.plan, params, like), inputs, targets, out), tuple(out)


def transpose(
    program: Program,
    params: Params,
    values: Sequence[Tensor],
    targets: Tensor,
    wrt: tuple[int, ...],
    out: Sequence[Tensor],
    cotangent: Tensor | None = None,
) -> None:
    """The transpose of a linear Program, whose slopes are among its inputs ``values``; there is no forward pass.

    Seeds are one-hot at ``targets``, or dense if ``cotangent [N, S, *out]`` is given.  Fills ``out`` as `jacobian`
    does; raises `KernelsUnavailable` if the weights are not finite or of another dtype.
    """
    call_plan = grouped_call_plan(program, targets.shape[-1], values[0], wrt)
    weights, targets = PlanWeights(call_plan.plan, params, values[0]), targets.contiguous()
    try:
        _transpose(call_plan, weights, values, targets, out, cotangent)
        if not call_plan.confirmed:
            seeds = [targets] if cotangent is None else [targets, cotangent]
            _confirm(call_plan, weights, values, seeds, out, _transpose)
    except (KernelsUnavailable, TooLarge) as error:
        warn_once(program, error)
        raise KernelsUnavailable(str(error)) from error


def _transpose(
    call_plan: GroupedCallPlan,
    weights: PlanWeights,
    values: Sequence[Tensor],
    targets: Tensor,
    out: Sequence[Tensor],
    cotangent: Tensor | None = None,
) -> None:
    Execution(call_plan, weights, values, targets, out).run(cotangent)


def forward_values(
    program: Program, params: Params, inputs: Sequence[Tensor], wanted: Sequence[int]
) -> dict[int, Tensor]:
    """The values ``wanted`` of a forward pass, ``[N, *shape]`` each; none of them if no kernel may run."""
    like, wanted = leading(inputs), tuple(v for v in wanted if v >= len(inputs))
    if not wanted:
        return {}
    call_plan = grouped_call_plan(program, 0, like, (), wanted)
    if not call_plan.native or call_plan.plan.cast_dtype is not None or not like.shape[0]:
        return {}

    try:
        return _wanted_values(call_plan, PlanWeights(call_plan.plan, params, like), inputs)
    except (KernelsUnavailable, TooLarge) as error:
        warn_once(program, error)
        return {}


def _wanted_values(call_plan: GroupedCallPlan, weights: PlanWeights, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """The values that a plan of a forward pass computes."""
    wanted = call_plan.plan.wanted

    def run(call_plan: CallPlan, weights: PlanWeights, inputs: Sequence[Tensor]) -> list[Tensor]:
        assert isinstance(call_plan, GroupedCallPlan)
        execution = Execution(call_plan, weights, inputs, None, ())
        execution.forward(call_plan.groups)
        return [execution.values[v] for v in wanted]

    values = run(call_plan, weights, inputs)
    if not call_plan.confirmed:
        confirm(call_plan, weights, inputs, values, run)
    return dict(zip(wanted, values, strict=True))


def fallback_reason(
    program: Program, seeds: int, params: Params, inputs: Sequence[Tensor], wrt: Sequence[int]
) -> str | None:
    """Why a Jacobian with these tensors runs without the kernels that its plan has; None if it runs as planned."""
    call_plan, like = call_plan_for(program, seeds, leading(inputs), tuple(wrt)), leading(inputs)
    if call_plan.plan.cast_dtype is not None:
        params, like = {name: _as_float32(p) for name, p in params.items()}, _as_float32(like)
    try:
        _pack(call_plan, PlanWeights(call_plan.plan, params, like))
    except (KernelsUnavailable, TooLarge) as error:
        return str(error)
    return None


def _pack(call_plan: CallPlan, weights: PlanWeights) -> None:
    """Pack the weights of all chains that a Jacobian takes."""
    match call_plan:
        case ProductCallPlan():
            _pack(call_plan.before, weights)
            _pack(call_plan.after, weights)
        case ForwardCallPlan():
            _pack(call_plan.inner, transposed_weights(call_plan.forward, weights))
        case GroupedCallPlan():
            for chain in call_plan.backward_chains():
                weights.packed(chain)


def transposed_weights(forward: ForwardPlan, weights: PlanWeights) -> PlanWeights:
    """The packed weights of forward mode's transposed Program."""
    return weights.of_plan(forward.inner, LazyParams(forward.transposed.program, weights.params))


# ---------------------------------------------------------------------------------------------------------------
# Ways to fill a Jacobian


def _fill(
    call_plan: CallPlan, weights: PlanWeights, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    if _runs_kernels(call_plan, inputs):
        try:
            y = _by_kernels(call_plan, weights, inputs, targets, out)
            if not call_plan.confirmed:
                _confirm(call_plan, weights, inputs, [targets], (y, *out), _fill_uncompared)
            return y
        except (KernelsUnavailable, TooLarge) as error:
            warn_once(call_plan.program, error)
    # With weights that are not finite, positions that are not needed send NaN back, as in torch, so all are kept.
    return _by_reference(call_plan, weights.params, inputs, targets, out)


def _fill_uncompared(
    call_plan: CallPlan, weights: PlanWeights, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    if _runs_kernels(call_plan, inputs):
        return _by_kernels(call_plan, weights, inputs, targets, out)
    return _by_reference(call_plan, weights.params, inputs, targets, out)


def _runs_kernels(call_plan: CallPlan, inputs: Sequence[Tensor]) -> bool:
    return bool(call_plan.native and call_plan.plan.seeds and inputs[0].shape[0])


def _by_kernels(
    call_plan: CallPlan, weights: PlanWeights, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    match call_plan:
        case ProductCallPlan():
            return _through_bottleneck(call_plan, weights, inputs, targets, out)
        case ForwardCallPlan():
            return _forward_mode(call_plan, weights, inputs, targets, out)
        case GroupedCallPlan():
            return Execution(call_plan, weights, inputs, targets, out).run()
    raise TypeError(f"a call plan of the unknown kind {type(call_plan).__name__}")


def _confirm(
    call_plan: CallPlan,
    weights: PlanWeights,
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    got: Sequence[Tensor],
    fill: Callable[..., Tensor | None],
) -> None:
    """Compare ``got``: the gradients that ``fill`` writes (`_fill_uncompared` or `_transpose`), behind the output if
    it returns one.

    ``seeds``: targets, and a dense cotangent if they are not one-hot.
    """

    def run(call_plan: CallPlan, weights: PlanWeights, given: Sequence[Tensor]) -> Sequence[Tensor]:
        chosen = [few_seeds(t, call_plan.plan.seeds) for t in given[len(inputs) :]]
        shapes = [call_plan.program.inputs[w] for w in call_plan.wrt]
        out = [weights.like.new_empty(*chosen[0].shape, *shape) for shape in shapes]
        y = fill(call_plan, weights, given[: len(inputs)], chosen[0], out, *chosen[1:])
        return out if y is None else [y, *out]

    targets, *dense = seeds
    confirm(call_plan, weights, [*inputs, targets.expand(len(inputs[0]), -1), *dense], got, run)


def _in_float32(
    call_plan: CallPlan, params: Params, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    """Runs the kernels in float32; the copies on either side cost less than the kernels."""
    wide = [_as_float32(t) for t in inputs]
    results = [wide[w].new_empty(o.shape) for w, o in zip(call_plan.wrt, out, strict=True)]
    params = {name: _as_float32(p) for name, p in params.items()}
    y = _fill(call_plan, PlanWeights(call_plan.plan, params, leading(wide)), wide, targets, results)
    for o, result in zip(out, results, strict=True):
        o.copy_(result)
    return y.to(leading(inputs).dtype)


def _as_float32(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


def _through_bottleneck(
    call_plan: ProductCallPlan,
    weights: PlanWeights,
    inputs: Sequence[Tensor],
    targets: Tensor,
    out: Sequence[Tensor],
) -> Tensor:
    """The product ``dy/dv · dv/dx``, for a part of the batch at a time, so that ``dv/dx`` stays small."""
    before, after = call_plan.before, call_plan.after
    width, like = before.outputs, leading(inputs)
    features = [o[0, 0].numel() for o in out]
    each = out[0].element_size() * (width * sum(features) + targets.shape[-1] * max(features))  # dv/dx and a product
    middle = all_output_indices(width, targets.device)
    outputs = []
    for a, b in spans(0, inputs[0].shape[0], samples_per_chunk(like.device, each, each)):
        rows = [t[a:b] for t in inputs]
        inner = [rows[w].new_empty(b - a, width, *rows[w].shape[1:]) for w in before.wrt]  # [n, K, *in]
        v = _fill(before, weights, rows, middle, inner)  # [n, *v]
        chunk_targets = rows_of_targets(targets, slice(a, b))
        outer = like.new_empty(b - a, targets.shape[-1], width)  # [n, S, K]
        outputs.append(_fill(after, weights, [v], chunk_targets, [outer.view(*outer.shape[:2], *v.shape[1:])]))
        for o, j in zip(out, inner, strict=True):
            o[a:b].copy_((outer @ j.reshape(b - a, width, -1)).view(o[a:b].shape))
    return torch.cat(outputs)


def _forward_mode(
    call_plan: ForwardCallPlan,
    weights: PlanWeights,
    inputs: Sequence[Tensor],
    targets: Tensor,
    out: Sequence[Tensor],
) -> Tensor:
    """Forward mode: a forward pass, the slopes at its values, and the chains of the transpose for all tangents."""
    forward, program, n, like = call_plan.forward, call_plan.program, inputs[0].shape[0], weights.like
    values = _values(forward, weights, inputs)
    slopes = forward_mode.slope_tensors(program, weights.params, values, forward.transposed.slopes)
    seed = like.new_zeros(n, *program.output_shape)  # the cotangent input, whose value does not matter
    rows = like.new_empty(n, forward.transposed.tangents, *program.output_shape)
    tangents = all_output_indices(forward.transposed.tangents, like.device)
    execution = Execution(call_plan.inner, transposed_weights(forward, weights), [seed, *slopes], tangents, [rows])
    execution.run()
    finish_forward_mode(call_plan, weights.params, inputs, rows, targets, out)
    return values[program.output]


def _values(forward: ForwardPlan, weights: PlanWeights, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """The values that forward mode reads, ``[N, *shape]`` each."""
    wanted = tuple(v for v in forward.read if v >= len(inputs))
    call_plan = grouped_call_plan(forward.values, 0, weights.like, (), wanted)
    return dict(enumerate(inputs)) | _wanted_values(call_plan, values_weights(call_plan, weights), inputs)


def values_weights(call_plan: GroupedCallPlan, weights: PlanWeights) -> PlanWeights:
    """The packed weights of forward mode's forward pass."""
    return weights.of_plan(call_plan.plan, LazyParams(call_plan.plan.original, weights.params))


def finish_forward_mode(
    call_plan: CallPlan, params: Params, inputs: Sequence[Tensor], rows: Tensor, targets: Tensor, out: Sequence[Tensor]
) -> None:
    """Fill ``out`` from the tangents of the output ``rows [N, D, *out]``.

    torch takes reverse mode, in which 0 · Inf gives NaN in other places.  So samples with a derivative that is not
    finite are computed once more, by the plain reference.
    """
    outputs = call_plan.program.outputs
    chosen = None if targets is all_output_indices(outputs, targets.device) else targets
    finite = forward_mode.write_transposed(rows.view(*rows.shape[:2], outputs), chosen, out)
    if bool(finite.all()):
        return
    samples = (~finite).nonzero()[:, 0]
    again = [o.new_empty(len(samples), *o.shape[1:]) for o in out]
    _by_reference(call_plan, params, [x[samples] for x in inputs], rows_of_targets(targets, samples), again)
    for o, a in zip(out, again, strict=True):
        o[samples] = a


def _by_reference(
    call_plan: CallPlan, params: Params, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    """A Jacobian by the plain reference, part by part, because the caller has only planned for a kernel's memory."""
    program, n = call_plan.plan.original, inputs[0].shape[0]
    need = stepwise_bytes(program.shapes, targets.shape[-1], leading(inputs).element_size())
    outputs = []
    for a, b in list(spans(0, n, stepwise_samples(inputs[0].device, need))) or [(0, 0)]:
        chunk_inputs, rows = [t[a:b] for t in inputs], [o[a:b] for o in out]
        chunk_targets = rows_of_targets(targets, slice(a, b))
        outputs.append(reference.jacobian(program, params, chunk_inputs, chunk_targets, call_plan.wrt, out=rows)[0])
    return torch.cat(outputs)
