"""Counting operations: dense multiply-adds per sample, from shapes alone."""

from __future__ import annotations

import math

from . import program as ir


def forward_macs(program: ir.Program, i: int) -> int:
    """Dense multiply-adds of step ``i`` for one sample; elementwise work counts one per element, and views count zero.

    An `Opaque` step counts one per element here; the planner uses measured numbers if they are known.
    """
    step = program.steps[i]
    out = math.prod(step.shape)
    source = program.shape(step.inputs[0]) if step.inputs else ()
    match step.form:
        case ir.Contract(map=ir.Dense()):
            return out * source[-1]
        case ir.Contract(map=ir.Windows() as w):
            return out * w.taps * source[0] // w.groups
        case ir.Contract(map=ir.Positions(axes)):
            return source[0] * math.prod(sum(len(c) for _, c in rows) for rows in axes)
        case ir.Contract(map=ir.Channels()):
            return out
        case ir.Select(windows=w):
            return out * w.taps
        case ir.LowRank():
            return 3 * out
        case ir.Sum():
            return out * (len(step.inputs) - 1)
        case ir.Product(function="matmul"):
            return out * source[-1]
        case ir.View() | ir.Index():
            return 0
        case ir.Opaque():
            return max(1, out, sum(math.prod(program.shape(v)) for v in step.inputs))
    return out


def sides(program: ir.Program, i: int) -> int:
    """How many products, each as expensive as the forward, the backward of a seed takes: two if both factors vary."""
    return 2 if program.steps[i].form == ir.Product("matmul") else 1


def tangent_macs(program: ir.Program, i: int) -> int:
    """Multiply-adds of one tangent through step ``i`` in forward mode (:mod:`gradkern.passes.forward_mode`).

    There a convolution visits every position that it reads, whatever its stride.  But a transposed convolution skips
    the zeros that an `Index` in front of it inserts between elements.
    """
    step = program.steps[i]
    if not (isinstance(step.form, ir.Contract) and isinstance(step.form.map, ir.Windows)):
        return forward_macs(program, i) * sides(program, i)
    w, source = step.form.map, step.inputs[0]
    elements, before = math.prod(program.shape(source)), source - len(program.inputs)
    if before >= 0 and isinstance(program.steps[before].form, ir.Index) and len(program.consumers[source]) == 1:
        elements = min(elements, sum(math.prod(program.shape(v)) for v in program.steps[before].inputs))
    return elements * w.taps * step.shape[0] // w.groups


def total_macs(program: ir.Program, i: int, seeds: int, forward: int | None = None) -> int:
    """Multiply-adds of the forward, and of the backward, which costs as much as the forward for each of the seeds."""
    return (forward_macs(program, i) if forward is None else forward) * (1 + sides(program, i) * seeds)
