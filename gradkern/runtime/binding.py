"""The live values of a Program, by name.

Version counters cannot tell that a model has changed (fused optimizer steps, ``.data`` edits, numpy views).  So
values are resolved by name on every call; everything else that a Program depends on is guarded by a key of the
model's structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.calls import LITERAL, evaluate, form_params, operator_of, params_in
from ..ir.program import Call, Derived, Param, Program
from ..util.memo import Memo

# ---------------------------------------------------------------------------------------------------------------
# Binding


class Binder:
    """The names of one Program, grouped by module, so that each module is looked up once per call."""

    def __init__(self, program: Program) -> None:
        derived = {d.name for d in program.derived}
        read = [p for step in program.steps for p in form_params(step.form)]
        read += [p for d in program.derived for p in params_in(d.call)]
        names = dict.fromkeys(p.name for p in read if p.name not in derived)
        grouped: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        for name in names:
            *path, attribute = name.split(".")
            grouped.setdefault(tuple(path), []).append((attribute, name))
        self.groups = [(path, tuple(items)) for path, items in grouped.items()]
        self.derived = [_Computed(d) for d in program.derived]

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path, items in self.groups:
            at = _submodule(model, path)
            own = at.__dict__ if isinstance(at, nn.Module) else {}
            parameters, buffers = own.get("_parameters", {}), own.get("_buffers", {})
            for attribute, name in items:
                tensor = parameters.get(attribute)
                if tensor is None:
                    tensor = buffers.get(attribute)
                if tensor is None:
                    tensor = getattr(at, attribute, None)
                if not isinstance(tensor, Tensor):
                    raise KeyError(f"the model has no tensor {name!r} any more; trace it again")
                tensors[name] = tensor.detach() if tensor.requires_grad else tensor
        if self.derived:
            with torch.no_grad():
                for derived in self.derived:
                    tensors[derived.name] = derived(tensors)
        return tensors


class _Computed:
    """One derived tensor, its op and the kinds of its arguments looked up once."""

    def __init__(self, derived: Derived) -> None:
        call = self.call = derived.call
        self.name = derived.name
        simple = all(isinstance(x, Param) or not isinstance(x, (tuple, Call)) for x in call.args)
        plain = simple and not call.kwargs and call.index is None and call.op != LITERAL
        self.op = operator_of(call.op) if plain else None
        self.arguments = [(isinstance(x, Param), x.name if isinstance(x, Param) else x) for x in call.args]

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.op is not None:
            return self.op(*[tensors[x] if is_param else x for is_param, x in self.arguments])
        return evaluate(self.call, lambda leaf: tensors[leaf.name])


def _submodule(model: nn.Module, path: tuple[str, ...]) -> Any:
    at: Any = model
    for part in path:
        children = at.__dict__.get("_modules") if isinstance(at, nn.Module) else None
        child = children.get(part) if children else None
        at = getattr(at, part) if child is None else child
    return at


_binders: Memo[Binder] = Memo(256)


def bind(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """The live tensors that ``program`` names, detached, and its derived tensors, computed now.

    Raises KeyError where the model has no such tensor any more.
    """
    return _binders.get_or_make(program.key, lambda: Binder(program))(model)


def all_finite(params: Mapping[str, Tensor]) -> bool:
    """No NaN or Inf (a sum that overflows counts as one)."""
    return all(bool(torch.isfinite(p.sum())) for p in params.values() if p.is_floating_point())
