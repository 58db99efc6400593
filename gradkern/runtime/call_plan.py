"""Plans specialized for the inputs that a call differentiates, remembered between calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codegen.chain import Chain
from ..codegen.machine import NoKernels
from ..ir import graph
from ..ir.program import Program
from ..planner.plan import ForwardPlan, GroupedPlan, Plan, ProductPlan, plan
from ..util.memo import Memo
from . import ops

CPU = torch.device("cpu")

_plans: Memo[Plan] = Memo(256)
_call_plans: Memo[CallPlan] = Memo(256)


def plan_for(
    program: Program,
    seeds: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    wanted: tuple[int, ...] | None = None,
    wrt: tuple[int, ...] | None = None,
    reverse: bool = False,
) -> Plan:
    """The plan for this machine, remembered.  ``wrt``: the inputs to differentiate, by default all."""
    machine = ops.machine(device)
    wrt = None if wrt == tuple(range(len(program.inputs))) else wrt
    key = (program.key, seeds, dtype, machine, wanted, wrt, reverse)
    return _plans.get_or_make(
        key, lambda: plan(program, seeds, dtype, machine=machine, wanted=wanted, wrt=wrt, reverse=reverse)
    )


def call_plan_for(
    program: Program,
    seeds: int,
    like: Tensor,
    wrt: tuple[int, ...],
    wanted: tuple[int, ...] | None = None,
    reverse: bool = False,
) -> CallPlan:
    """The plan for the dtype and device of ``like``, specialized for the inputs ``wrt``, remembered."""
    key = (program.key, seeds, like.dtype, ops.machine(like.device), wrt, wanted, reverse)
    return _call_plans.get_or_make(
        key, lambda: specialized(plan_for(program, seeds, like.dtype, like.device, wanted, wrt or None, reverse), wrt)
    )


def grouped_call_plan(
    program: Program, seeds: int, like: Tensor, wrt: tuple[int, ...], wanted: tuple[int, ...] | None = None
) -> GroupedCallPlan:
    """`call_plan_for` of a forward pass that computes ``wanted``, or else in reverse mode: such plans are groups."""
    call_plan = call_plan_for(program, seeds, like, wrt, wanted, reverse=wanted is None)
    assert isinstance(call_plan, GroupedCallPlan)
    return call_plan


@dataclass(frozen=True)
class CallGroup:
    """A group, with the facts about it that calls need."""

    number: int
    native: bool
    steps: tuple[int, ...]
    live_out: tuple[int, ...]
    wrt: tuple[int, ...]  # the values that it sends cotangents to
    only_reader_of: frozenset[int]  # inputs of the network that no other group reads


class CallPlan:
    """A plan specialized for the inputs ``wrt``: everything that does not depend on tensors is computed once."""

    def __init__(self, plan: Plan, wrt: tuple[int, ...]) -> None:
        program = plan.program
        self.plan, self.program, self.wrt = plan, program, wrt
        self.native, self.linear = plan.native, bool(program.slopes)
        self.outputs, self.shapes = program.outputs, program.shapes
        #: Whether results of these kernels have been compared with torch's own, which they have to be once.
        self.confirmed = not plan.native

    def without_kernels(self, seeds: int) -> CallPlan:
        """The call plan without gradkern's own kernels, for a number of seeds."""
        own = self.plan
        wanted = None if own.seeds else own.wanted
        return specialized(
            plan(own.original, seeds, own.dtype, machine=NoKernels(), wanted=wanted, reverse=True), self.wrt
        )


class GroupedCallPlan(CallPlan):
    """A `GroupedPlan` for the inputs ``wrt``."""

    def __init__(self, plan: GroupedPlan, wrt: tuple[int, ...]) -> None:
        super().__init__(plan, wrt)
        self.grouped = plan
        self.needed = graph.descendants(plan.program, wrt)  # the values whose cotangents are needed
        self.groups = tuple(self._group(k) for k in range(len(plan.groups)))
        last = self.groups[-1] if self.groups else None
        #: Whether seeds enter the last group as targets, so that no one-hot tensor is made.
        self.targets_enter = bool(
            last and last.native and last.wrt and last.live_out == (plan.program.output,) and plan.seeds
        )
        self._chains: dict[tuple[int, bool, bool], Chain] = {}

    def _group(self, k: int) -> CallGroup:
        group, inside = self.grouped.groups[k], set(self.grouped.groups[k].steps)
        wrt = tuple(v for v in group.live_in if v in self.needed)
        only_reader_of = frozenset(v for v in wrt if v in self.wrt and inside.issuperset(self.program.consumers[v]))
        return CallGroup(k, group.native, group.steps, group.live_out, wrt, only_reader_of)

    def chain(self, group: CallGroup, *, backward: bool, onehot: bool = False) -> Chain:
        """The group's chain, for the forward pass alone or with the backward pass.  Raises `TooLarge`."""
        key = (group.number, backward, onehot)
        chain = self._chains.get(key)
        if chain is None:
            seeds, wrt = (self.plan.seeds, group.wrt) if backward else (0, ())
            chain = self._chains.setdefault(key, self.grouped.chain(group.number, seeds, wrt, onehot))
        return chain

    def backward_chains(self) -> Iterator[Chain]:
        """The chains that a backward pass through all groups takes."""
        for group in self.groups:
            if group.native and group.wrt and self.plan.seeds:
                yield self.chain(group, backward=True, onehot=self.targets_enter and group is self.groups[-1])


class ProductCallPlan(CallPlan):
    """A `ProductPlan` for the inputs ``wrt``."""

    def __init__(self, plan: ProductPlan, wrt: tuple[int, ...]) -> None:
        super().__init__(plan, wrt)
        self.before, self.after = specialized(plan.before, wrt), specialized(plan.after, (0,))
        self.before.confirmed = self.after.confirmed = True  # what is compared is the whole


class ForwardCallPlan(CallPlan):
    """A `ForwardPlan` for the inputs ``wrt``.  ``inner``: for the cotangents of its transpose."""

    def __init__(self, plan: ForwardPlan, wrt: tuple[int, ...]) -> None:
        super().__init__(plan, wrt)
        self.forward = plan
        self.inner = GroupedCallPlan(plan.inner, (0,))
        self.inner.confirmed = True  # what is compared is the whole


def specialized(plan: Plan, wrt: tuple[int, ...]) -> CallPlan:
    """A plan for the inputs ``wrt``."""
    match plan:
        case GroupedPlan():
            return GroupedCallPlan(plan, wrt)
        case ProductPlan():
            return ProductCallPlan(plan, wrt)
        case ForwardPlan():
            return ForwardCallPlan(plan, wrt)
    raise TypeError(f"a plan of the unknown kind {type(plan).__name__}")
