"""Implementations: for every form an ordered list of ways to run it; the first that takes the step wins.

Each says why it does not take a step.  `Plan.steps` shows which one took it and what those before it said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..codegen.cuda.lowering import too_heavy_reason
from ..codegen.machine import Device, Machine
from ..codegen.support import NATIVE_DTYPES, unsupported_reason
from ..ir.program import Contract, Given, Index, LowRank, Opaque, Product, Program, Scale, Select, Sum, View
from ..ir.recurrent import GATES, recognise

Reason = Callable[[Program, int, torch.dtype, Machine | None], str | None]
SILENT = ""  # a refusal that `explain` does not show: nobody expects this implementation here
COMPUTING = (Contract, Scale, Select, LowRank, Product, Index, Given, Sum)  # forms that do more than View


@dataclass(frozen=True)
class Implementation:
    """One way to run a step.  ``unsupported_reason`` is None where it takes the step."""

    name: str
    forms: tuple[type, ...]
    unsupported_reason: Reason
    native: bool = False  # runs on gradkern's own kernels, or needs no work at all
    fused: bool = True  # all seeds at once

    def path(self, machine: Machine | None) -> str:
        """The name as `explain` shows it."""
        return f"{self.name} {machine.isa}" if self is KERNEL and machine is not None else self.name


def kernel_reason(program: Program, i: int, dtype: torch.dtype, machine: Machine | None) -> str | None:
    """Why step ``i`` has no kernel; None where it has one."""
    step = program.steps[i]
    if isinstance(step.form, Opaque):
        return f"{step.op or step.form.call.op}: {step.form.reason}"
    if machine is None:
        return "the compiled extension is missing or has no kernels for this device"
    if dtype not in NATIVE_DTYPES:
        return f"the kernels take float32 and float64, not {str(dtype).removeprefix('torch.')}"
    reason = unsupported_reason(program, step)
    return too_heavy_reason(program, i) if reason is None and isinstance(machine, Device) else reason


def _recurrent_reason(program: Program, i: int, dtype: torch.dtype, machine: Machine | None) -> str | None:
    form = program.steps[i].form
    assert isinstance(form, Opaque)
    if recognise(form.call) is not None:
        return None
    return "a recurrent layer with a state or with dropout of its own" if form.call.op in GATES else SILENT


AS_VIEW = Implementation("view", (View,), lambda *_: None, native=True)
FOLDED = Implementation(
    "folded", COMPUTING, lambda *_: SILENT, native=True
)  # into a neighbour: only the grouping knows
KERNEL = Implementation("kernel", (*COMPUTING, Opaque), kernel_reason, native=True)
ATEN = Implementation("aten, seeds folded", COMPUTING, lambda *_: None)
RECURRENT = Implementation("aten, seeds folded", (Opaque,), _recurrent_reason)  # runtime/recurrent.py
PER_OP = Implementation("autograd, per op", (Opaque,), lambda *_: None, fused=False)  # torch's own VJP, under vmap
IMPLEMENTATIONS = (AS_VIEW, FOLDED, KERNEL, ATEN, RECURRENT, PER_OP)


def choose_implementation(
    program: Program, i: int, dtype: torch.dtype, machine: Machine | None, settled: Mapping[Implementation, str | None]
) -> tuple[Implementation, tuple[str, ...]]:
    """The first implementation that takes step ``i``, and the reasons of those before it.

    ``settled``: what the grouping has decided beyond what the step alone tells.
    """
    refusals: list[str] = []
    for implementation in IMPLEMENTATIONS:
        if not isinstance(program.steps[i].form, implementation.forms):
            continue
        reason = (
            settled[implementation]
            if implementation in settled
            else implementation.unsupported_reason(program, i, dtype, machine)
        )
        if reason is None:
            return implementation, tuple(refusals)
        if reason != SILENT:
            refusals.append(reason)
    raise AssertionError(f"step {i}: no implementation takes {type(program.steps[i].form).__name__}")
