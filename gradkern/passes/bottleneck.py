"""Where seeds start: at the outputs, or at a bottleneck that everything passes through.

With C outputs and a value ``v`` of K elements that every path from the inputs crosses, the Jacobian is
``dy/dv [C, K] · dv/dx [K, in]``.  Where K is well below C it is cheaper to send K seeds through the layers before
``v`` and to multiply once.  The choice is pure: shapes and counts of operations, no data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..ir import graph
from ..ir.functions import RECTIFYING
from ..ir.macs import forward_macs, sides
from ..ir.program import Program, Scale

WORTHWHILE = 1.25  # times fewer operations; otherwise two calls and a product are not worth it


@dataclass(frozen=True)
class Bottleneck:
    """Seeds start at ``value``, which has ``width`` elements.  Costs are multiply-adds per sample of the backward."""

    value: int
    width: int
    cost: int
    unsplit: int  # with the seeds at the outputs

    def __str__(self) -> str:
        return (
            f"seeds start at v{self.value} ({self.width} elements), then one multiplication: "
            f"{self.unsplit / 1e6:.3g} -> {self.cost / 1e6:.3g} million multiply-adds backward, "
            f"{self.unsplit / self.cost:.2g} times fewer"
        )


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


def cost(program: Program, seeds: int, value: int | None, macs: Callable[[int], int]) -> int:
    """Multiply-adds of the backward per sample with the seeds at ``value`` (None: at the outputs).

    ``seeds`` cotangents pass every step after the value, and one cotangent per element of the value passes every step
    before it.  The multiplication takes ``seeds × elements × inputs``.
    """
    base = len(program.inputs)
    needed = [v - base for v in graph.ancestors(program, [program.output]) if v >= base]
    if value is None:
        return seeds * sum(macs(i) for i in needed)
    before = {v - base for v in graph.ancestors(program, [value]) if v >= base}
    width = math.prod(program.shape(value))
    features = sum(math.prod(shape) for shape in program.inputs)
    crossed = width * sum(macs(i) for i in before) + seeds * sum(macs(i) for i in needed if i not in before)
    return crossed + seeds * width * features


def cheapest(program: Program, seeds: int) -> Bottleneck | None:
    """The cheapest place for the seeds; None if that is the outputs, or hardly better than they are."""
    if program.slopes or any(isinstance(s.form, Scale) and s.form.function in RECTIFYING for s in program.steps):
        return None  # slopes are inputs too, and a rectified cotangent is not linear, so Jacobians cannot be multiplied

    def count(i: int) -> int:
        return forward_macs(program, i) * sides(program, i)

    unsplit = cost(program, seeds, None, count)
    narrow = [v for v in bottlenecks(program) if math.prod(program.shape(v)) < seeds]
    best = min(((cost(program, seeds, v, count), v) for v in narrow), default=(unsplit, -1))
    if not narrow or unsplit < WORTHWHILE * best[0]:
        return None
    return Bottleneck(best[1], math.prod(program.shape(best[1])), best[0], unsplit)


def split_at(program: Program, value: int) -> tuple[Program, Program]:
    """The network up to ``value``, and the network from there on."""
    before = graph.ancestors(program, [value])
    after = sorted(graph.ancestors(program, [program.output]) - before)
    steps = [v - len(program.inputs) for v in after]
    return graph.up_to(program, value), graph.part(program, [value], steps, program.output)
