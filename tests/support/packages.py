"""The packages of ``gradkern/`` and their order."""

from __future__ import annotations

TOP = "top"  # the modules in gradkern/ itself


#: The packages from the ground up: one imports itself and those above its own line in this list.
PACKAGES = (
    "util",
    "ir",
    "passes",
    "codegen",
    "planner",
    "runtime",
    "frontend",
    "kernels",
    "dispatch",
    TOP,
    "attr",
    "integrations",
    "data",
    "report",
    "cli",
)
