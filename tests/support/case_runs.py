"""Programs of the cases, traced once per process, and the results of the engine and the oracle for them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from gradkern.ir.program import Program
from gradkern.runtime import executor
from tests.cases import CASES
from tests.support import capturing, oracle

EXACT = 1e-10  # relative tolerance in float64


@cache
def program_of(name: str) -> Program:
    case = CASES[name]
    with torch.no_grad():
        return capturing.to_program(case.build(dtype=torch.float64), case.inputs(4, dtype=torch.float64))


def parts(name: str, n: int, dtype: torch.dtype = torch.float64, seed: int = 1):
    """A case's model, its samples, its Program and the bound parameters."""
    case = CASES[name]
    model, inputs, program = case.build(dtype=dtype), case.inputs(n, seed=seed, dtype=dtype), program_of(name)
    with torch.no_grad():
        return model, inputs, program, capturing.bind(program, model)


def run(program: Program, params, inputs, targets=None, wrt=None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The engine's result, in memory filled with NaN before, so that a missing write shows."""
    seeds = program.outputs if targets is None else targets.shape[-1]
    chosen = range(len(inputs)) if wrt is None else wrt
    out = tuple(
        torch.full((x.shape[0], seeds, *x.shape[1:]), float("nan"), dtype=x.dtype) for x in (inputs[w] for w in chosen)
    )
    with torch.no_grad():
        y, found = executor.jacobian(program, params, inputs, targets, wrt, out=out)
    assert all(f is o for f, o in zip(found, out, strict=True))
    return y, out


@cache
def exact(name: str, n: int, seed: int = 1) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The oracle's outputs and Jacobians in float64."""
    case = CASES[name]
    return oracle.jacobian(case.build(dtype=torch.float64), case.inputs(n, seed=seed, dtype=torch.float64))


@cache
def lowered(name: str) -> tuple[nn.Module, Program]:
    """A float64 network of the table and its verified Program."""
    case = CASES[name]
    model = case.build(dtype=torch.float64)
    inputs = case.inputs(3, dtype=torch.float64)
    program = capturing.to_program(model, inputs)
    capturing.verify(program, model, inputs)
    return model, program


def forms(program: Program) -> list[type]:
    return [type(step.form) for step in program.steps]


def proposed(model: nn.Module, *shapes: tuple[int, ...]) -> Program:
    """Trace and verify on random float64 samples."""
    inputs = tuple(torch.randn(3, *s, dtype=torch.float64) for s in shapes)
    model = model.double().eval()
    program = capturing.to_program(model, inputs)
    capturing.verify(program, model, inputs)
    return program
