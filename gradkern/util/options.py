"""The caller's choice of engine and memory, and the warnings and errors that gradkern raises.

The engine comes from the first of these that is set: the ``engine=`` argument, :func:`use` in this thread, the
environment variable ``GRADKERN_ENGINE`` (read at every call).  Otherwise it is ``"auto"``.

With the environment variable ``GRADKERN_DEBUG=1``, errors that would send a model to autograd, or a call to Captum's
own code, are raised instead, with their traceback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

Engine = Literal["auto", "kernel", "reference", "autograd"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
ENVIRONMENT = "GRADKERN_ENGINE"
_ENCODED = os.environ.encodekey(ENVIRONMENT)
DEBUG = "GRADKERN_DEBUG"
DEFAULT_MEMORY_BUDGET = 512 << 20  # bytes
GPU_SHARE = 16  # the budget on a GPU is its memory divided by this: a GPU needs large pieces

_engine: ContextVar[Engine | None] = ContextVar("gradkern_engine", default=None)
_budget: ContextVar[int | None] = ContextVar("gradkern_memory_budget", default=None)


class GradkernWarning(UserWarning):
    """Something is slower than it could be, or may not be what was meant.  The message says what, and what to do."""


class InputError(Exception):
    """Base of the errors about the caller's arguments; always also a ValueError or a TypeError."""


class BadArgument(InputError):
    """Base of the errors about arguments that do not fit; Captum may accept them, or raise its own error."""


class BadValue(BadArgument, ValueError):
    """A shape, an index, a device or a name that does not fit."""


class BadType(BadArgument, TypeError):
    """A dtype or a Python type that does not fit."""


class Unused(InputError, ValueError, RuntimeError):
    """An input that the output does not depend on; torch and Captum raise a RuntimeError for it."""


def _valid_engine(name: str, source: str) -> Engine:
    if name not in ENGINES:
        raise BadValue(f"{source}: got {name!r}, expected one of {', '.join(map(repr, ENGINES))}.")
    return name


def _valid_budget(size: int) -> int:
    from .integers import as_int

    number = as_int(size)
    if number is None or number <= 0:
        raise BadValue(f"memory_budget: got {size!r}, expected a positive number of bytes, such as {128 << 20}.")
    return number


def engine(argument: str | None = None) -> Engine:
    """The engine in effect: the argument, else `use`, else the environment, else ``"auto"``."""
    if argument is not None:
        return _valid_engine(argument, "engine=")
    chosen = _engine.get()
    if chosen is not None:
        return chosen
    table = getattr(os.environ, "_data", None)  # `os.environ.get` looks it up in there too, in more Python code
    if table is not None and _ENCODED not in table:
        return "auto"
    return _valid_engine(os.environ.get(ENVIRONMENT) or "auto", f"environment variable {ENVIRONMENT}")


def debugging() -> bool:
    """Whether errors are raised instead of worked around (``GRADKERN_DEBUG=1``)."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def memory_budget(device: torch.device | None = None) -> int:
    """Bytes that a call may allocate in addition to its result (more only if a single sample needs more).

    Default: 512 MiB, or a sixteenth of the memory of the GPU that the work is for.
    """
    chosen = _budget.get()
    if chosen is None and device is not None and device.type == "cuda":
        import torch

        return max(DEFAULT_MEMORY_BUDGET, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)
    return chosen or DEFAULT_MEMORY_BUDGET


@contextmanager
def use(engine: Engine | None = None, *, memory_budget: int | None = None) -> Iterator[None]:
    """Choose the engine and the memory budget for the calls inside, Captum classes included.

    ``engine``: ``"auto"`` (capture the model once that saves time, then measure whether kernels or autograd are faster,
    the default), ``"kernel"`` (capture at once and take the kernels, whatever that costs), ``"reference"`` (plain torch
    per step, no compiled code) or ``"autograd"`` (never capture).
    ``memory_budget``: bytes in addition to the result, by default 512 MiB, or a sixteenth of a GPU's memory.
    Both hold for this thread (and context) only; ``None`` keeps the setting outside.
    """
    undo: list[tuple[ContextVar[Any], Token[Any]]] = []
    if engine is not None:
        undo.append((_engine, _engine.set(_valid_engine(engine, "gradkern.use(engine)"))))
    if memory_budget is not None:
        undo.append((_budget, _budget.set(_valid_budget(memory_budget))))
    try:
        yield
    finally:
        for variable, token in reversed(undo):
            variable.reset(token)
