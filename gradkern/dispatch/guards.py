"""What a call depends on besides values: why autograd must take it at once, and the key that guards a Program.

Version counters cannot tell that a model has changed (fused optimizer steps, ``.data`` edits, numpy views).  So
tensors are bound by name on every call, and everything else that a Program depends on is in the key.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple("_global" + name for name in (*HOOKS, "_forward_hooks_always_called"))
PLAIN_TENSORS = (Tensor, nn.Parameter)
OWN_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")  # torch's, and harmless


# ---------------------------------------------------------------------------------------------------------------
# Reasons for autograd


@dataclass(frozen=True)
class EagerReason:
    """``text`` in words.  ``couples_batch``: one forward must see all samples, or random draws and buffers go wrong."""

    text: str
    couples_batch: bool = False


def eager_reason(fn: Any, module: nn.Module | None, inputs: Sequence[Tensor]) -> EagerReason | None:
    """The reason to leave this call to autograd, or None where tracing has a chance.  ``module``: what ``fn`` runs."""
    if module is None:
        name = getattr(fn, "__qualname__", None) or type(fn).__name__
        return EagerReason(f"{name} is neither a torch.nn.Module nor a module's own forward, so it cannot be traced")
    if isinstance(module, torch.jit.ScriptModule):
        return EagerReason("it is TorchScript, which torch.export does not read")
    state = _state(module)
    if state is not None and state.couples_batch:
        return state
    if autocast(inputs):
        return EagerReason("autocast is active: the kernels work in the dtype of the inputs")
    for x in inputs:
        if type(x) not in PLAIN_TENSORS:
            return EagerReason(f"the input is a tensor subclass, {type(x).__name__}")
    if any(getattr(torch_module, name, None) for name in GLOBAL_HOOKS):
        return EagerReason("a global module hook is registered")
    return state


def autocast(inputs: Sequence[Tensor]) -> bool:
    """Is autocast active for the device of the inputs?"""
    device = inputs[0].device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _state(module: nn.Module) -> EagerReason | None:
    """Training mode first (it decides about chunks), then hooks and devices; in one pass over the modules."""
    hooked: EagerReason | None = None
    for path, part in module.named_modules():
        reason = _training(part)
        if reason:
            return EagerReason(f"{type(part).__name__} ({path or 'the model itself'}) {reason}", couples_batch=True)
        if hooked is None and _user_hooks(part):
            hooked = EagerReason(f"a hook is registered on {type(part).__name__} ({path or 'the model itself'})")
    return hooked


def _training(part: nn.Module) -> str:
    """Why this module mixes samples, draws random numbers or changes its buffers, as it is now; else empty."""
    if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
        return "normalises by the batch (training mode, or no running statistics)"
    if not part.training:
        return ""
    dropout = part.p if isinstance(part, nn.modules.dropout._DropoutNd) else 0
    if dropout > 0 or (isinstance(part, nn.RNNBase) and part.dropout > 0):
        return "is in training mode and drops at random"
    if isinstance(part, nn.RReLU):
        return "is in training mode and draws random slopes"
    if isinstance(part, nn.modules.instancenorm._InstanceNorm) and part.track_running_stats:
        return "is in training mode and updates its running statistics"
    return ""


def _user_hooks(part: nn.Module) -> bool:
    tables = [hooks for name in HOOKS if (hooks := getattr(part, name, None))]
    return any(type(hook).__module__ not in OWN_HOOKS for hooks in tables for hook in hooks.values())


# ---------------------------------------------------------------------------------------------------------------
# The key


def key_of(module: nn.Module, inputs: Sequence[Tensor]) -> Hashable:
    """Structure of the model, and shapes, dtypes and devices of the inputs."""
    if isinstance(module, torch.jit.ScriptModule):  # it has no attributes to look at, and is never traced
        structure: Hashable = tuple(part.training for part in module.modules())
    else:
        structure = structure_key(module)
    return structure, signature(inputs), autocast(inputs)


def signature(inputs: Sequence[Tensor]) -> Hashable:
    """Shapes per sample, dtypes and devices."""
    return tuple((tuple(x.shape[1:]), x.dtype, str(x.device)) for x in inputs)


_BASE = frozenset(nn.Module().__dict__)  # what every module has; looked at by name below
_GLOBAL_HOOKS = tuple(getattr(torch_module, name) for name in GLOBAL_HOOKS[:-1] if hasattr(torch_module, name))
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
        attributes = module.__dict__
        kind = type(module)
        add(kind)
        add(kind.forward)
        add(attributes["training"])
        for table in (attributes["_parameters"], attributes["_buffers"]):
            for name, tensor in table.items():
                add(name)
                if tensor is None:
                    add(None)
                    continue
                number = seen.setdefault(id(tensor), len(seen))
                add((number, tensor.shape, tensor.dtype, tensor.device, type(tensor)))
        for name in HOOKS:
            if attributes.get(name):
                add((name, _hooks(attributes[name])))
        for name, value in attributes.items():
            if name in _BASE:
                continue
            add(name)
            add(value if type(value) in _PLAIN else _frozen(value, seen, stack, _DEPTH))
        for name, child in attributes["_modules"].items():
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
        plain = hasattr(value, "tobytes") and getattr(value, "dtype", None) is not None and value.dtype.kind != "O"
        return (kind, value.shape, value.dtype.str, value.tobytes()) if plain else _Same(value)
    if kind in (weakref.ref, type, types.BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket):
        return value if kind is not weakref.ref else inner(value())
    fields = getattr(value, "__dict__", None)
    if isinstance(fields, dict):
        return (_Same(value), tuple([(k, inner(v)) for k, v in fields.items()]))
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
        target = self.target()
        return target is not None and target is other.target()
