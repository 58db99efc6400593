"""Checks at the start of a call: is there a reason for autograd, and which captured graph's guards hold?

A reason for autograd lies in the call or in the state of the model, whatever the network computes.  torch.compile's
front end makes the guards over everything that a captured graph depends on (`frontend.capture`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..frontend.capture import GraphCache, GraphMatch, GuardedGraph, code_of
from ..util.callables import by_name, describe_arguments, modules_behind
from ..util.torch_compat import disable_current_modes

BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", *BACKWARD_HOOKS)
GLOBAL_HOOKS = [vars(torch_module).get("_global" + name, {}) for name in (*HOOKS, "_forward_hooks_always_called")]
PLAIN_TENSORS = (Tensor, nn.Parameter)


# ---------------------------------------------------------------------------------------------------------------
# Reasons for autograd


@dataclass(frozen=True)
class EagerReason:
    """Why autograd must take a call, in words (``text``).

    ``couples_batch``: one forward must see all samples, because it draws random numbers or changes buffers.
    """

    text: str
    couples_batch: bool = False


def call_reason(inputs: Sequence[Tensor]) -> EagerReason | None:
    """A reason for autograd in the call that no guard sees, or None.  Every call asks for it, so it has to be cheap."""
    for x in inputs:
        if type(x) not in PLAIN_TENSORS:
            return EagerReason(f"the input is a tensor subclass, {type(x).__name__}")
    if any(GLOBAL_HOOKS):
        return EagerReason("a global module hook is registered")
    return None


def guarded_reason(module: nn.Module | None, inputs: Sequence[Tensor]) -> EagerReason | None:
    """A reason for autograd in the call, or None.  Guards of a graph exclude it: it is asked for if none hold."""
    if isinstance(module, torch.jit.ScriptModule):
        return EagerReason("it is TorchScript, which torch.compile does not read")
    if autocast(inputs):
        return EagerReason("autocast is active: the kernels work in the dtype of the inputs")
    return None


def autocast(inputs: Sequence[Tensor]) -> bool:
    """Whether autocast is active for the device of the inputs."""
    device = inputs[0].device.type
    return (device == "cpu" or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def model_reason(module: nn.Module) -> EagerReason | None:
    """The reason in the state of the model, or None.  A Program does not need it, as its guards check the same.

    One pass over the modules looks for training mode first (it decides about chunks), then for hooks.
    """
    hooked: EagerReason | None = None
    for path, part in module.named_modules():
        reason = _training(part)
        if reason:
            return EagerReason(f"{type(part).__name__} ({path or 'the model itself'}) {reason}", couples_batch=True)
        if hooked is None and any(getattr(part, name, None) for name in BACKWARD_HOOKS):
            where = path or "the model itself"
            hooked = EagerReason(f"a backward hook is registered on {type(part).__name__} ({where})")
    return hooked


def _training(part: nn.Module) -> str:
    """Why this module, in its present mode, mixes samples, draws random numbers or changes buffers; empty if not."""
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


# ---------------------------------------------------------------------------------------------------------------
# Guards of captured graphs


def stand_ins(inputs: Sequence[Tensor], *, for_guards: bool = False) -> tuple[Tensor, ...]:
    """Stand-ins for the inputs that are passed to Dynamo, which looks at everything except their values.

    ``for_guards``: they are made once and have no memory, which is enough to check guards.
    """
    shown, fresh = [], _remembered if for_guards else _fresh
    for place, x in enumerate(inputs):
        plain = not (x.is_neg() or x.is_conj())
        shown.append(fresh(place, x.shape, x.dtype, x.device) if plain else _requiring_grad(x.detach()))
    return tuple(shown)


def _fresh(place: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A stand-in for input number ``place``, which is never the same tensor as another.

    The input may have other strides along axes of one element, as a sample of a wider tensor has.
    """
    return _requiring_grad(torch.empty(shape, dtype=dtype, device=device))


@lru_cache(maxsize=256)
def _remembered(place: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = _fresh(place, shape, dtype, device)
    x.untyped_storage().resize_(0)
    return x


def _requiring_grad(x: Tensor) -> Tensor:
    return x.requires_grad_() if x.is_floating_point() or x.is_complex() else x


def find_graph(capture: GraphCache, fn: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphMatch | None:
    """The graph whose guards hold now, with the live tensors that it reads; None if there is none."""
    local = by_name(fn, stand_ins(inputs, for_guards=True))
    if in_modes():
        with torch.inference_mode(False), disable_current_modes():
            return matching(capture, local)
    return matching(capture, local)


def in_modes() -> bool:
    """Whether a mode is active that the guards would compare, such as a profiler's."""
    return bool(torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack())


def matching(capture: GraphCache, local: dict[str, Any]) -> GraphMatch | None:
    """`find_graph`, outside of modes, for the arguments of a call by name."""
    grad_enabled, latest = torch.is_grad_enabled(), capture.latest
    torch._C._set_grad_enabled(True)  # as at capture, since a guard compares it
    try:
        for graph in capture.graphs if latest is None else (latest, *capture.graphs):
            if graph.guards.cache_entry is not None and graph.guards.root.check(local):
                if not _same_methods(graph):
                    return None
                capture.latest = graph
                return GraphMatch(graph, graph.read_tensors(local, capture.shared))
    finally:
        torch._C._set_grad_enabled(grad_enabled)
    return None


def _same_methods(graph: GuardedGraph) -> bool:
    for owner, name, code in graph.methods:
        method = getattr(owner(), name, None)
        if getattr(method, "__code__", None) is not code and code_of(method) is not code:
            return False
    return True


def signature(inputs: Sequence[Tensor]) -> Hashable:
    """What inputs must have in common to share a graph: shapes per sample, dtypes and devices."""
    return tuple([(x.shape[1:], x.dtype, x.device) for x in inputs])


def refusal_key(fn: Any) -> Hashable:
    """The key under which a refusal is remembered: a changed mode or hook of a module, or other arguments, make a new
    key, and the model is tried again."""
    parts = [part for module in modules_behind(fn) for part in module.modules()]
    return describe_arguments(fn), tuple([(type(part), part.training, *map(len, _hook_tables(part))) for part in parts])


def _hook_tables(part: nn.Module) -> list[Any]:
    return [getattr(part, name, None) or () for name in HOOKS]
