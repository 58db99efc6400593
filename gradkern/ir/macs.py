"""Counting operations: dense multiply-adds per sample, from shapes alone."""

from __future__ import annotations

import math

from . import program as ir


def forward_macs(program: ir.Program, i: int) -> int:
    """Dense multiply-adds of step ``i`` for one sample; elementwise work counts one per element, and views count zero.

    An `Opaque` step counts its elements here; the planner uses better numbers if they are known.
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
    """How many products, each as expensive as the forward, the backward of one seed takes: two if both sides vary."""
    return 2 if program.steps[i].form == ir.Product("matmul") else 1


def total_macs(program: ir.Program, i: int, seeds: int, forward: int | None = None) -> int:
    """The forward, and the backward of ``seeds`` seeds, which costs as much as the forward for each seed."""
    return (forward_macs(program, i) if forward is None else forward) * (1 + sides(program, i) * seeds)
