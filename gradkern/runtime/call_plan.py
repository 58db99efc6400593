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
from ..planner.plan import Plan, plan
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
        key, lambda: CallPlan(plan_for(program, seeds, like.dtype, like.device, wanted, wrt or None, reverse), wrt)
    )


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
        self.transposed = None if plan.forward_mode is None else CallPlan(plan.forward_mode.plan, (0,))
        self._chains: dict[tuple[int, bool, bool], Chain] = {}
        #: Whether results of these kernels have been compared with torch's own, which they have to be once.
        self.confirmed = not plan.native
        for part in (*(self.parts or ()), *([self.transposed] if self.transposed else ())):
            part.confirmed = True  # what is compared is the whole

    def _group(self, k: int) -> CallGroup:
        group, inside = self.plan.groups[k], set(self.plan.groups[k].steps)
        wrt = tuple(v for v in group.live_in if v in self.needed)
        only_reader_of = frozenset(v for v in wrt if v in self.wrt and inside.issuperset(self.program.consumers[v]))
        return CallGroup(k, group.native, group.steps, group.live_out, wrt, only_reader_of)

    def folded(self, seeds: int) -> CallPlan:
        """The call plan without gradkern's own kernels, for a number of seeds."""
        own = self.plan
        wanted = None if own.seeds else own.wanted
        return CallPlan(
            plan(own.original, seeds, own.dtype, machine=NoKernels(), wanted=wanted, reverse=True), self.wrt
        )

    def chain(self, group: CallGroup, *, backward: bool, onehot: bool = False) -> Chain:
        """The group's chain, for the forward pass alone or with the backward pass.  Raises `TooLarge`."""
        key = (group.number, backward, onehot)
        chain = self._chains.get(key)
        if chain is None:
            seeds, wrt = (self.plan.seeds, group.wrt) if backward else (0, ())
            chain = self._chains.setdefault(key, self.plan.chain(group.number, seeds, wrt, onehot))
        return chain

    def backward_chains(self) -> Iterator[Chain]:
        """The chains that a backward pass through all groups takes."""
        for group in self.groups:
            if group.native and group.wrt and self.plan.seeds:
                yield self.chain(group, backward=True, onehot=self.targets_enter and group is self.groups[-1])
