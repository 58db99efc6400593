"""Calls as data: walking over them, replacing their leaves, and running them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .program import Batch, Call, Contract, Form, Opaque, Param, Value

Params = Mapping[str, Tensor]  # live tensors by name
LITERAL = "gradkern.literal"  # a tensor literal in a network's code; the args are dtype, shape, bytes and device


# ---------------------------------------------------------------------------------------------------------------
# Walking


def arguments(call: Call) -> tuple[Any, ...]:
    """Positional and keyword arguments of a call."""
    return (*call.args, *(value for _, value in call.kwargs))


def leaves(tree: Any) -> list[Any]:
    """The leaves of an argument tree, whose inner nodes are tuples and calls."""
    if isinstance(tree, tuple):
        return [leaf for item in tree for leaf in leaves(item)]
    return leaves(arguments(tree)) if isinstance(tree, Call) else [tree]


def calls_in(tree: Any) -> list[Call]:
    """A call and those inside its arguments, innermost first."""
    if isinstance(tree, tuple):
        return [call for item in tree for call in calls_in(item)]
    return [*calls_in(arguments(tree)), tree] if isinstance(tree, Call) else []


def params_in(tree: Any) -> tuple[Param, ...]:
    """Every `Param` in an expression, once each, in order of appearance."""
    return tuple(dict.fromkeys(leaf for leaf in leaves(tree) if isinstance(leaf, Param)))


def values_in(tree: Any) -> tuple[Value, ...]:
    """Every `Value` in an expression, once each, in order of appearance."""
    return tuple(dict.fromkeys(leaf for leaf in leaves(tree) if isinstance(leaf, Value)))


def form_params(form: Form) -> tuple[Param, ...]:
    """Every `Param` that a form reads."""
    if isinstance(form, Contract):
        return tuple(p for p in (form.weight, form.bias) if p is not None)
    return params_in(form.call) if isinstance(form, Opaque) else ()


def rewrite(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """The tree with every leaf replaced."""
    if isinstance(tree, tuple):
        return tuple(rewrite(item, leaf) for item in tree)
    if isinstance(tree, Call):
        kwargs = tuple((k, rewrite(v, leaf)) for k, v in tree.kwargs)
        return Call(tree.op, rewrite(tree.args, leaf), kwargs, tree.index)
    return leaf(tree)


# ---------------------------------------------------------------------------------------------------------------
# Running


@cache
def operator_of(name: str) -> Callable[..., Any]:
    """The torch op of a full name such as ``"aten.conv1d.default"``."""
    namespace, packet, overload = name.rsplit(".", 2)
    at: Any = torch.ops
    for part in namespace.split("."):
        at = getattr(at, part)
    return getattr(getattr(at, packet), overload)


def bind_arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an op by their names in its schema, with defaults filled in."""
    schema = op._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    return bound | {a.name: x for a, x in zip(schema, args, strict=False)} | dict(kwargs)


def evaluate(call: Call, leaf: Callable[[Any], Any], apply: Callable[..., Any] | None = None) -> Any:
    """Run a call.  ``leaf`` returns the tensor or number of each `Param`, `Value` and `Batch`; ``apply(op, *args)``
    runs an operation (by default, it is just called)."""
    done: dict[Call, Any] = {}  # a nested call may be read twice, and several results come from one run

    def run(call: Call) -> Any:
        if call.op == LITERAL:
            return literal_tensor(*call.args)
        full = call if call.index is None else Call(call.op, call.args, call.kwargs)
        if full not in done:
            args = [item(x) for x in call.args]
            kwargs, op = {k: item(v) for k, v in call.kwargs}, operator_of(call.op)
            done[full] = op(*args, **kwargs) if apply is None else apply(op, *args, **kwargs)
        return done[full] if call.index is None else done[full][call.index]

    def item(x: Any) -> Any:
        if isinstance(x, tuple):
            return [item(y) for y in x]
        if isinstance(x, Call):
            return run(x)
        return leaf(x) if isinstance(x, (Param, Value, Batch)) else x

    return run(call)


# ---------------------------------------------------------------------------------------------------------------
# Literals


def literal(value: Tensor) -> Call:
    """The call that returns ``value``."""
    flat = value.detach().cpu().contiguous()
    data = ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()) if flat.numel() else b""
    return Call(LITERAL, (value.dtype, tuple(value.shape), data, value.device))


@lru_cache(maxsize=256)
def literal_tensor(dtype: torch.dtype, shape: tuple[int, ...], data: bytes, device: torch.device) -> Tensor:
    """The tensor of a literal.  Equal literals share one tensor, which is never written to."""
    with torch.inference_mode(False):
        if not data:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape).to(device)
