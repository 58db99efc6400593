"""All-class input gradients: the Jacobian of a network's outputs with respect to its inputs, per sample, fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .api import explain, iter_jacobian, jacobian, prepare
from .checking import Check, check
from .dispatch.targets import TopK
from .ir.program import Program
from .planner.plan import Plan
from .util.memo import reset
from .util.options import GradkernWarning, use

if TYPE_CHECKING:
    from . import attr as attr
    from .attr.plug import accelerate
    from .data import importance, run

_DATA = ("run", "importance")  # of gradkern.data, whose libraries come with an extra


def __getattr__(name: str) -> Any:
    if name == "attr":  # Captum is slow to import, so it is imported at first use
        return import_module(".attr", __name__)
    if name == "accelerate":
        return import_module(".attr.plug", __name__).accelerate
    if name not in _DATA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import data
    except ImportError as error:
        raise ImportError(f"gradkern.{name} needs the data extra ({error}): pip install 'gradkern[data]'") from error
    return getattr(data, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "attr"})


__version__ = "0.1.0"

__all__ = [
    "Check",
    "GradkernWarning",
    "Plan",
    "Program",
    "TopK",
    "accelerate",
    "check",
    "explain",
    "importance",
    "iter_jacobian",
    "jacobian",
    "prepare",
    "reset",
    "run",
    "use",
]
