"""The table that a plan prints: a row per step, why no faster implementation runs it, and shares of the operations."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..ir.macs import total_macs
from ..ir.program import Opaque, describe
from ..ir.recurrent import recognize
from ..passes.direction import Direction
from ..util.text import shorten
from .implementations import ATEN, FOLDED, KERNEL, Choice, Implementation
from .timing import Timing

if TYPE_CHECKING:
    from .plan import Plan

WIDEST = 36  # characters of a layer or a form
NAMED = 3  # steps that are named with a reason that they share
PARAMETER = re.compile(r", %[\w.]+")  # the names of weights, which are those of the layer
LEGEND = {
    "kernel": "gradkern's own kernel",
    "folded": "done by the kernel of the step before",
    "view": "no work",
    "walk": "torch's forward pass, and gradkern's own kernel back through time for all outputs",
    "aten": "torch's operation, once for all outputs",
    "autograd": "torch differentiates this operation",
}


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
class Facts:
    """What `gradkern.explain` adds to a plan, from live tensors."""

    measured_macs: Mapping[int, int] = field(default_factory=dict)  # forward, per sample, of opaque steps
    fallback: str | None = None  # why plain torch runs every step with the present tensors
    timing: Timing | None = None  # of the plan and of autograd, if they were compared


NO_FACTS = Facts()


@dataclass(frozen=True)
class LocalSeeds:
    """Seeds, or tangents, that start in a chain and are local.

    ``share``: of their multiply-adds that is left; ``tile``: the neighbours that go together.
    """

    share: float
    tile: int
    seed: str = "seed"
    end: str = "output"
    where: str = ""

    def __str__(self) -> str:
        return (
            f"{self.where}local {self.seed}s: {100 * self.share:.0f} % of their multiply-adds are left where "
            f"{self.tile} neighbouring {self.seed}s reach from the middle of the {self.end}"
        )


class Table(ABC):
    """What ``explain`` prints of a plan.  Subclasses have the facts; the text is made here."""

    direction: Direction | None
    cast_dtype: torch.dtype | None
    seeds: int
    facts: Facts

    @property
    @abstractmethod
    def group_count(self) -> int:
        """The groups of the steps that are shown."""

    @property
    @abstractmethod
    def steps(self) -> tuple[PlanStep, ...]:
        """The rows in the order of ``program.steps``, or of the Programs that run if part of it is in forward mode."""

    @property
    @abstractmethod
    def local_seeds(self) -> tuple[LocalSeeds, ...]:
        """Where seeds or tangents are local."""

    @property
    def work(self) -> str:
        """What goes through the network together."""
        return f"{self.seeds} seed{'s' * (self.seeds != 1)}"

    def direction_lines(self) -> Iterator[str]:
        """The direction of differentiation."""
        if self.direction is not None:
            yield str(self.direction)

    @property
    def timing(self) -> Timing | None:
        """The time of a call by this plan and on autograd, if they were compared."""
        return self.facts.timing

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
        return f"<Plan: {self._summary()}>"

    def __str__(self) -> str:
        rows = [("value", "layer", "form", "shape", "path", "MMAC")]
        for s in self.steps:
            shape = "×".join(map(str, s.shape)) or "()"
            layer = shorten(s.module or s.op, WIDEST, keep_end=True)  # its place in the model
            form = shorten(PARAMETER.sub("", s.form), WIDEST)
            rows.append((f"v{s.value}", layer, form, shape, s.path, f"{s.macs / 1e6:.3g}"))
        widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(_legend({s.path for s in self.steps}))
        lines += self._refusals()
        lines += self.direction_lines()
        if self.facts.fallback is None:
            lines += map(str, self.local_seeds)
        if self.cast_dtype is not None:
            name = str(self.cast_dtype).removeprefix("torch.")
            lines.append(f"{name} is cast to float32 on the way in, and back on the way out")
        if self.facts.fallback is not None:
            lines.append(f"with the present tensors, no kernel runs: {self.facts.fallback}")
        lines.append(self._summary())
        if self.timing is not None:
            lines.append(self.timing.text(*() if self.native_share else ("planned ATen calls",)))
        return "\n".join(lines)

    def _summary(self) -> str:
        """The last line: seeds, groups, and shares of the operations."""
        return (
            f"{self.work}, {self.group_count} group{'s' * (self.group_count != 1)}, "
            f"fused {100 * self.fused_share:.1f} % of the operations, own kernels {100 * self.native_share:.1f} %"
        )

    def _refusals(self) -> Iterator[str]:
        """Why no faster implementation runs the steps, a line per reason."""
        refused: dict[str, list[str]] = {}
        for s in self.steps:
            for reason in s.refusals:
                refused.setdefault(reason, []).append(f"v{s.value} ({s.module or s.op})")
        for reason, steps in refused.items():
            if reason != self.facts.fallback:
                more = f" and {len(steps) - NAMED} more" if len(steps) > NAMED else ""
                yield f"{', '.join(steps[:NAMED])}{more}: {reason}"


def rows_of_group(
    plan: Plan,
    number: int,
    steps: Sequence[int],
    choices: Sequence[Choice],
    folded: Collection[int],
    seeds: Sequence[int],
) -> Iterator[PlanStep]:
    """The rows of one group.

    ``folded``: the steps that a neighbour's kernel does; ``seeds``: per step, how many cotangents go back through it.
    """
    program, facts, base = plan.program, plan.facts, len(plan.program.inputs)
    for i in steps:
        step, implementation, refusals = program.steps[i], choices[i].implementation, choices[i].refusals
        if i in folded:
            implementation = FOLDED
        if facts.fallback is not None and implementation in (KERNEL, FOLDED):
            implementation, refusals = ATEN, (facts.fallback, *refusals)
        macs = own = total_macs(program, i, seeds[i], facts.measured_macs.get(i))
        recurrent = recognize(step.form.call) if isinstance(step.form, Opaque) else None
        if recurrent is not None:
            length, inputs = program.shape(step.inputs[0])
            values, own = recurrent.macs(length, inputs, step.shape[-1], seeds[i])
            macs = values + own
        yield PlanStep(
            value=base + i,
            form=describe(step.form),
            shape=step.shape,
            implementation=implementation,
            path=implementation.path(plan.machine),
            refusals=refusals,
            op=step.op,
            module=step.module,
            macs=macs,
            native_macs=own * implementation.native,
            group=number,
        )


def _legend(paths: set[str]) -> str:
    """The explanation of the table's last two columns."""
    words = [f"{name}: {LEGEND[name]}" for name in LEGEND if any(p.split(",")[0].split()[0] == name for p in paths)]
    counted = "MMAC: million multiply-adds per sample, forward and backward (counts by mode: backward). "
    return counted + ("Paths: " + "; ".join(words) + "." if words else "")
