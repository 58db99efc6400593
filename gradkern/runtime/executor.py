"""The executor of plans: forward and all-seed backward, group by group.

It has the same contract as `reference.jacobian`, which is its oracle.  The forward pass runs group by group and keeps
the values that cross their borders; the backward pass hands cotangents ``[N, S, *shape]`` from group to group.  A
native group recomputes its forward instead of saving it, which costs one forward per S backwards.  The last group, in
which the seeds start, runs once for both passes, so a network that is one chain is a single call of the compiled op.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..codegen.chain import Chain
from ..codegen.machine import Device, NoKernels, TooLarge
from ..ir import graph
from ..ir.calls import Params
from ..ir.program import Program
from ..planner.plan import Plan, plan
from ..util.chunks import samples_per_chunk, spans, stepwise_bytes, stepwise_samples
from ..util.memo import Memo
from ..util.options import GradkernWarning
from . import ops, reference
from .confirmation import confirm
from .parameters import KernelsUnavailable, Packed, PlanWeights, every, leading

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------
# Plans, specialized for the inputs that a call differentiates


_plans: Memo[Plan] = Memo(256)
_call_plans: Memo[CallPlan] = Memo(256)


def plan_for(
    program: Program,
    seeds: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    wanted: tuple[int, ...] | None = None,
) -> Plan:
    """The plan for this machine, remembered."""
    machine = ops.machine(device)
    key = (program.key, seeds, dtype, machine, wanted)
    return _plans.get_or_make(key, lambda: plan(program, seeds, dtype, machine=machine, wanted=wanted))


def call_plan_for(
    program: Program, seeds: int, like: Tensor, wrt: tuple[int, ...], wanted: tuple[int, ...] | None = None
) -> CallPlan:
    """The plan for the dtype and device of ``like``, specialized for the inputs ``wrt``, remembered."""
    key = (program.key, seeds, like.dtype, ops.machine(like.device), wrt, wanted)
    return _call_plans.get_or_make(
        key, lambda: CallPlan(plan_for(program, seeds, like.dtype, like.device, wanted), wrt)
    )


@dataclass(frozen=True)
class CallGroup:
    """A group, and the facts about it that calls need."""

    number: int
    native: bool
    steps: tuple[int, ...]
    live_out: tuple[int, ...]
    wrt: tuple[int, ...]  # the values that it sends cotangents to
    alone: frozenset[int]  # inputs of the network that no other group reads


class CallPlan:
    """A plan specialized for the inputs ``wrt``: everything that does not depend on tensors is computed once."""

    def __init__(self, plan: Plan, wrt: tuple[int, ...]) -> None:
        program = plan.program
        self.plan, self.program, self.wrt = plan, program, wrt
        self.native, self.linear = plan.native, bool(program.slopes)
        self.outputs, self.shapes = program.outputs, program.shapes
        self.needed = graph.descendants(program, wrt)  # the values whose cotangents are needed
        self.groups = tuple(self._group(k) for k in range(len(plan.groups)))
        last = self.groups[-1] if self.groups else None
        #: Whether seeds enter the last group as targets, so that no one-hot tensor is made.
        self.targets_enter = bool(
            last and last.native and last.wrt and last.live_out == (program.output,) and plan.seeds
        )
        self.parts: tuple[CallPlan, CallPlan] | None = None
        if plan.parts is not None:
            self.parts = CallPlan(plan.parts[0], wrt), CallPlan(plan.parts[1], (0,))
        self._chains: dict[tuple[int, bool, bool], Chain] = {}
        #: Whether results of these kernels have been compared with torch's own, which a GPU's have to be once.
        self.confirmed = not isinstance(plan.machine, Device)

    def _group(self, k: int) -> CallGroup:
        group, inside = self.plan.groups[k], set(self.plan.groups[k].steps)
        wrt = tuple(v for v in group.live_in if v in self.needed)
        alone = frozenset(v for v in wrt if v in self.wrt and inside.issuperset(self.program.consumers[v]))
        return CallGroup(k, group.native, group.steps, group.live_out, wrt, alone)

    @cached_property
    def folded(self) -> CallPlan:
        """The same without kernels of gradkern's own."""
        own = self.plan
        wanted = None if own.seeds else own.wanted
        return CallPlan(plan(own.original, own.seeds, own.dtype, machine=NoKernels(), wanted=wanted), self.wrt)

    def chain(self, group: CallGroup, *, backward: bool, onehot: bool = False) -> Chain:
        """The group's chain, for the forward pass alone or with the backward pass.  Raises `TooLarge`."""
        key = (group.number, backward, onehot)
        chain = self._chains.get(key)
        if chain is None:
            seeds, wrt = (self.plan.seeds, group.wrt) if backward else (0, ())
            chain = self._chains.setdefault(key, self.plan.chain(group.number, seeds, wrt, onehot))
        return chain

    def backward_chains(self) -> Iterator[Chain]:
        """The chains that a Jacobian takes."""
        if self.parts is not None:
            for part in self.parts:
                yield from part.backward_chains()
            return
        for group in self.groups:
            if group.native and group.wrt and self.plan.seeds:
                yield self.chain(group, backward=True, onehot=self.targets_enter and group is self.groups[-1])


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
        targets = every(program.outputs, like.device)
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
    call_plan = call_plan_for(program, targets.shape[-1], values[0], wrt)
    weights = PlanWeights(call_plan.plan, params, values[0])
    try:
        Execution(call_plan, weights, values, targets.contiguous(), out).run(cotangent)
    except (KernelsUnavailable, TooLarge) as error:
        _warn_once(program, error)
        raise KernelsUnavailable(str(error)) from error


def forward_values(
    program: Program, params: Params, inputs: Sequence[Tensor], wanted: Sequence[int]
) -> dict[int, Tensor]:
    """The values ``wanted`` of a forward pass, ``[N, *shape]`` each; none of them if no kernel may run."""
    like, wanted = leading(inputs), tuple(v for v in wanted if v >= len(inputs))
    if not wanted:
        return {}
    call_plan = call_plan_for(program, 0, like, (), wanted)
    if not call_plan.native or call_plan.plan.cast_dtype is not None or not like.shape[0]:
        return {}

    def run(call_plan: CallPlan, weights: PlanWeights, inputs: Sequence[Tensor]) -> list[Tensor]:
        execution = Execution(call_plan, weights, inputs, None, ())
        execution.forward(call_plan.groups)
        return [execution.values[v] for v in wanted]

    weights = PlanWeights(call_plan.plan, params, like)
    try:
        values = run(call_plan, weights, inputs)
    except (KernelsUnavailable, TooLarge) as error:
        _warn_once(program, error)
        return {}
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
    weights = PlanWeights(call_plan.plan, params, like)
    try:
        for chain in call_plan.backward_chains():
            weights.packed(chain)
    except (KernelsUnavailable, TooLarge) as error:
        return str(error)
    return None


_warned: Memo[bool] = Memo(256)


def _warn_once(program: Program, error: Exception) -> None:
    """Say that plain torch takes the place of the planned kernels, once per network and reason."""
    key = (program.key, str(error))
    if _warned.get(key) is None:
        _warned.put(key, True)
        warnings.warn(
            f"gradkern's kernels cannot run a network of {len(program.steps)} steps with outputs of shape "
            f"{list(program.output_shape)}: {error}. Plain torch runs it step by step instead: the results are the "
            "same, but it takes longer.",
            GradkernWarning,
            stacklevel=2,
        )


# ---------------------------------------------------------------------------------------------------------------
# Ways to fill a Jacobian


def _fill(
    call_plan: CallPlan, weights: PlanWeights, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    n = inputs[0].shape[0]
    if call_plan.parts is not None and n:
        return _through_bottleneck(call_plan.parts, weights, inputs, targets, out)
    if n and call_plan.plan.seeds and call_plan.native:
        try:
            return Execution(call_plan, weights, inputs, targets, out).run()
        except (KernelsUnavailable, TooLarge) as error:
            _warn_once(call_plan.program, error)
    # With weights that are not finite, positions that are not needed send NaN back, as in torch, so all are kept.
    return _by_reference(call_plan, weights.params, inputs, targets, out)


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
    parts: tuple[CallPlan, CallPlan],
    weights: PlanWeights,
    inputs: Sequence[Tensor],
    targets: Tensor,
    out: Sequence[Tensor],
) -> Tensor:
    """``dy/dv · dv/dx`` for a part of the batch at a time, so that ``dv/dx`` stays small."""
    before, after = parts
    width, like = before.outputs, leading(inputs)
    features = [o[0, 0].numel() for o in out]
    each = out[0].element_size() * (width * sum(features) + targets.shape[-1] * max(features))  # dv/dx and a product
    middle = every(width, targets.device)
    outputs = []
    for a, b in spans(0, inputs[0].shape[0], samples_per_chunk(like.device, each, each)):
        rows = [t[a:b] for t in inputs]
        inner = [rows[w].new_empty(b - a, width, *rows[w].shape[1:]) for w in before.wrt]  # [n, K, *in]
        v = _fill(before, weights, rows, middle, inner)  # [n, *v]
        chunk_targets = targets[a:b] if targets.dim() == 2 else targets
        outer = like.new_empty(b - a, targets.shape[-1], width)  # [n, S, K]
        outputs.append(_fill(after, weights, [v], chunk_targets, [outer.view(*outer.shape[:2], *v.shape[1:])]))
        for o, j in zip(out, inner, strict=True):
            o[a:b].copy_((outer @ j.reshape(b - a, width, -1)).view(o[a:b].shape))
    return torch.cat(outputs)


def _by_reference(
    call_plan: CallPlan, params: Params, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    """The same without kernels, for a part of the batch at a time: the caller has only planned a kernel's memory."""
    program, n = call_plan.plan.original, inputs[0].shape[0]
    need = stepwise_bytes(program.shapes, targets.shape[-1], leading(inputs).element_size())
    outputs = []
    for a, b in list(spans(0, n, stepwise_samples(inputs[0].device, need))) or [(0, 0)]:
        chunk_targets = targets[a:b] if targets.dim() == 2 else targets
        chunk_inputs, rows = [t[a:b] for t in inputs], [o[a:b] for o in out]
        outputs.append(reference.jacobian(program, params, chunk_inputs, chunk_targets, call_plan.wrt, out=rows)[0])
    return torch.cat(outputs)


# ---------------------------------------------------------------------------------------------------------------
# Group by group


def run_chain(
    packed: Packed,
    inputs: list[Tensor],
    targets: Tensor | None,
    rows: Tensor | None,
    cotangents: list[Tensor],
    results: list[Tensor],
) -> list[Tensor]:
    """One chain, forward and backward: fills ``results``, returns the outputs."""
    c, records = packed.chain, (packed.weights, packed.tables, packed.forward, packed.backward)
    return ops.chain_vjp(inputs, *records, c.sizes, c.output_sizes, targets, rows, cotangents, c.seed_tile, results)


class Execution:
    """Forward and backward over the groups of a plan, for one chunk of samples."""

    def __init__(
        self,
        call_plan: CallPlan,
        weights: PlanWeights,
        inputs: Sequence[Tensor],
        targets: Tensor | None,
        out: Sequence[Tensor],
    ) -> None:
        self.call_plan, self.program, self.weights, self.targets, self.out = (
            call_plan,
            call_plan.program,
            weights,
            targets,
            out,
        )
        self.base, self.n, self.seeds, self.like = len(inputs), inputs[0].shape[0], call_plan.plan.seeds, weights.like
        self.values: dict[int, Tensor] = dict(enumerate(inputs))
        self.cotangents: dict[int, Tensor] = {}

    def run(self, cotangent: Tensor | None = None) -> Tensor:
        """Fill ``out`` and return the output.  ``cotangent [N, S, *out]``: seeds that replace the one-hot targets."""
        output = self._run(cotangent)
        if not self.call_plan.confirmed:
            self._confirm(output, cotangent)
        return output

    def _confirm(self, output: Tensor, cotangent: Tensor | None) -> None:
        """Compare what has been filled with torch's own results; targets and cotangents are rows like the inputs."""
        inputs, targets = [self.values[v] for v in range(self.base)], self.targets
        rows = [] if targets is None else [targets.expand(self.n, -1)]
        rows += [] if cotangent is None else [cotangent]

        def run(call_plan: CallPlan, weights: PlanWeights, given: Sequence[Tensor]) -> list[Tensor]:
            targets = None if self.targets is None else given[self.base].contiguous()
            out = [weights.like.new_empty(len(given[0]), *o.shape[1:]) for o in self.out]
            execution = Execution(call_plan, weights, given[: self.base], targets, out)
            y = execution.run(None if cotangent is None else given[-1])
            return out if call_plan.linear else [y, *out]

        got = self.out if self.call_plan.linear else (output, *self.out)
        confirm(self.call_plan, self.weights, [*inputs, *rows], got, run)

    def _run(self, cotangent: Tensor | None) -> Tensor:
        call_plan, output = self.call_plan, self.program.output
        targets_enter = call_plan.targets_enter and cotangent is None
        if not call_plan.linear:
            self.forward(call_plan.groups[:-1] if targets_enter else call_plan.groups)
        if cotangent is not None:
            self.cotangents[output] = cotangent.view(self.n, self.seeds, *call_plan.shapes[output])
        elif not targets_enter:
            self.cotangents[output] = reference.one_hot(self.program, self.values.get(output, self.like), self.targets)
        for group in reversed(call_plan.groups):
            if not group.native:
                self.backward_reference(group)
            elif group.wrt:
                self.backward_native(group, targets_enter and group is call_plan.groups[-1])
        for w, o in zip(call_plan.wrt, self.out, strict=True):
            arrived = self.cotangents.get(w)
            if arrived is None:
                o.zero_()  # the output does not depend on this input
            elif arrived is not o:
                o.copy_(arrived)
        return self.values.get(output, self.like)

    def forward(self, groups: Sequence[CallGroup]) -> None:
        for group in groups:
            self.forward_native(group) if group.native else self.forward_reference(group)

    def add(self, value: int, cotangent: Tensor) -> None:
        """``cotangent``: [N, S, *shape]."""
        sum_so_far = self.cotangents.get(value)
        self.cotangents[value] = cotangent if sum_so_far is None else sum_so_far + cotangent

    # ---- native groups

    def forward_native(self, group: CallGroup) -> None:
        chain = self.call_plan.chain(group, backward=False)
        packed = self.weights.packed(chain)
        records = packed.weights, packed.tables, packed.forward
        self.store_outputs(group, ops.chain_forward(self.reads(chain), *records, chain.sizes, chain.output_sizes))

    def store_outputs(self, group: CallGroup, results: list[Tensor]) -> None:
        for v, y in zip(group.live_out, results, strict=True):
            self.values[v] = y.view(self.n, *self.call_plan.shapes[v])

    def backward_native(self, group: CallGroup, targets_enter: bool) -> None:
        if not targets_enter and not any(v in self.cotangents for v in group.live_out):
            return
        try:
            chain = self.call_plan.chain(group, backward=True, onehot=targets_enter)
        except TooLarge as error:  # the plan was made for one-hot seeds, and dense ones may need more room
            if not self.call_plan.linear or targets_enter:
                raise
            _warn_once(self.program, error)
            return self.backward_reference(group)
        packed, ins = self.weights.packed(chain), self.reads(chain)
        results = [self.result(group, v) for v in chain.wrt]
        if targets_enter:
            assert self.targets is not None
            outputs = run_chain(
                packed, ins, self.targets, packed.seed_rows(self.targets, self.call_plan.outputs), [], results
            )
            if not self.call_plan.linear:
                self.store_outputs(group, outputs)
        else:
            run_chain(packed, ins, None, None, [self.dense(v) for v in group.live_out], results)
        for v, r in zip(chain.wrt, results, strict=True):
            self.add(v, r)

    def reads(self, chain: Chain) -> list[Tensor]:
        """The contiguous tensors that a chain reads."""
        if self.call_plan.linear:  # only the slopes are read
            return [self.values.get(v, self.like).contiguous() for v in chain.inputs] or [self.like.contiguous()]
        for v in chain.inputs:
            if (dtype := self.values[v].dtype) != self.like.dtype:
                raise KernelsUnavailable(f"value v{v} is {dtype}, and the inputs are {self.like.dtype}")
        return [self.values[v].contiguous() for v in chain.inputs]

    def result(self, group: CallGroup, value: int) -> Tensor:
        """Where a kernel writes a cotangent: into the caller's tensor if possible, else into a temporary."""
        if value in group.alone and value not in self.cotangents:
            o = self.out[self.call_plan.wrt.index(value)]
            if o.is_contiguous() and o.dtype == self.like.dtype and o.device == self.like.device:
                return o
        return self.like.new_empty(self.n, self.seeds, *self.call_plan.shapes[value])

    def dense(self, value: int) -> Tensor:
        """The cotangent of a value that leaves a group, ``[N, S, size]``; zeros if nothing reads it."""
        arrived, shape = self.cotangents.pop(value, None), (self.n, self.seeds, math.prod(self.call_plan.shapes[value]))
        return self.like.new_zeros(shape) if arrived is None else arrived.reshape(shape).contiguous()

    # ---- the other groups

    def forward_reference(self, group: CallGroup) -> None:
        for i in group.steps:
            args = [self.values[v] for v in self.program.steps[i].inputs]
            self.values[self.base + i] = reference.forward_step(self.program, i, args, self.weights.params)

    def backward_reference(self, group: CallGroup) -> None:
        for i in reversed(group.steps):
            inputs = self.program.steps[i].inputs
            g = self.cotangents.pop(self.base + i, None)
            if g is None or not any(v in self.call_plan.needed for v in inputs):
                continue
            args, out = [self.value(v) for v in inputs], self.value(self.base + i)
            parts = reference.vjp_step(self.program, i, args, out, g, self.weights.params)
            for v, part in zip(inputs, parts, strict=True):
                if v in self.call_plan.needed:
                    self.add(v, part)

    def value(self, v: int) -> Tensor:
        """A value that a step's VJP may read; of a linear Program's values, only slopes need more than the shape."""
        value = self.values.get(v)
        if value is None:
            assert self.call_plan.linear
            value = self.like.new_empty(1).expand(self.n, *self.call_plan.shapes[v])
        return value
