"""Old public names, which keep working for one release, with a DeprecationWarning."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_argument(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that its argument ``new`` may also be passed by its old name, ``old=``."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            if old in kwargs:
                warn_of_old_name(f"{old}=", f"{new}=", 3)
                return function(*args, **{new: kwargs.pop(old)}, **kwargs)
            return function(*args, **kwargs)

        return call

    return wrap


def keyword_only(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose keyword-only arguments ``names`` could be passed by position before, in this order."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        places = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(function).parameters.values())

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            given = dict(zip(names, args[places:], strict=False))
            if given:
                named = ", ".join(f"{name}=" for name in given)
                message = f"{function.__qualname__}: pass {named} by name; by position is an error in the next release"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
            return function(*args[:places], *args[places + len(given) :], **given, **kwargs)

        return call

    return wrap


def old_names(scope: dict[str, Any], names: dict[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for the module with the globals ``scope``; ``names`` maps old names to new ones."""

    def find(name: str) -> Any:
        module = scope["__name__"]
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_of_old_name(f"{module}.{name}", f"{module}.{names[name]}", 3)
        return scope[names[name]]

    return find


def adopt_old_methods(cls: type, names: dict[str, str]) -> None:
    """Rename methods that a class defines under their old names; called by ``__init_subclass__``."""
    for old, new in names.items():
        if old in vars(cls):
            warn_of_old_name(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}", 4)
            setattr(cls, new, vars(cls)[old])


def warn_of_old_name(old: str, new: str, level: int) -> None:
    """Warn that an old name was used; ``level``: the frames between here and the caller, as in `warnings.warn`."""
    message = f"{old} is now {new}; the old name will be removed in the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=level)
