"""A copy of a module tree that shares its tensors: torch.export may modify it while others use the model."""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import Any

from torch import nn

_OWN_DICTS = ("_parameters", "_buffers")


def shell_copy(model: nn.Module) -> nn.Module:
    """The same modules with the same tensors, hooks and attributes in new objects.

    Export swaps parameters for fake ones and forward passes set attributes; both happen to the shell.  References
    from one module to another, in lists or as bound methods, lead to shells too.
    """
    shells: dict[int, nn.Module] = {}

    def shell_of(module: nn.Module) -> nn.Module:
        known = shells.get(id(module))
        if known is not None:
            return known
        shell = object.__new__(type(module))
        shells[id(module)] = shell
        attributes = shell.__dict__
        for name, value in module.__dict__.items():
            attributes[name] = dict(value) if name in _OWN_DICTS else remade(value)
        return shell

    def remade(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return shell_of(value)
        kind = type(value)
        if kind is list or kind is tuple:
            return kind(remade(item) for item in value)
        if kind is dict or kind is OrderedDict:
            return kind((key, remade(item)) for key, item in value.items())
        if kind is set:
            return set(value)
        if kind is MethodType and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, shell_of(value.__self__))
        return value

    return shell_of(model)
