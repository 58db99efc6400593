"""The executor of plans: forward and all-seed backward, group by group.

It has the same contract as `reference.jacobian`, which is its oracle.  The forward pass runs group by group and keeps
the values that cross their borders; the backward pass hands cotangents ``[N, S, *shape]`` from group to group.  A
native group recomputes its forward instead of saving it, which costs one forward per S backwards.  The last group, in
which the seeds start, runs once for both passes, so a network that is one chain is a single call of the compiled op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..codegen.chain import Chain
from ..codegen.machine import TooLarge
from ..ir import graph
from ..ir.calls import Params
from ..ir.program import Program
from ..planner.plan import Plan, plan
from ..util.chunks import samples_per_chunk, spans, stepwise_bytes, stepwise_samples
from ..util.memo import Memo
from . import ops, reference
from .parameters import KernelsUnavailable, Packed, PlanWeights

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------
# Plans, specialised for the inputs that a call differentiates


_plans: Memo[Plan] = Memo(256)
_executables: Memo[Executable] = Memo(256)


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


def executable_for(
    program: Program, seeds: int, like: Tensor, wrt: tuple[int, ...], wanted: tuple[int, ...] | None = None
) -> Executable:
    """The plan for the dtype and device of ``like``, specialised for the inputs ``wrt``, remembered."""
    key = (program.key, seeds, like.dtype, ops.machine(like.device), wrt, wanted)
    return _executables.get_or_make(
        key, lambda: Executable(plan_for(program, seeds, like.dtype, like.device, wanted), wrt)
    )


@dataclass(frozen=True)
class BoundGroup:
    """A group, and the facts about it that calls need."""

    number: int
    native: bool
    steps: tuple[int, ...]
    live_out: tuple[int, ...]
    wrt: tuple[int, ...]  # the values that it sends cotangents to
    alone: frozenset[int]  # inputs of the network that no other group reads


class Executable:
    """A plan specialised for the inputs ``wrt``: everything that does not depend on tensors is computed once."""

    def __init__(self, plan: Plan, wrt: tuple[int, ...]) -> None:
        program = plan.program
        self.plan, self.program, self.wrt = plan, program, wrt
        self.native, self.linear = plan.native, bool(program.slopes)
        self.outputs, self.shapes = program.outputs, program.shapes
        self.needed = graph.descendants(program, wrt)  # the values whose cotangents are needed
        self.groups = tuple(self._bound(k) for k in range(len(plan.groups)))
        last = self.groups[-1] if self.groups else None
        #: Whether seeds enter the last group as targets, so that no one-hot tensor is made.
        self.targets_enter = bool(
            last and last.native and last.wrt and last.live_out == (program.output,) and plan.seeds
        )
        self.parts: tuple[Executable, Executable] | None = None
        if plan.parts is not None:
            self.parts = Executable(plan.parts[0], wrt), Executable(plan.parts[1], (0,))
        self._chains: dict[tuple[int, bool, bool], Chain] = {}

    def _bound(self, k: int) -> BoundGroup:
        group, inside = self.plan.groups[k], set(self.plan.groups[k].steps)
        wrt = tuple(v for v in group.live_in if v in self.needed)
        alone = frozenset(v for v in wrt if v in self.wrt and inside.issuperset(self.program.consumers[v]))
        return BoundGroup(k, group.native, group.steps, group.live_out, wrt, alone)

    def chain(self, group: BoundGroup, *, backward: bool, onehot: bool = False) -> Chain:
        """The group's chain, for the forward pass alone or with the backward pass.  Raises `TooLarge`."""
        key = (group.number, backward, onehot)
        chain = self._chains.get(key)
        if chain is None:
            seeds, wrt = (self.plan.seeds, group.wrt) if backward else (0, ())
            chain = self._chains.setdefault(key, self.plan.chain(group.number, seeds, wrt, onehot))
        return chain


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
    x = executable_for(program, seeds, like, wrt)
    if x.plan.cast_dtype is not None:
        return _in_float32(x, params, inputs, targets, out), tuple(out)
    return _fill(x, PlanWeights(x.plan, params, like), inputs, targets, out), tuple(out)


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
    x = executable_for(program, targets.shape[-1], values[0], wrt)
    weights = PlanWeights(x.plan, params, values[0])
    try:
        GroupExecutor(x, weights, values, targets.contiguous(), out).run(cotangent)
    except TooLarge as error:
        raise KernelsUnavailable from error


def forward_values(
    program: Program, params: Params, inputs: Sequence[Tensor], wanted: Sequence[int]
) -> dict[int, Tensor]:
    """The values ``wanted`` of a forward pass, ``[N, *shape]`` each; none of them if no kernel may run."""
    like, wanted = leading(inputs), tuple(v for v in wanted if v >= len(inputs))
    if not wanted:
        return {}
    x = executable_for(program, 0, like, (), wanted)
    if not x.native or x.plan.cast_dtype is not None or not like.shape[0]:
        return {}
    groups = GroupExecutor(x, PlanWeights(x.plan, params, like), inputs, None, ())
    with suppress(KernelsUnavailable, TooLarge):
        groups.forward(x.groups)
        return {v: groups.values[v] for v in wanted}
    return {}


def leading(inputs: Sequence[Tensor]) -> Tensor:
    """The first floating input: a call computes in its dtype and on its device."""
    return next((x for x in inputs if x.is_floating_point()), inputs[0])


@lru_cache(maxsize=64)
def every(outputs: int, device: torch.device) -> Tensor:
    """The indices of all outputs; never written to."""
    with torch.inference_mode(False):
        return torch.arange(outputs, device=device)


# ---------------------------------------------------------------------------------------------------------------
# Ways to fill a Jacobian


def _fill(
    x: Executable, weights: PlanWeights, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    n = inputs[0].shape[0]
    if x.parts is not None and n:
        return _through_bottleneck(x.parts, weights, inputs, targets, out)
    if n and x.plan.seeds and x.native:
        with suppress(KernelsUnavailable, TooLarge):
            return GroupExecutor(x, weights, inputs, targets, out).run()
    # With weights that are not finite, positions that are not needed send NaN back, as in torch, so all are kept.
    return _by_reference(x, weights.params, inputs, targets, out)


def _in_float32(
    x: Executable, params: Params, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    """Runs the kernels in float32; the copies on either side cost less than the kernels."""

    def cast(t: Tensor) -> Tensor:
        return t.float() if t.is_floating_point() else t

    wide = [cast(t) for t in inputs]
    results = [wide[w].new_empty(o.shape) for w, o in zip(x.wrt, out, strict=True)]
    params = {name: cast(p) for name, p in params.items()}
    y = _fill(x, PlanWeights(x.plan, params, leading(wide)), wide, targets, results)
    for o, result in zip(out, results, strict=True):
        o.copy_(result)
    return y.to(leading(inputs).dtype)


def _through_bottleneck(
    parts: tuple[Executable, Executable],
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
    every = torch.arange(width, device=targets.device)
    outputs = []
    for a, b in spans(0, inputs[0].shape[0], samples_per_chunk(like.device, each, each)):
        rows = [x[a:b] for x in inputs]
        inner = [rows[w].new_empty(b - a, width, *rows[w].shape[1:]) for w in before.wrt]  # [n, K, *in]
        v = _fill(before, weights, rows, every, inner)  # [n, *v]
        chosen = targets[a:b] if targets.dim() == 2 else targets
        outer = like.new_empty(b - a, targets.shape[-1], width)  # [n, S, K]
        outputs.append(_fill(after, weights, [v], chosen, [outer.view(*outer.shape[:2], *v.shape[1:])]))
        for o, j in zip(out, inner, strict=True):
            o[a:b].copy_((outer @ j.reshape(b - a, width, -1)).view(o[a:b].shape))
    return torch.cat(outputs)


def _by_reference(
    x: Executable, params: Params, inputs: Sequence[Tensor], targets: Tensor, out: Sequence[Tensor]
) -> Tensor:
    """The same without kernels, for a part of the batch at a time: the caller has only planned a kernel's memory."""
    program, n = x.plan.original, inputs[0].shape[0]
    need = stepwise_bytes(program.shapes, targets.shape[-1], leading(inputs).element_size())
    outputs = []
    for a, b in list(spans(0, n, stepwise_samples(inputs[0].device, need))) or [(0, 0)]:
        chosen = targets[a:b] if targets.dim() == 2 else targets
        chunk_inputs, rows = [t[a:b] for t in inputs], [o[a:b] for o in out]
        outputs.append(reference.jacobian(program, params, chunk_inputs, chosen, x.wrt, out=rows)[0])
    return torch.cat(outputs)


# ---------------------------------------------------------------------------------------------------------------
# Group by group


def call(
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


class GroupExecutor:
    """Forward and backward over the groups of a plan, for one chunk of samples."""

    def __init__(
        self,
        x: Executable,
        weights: PlanWeights,
        inputs: Sequence[Tensor],
        targets: Tensor | None,
        out: Sequence[Tensor],
    ) -> None:
        self.x, self.program, self.weights, self.targets, self.out = x, x.program, weights, targets, out
        self.base, self.n, self.seeds, self.like = len(inputs), inputs[0].shape[0], x.plan.seeds, weights.like
        self.values: dict[int, Tensor] = dict(enumerate(inputs))
        self.cotangents: dict[int, Tensor] = {}

    def run(self, cotangent: Tensor | None = None) -> Tensor:
        """Fill ``out`` and return the output.  ``cotangent [N, S, *out]``: seeds that replace the one-hot targets."""
        x, output = self.x, self.program.output
        targets_enter = x.targets_enter and cotangent is None
        if not x.linear:
            self.forward(x.groups[:-1] if targets_enter else x.groups)
        if cotangent is not None:
            self.cotangents[output] = cotangent.view(self.n, self.seeds, *x.shapes[output])
        elif not targets_enter:
            self.cotangents[output] = reference.one_hot(self.program, self.values.get(output, self.like), self.targets)
        for group in reversed(x.groups):
            if not group.native:
                self.backward_reference(group)
            elif group.wrt:
                self.backward_native(group, targets_enter and group is x.groups[-1])
        for w, o in zip(x.wrt, self.out, strict=True):
            arrived = self.cotangents.get(w)
            if arrived is None:
                o.zero_()  # the output does not depend on this input
            elif arrived is not o:
                o.copy_(arrived)
        return self.values.get(output, self.like)

    def forward(self, groups: Sequence[BoundGroup]) -> None:
        for group in groups:
            self.forward_native(group) if group.native else self.forward_reference(group)

    def add(self, value: int, cotangent: Tensor) -> None:
        """``cotangent``: [N, S, *shape]."""
        sum_so_far = self.cotangents.get(value)
        self.cotangents[value] = cotangent if sum_so_far is None else sum_so_far + cotangent

    # ---- native groups

    def forward_native(self, group: BoundGroup) -> None:
        chain = self.x.chain(group, backward=False)
        packed = self.weights.packed(chain)
        records = packed.weights, packed.tables, packed.forward
        self.keep(group, ops.chain_forward(self.reads(chain), *records, chain.sizes, chain.output_sizes))

    def keep(self, group: BoundGroup, results: list[Tensor]) -> None:
        for v, y in zip(group.live_out, results, strict=True):
            self.values[v] = y.view(self.n, *self.x.shapes[v])

    def backward_native(self, group: BoundGroup, targets_enter: bool) -> None:
        if not targets_enter and not any(v in self.cotangents for v in group.live_out):
            return
        try:
            chain = self.x.chain(group, backward=True, onehot=targets_enter)
        except TooLarge:  # the plan was made for one-hot seeds, and dense ones may need more room
            if not self.x.linear or targets_enter:
                raise
            return self.backward_reference(group)
        packed, ins = self.weights.packed(chain), self.reads(chain)
        results = [self.result(group, v) for v in chain.wrt]
        if targets_enter:
            assert self.targets is not None
            outputs = call(packed, ins, self.targets, packed.seed_rows(self.targets, self.x.outputs), [], results)
            if not self.x.linear:
                self.keep(group, outputs)
        else:
            call(packed, ins, None, None, [self.dense(v) for v in group.live_out], results)
        for v, r in zip(chain.wrt, results, strict=True):
            self.add(v, r)

    def reads(self, chain: Chain) -> list[Tensor]:
        """The contiguous tensors that a chain reads.  A network that changes the dtype inside has no kernels."""
        if self.x.linear:  # only the slopes are read
            return [self.values.get(v, self.like).contiguous() for v in chain.inputs] or [self.like.contiguous()]
        if any(self.values[v].dtype != self.like.dtype for v in chain.inputs):
            raise KernelsUnavailable
        return [self.values[v].contiguous() for v in chain.inputs]

    def result(self, group: BoundGroup, value: int) -> Tensor:
        """Where a kernel writes a cotangent: into the caller's tensor if possible, else into a temporary."""
        if value in group.alone and value not in self.cotangents:
            o = self.out[self.x.wrt.index(value)]
            if o.is_contiguous() and o.dtype == self.like.dtype and o.device == self.like.device:
                return o
        return self.like.new_empty(self.n, self.seeds, *self.x.shapes[value])

    def dense(self, value: int) -> Tensor:
        """The cotangent of a value that leaves a group, ``[N, S, size]``; zeros if nothing reads it."""
        arrived, shape = self.cotangents.pop(value, None), (self.n, self.seeds, math.prod(self.x.shapes[value]))
        return self.like.new_zeros(shape) if arrived is None else arrived.reshape(shape).contiguous()

    # ---- the other groups

    def forward_reference(self, group: BoundGroup) -> None:
        for i in group.steps:
            args = [self.values[v] for v in self.program.steps[i].inputs]
            self.values[self.base + i] = reference.forward_step(self.program, i, args, self.weights.params)

    def backward_reference(self, group: BoundGroup) -> None:
        for i in reversed(group.steps):
            inputs = self.program.steps[i].inputs
            g = self.cotangents.pop(self.base + i, None)
            if g is None or not any(v in self.x.needed for v in inputs):
                continue
            args, out = [self.value(v) for v in inputs], self.value(self.base + i)
            parts = reference.vjp_step(self.program, i, args, out, g, self.weights.params)
            for v, part in zip(inputs, parts, strict=True):
                if v in self.x.needed:
                    self.add(v, part)

    def value(self, v: int) -> Tensor:
        """A value that a step's VJP may read; of a linear Program's values, only slopes need more than the shape."""
        value = self.values.get(v)
        if value is None:
            assert self.x.linear
            value = self.like.new_empty(1).expand(self.n, *self.x.shapes[v])
        return value
