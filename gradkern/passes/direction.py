"""The direction of differentiation: from the outputs back, from the inputs forward, or both from a narrow value.

Reverse mode sends one cotangent per seed back through every step.  Forward mode (:mod:`.forward_mode`) sends one
tangent per number of the inputs ahead.  If every path from the inputs crosses a value ``v`` of K elements, the Jacobian
is ``dy/dv [S, K] · dv/dx [K, in]``, and each factor has its own direction.  The choice depends only on shapes and
counts of operations, not on data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..ir import graph
from ..ir.functions import RECTIFYING
from ..ir.macs import forward_macs, sides, tangent_macs
from ..ir.program import Contract, Dense, Program, Scale, View
from .forward_mode import no_rule_reason

Mode = Literal["reverse", "forward"]
CUT_WORTHWHILE = 1.25  # a cut has to save this factor of the operations, as it takes two calls and a product
#: The factor that forward mode has to save, as it writes all slopes to memory and skips no zeros of a pattern.
FORWARD_WORTHWHILE = 2.0


@dataclass(frozen=True)
class Section:
    """A network, or the part of it before or after a cut: the multiply-adds per sample in either mode."""

    reverse_macs: int
    forward_macs: int | None  # None: some step has no rule
    refusal: str = ""  # which step, and why

    @property
    def mode(self) -> Mode:
        if self.forward_macs is None or self.reverse_macs == 0:
            return "reverse"
        if self.reverse_macs < FORWARD_WORTHWHILE * self.forward_macs:
            return "reverse"
        return "forward"

    @property
    def cost(self) -> int:
        return self.reverse_macs if self.mode == "reverse" or self.forward_macs is None else self.forward_macs


@dataclass(frozen=True)
class Cut:
    """A Jacobian as a product of two, where ``value``, of ``width`` elements, is the output of the first."""

    value: int
    width: int
    before: Section
    after: Section
    cost: int


@dataclass(frozen=True)
class Direction:
    """The choice, and the counts that it was made by."""

    seeds: int
    tangents: int
    whole: Section
    cut: Cut | None = None

    @property
    def is_forward(self) -> bool:
        """Whether the whole network runs in forward mode."""
        return self.cut is None and self.whole.mode == "forward"

    def __str__(self) -> str:
        whole, cut = self.whole, self.cut
        if cut is not None:
            modes = ""
            if "forward" in (cut.before.mode, cut.after.mode):
                modes = f", {cut.before.mode} mode up to it and {cut.after.mode} mode from it on"
            fewer = f", {whole.cost / cut.cost:.2g} times fewer" if cut.cost else ""
            return (
                f"seeds start at v{cut.value} ({cut.width} elements{modes}), then one multiplication: "
                f"{_millions(whole.cost)} -> {_millions(cut.cost)} million multiply-adds{fewer}"
            )
        reverse = (
            f"reverse mode from {self.seeds} output{'s' * (self.seeds != 1)}",
            f"{_millions(whole.reverse_macs)} million multiply-adds",
        )
        if whole.forward_macs is None:  # there is nothing to compare, and steps that torch runs have no count
            return f"{reverse[0]} (forward mode: {whole.refusal})"
        forward = (
            f"forward mode from {self.tangents} input{'s' * (self.tangents != 1)}",
            f"{_millions(whole.forward_macs)} million multiply-adds",
        )
        chosen, other = (forward, reverse) if self.is_forward else (reverse, forward)
        return f"{': '.join(chosen)} ({': '.join(other)})"


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g}"


def choose(program: Program, seeds: int, wrt: Sequence[int]) -> Direction:
    """The direction with the fewest multiply-adds, for ``seeds`` outputs and all numbers of the inputs ``wrt``."""
    counts = _Counts(program, seeds, tuple(wrt))
    whole = counts.side(None, None)
    one_way = program.slopes or any(isinstance(s.form, Scale) and s.form.function in RECTIFYING for s in program.steps)
    if one_way:  # slopes are inputs too, and a rectified cotangent is not linear, so Jacobians cannot be multiplied
        return Direction(seeds, counts.tangents, whole)
    widest = max(seeds, counts.tangents)
    cuts = [counts.cut(v) for v in bottlenecks(program) if math.prod(program.shape(v)) < widest]
    best = min(cuts, key=lambda cut: (cut.cost, cut.value), default=None)
    if best is not None and whole.cost < CUT_WORTHWHILE * best.cost:
        best = None
    return Direction(seeds, counts.tangents, whole, best)


class _Counts:
    """Counts of a program's operations for a number of seeds and the inputs ``wrt``."""

    def __init__(self, program: Program, seeds: int, wrt: tuple[int, ...]) -> None:
        self.program, self.seeds, self.base = program, seeds, len(program.inputs)
        self.wrt, self.tangents = wrt, sum(math.prod(program.inputs[w]) for w in wrt)
        self.needed = self._steps_of(program.output)
        self.reached = graph.descendants(program, wrt)
        steps = range(len(program.steps))
        self.reverse_macs = [forward_macs(program, i) * sides(program, i) for i in steps]
        self.forward_macs = [tangent_macs(program, i) if self.base + i in self.reached else 0 for i in steps]
        reasons = {i: no_rule_reason(program, i) for i in steps if self.base + i in self.reached}
        self.refusals = {i: self._refusal(i, reason) for i, reason in reasons.items() if reason is not None}

    def _steps_of(self, value: int) -> frozenset[int]:
        """The steps that lead to a value."""
        return frozenset(v - self.base for v in graph.ancestors(self.program, [value]) if v >= self.base)

    def _refusal(self, i: int, reason: str) -> str:
        return f"v{self.base + i} ({self.program.steps[i].module or self.program.steps[i].op}): {reason}"

    def cut(self, value: int) -> Cut:
        width = math.prod(self.program.shape(value))
        before, after = self.side(None, value), self.side(value, None)
        return Cut(value, width, before, after, before.cost + after.cost + self.seeds * width * self.tangents)

    def side(self, start: int | None, end: int | None) -> Section:
        """The steps from a value (None: the inputs) to a value (None: the output)."""
        steps = self.needed if end is None else self._steps_of(end)
        if start is not None:
            steps -= self._steps_of(start)
        seeds = self.seeds if end is None else math.prod(self.program.shape(end))
        tangents = self.tangents if start is None else math.prod(self.program.shape(start))
        last = self.program.output if end is None else end
        back = sum(self.reverse_macs[i] for i in steps) - self._free_reverse(last)
        refused = min(steps & self.refusals.keys(), default=None)
        if refused is not None:
            return Section(seeds * back, None, self.refusals[refused])
        if last not in self.reached:
            return Section(seeds * back, None, "the output does not depend on the inputs")
        ahead = sum(self.forward_macs[i] for i in steps) - self._free_forward(start)
        return Section(seeds * back, tangents * ahead)

    def _is_linear_layer(self, i: int) -> bool:
        step = self.program.steps[i]
        return isinstance(step.form, Contract) and isinstance(step.form.map, Dense) and len(step.shape) == 1

    def _free_reverse(self, end: int) -> int:
        """One-hot seeds through a linear layer are rows of its weight, which need no computation."""
        while end >= self.base and isinstance(self.program.steps[end - self.base].form, View):
            (end,) = self.program.steps[end - self.base].inputs
        i = end - self.base
        return self.reverse_macs[i] if i >= 0 and self._is_linear_layer(i) else 0

    def _free_forward(self, start: int | None) -> int:
        """Tangents through the first linear layer are columns of its weight, which need no computation."""
        if start is None and len(self.wrt) > 1:
            return 0
        value = self.wrt[0] if start is None else start
        readers = self.program.consumers[value]
        while len(readers) == 1 and isinstance(self.program.steps[readers[0]].form, View):
            readers = self.program.consumers[self.base + readers[0]]
        return self.forward_macs[readers[0]] if len(readers) == 1 and self._is_linear_layer(readers[0]) else 0


def bottlenecks(program: Program) -> list[int]:
    """Values, other than inputs and the output, that every path from an input to the output crosses."""
    base = len(program.inputs)
    needed = graph.ancestors(program, [program.output])
    # Values are in topological order, so all paths cross a value if no edge leaps over it.
    reach = 0  # the last value that anything read so far leads to
    crossed = []
    last_read = dict.fromkeys(needed, -1)
    for i, step in enumerate(program.steps):
        if base + i in needed:
            for v in step.inputs:
                last_read[v] = base + i
    for v in sorted(needed):
        if v >= base and v != program.output and reach <= v:
            crossed.append(v)
        reach = max(reach, last_read[v])
    return crossed


def split_at(program: Program, value: int) -> tuple[Program, Program]:
    """The network up to ``value``, and the network from there on."""
    before = graph.ancestors(program, [value])
    after = sorted(graph.ancestors(program, [program.output]) - before)
    steps = [v - len(program.inputs) for v in after]
    return graph.up_to(program, value), graph.part(program, [value], steps, program.output)
