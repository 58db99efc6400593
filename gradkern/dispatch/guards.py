"""Why a call goes to autograd at once, without a look at what the network computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from .request import model_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple("_global" + name for name in (*HOOKS, "_forward_hooks_always_called"))
OWN_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")  # torch's, and harmless


@dataclass(frozen=True)
class Refusal:
    """``reason`` in words.  ``whole``: one forward must see the whole batch, or random draws and buffers go wrong."""

    reason: str
    whole: bool = False


def at_once(fn: Any, inputs: Sequence[Tensor]) -> Refusal | None:
    """The reason to leave this call to autograd, or None where tracing has a chance."""
    module = model_of(fn)
    if module is None:
        return Refusal(f"{_name(fn)} is neither a torch.nn.Module nor a module's own forward, so it cannot be traced")
    if isinstance(module, torch.jit.ScriptModule):
        return Refusal("it is TorchScript, which torch.export does not read")
    state = _state(module)
    if state is not None and state.whole:
        return state
    if autocast(inputs):
        return Refusal("autocast is active: the kernels work in the dtype of the inputs")
    for x in inputs:
        if type(x) not in (Tensor, nn.Parameter):
            return Refusal(f"the input is a tensor subclass, {type(x).__name__}")
    if any(getattr(module_globals, name, None) for name in GLOBAL_HOOKS):
        return Refusal("a global module hook is registered")
    return state


def autocast(inputs: Sequence[Tensor]) -> bool:
    """Is autocast active for the device of the inputs?"""
    device = inputs[0].device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _state(module: nn.Module) -> Refusal | None:
    """Training mode first (it decides about chunks), then hooks and devices; in one pass over the modules."""
    hooked: Refusal | None = None
    for path, part in module.named_modules():
        why = _training(part)
        if why:
            return Refusal(f"{type(part).__name__} ({path or 'the model itself'}) {why}", whole=True)
        if hooked is None and _user_hooks(part):
            hooked = Refusal(f"a hook is registered on {type(part).__name__} ({path or 'the model itself'})")
    return hooked


def _training(part: nn.Module) -> str:
    """Why this module mixes samples, draws random numbers or changes its buffers, as it is now; else empty."""
    if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
        return "normalises by the batch (training mode, or no running statistics)"
    if not part.training:
        return ""
    if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
        return "is in training mode and drops at random"
    if isinstance(part, nn.RNNBase) and part.dropout > 0:
        return "is in training mode and drops at random"
    if isinstance(part, nn.RReLU):
        return "is in training mode and draws random slopes"
    if isinstance(part, nn.modules.instancenorm._InstanceNorm) and part.track_running_stats:
        return "is in training mode and updates its running statistics"
    return ""


def _user_hooks(part: nn.Module) -> bool:
    for name in HOOKS:
        hooks = getattr(part, name, None)
        if hooks and not all(_own(h) for h in hooks.values()):
            return True
    return False


def _own(hook: Any) -> bool:
    return type(hook).__module__ in OWN_HOOKS


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__
