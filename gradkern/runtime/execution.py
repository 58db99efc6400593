"""One run of a plan, group by group, for one chunk of samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from ..codegen.chain import Chain
from ..codegen.machine import TooLarge
from ..ir.program import Opaque, Program
from ..ir.recurrent import recognize
from ..util.memo import Memo
from ..util.options import GradkernWarning
from . import ops, recurrent, reference
from .call_plan import CallGroup, GroupedCallPlan
from .parameters import KernelsUnavailable, Packed, PlanWeights

_warned: Memo[bool] = Memo(256)


def warn_once(program: Program, error: Exception) -> None:
    """Say that plain torch takes the place of the planned kernels, once per network and reason."""
    key = (program.key, str(error))
    if _warned.get(key) is None:
        _warned.put(key, True)
        warnings.warn(
            f"gradkern's kernels cannot run a network of {len(program.steps)} steps with outputs of shape "
            f"{list(program.output_shape)}: {error}. Plain torch runs it step by step instead, which takes "
            "longer.",
            GradkernWarning,
            stacklevel=2,
        )


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
        call_plan: GroupedCallPlan,
        weights: PlanWeights,
        inputs: Sequence[Tensor],
        targets: Tensor | None,
        out: Sequence[Tensor],
    ) -> None:
        self.call_plan, self.program = call_plan, call_plan.program
        self.weights, self.like = weights, weights.like
        self.targets, self.seeds = targets, call_plan.plan.seeds
        self.out = out
        self.base, self.n = len(inputs), inputs[0].shape[0]
        self.values: dict[int, Tensor] = dict(enumerate(inputs))
        self.cotangents: dict[int, Tensor] = {}

    def run(self, cotangent: Tensor | None = None) -> Tensor:
        """Fill ``out`` and return the output.  ``cotangent [N, S, *out]``: seeds that replace the one-hot targets."""
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
            if group.native:
                self.forward_native(group)
            else:
                self.forward_reference(group)

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
            warn_once(self.program, error)
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
        if value in group.only_reader_of and value not in self.cotangents:
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
        params = self.weights.params
        for i in group.steps:
            step = self.program.steps[i]
            args = [self.values[v] for v in step.inputs]
            layer = recognize(step.form.call) if isinstance(step.form, Opaque) else None
            if layer is not None:
                self.values[self.base + i] = recurrent.forward(layer, args[0], lambda p: params[p.name])
            else:
                self.values[self.base + i] = reference.forward_step(self.program, i, args, params)

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
