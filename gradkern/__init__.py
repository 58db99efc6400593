"""All-class input gradients: the Jacobian of a network's outputs with respect to its inputs, per sample, fast."""

from __future__ import annotations

from typing import Any

from .api import explain, iter_jacobian, jacobian, prepare
from .attr.plug import accelerate
from .checking import check
from .options import GradkernWarning, use
from .targets import TopK

_DATA = {"run": "run", "importance": "importance"}  # of gradkern.data, whose libraries come with an extra


def __getattr__(name: str) -> Any:
    if name not in _DATA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import data
    except ImportError as error:
        raise ImportError(f"gradkern.{name} needs the data extra ({error}): pip install 'gradkern[data]'") from error
    return getattr(data, _DATA[name])


__version__ = "0.1.0"

__all__ = [
    "GradkernWarning",
    "TopK",
    "accelerate",
    "check",
    "explain",
    "importance",
    "iter_jacobian",
    "jacobian",
    "prepare",
    "run",
    "use",
]
