"""Implementations: an ordered list of ways to run each form.  A plan takes the first one that accepts the step.

Each implementation says why it refuses a step.  `Plan.steps` shows the chosen one, and the reasons of those before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..codegen.machine import Device, Machine, NoKernels
from ..codegen.support import NATIVE_DTYPES, unsupported_reason
from ..ir.program import Contract, Given, Index, LowRank, Opaque, Product, Program, Scale, Select, Sum, View
from ..ir.recurrent import GATES, recognize
from .heavy import too_heavy_reason

Reason = Callable[[Program, int, torch.dtype, Machine | NoKernels], str | None]
SILENT = ""  # a refusal that `explain` does not show: the implementation is for other steps
COMPUTING = (Contract, Scale, Select, LowRank, Product, Index, Given, Sum)  # forms that do more than View


@dataclass(frozen=True)
class Implementation:
    """One way to run a step.  ``unsupported_reason`` returns None if it accepts the step."""

    name: str
    forms: tuple[type, ...]
    unsupported_reason: Reason
    native: bool = False  # runs on gradkern's own kernels, or needs no work at all
    fused: bool = True  # all seeds at once
    chained: bool = False  # as part of a chain

    def path(self, machine: Machine | NoKernels) -> str:
        """The name as `explain` shows it."""
        return f"{self.name} {machine.isa}" if self in (KERNEL, WALK) and machine else self.name


@dataclass(frozen=True)
class Choice:
    """The implementation that runs a step, and why those before it in the list refused."""

    implementation: Implementation
    refusals: tuple[str, ...]


def kernel_reason(program: Program, i: int, dtype: torch.dtype, machine: Machine | NoKernels) -> str | None:
    """Why step ``i`` has no kernel; None if it has one."""
    step = program.steps[i]
    if isinstance(step.form, Opaque):
        return f"{step.op or step.form.call.op}: {step.form.reason}"
    if isinstance(machine, NoKernels):
        return machine.reason
    if dtype not in NATIVE_DTYPES:
        return f"the kernels take float32 and float64, not {str(dtype).removeprefix('torch.')}"
    reason = unsupported_reason(program, step)
    return too_heavy_reason(program, i) if reason is None and isinstance(machine, Device) else reason


def _walk_reason(program: Program, i: int, dtype: torch.dtype, machine: Machine | NoKernels) -> str | None:
    form = program.steps[i].form
    assert isinstance(form, Opaque)
    if recognize(form.call) is None:
        return "a recurrent layer with a state or with dropout of its own" if form.call.op in GATES else SILENT
    if isinstance(machine, NoKernels):
        return machine.reason
    if isinstance(machine, Device) or dtype not in NATIVE_DTYPES:
        return "the kernel that walks back through time takes float32 and float64 on a CPU"
    return None


def _recurrent_reason(program: Program, i: int, dtype: torch.dtype, machine: Machine | NoKernels) -> str | None:
    form = program.steps[i].form
    return None if isinstance(form, Opaque) and recognize(form.call) is not None else SILENT


def _view_reason(program: Program, i: int, dtype: torch.dtype, machine: Machine | NoKernels) -> str | None:
    return None if kernel_reason(program, i, dtype, machine) is None else SILENT  # torch's views are also free


CHAIN_VIEW = Implementation("view", (View,), _view_reason, native=True, chained=True)
TORCH_VIEW = Implementation("view", (View,), lambda *_: None, native=True)
KERNEL = Implementation("kernel", (*COMPUTING, Opaque), kernel_reason, native=True, chained=True)
ATEN = Implementation("aten, seeds folded", COMPUTING, lambda *_: None)
WALK = Implementation("walk", (Opaque,), _walk_reason, native=True)  # runtime/recurrent.py
RECURRENT = Implementation("aten, seeds folded", (Opaque,), _recurrent_reason)  # the same walk by torch's operations
PER_OP = Implementation("autograd, per op", (Opaque,), lambda *_: None, fused=False)  # torch's own VJP
IMPLEMENTATIONS = (CHAIN_VIEW, TORCH_VIEW, KERNEL, ATEN, WALK, RECURRENT, PER_OP)
#: A step of `KERNEL` that is done by a neighbour's kernel, which only the grouping knows.
FOLDED = Implementation("folded", COMPUTING, lambda *_: None, native=True, chained=True)


def choose_implementation(
    program: Program, i: int, dtype: torch.dtype, machine: Machine | NoKernels, too_large: str | None = None
) -> Choice:
    """The first implementation that takes step ``i``.

    ``too_large``: why no chain can, or should, hold the step.
    """
    refusals: list[str] = []
    for implementation in IMPLEMENTATIONS:
        if not isinstance(program.steps[i].form, implementation.forms):
            continue
        reason = implementation.unsupported_reason(program, i, dtype, machine)
        if reason is None and implementation.chained:
            reason = too_large
        if reason is None:
            return Choice(implementation, tuple(refusals))
        if reason != SILENT:
            refusals.append(reason)
    raise AssertionError(f"step {i}: no implementation takes {type(program.steps[i].form).__name__}")
