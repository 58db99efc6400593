"""Callables that a caller passes as the model (a module, a method, a partial, a function), and the modules behind."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .outputs import Output, check_output_choice, choose_output, output_key
from .torch_compat import eval_frame


@dataclass(frozen=True, eq=False)
class FixedArguments:
    """``fn`` with fixed values for the arguments that are not samples, by position; it is called with the samples.

    ``output``: the part of its result that is returned, as in `util.outputs`.
    """

    fn: Callable[..., Any]
    given: dict[int, Any]
    output: Output = None

    def __call__(self, *samples: Any) -> Any:
        return choose_output(self.fn(*place_arguments(samples, self.given)), self.output)


def with_given(fn: Callable[..., Any], given: dict[int, Any]) -> Callable[..., Any]:
    """``fn`` with fixed arguments."""
    model, before, output = split_arguments(fn)
    return FixedArguments(model, before | given, output) if given else fn


def with_output(fn: Callable[..., Any], output: Output) -> Callable[..., Any]:
    """``fn``, returning the part ``output`` of its result."""
    return fn if output is None else FixedArguments(unwrap(fn), {}, check_output_choice(output))


def place_arguments(samples: Sequence[Any], given: dict[int, Any]) -> list[Any]:
    """All arguments in order.  ``given``: the fixed ones by position, ascending."""
    arguments = list(samples)
    for place, value in given.items():
        arguments.insert(place, value)
    return arguments


def split_arguments(fn: Callable[..., Any]) -> tuple[Callable[..., Any], dict[int, Any], Output]:
    """A callable, its fixed arguments besides the samples, and the part of its result that is returned."""
    return (fn.fn, fn.given, fn.output) if isinstance(fn, FixedArguments) else (fn, {}, None)


def by_name(fn: Callable[..., Any], samples: tuple[Any, ...]) -> dict[str, Any]:
    """A call as it is captured and guarded: ``fn``, the fixed arguments ``given``, ``inputs`` and ``output``."""
    if isinstance(fn, FixedArguments):
        return {"fn": fn.fn, "given": fn.given, "inputs": samples, "output": fn.output}
    return {"fn": fn, "given": {}, "inputs": samples, "output": None}


def is_same(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    """Whether both are the same callable with the same arguments; values are compared by identity."""
    (f, given, output), (g, other, another) = split_arguments(a), split_arguments(b)
    if output_key(output) != output_key(another):
        return False
    if f is not g and not (isinstance(f, types.MethodType) and f == g):
        return False
    return given.keys() == other.keys() and all(given[k] is other[k] for k in given)


def unwrap(fn: Any) -> Any:
    """The callable inside wrappers that do not change results: `torch.compile`, data parallelism on one device."""
    while (inner := _inner(fn)) is not None:
        fn = inner
    return fn


def _inner(fn: Any) -> Any:
    if isinstance(fn, types.FunctionType):
        compiled = fn.__globals__ is vars(eval_frame) and not getattr(fn, "_torchdynamo_disable", False)
        return getattr(fn, "_torchdynamo_orig_callable", None) if compiled else None
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, nn.Module):
        owner = fn.__self__
        unhooked = fn.__func__ is type(owner).forward and not _hooked(owner)
        return owner if unhooked or fn.__func__ is type(owner).__call__ else None
    if _WRAPPERS.isdisjoint(type(fn).__mro__) or _hooked(fn):  # `isinstance` is slow: one has an abstract base
        return None
    if isinstance(fn, eval_frame.OptimizedModule):
        return fn._orig_mod
    return fn.module if len(fn.device_ids or ()) <= 1 else None


_WRAPPERS = frozenset((eval_frame.OptimizedModule, DataParallel, DistributedDataParallel))


def _hooked(module: nn.Module) -> bool:
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(bool, tables))


def anchor(fn: Any) -> tuple[Any, Hashable]:
    """The object whose lifetime bounds the state kept for ``fn``, and the path from that object to ``fn``."""
    if isinstance(fn, nn.Module):
        return fn, ()
    if isinstance(fn, FixedArguments):
        owner, way = anchor(fn.fn)
        return owner, (way, tuple(fn.given), output_key(fn.output))
    if isinstance(fn, functools.partial):
        owner, way = anchor(fn.func)
        return owner, (way, "partial")
    if isinstance(fn, types.MethodType):
        owner, way = anchor(fn.__self__)
        return owner, (way, fn.__func__)
    return fn, ()


def model_of(fn: Any) -> nn.Module | None:
    """The module behind ``fn``: ``fn`` itself, or the one whose method or `functools.partial` it is; else None."""
    owner = anchor(fn)[0]
    return owner if isinstance(owner, nn.Module) else None


def name_of(fn: Any) -> str:
    """The name of ``fn`` in messages: the class of a module, the name of a function."""
    owner = anchor(fn)[0]
    of_class = type(owner).__name__
    return of_class if isinstance(owner, nn.Module) else getattr(owner, "__qualname__", of_class)


def modules_behind(fn: Any) -> tuple[nn.Module, ...]:
    """The modules that ``fn`` is likely to run: its own, those in its closure, and the globals that it names."""
    return tuple(x for x in _reachable(fn) if isinstance(x, nn.Module))


def _reachable(fn: Any) -> Iterator[Any]:
    owner = anchor(fn)[0]
    yield owner
    if isinstance(owner, types.FunctionType):
        for cell in owner.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield from (owner.__globals__.get(name) for name in owner.__code__.co_names)
        yield from owner.__defaults__ or ()
    elif not isinstance(owner, nn.Module):
        yield from getattr(owner, "__dict__", {}).values()


def describe_arguments(fn: Any) -> Hashable:
    """The fixed arguments of ``fn`` besides the samples, as numbers, shapes and types."""
    _, given, output = split_arguments(fn)
    return tuple([(place, _describe(value)) for place, value in given.items()]), output_key(output)


def _describe(value: Any) -> Hashable:
    if isinstance(value, (bool, int, float, str, type(None))):
        return type(value), value
    return (type(value), *((value.shape, value.dtype) if isinstance(value, Tensor) else ()))
