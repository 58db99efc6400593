"""All-class input gradients: the Jacobian of a network's outputs with respect to its inputs, per sample, fast.

Names are imported at first use, so that ``import gradkern`` and ``gradkern --help`` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attr as attr
    from . import data as data
    from . import kernels as kernels
    from . import plot as plot
    from .api import Explanation, explain, iter_jacobian, jacobian, prepare
    from .attr.plug import accelerate
    from .checking import Check, check
    from .data import importance, run
    from .dispatch.prepared import Prepared
    from .dispatch.targets import TopK
    from .ir.program import Program
    from .planner.plan import Plan
    from .runtime.confirmation import KernelsDiffer
    from .runtime.versions import show_versions
    from .util.memo import reset
    from .util.options import GradkernWarning, use
    from .util.outputs import Sums

__version__ = "0.1.0"

_HOMES = {
    "Check": "checking",
    "Explanation": "api",
    "GradkernWarning": "util.options",
    "KernelsDiffer": "runtime.confirmation",
    "Plan": "planner.plan",
    "Prepared": "dispatch.prepared",
    "Program": "ir.program",
    "Sums": "util.outputs",
    "TopK": "dispatch.targets",
    "accelerate": "attr.plug",
    "check": "checking",
    "explain": "api",
    "importance": "data",
    "iter_jacobian": "api",
    "jacobian": "api",
    "prepare": "api",
    "reset": "util.memo",
    "run": "data",
    "show_versions": "runtime.versions",
    "use": "util.options",
}
_SUBMODULES = ("attr", "data", "kernels", "plot")

__all__ = [
    "Check",
    "Explanation",
    "GradkernWarning",
    "KernelsDiffer",
    "Plan",
    "Prepared",
    "Program",
    "Sums",
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
    "show_versions",
    "use",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ImportError as error:
        if _HOMES[name] != "data":
            raise
        hint = "pip install 'gradkern[data]', in a checkout pip install --no-build-isolation '.[data]'"
        raise ImportError(f"gradkern.{name} needs the data extra ({error}): {hint}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
