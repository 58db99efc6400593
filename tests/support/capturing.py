"""Networks as Programs, without the dispatcher: captured and lowered, bound by name, verified."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gradkern.dispatch.guards import stand_ins
from gradkern.frontend import to_program as frontend
from gradkern.frontend import verify as verification
from gradkern.frontend.capture import GraphCache
from gradkern.ir.calls import form_params, params_in
from gradkern.ir.program import Program
from gradkern.runtime import parameters


def to_program(model: nn.Module, inputs: tuple[Tensor, ...]) -> Program:
    """The Program that is proposed for samples like ``inputs``."""
    return frontend.to_program(GraphCache().capture(model, stand_ins(inputs)), inputs, type(model).__name__)


def bind(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that ``program`` names, looked up in ``model``, and those derived from them."""
    derived = {d.name for d in program.derived}
    read = [p for step in program.steps for p in form_params(step.form)]
    read += [p for d in program.derived for p in params_in(d.call)]
    named = {p.name: _tensor(model, p.name) for p in read if p.name not in derived}
    return parameters.bind(program, named)


def verify(program: Program, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """`gradkern.frontend.verify.verify` with the model's parameters."""
    verification.verify(program, model, bind(program, model), inputs)


def _tensor(model: nn.Module, name: str) -> Tensor:
    at: Any = model
    for part in name.split("."):
        at = at[int(part)] if isinstance(at, (list, tuple)) else at[part] if isinstance(at, dict) else getattr(at, part)
    return at.detach()
