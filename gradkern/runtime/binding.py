"""The live values of a Program, by name, and the key that says whether a Program still fits its model.

Version counters cannot tell that a model has changed (fused optimizer steps, ``.data`` edits, numpy views).  So
values are resolved by name on every call, and everything else that a trace depends on is in `structure_key`.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

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


# ---------------------------------------------------------------------------------------------------------------
# Structure key

_BASE = frozenset(nn.Module().__dict__)  # what every module has; looked at by name below
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    getattr(torch_module, "_global" + name) for name in _HOOKS if hasattr(torch_module, "_global" + name)
)
_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_DEPTH = 6  # of nested containers and plain objects that are looked into


def structure_key(model: nn.Module) -> Hashable:
    """Everything that a trace of ``model`` depends on but its tensors' values.

    Modules' types, their order and sharing, training flags, hooks (on modules and global), the numbers, strings
    and functions among their attributes (also nested in containers and plain objects, also in the closure of a
    function), and shape, dtype, device and sharing of parameters and buffers.  Values of tensors are not in it.
    """
    parts: list[Any] = [_hooks(table) for table in _GLOBAL_HOOKS if table]
    add = parts.append
    seen: dict[int, int] = {}  # first appearance of modules and tensors: sharing is structure, identity is not
    stack: list[nn.Module] = [model]
    seen[id(model)] = 0
    while stack:
        module = stack.pop()
        own = module.__dict__
        kind = type(module)
        add(kind)
        add(kind.forward)
        add(own["training"])
        for table in (own["_parameters"], own["_buffers"]):
            for name, tensor in table.items():
                add(name)
                if tensor is None:
                    add(None)
                    continue
                number = seen.setdefault(id(tensor), len(seen))
                add((number, tensor.shape, tensor.dtype, tensor.device, type(tensor)))
        for name in _HOOKS:
            if own.get(name):
                add((name, _hooks(own[name])))
        for name, value in own.items():
            if name in _BASE:
                continue
            add(name)
            add(value if type(value) in _PLAIN else _frozen(value, seen, stack, _DEPTH))
        for name, child in own["_modules"].items():
            add(name)
            add(None if child is None else _module_number(child, seen, stack))
    return tuple(parts)


def _module_number(module: nn.Module, seen: dict[int, int], stack: list[nn.Module]) -> int:
    """A module's number by first appearance; a new one is queued to be looked at."""
    number = seen.get(id(module))
    if number is None:
        number = seen[id(module)] = len(seen)
        stack.append(module)
    return number


def _frozen(value: Any, seen: dict[int, int], stack: list[nn.Module], depth: int) -> Hashable:
    """A hashable stand-in for an attribute that is equal as long as the attribute does the same."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        if depth == 0:
            return _Same(value)
        for item in value:
            if type(item) not in _PLAIN:
                return (kind, tuple([_frozen(x, seen, stack, depth - 1) for x in value]))
        return value if kind is tuple else (kind, tuple(value))
    if isinstance(value, nn.Module):
        return ("module", _module_number(value, seen, stack))
    if isinstance(value, Tensor):
        return (seen.setdefault(id(value), len(seen)), value.shape, value.dtype, value.device, kind)
    if depth == 0:
        return _Same(value)
    return _frozen_object(value, kind, lambda x: _frozen(x, seen, stack, depth - 1))


def _frozen_object(value: Any, kind: type, inner: Any) -> Hashable:
    if isinstance(value, dict):
        return (kind, tuple([(inner(k), inner(v)) for k, v in value.items()]))
    if isinstance(value, (list, tuple)):
        return (kind, tuple([inner(v) for v in value]))
    if kind in (set, frozenset):
        return (kind, frozenset(inner(v) for v in value))
    if kind is types.FunctionType:
        cells = tuple([_cell(c, inner) for c in value.__closure__ or ()])
        return (kind, value.__code__, inner(value.__defaults__), cells)
    if kind is types.MethodType:
        return (kind, inner(value.__func__), inner(value.__self__))
    if kind is functools.partial:
        return (kind, inner(value.func), inner(value.args), inner(value.keywords))
    if kind.__module__ == "numpy":
        return _frozen_array(value, kind)
    if kind in (weakref.ref, type, types.BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket):
        return value if kind is not weakref.ref else inner(value())
    fields = getattr(value, "__dict__", None)
    if isinstance(fields, dict):
        return (_Same(value), tuple([(k, inner(v)) for k, v in fields.items()]))
    return _Same(value)


def _frozen_array(value: Any, kind: type) -> Hashable:
    if hasattr(value, "tobytes") and getattr(value, "dtype", None) is not None and value.dtype.kind != "O":
        return (kind, value.shape, value.dtype.str, value.tobytes())
    return _Same(value)


def _cell(cell: types.CellType, inner: Any) -> Hashable:
    try:
        return inner(cell.cell_contents)
    except ValueError:  # still empty
        return None


def _hooks(table: Mapping[int, Any]) -> Hashable:
    return tuple([(number, _Same(hook)) for number, hook in table.items()])


class _Same:
    """Equal to another only while both stand for one living object: an id alone may be given out again."""

    __slots__ = ("number", "target")

    def __init__(self, value: Any) -> None:
        self.number = id(value)
        try:
            self.target: Any = weakref.ref(value)
        except TypeError:  # cannot be referred to weakly: keep it
            self.target = lambda: value

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self.number != other.number:
            return False
        mine = self.target()
        return mine is not None and mine is other.target()
