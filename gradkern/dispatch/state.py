"""What is known about each model: its Programs, why one cannot be traced, what it does on autograd, and what that cost.

Everything hangs weakly on the model and is guarded by a key (`guards.key_of`) of its structure and of the inputs'
shapes, dtypes and devices, so that nothing is ever stale.  Values of tensors are never kept here.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..frontend import tracer
from ..ir.program import Opaque, Program
from ..util.memo import Memo, WeakMemo, on_reset
from ..util.options import GradkernWarning, InputError
from .eager import ModelProfile, buffers_kept, check_followed

STRUCTURES_PER_MODEL = 16
FIRST_TRACE = 1.2  # seconds, the first in a process (measured: about 1.1)
LATER_TRACE = 0.15  # seconds (measured: 0.08 … 0.12 and the verification)
SAVED_SHARE = 0.7  # of autograd's time, as predicted before anything is known (measured: 0.1 … 0.9)

_trace_seconds: list[float] = []


@dataclass(frozen=True)
class Verdict:
    """What tracing said: a Program, or the reason why there is none."""

    program: Program | None
    reason: str = ""
    couples_batch: bool = False  # samples of one batch depend on each other

    @cached_property
    def opaque(self) -> bool:
        """Does torch differentiate some of the steps?"""
        return self.program is not None and any(isinstance(step.form, Opaque) for step in self.program.steps)


@dataclass
class CacheEntry:
    """What is known about one structure of one model."""

    verdict: Verdict | None = None
    profile: ModelProfile | None = None
    seconds: float = 0.0  # spent on autograd where a Program might have saved some


class ModelState:
    """All that is known about one model."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.live = threading.RLock()  # held where a forward changes the model's buffers
        self.entries: Memo[CacheEntry] = Memo(STRUCTURES_PER_MODEL)  # by the key of a structure
        self._warned: set[str] = set()

    def profile(self, entry: CacheEntry, measure: Callable[[], ModelProfile]) -> ModelProfile:
        """The profile of this structure, measured where it is not known yet."""
        if entry.profile is None:
            with self.live:
                measured = measure()
            entry.profile = measured
        return entry.profile

    def trace(self, entry: CacheEntry, module: nn.Module, samples: Callable[[], tuple[Tensor, ...]]) -> Verdict:
        """Trace and verify now, unless that has been done; warns once where autograd takes over."""
        with self.lock:
            if entry.verdict is not None:
                return entry.verdict
            verdict = entry.verdict = _traced(module, samples())
        name = type(module).__name__
        if verdict.program is None:
            self.warn(f"{name} runs on autograd as a whole: {verdict.reason}.")
            return verdict
        opaque = [(s, s.form) for s in verdict.program.steps if isinstance(s.form, Opaque)]
        if opaque:
            listed = "; ".join(dict.fromkeys(f"{s.op or form.call.op} in {s.module or name}" for s, form in opaque))
            self.warn(
                f"{name}: torch differentiates these steps, which have no kernel: {listed}. See gradkern.explain."
            )
        return verdict

    def warn(self, message: str) -> None:
        """Warn, once per model and message."""
        with self.lock:
            if message in self._warned:
                return
            self._warned.add(message)
        warnings.warn(message, GradkernWarning, stacklevel=_stack_level())


models = WeakMemo(ModelState)
_callables = ModelState()  # of it only the warnings about callables that are no modules, once per process


def warn(module: nn.Module | None, message: str) -> None:
    """Warn, once per model and message."""
    (_callables if module is None else models.of(module)).warn(message)


on_reset(_callables._warned.clear)


def worth_tracing(entry: CacheEntry, predicted: float) -> bool:
    """Would tracing have paid by now?  ``predicted``: seconds of autograd that this call still needs."""
    return SAVED_SHARE * (entry.seconds + predicted) >= trace_cost()


def _traced(module: nn.Module, samples: tuple[Tensor, ...]) -> Verdict:
    begin = time.perf_counter()
    try:
        check_followed(module, samples)
        with torch.inference_mode(False), torch.no_grad(), buffers_kept(module):
            program = tracer.trace(module, samples)
            tracer.verify(program, module, samples)
        return Verdict(program)
    except tracer.Untraceable as error:
        return Verdict(None, _one_line(error.reason), couples_batch=error.mixes)
    except InputError:
        raise
    except Exception as error:  # whatever an export may raise, autograd still gives the right result
        return Verdict(None, f"tracing failed with {type(error).__name__}: {_one_line(str(error))}")
    finally:
        _trace_seconds.append(time.perf_counter() - begin)
        del _trace_seconds[1:-8]  # the first stands apart


def _one_line(text: str) -> str:
    line = next((part.strip() for part in text.splitlines() if part.strip()), "no reason given")
    return line.rstrip(".")[:300]


def trace_cost() -> float:
    """Seconds that the next trace is expected to take: the median of those so far, the first in the process aside."""
    if not _trace_seconds:
        return FIRST_TRACE
    later = sorted(_trace_seconds[1:]) or [LATER_TRACE]
    return later[len(later) // 2]


def _stack_level() -> int:
    """Steps from the function that warns to the first caller outside gradkern and Captum."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("gradkern", "captum", "contextlib"):
            break
    return level
