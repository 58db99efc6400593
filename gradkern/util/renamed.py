"""Old names of public arguments, which work for one release, with a warning."""

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
                note(f"{old}=", f"{new}=", 3)
                return function(*args, **{new: kwargs.pop(old)}, **kwargs)
            return function(*args, **kwargs)

        return call

    return wrap


def note(old: str, new: str, level: int) -> None:
    """Warn of an old name; ``level``: steps from here to its use, for `warnings.warn`."""
    message = f"{old} is now {new}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=level)
