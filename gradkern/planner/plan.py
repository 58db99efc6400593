"""Plan: how each step of a Program runs, as a pure function of the program, the machine and the seeds.

A plan prunes the program, chooses the direction of differentiation, and cuts the DAG into groups.  A native group is
one chain: forward pattern and all-seed backward of a block of samples without leaving the cache.  The other steps run
through the plain reference, the seeds folded into the batch, or are differentiated by torch.  A plan owns the chains
that are lowered for it.  ``str(plan)`` is the table that ``gradkern.explain`` prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from ..codegen.chain import Chain
from ..codegen.grouping import GraphBuilder
from ..codegen.machine import Device, Machine, NoKernels
from ..codegen.support import CAST_DTYPES
from ..ir import graph
from ..ir.calls import form_params, params_in
from ..ir.macs import total_macs
from ..ir.program import Contract, Opaque, Program, describe
from ..ir.recurrent import recognize
from ..passes import direction
from ..passes.direction import Cut, Direction
from ..passes.exchange_axes import exchange_axes
from ..passes.forward_mode import Transposed, transpose, values_read
from ..passes.phases import without_zeros
from ..passes.prune_positions import prune
from ..util.chunks import element_counts, stepwise_bytes
from .groups import Chains, Group, Partition
from .heavy import heavy_layers
from .implementations import ATEN, FOLDED, KERNEL, Choice, Implementation, choose_implementation
from .table import summary, table
from .timing import Timing


@dataclass(frozen=True)
class PlanStep:
    """One row of the table."""

    value: int
    form: str
    shape: tuple[int, ...]
    implementation: Implementation
    path: str  # the implementation's name, with the instruction set of a kernel
    refusals: tuple[str, ...]  # why those that come before it in the list do not take the step
    op: str
    module: str
    macs: int  # dense multiply-adds per sample, forward and all seeds
    native_macs: int  # those of them on gradkern's own kernels
    group: int

    @property
    def why(self) -> str:
        """Why no faster implementation runs the step; empty if there is none."""
        return self.refusals[0] if self.refusals else ""


@dataclass(frozen=True)
class ForwardMode:
    """The Program whose reverse mode is the forward mode of a network, and the plan of it for all tangents as seeds."""

    transposed: Transposed
    plan: Plan
    values: Program  # the network as its forward pass runs
    read: tuple[int, ...]  # the needed ones of its values, by their numbers in the network


class Parts(NamedTuple):
    """The plans of a network up to its bottleneck and from there on; the Jacobian is the product of theirs."""

    before: Plan
    after: Plan


@dataclass(frozen=True, repr=False)
class Plan:
    """How a Program runs for a number of seeds on a machine: groups in execution order, and a table row per step.

    ``str()`` is a table.  It shows the implementation of each step and why there is no faster one, where seeds start,
    and the shares of the operations that are fused (all seeds at once) and that run on gradkern's own kernels.
    """

    original: Program  # as the caller gave it; runs if weights are not finite
    program: Program  # the one that runs, without the positions that the output does not need
    machine: Machine | NoKernels
    dtype: torch.dtype  # of the computation
    seeds: int
    wanted: tuple[int, ...]  # the values to compute: the program's output, or those that a forward pass is asked for
    groups: tuple[Group, ...]
    choices: tuple[Choice, ...]  # per step: the implementation that runs it
    chains: Chains = field(compare=False)
    direction: Direction | None = None  # None for a forward pass
    #: What runs in place of the groups, if anything does.  Beside `Parts` the groups only serve the table, which shows
    #: the steps of the whole network with their own numbers and modules; beside `ForwardMode` there are none.
    instead: Parts | ForwardMode | None = None
    cast_dtype: torch.dtype | None = None  # the inputs' dtype, if the plan computes in float32 instead
    measured_macs: Mapping[int, int] = field(default_factory=dict)  # forward, per sample, of opaque steps
    fallback: str | None = None  # why plain torch runs every step with the present tensors
    timing: Timing | None = None  # of the plan and of autograd, if they were compared

    @property
    def bottleneck(self) -> Cut | None:
        """Where the seeds start, if not at the outputs."""
        return None if self.direction is None else self.direction.cut

    @property
    def parts(self) -> Parts | None:
        return self.instead if isinstance(self.instead, Parts) else None

    @property
    def forward_mode(self) -> ForwardMode | None:
        return self.instead if isinstance(self.instead, ForwardMode) else None

    @cached_property
    def native(self) -> bool:
        """Whether any kernel runs."""
        return any(g.native for g in self.groups) if self.forward_mode is None else self.forward_mode.plan.native

    @cached_property
    def single_chain(self) -> bool:
        """Whether one native group runs everything, so that nothing in between is written to memory."""
        return len(self.groups) == 1 and self.groups[0].native and self.groups[0].live_out == self.wanted

    @cached_property
    def packed_names(self) -> tuple[str, ...]:
        """The tensors of the Program that are packed for kernels, or from which a Program made from it derives such."""
        if self.parts is not None:
            return tuple(dict.fromkeys(name for part in self.parts for name in part.packed_names))
        if self.forward_mode is not None:
            values = self.forward_mode.values
            of_values = underived(values, contraction_params(values, range(len(values.steps))))
            return tuple(dict.fromkeys((*self.forward_mode.plan.live_names, *of_values)))
        native = {i for g in self.groups if g.native for i in g.steps}
        return contraction_params(self.program, [i for i in graph.steps_to(self.program, self.wanted) if i in native])

    @cached_property
    def bytes_per_sample(self) -> int:
        """The bytes that a call allocates for a sample in addition to the result, if it is not a single chain."""
        size, outputs = self.dtype.itemsize, self.program.outputs

        def inside(plan: Plan) -> int:
            return size * plan.program.outputs if plan.single_chain else plan.bytes_per_sample

        if self.forward_mode is not None:
            inner = self.forward_mode.plan.program  # its inputs are the slopes; the result is also stored transposed
            numbers = sum(element_counts(shapes)[0] for shapes in (self.program.shapes, inner.inputs))
            return size * (numbers + 2 * inner.outputs * outputs) + inside(self.forward_mode.plan)
        if self.parts is not None and self.bottleneck is not None:
            features = element_counts(self.program.inputs)[0]
            factors = self.bottleneck.width * (features + self.seeds) + self.seeds * features
            return size * factors + max(map(inside, self.parts))
        base = len(self.program.inputs)
        stored = [v for g in self.groups for v in (g.live_out if g.native else (base + i for i in g.steps))]
        return stepwise_bytes([*self.program.inputs, *map(self.program.shape, stored)], self.seeds, size)

    @cached_property
    def live_names(self) -> tuple[str, ...]:
        """The live tensors of the network, as it was given, that are packed or that packed ones are derived from."""
        return underived(self.original, self.packed_names)

    def chain(self, group: int, seeds: int, wrt: tuple[int, ...], onehot: bool) -> Chain:
        """The chain of a native group, lowered once; see `Chains.get`."""
        return self.chains.get(self.groups[group], seeds, wrt, onehot)

    @cached_property
    def local_seeds(self) -> Chain | None:
        """The chain in which seeds (in forward mode: tangents) start, if they are local; else None."""
        run = self if self.forward_mode is None else self.forward_mode.plan
        last = run.groups[-1] if run.groups else None
        if self.parts is not None or not run.seeds or last is None or not last.native:
            return None
        if last.live_out != (run.program.output,) or isinstance(self.machine, Device):
            return None
        inputs = [v for v in range(len(run.program.inputs)) if v not in run.program.slopes]
        passed = graph.descendants(run.program, inputs if self.forward_mode is None else [0])
        chain = run.chain(len(run.groups) - 1, run.seeds, tuple(v for v in last.live_in if v in passed), True)
        return chain if chain.local_share < 1 else None

    def explained(self, measured_macs: Mapping[int, int], fallback: str | None) -> Plan:
        """The plan with facts that only live tensors tell.

        ``measured_macs``: multiply-adds of opaque steps, by step of ``program``; ``fallback``: why no kernel can run.
        """
        return replace(self, measured_macs=dict(measured_macs), fallback=fallback)

    def timed(self, timing: Timing | None) -> Plan:
        """The plan with the measured time of a call, which says that autograd runs instead if that was faster."""
        return replace(self, timing=timing)

    # ---- the table

    @cached_property
    def steps(self) -> tuple[PlanStep, ...]:
        """The rows in the order of ``program.steps``, or of the Programs that run if part of it is in forward mode."""
        running: Sequence[Plan] = [self.forward_mode.plan] if self.forward_mode is not None else []
        if self.parts is not None and any(part.instead for part in self.parts):
            running = self.parts
        if running:
            return tuple(row for plan in running for row in replace(plan, fallback=self.fallback).steps)
        program, base = self.program, len(self.program.inputs)
        builders = (GraphBuilder(program, list(g.steps), list(g.live_out)) for g in self.groups if g.native)
        folded = {i for builder in builders for unit in builder.build().units for i in unit.steps[1:]}
        before = graph.ancestors(program, [self.bottleneck.value]) if self.bottleneck else set()
        rows = []
        for k, i in sorted(((k, i) for k, g in enumerate(self.groups) for i in g.steps), key=lambda at: at[1]):
            step = program.steps[i]
            implementation, refusals = self.choices[i].implementation, self.choices[i].refusals
            if i in folded:
                implementation = FOLDED
            if self.fallback is not None and implementation in (KERNEL, FOLDED):
                implementation, refusals = ATEN, (self.fallback, *refusals)
            seeds = self.bottleneck.width if self.bottleneck and base + i in before else self.seeds
            macs = total_macs(program, i, seeds, self.measured_macs.get(i))
            own = macs
            recurrent = recognize(step.form.call) if isinstance(step.form, Opaque) else None
            if recurrent is not None:
                length, inputs = program.shape(step.inputs[0])
                values, own = recurrent.macs(length, inputs, step.shape[-1], seeds)
                macs = values + own
            form, path, own = describe(step.form), implementation.path(self.machine), own * implementation.native
            rows.append(
                PlanStep(base + i, form, step.shape, implementation, path, refusals, step.op, step.module, macs, own, k)
            )
        return tuple(rows)

    @cached_property
    def fused_share(self) -> float:
        """Share of the dense multiply-adds on kernels or on ATen calls with all seeds folded into the batch."""
        return self._share(sum(s.macs for s in self.steps if s.implementation.fused))

    @cached_property
    def native_share(self) -> float:
        """Share of the dense multiply-adds on gradkern's own kernels."""
        return self._share(sum(s.native_macs for s in self.steps))

    def _share(self, counted: int) -> float:
        total = sum(s.macs for s in self.steps)
        return counted / total if total else 1.0

    def __repr__(self) -> str:
        return f"<Plan: {summary(self)}>"

    def __str__(self) -> str:
        return table(self)


def contraction_params(program: Program, steps: Iterable[int]) -> tuple[str, ...]:
    """The weights and biases of the contractions among ``steps``."""
    forms = (program.steps[i].form for i in steps)
    return tuple(dict.fromkeys(p.name for form in forms if isinstance(form, Contract) for p in form_params(form)))


def underived(program: Program, names: Iterable[str]) -> tuple[str, ...]:
    """The tensors from which ``program`` derives the tensors ``names``, or those themselves if it does not."""
    calls = {derived.name: derived.call for derived in program.derived}
    pending = list(names)
    reached: dict[str, None] = {}
    for name in pending:  # it grows
        if name in calls:
            pending += [p.name for p in params_in(calls[name]) if p.name not in pending]
        else:
            reached[name] = None
    return tuple(reached)


def plan(
    program: Program,
    seeds: int,
    dtype: torch.dtype = torch.float32,
    *,
    machine: Machine | NoKernels,
    wanted: tuple[int, ...] | None = None,
    wrt: tuple[int, ...] | None = None,
    reverse: bool = False,
) -> Plan:
    """The plan of ``program`` for ``seeds`` seeds per sample on ``machine``.

    ``wanted``: the values that a forward pass computes (then ``seeds`` is 0); by default a Jacobian with respect to the
    inputs ``wrt`` (by default all) is planned.  ``reverse``: in reverse mode, with the seeds at the outputs.
    """
    original, cast_dtype = program, None
    opaque = any(isinstance(s.form, Opaque) for s in program.steps)  # a call that torch runs may name a dtype
    if isinstance(machine, Device) and dtype in CAST_DTYPES and not opaque:
        cast_dtype, dtype = dtype, torch.float32
    if wanted is None and not program.slopes:
        program = prune(program)
        if machine and not isinstance(machine, Device):
            program = exchange_axes(program)
    chosen = None
    if wanted is None and not reverse:
        chosen = direction.choose(program, seeds, range(len(program.inputs)) if wrt is None else wrt)
    heavy = heavy_layers(program) if seeds and machine and not isinstance(machine, Device) else {}
    choices = [choose_implementation(program, i, dtype, machine, heavy.get(i)) for i in range(len(program.steps))]
    steps = list(range(len(choices))) if wanted is None else graph.steps_to(program, wanted)
    wanted = (program.output,) if wanted is None else wanted
    chains = Chains(program, machine, dtype.itemsize)
    groups: tuple[Group, ...] = ()
    instead: Parts | ForwardMode | None = None
    if chosen is not None and chosen.is_forward:
        choices = []
        instead = _forward_mode(program, range(len(program.inputs)) if wrt is None else wrt, dtype, machine)
    else:
        partition = Partition(chains, seeds, steps, wanted, [c.implementation.chained for c in choices])
        groups = partition.groups()
        for i, reason in partition.too_large.items():
            choices[i] = choose_implementation(program, i, dtype, machine, reason)
        if chosen is not None and chosen.cut is not None:
            before, after = direction.split_at(program, chosen.cut.value)
            first = plan(before, chosen.cut.width, dtype, machine=machine, wrt=wrt)
            instead = Parts(first, plan(after, seeds, dtype, machine=machine))
    return Plan(
        original, program, machine, dtype, seeds, wanted, groups, tuple(choices), chains, chosen, instead, cast_dtype
    )


def _forward_mode(
    program: Program, wrt: Sequence[int], dtype: torch.dtype, machine: Machine | NoKernels
) -> ForwardMode:
    transposed = transpose(program, wrt, computed=not isinstance(machine, Device))
    inner = plan(transposed.program, transposed.tangents, dtype, machine=machine, reverse=True)
    read = tuple(dict.fromkeys((*values_read(program, transposed.slopes), program.output)))
    return ForwardMode(transposed, inner, without_zeros(program, read), read)
