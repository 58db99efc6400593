"""Plan: how each step of a Program runs, as a pure function of the program, the machine and the seeds.

`plan` prunes the program, chooses the direction of differentiation, and cuts the DAG into groups.  Plans are of three
kinds: groups that run one after another (`GroupedPlan`), a product of two Jacobians (`ProductPlan`), and the forward
mode of a network (`ForwardPlan`).  A plan owns the chains that are lowered for it.  ``str(plan)`` is the table that
``gradkern.explain`` prints.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..codegen.chain import Chain
from ..codegen.machine import Device, Machine, NoKernels
from ..codegen.support import CAST_DTYPES
from ..ir import graph
from ..ir.calls import form_params, params_in
from ..ir.program import Contract, Opaque, Program
from ..passes import direction
from ..passes.direction import Cut, Direction
from ..passes.exchange_axes import exchange_axes
from ..passes.forward_mode import Transposed, transpose, values_read
from ..passes.phases import without_zeros
from ..passes.prune_positions import prune
from ..util.chunks import element_counts, stepwise_bytes
from .groups import Chains, Group, Partition
from .heavy import heavy_layers
from .implementations import Choice, choose_implementation
from .table import NO_FACTS, Facts, LocalSeeds, PlanStep, Table, rows_of_group
from .timing import Timing


@dataclass(frozen=True, repr=False, kw_only=True)
class Plan(Table):
    """How a Program runs for a number of seeds on a machine.

    ``str()`` is a table.  It shows the implementation of each step and why there is no faster one, where seeds start,
    and the shares of the operations that are fused (all seeds at once) and that run on gradkern's own kernels.
    """

    original: Program  # as the caller gave it; runs if weights are not finite
    program: Program  # the one that runs, without the positions that the output does not need
    machine: Machine | NoKernels
    dtype: torch.dtype  # of the computation
    seeds: int
    wanted: tuple[int, ...]  # the values to compute: the program's output, or those that a forward pass is asked for
    direction: Direction | None = None  # None for a forward pass
    cast_dtype: torch.dtype | None = None  # the inputs' dtype, if the plan computes in float32 instead
    facts: Facts = NO_FACTS

    @property
    def bottleneck(self) -> Cut | None:
        """Where the seeds start, if not at the outputs."""
        return None if self.direction is None else self.direction.cut

    @property
    @abstractmethod
    def native(self) -> bool:
        """Whether any kernel runs."""

    @property
    def single_chain(self) -> bool:
        """Whether one native group runs everything, so that nothing in between is written to memory."""
        return False

    @property
    @abstractmethod
    def packed_names(self) -> tuple[str, ...]:
        """The tensors of the Program that are packed for kernels, or from which a Program made from it derives such."""

    @property
    @abstractmethod
    def bytes_per_sample(self) -> int:
        """The bytes that a call allocates for a sample in addition to the result."""

    @cached_property
    def live_names(self) -> tuple[str, ...]:
        """The live tensors of the network, as it was given, that are packed or that packed ones are derived from."""
        return underived(self.original, self.packed_names)

    def explained(self, measured_macs: Mapping[int, int], fallback: str | None) -> Plan:
        """The plan with facts that only live tensors tell.

        ``measured_macs``: multiply-adds of opaque steps, by step of ``program``; ``fallback``: why no kernel can run.
        """
        return replace(self, facts=replace(self.facts, measured_macs=dict(measured_macs), fallback=fallback))

    def timed(self, timing: Timing | None) -> Plan:
        """The plan with the measured time of a call, which says that autograd runs instead if that was faster."""
        return replace(self, facts=replace(self.facts, timing=timing))


@dataclass(frozen=True, repr=False, kw_only=True)
class GroupedPlan(Plan):
    """Groups in execution order, and the implementation of each step."""

    groups: tuple[Group, ...]
    choices: tuple[Choice, ...]  # per step
    chains: Chains = field(compare=False)

    @cached_property
    def native(self) -> bool:
        return any(g.native for g in self.groups)

    @cached_property
    def single_chain(self) -> bool:
        return len(self.groups) == 1 and self.groups[0].native and self.groups[0].live_out == self.wanted

    @cached_property
    def packed_names(self) -> tuple[str, ...]:
        native = {i for g in self.groups if g.native for i in g.steps}
        return contraction_params(self.program, [i for i in graph.steps_to(self.program, self.wanted) if i in native])

    @cached_property
    def bytes_per_sample(self) -> int:
        if self.single_chain:
            return self.dtype.itemsize * self.program.outputs
        base = len(self.program.inputs)
        stored = [v for g in self.groups for v in (g.live_out if g.native else (base + i for i in g.steps))]
        shapes = [*self.program.inputs, *map(self.program.shape, stored)]
        return stepwise_bytes(shapes, self.seeds, self.dtype.itemsize)

    def chain(self, group: int, seeds: int, wrt: tuple[int, ...], onehot: bool) -> Chain:
        """The chain of a native group, lowered once; see `Chains.get`."""
        return self.chains.get(self.groups[group], seeds, wrt, onehot)

    # ---- the table

    @property
    def group_count(self) -> int:
        return len(self.groups)

    @cached_property
    def steps(self) -> tuple[PlanStep, ...]:
        return self.rows(None)

    def rows(self, cut: Cut | None) -> tuple[PlanStep, ...]:
        """The rows in the order of ``program.steps``.  ``cut``: where seeds start, if not at the outputs."""
        seeds = [self.seeds] * len(self.program.steps)
        if cut is not None:
            before = graph.ancestors(self.program, [cut.value])
            base = len(self.program.inputs)
            seeds = [cut.width if base + i in before else self.seeds for i in range(len(seeds))]
        folded = {i for g in self.groups if g.native for i in self.chains.folded_steps(g)}
        rows: list[PlanStep] = []
        for number, group in enumerate(self.groups):
            rows += rows_of_group(self, number, group.steps, self.choices, folded, seeds)
        return tuple(sorted(rows, key=lambda row: row.value))

    @cached_property
    def local_seeds(self) -> tuple[LocalSeeds, ...]:
        last = self.groups[-1] if self.groups else None
        if not self.seeds or last is None or not last.native or isinstance(self.machine, Device):
            return ()
        if last.live_out != (self.program.output,):
            return ()
        inputs = [v for v in range(len(self.program.inputs)) if v not in self.program.slopes]
        passed = graph.descendants(self.program, inputs)
        chain = self.chain(len(self.groups) - 1, self.seeds, tuple(v for v in last.live_in if v in passed), True)
        return (LocalSeeds(chain.local_share, chain.seed_tile),) if chain.local_share < 1 else ()


@dataclass(frozen=True, repr=False, kw_only=True)
class ProductPlan(Plan):
    """The plans of a network up to its bottleneck and from there on; the Jacobian is the product of theirs.

    ``whole``: groups of the whole network, of which only the table is shown, with its own numbers and modules.
    """

    before: Plan
    after: Plan
    whole: GroupedPlan

    @property
    def parts(self) -> tuple[Plan, Plan]:
        return self.before, self.after

    @property
    def native(self) -> bool:
        return any(part.native for part in self.parts)

    @cached_property
    def packed_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.packed_names))

    @cached_property
    def bytes_per_sample(self) -> int:
        assert self.bottleneck is not None
        features = element_counts(self.program.inputs)[0]
        factors = self.bottleneck.width * (features + self.seeds) + self.seeds * features
        return self.dtype.itemsize * factors + max(part.bytes_per_sample for part in self.parts)

    # ---- the table

    @property
    def group_count(self) -> int:
        return len(self.whole.groups)

    @cached_property
    def steps(self) -> tuple[PlanStep, ...]:
        if all(isinstance(part, GroupedPlan) for part in self.parts):
            return replace(self.whole, facts=self.facts).rows(self.bottleneck)
        facts = Facts(fallback=self.facts.fallback)
        return tuple(row for part in self.parts for row in replace(part, facts=facts).steps)

    def direction_lines(self) -> Iterator[str]:
        yield str(self.direction)
        for where, part in zip(("up to", "from"), self.parts, strict=True):
            if not isinstance(part, GroupedPlan):
                yield f"  {where} there: {part.direction}"

    @cached_property
    def local_seeds(self) -> tuple[LocalSeeds, ...]:
        parts = zip(("up to", "from"), self.parts, strict=True)
        return tuple(replace(local, where=f"  {where} there: ") for where, part in parts for local in part.local_seeds)


@dataclass(frozen=True, repr=False, kw_only=True)
class ForwardPlan(Plan):
    """Forward mode: the plan of the Program whose reverse mode it is, for all tangents as seeds."""

    transposed: Transposed
    inner: GroupedPlan
    values: Program  # the network as its forward pass runs
    read: tuple[int, ...]  # the needed ones of its values, by their numbers in the network

    @property
    def native(self) -> bool:
        return self.inner.native

    @cached_property
    def packed_names(self) -> tuple[str, ...]:
        of_values = underived(self.values, contraction_params(self.values, range(len(self.values.steps))))
        return tuple(dict.fromkeys((*self.inner.live_names, *of_values)))

    @cached_property
    def bytes_per_sample(self) -> int:
        inner = self.inner.program  # its inputs are the slopes; the result is also stored transposed
        numbers = sum(element_counts(shapes)[0] for shapes in (self.program.shapes, inner.inputs))
        result = 2 * inner.outputs * self.program.outputs
        return self.dtype.itemsize * (numbers + result) + self.inner.bytes_per_sample

    # ---- the table

    @property
    def group_count(self) -> int:
        return len(self.inner.groups)

    @cached_property
    def steps(self) -> tuple[PlanStep, ...]:
        return replace(self.inner, facts=Facts(fallback=self.facts.fallback)).steps

    @property
    def work(self) -> str:
        return f"{self.transposed.tangents} tangents"

    @cached_property
    def local_seeds(self) -> tuple[LocalSeeds, ...]:
        return tuple(replace(local, seed="tangent", end="input") for local in self.inner.local_seeds)


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
    differentiated = range(len(program.inputs)) if wrt is None else wrt
    chosen = None
    if wanted is None and not reverse:
        chosen = direction.choose(program, seeds, differentiated)
    base: dict[str, Any] = {  # the fields of every plan
        "original": original,
        "program": program,
        "machine": machine,
        "dtype": dtype,
        "seeds": seeds,
        "wanted": (program.output,) if wanted is None else wanted,
        "direction": chosen,
        "cast_dtype": cast_dtype,
    }
    if chosen is not None and chosen.is_forward:
        transposed = transpose(program, differentiated, computed=not isinstance(machine, Device))
        inner = plan(transposed.program, transposed.tangents, dtype, machine=machine, reverse=True)
        assert isinstance(inner, GroupedPlan)
        read = tuple(dict.fromkeys((*values_read(program, transposed.slopes), program.output)))
        values = without_zeros(program, read)
        return ForwardPlan(**base, transposed=transposed, inner=inner, values=values, read=read)
    steps = list(range(len(program.steps))) if wanted is None else graph.steps_to(program, wanted)
    whole = GroupedPlan(**base, **_groups(program, steps, base["wanted"], seeds, dtype, machine))
    if chosen is None or chosen.cut is None:
        return whole
    before, after = direction.split_at(program, chosen.cut.value)
    return ProductPlan(
        **base,
        before=plan(before, chosen.cut.width, dtype, machine=machine, wrt=wrt),
        after=plan(after, seeds, dtype, machine=machine),
        whole=whole,
    )


def _groups(
    program: Program,
    steps: list[int],
    wanted: tuple[int, ...],
    seeds: int,
    dtype: torch.dtype,
    machine: Machine | NoKernels,
) -> dict[str, Any]:
    """The fields of a `GroupedPlan` that computes the values ``wanted`` by ``steps``."""
    heavy = heavy_layers(program) if seeds and machine and not isinstance(machine, Device) else {}
    choices = [choose_implementation(program, i, dtype, machine, heavy.get(i)) for i in range(len(program.steps))]
    chains = Chains(program, machine, dtype.itemsize)
    partition = Partition(chains, seeds, steps, wanted, [c.implementation.chained for c in choices])
    groups = partition.groups()
    for i, reason in partition.too_large.items():
        choices[i] = choose_implementation(program, i, dtype, machine, reason)
    return {"groups": groups, "choices": tuple(choices), "chains": chains}
