"""The graph of a Program: the ancestors and descendants of values, and parts as separate Programs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from .calls import rewrite
from .program import Opaque, Program, Step, Value


def ancestors(program: Program, values: Iterable[int], without: Collection[int] = ()) -> set[int]:
    """These values and everything that they are computed from; the search stops at the values ``without``."""
    base, reached, stack = len(program.inputs), set(), list(values)
    while stack:
        v = stack.pop()
        if v not in reached and v not in without:
            reached.add(v)
            stack.extend(program.steps[v - base].inputs if v >= base else ())
    return reached


def descendants(program: Program, values: Iterable[int], without: Collection[int] = ()) -> set[int]:
    """These values and everything that is computed from them; the search stops at the values ``without``."""
    base, reached = len(program.inputs), set(values)
    for i, step in enumerate(program.steps):
        if base + i not in without and not reached.isdisjoint(step.inputs):
            reached.add(base + i)
    return reached


def steps_to(program: Program, values: Iterable[int], among: Collection[int] | None = None) -> list[int]:
    """The indices of the steps that these values need, in order; with ``among``, only those steps are considered."""
    base, needed = len(program.inputs), set(values)
    steps = range(len(program.steps)) if among is None else sorted(among)
    kept = []
    for i in reversed(steps):
        if base + i in needed:
            needed.update(program.steps[i].inputs)
            kept.append(i)
    return kept[::-1]


def renumber(step: Step, number: Mapping[int, int]) -> Step:
    """A step with new indices for the values that it reads."""
    form = step.form
    if isinstance(form, Opaque):
        form = replace(form, call=rewrite(form.call, lambda x: Value(number[x.id]) if isinstance(x, Value) else x))
    return replace(step, form=form, inputs=tuple(number[v] for v in step.inputs))


def part(program: Program, inputs: Sequence[int], steps: Sequence[int], output: int) -> Program:
    """The steps ``steps`` as a Program that reads the values ``inputs`` and computes ``output`` (-1 for none)."""
    base = len(program.inputs)
    number = {v: k for k, v in enumerate((*inputs, *(base + i for i in steps)))}
    kept = tuple(renumber(program.steps[i], number) for i in steps)
    return Program(tuple(program.shape(v) for v in inputs), kept, number.get(output, -1), program.derived)


def up_to(program: Program, value: int) -> Program:
    """The Program with ``value`` as its output."""
    return part(program, range(len(program.inputs)), steps_to(program, [value]), value)
