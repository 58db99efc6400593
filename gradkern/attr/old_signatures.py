"""Signatures of the release before, for methods of a caller's own.  They work for one release, with a warning.

`row_maps` and `layer_maps` got the indices of the outputs and their number, and passed both on; now it is one `Seeds`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ..dispatch.targets import Seeds
from ..util.renamed import warn_of_old_name

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_seeds(place: int) -> Callable[[Function], Function]:
    """A method whose argument number ``place`` is `Seeds`, or, as before, flat indices (or None) and their number."""

    def wrap(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(args) > place + 1 and type(args[place + 1]) is int:
                indices, count = args[place : place + 2]
                args = (*args[:place], Seeds(count, (count,), indices), *args[place + 2 :])
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return wrap


def adopt_indices(cls: type, names: tuple[str, ...]) -> None:
    """Call the methods ``names`` that a class defines with ``(points, index, seeds, options)`` in that way."""
    for name in names:
        method = vars(cls).get(name)
        if method is None or "index" not in inspect.signature(method).parameters:
            continue
        warn_of_old_name(f"{cls.__name__}.{name}(…, index, seeds, options)", f"{name}(…, seeds, options)", 4)
        setattr(cls, name, _with_indices(method))


def _with_indices(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, at: Any, seeds: Seeds, options: Any) -> Any:
        return method(self, at, seeds.indices, seeds.count, options)

    return call
