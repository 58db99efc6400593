"""Old names of what is public, which work for one release, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_argument(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that also takes its argument ``new`` by the keyword ``old``."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            if old in kwargs:
                warn_of_old_name(f"{old}=", f"{new}=", 3)
                return function(*args, **{new: kwargs.pop(old)}, **kwargs)
            return function(*args, **kwargs)

        return call

    return wrap


def old_names(scope: dict[str, Any], names: dict[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module with the globals ``scope``; ``names``: the new names by the old."""

    def find(name: str) -> Any:
        module = scope["__name__"]
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_of_old_name(f"{module}.{name}", f"{module}.{names[name]}", 3)
        return scope[names[name]]

    return find


def adopt_old_methods(cls: type, names: dict[str, str]) -> None:
    """Give a class under its new name what its author defines under an old one; called by ``__init_subclass__``."""
    for old, new in names.items():
        if old in vars(cls):
            warn_of_old_name(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}", 4)
            setattr(cls, new, vars(cls)[old])


def warn_of_old_name(old: str, new: str, level: int) -> None:
    """Warn of an old name; ``level``: steps from here to its use, for `warnings.warn`."""
    message = f"{old} is now {new}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=level)
