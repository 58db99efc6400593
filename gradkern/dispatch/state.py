"""What is known about each model: its Programs, the models that cannot be traced, and the cost of both.

Everything hangs weakly on the model and is guarded by a key of its structure (`binding.structure_key`) and of the
inputs' shapes, dtypes and devices, so that nothing is ever stale.  Values are never cached here.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..frontend import tracer
from ..ir.program import Opaque, Program
from ..runtime import binding
from ..util.options import Complaint, GradkernWarning
from .eager import Facts, buffers_kept, check_followed
from .guards import autocast

KEPT = 16  # structures per model
FIRST_TRACE = 1.2  # seconds, the first in a process (measured: about 1.1)
LATER_TRACE = 0.15  # seconds (measured: 0.08 … 0.12 and the verification)
SAVED_SHARE = 0.7  # of autograd's time, as predicted before anything is known (measured: 0.1 … 0.9)

_trace_seconds: list[float] = []


@dataclass(frozen=True)
class Verdict:
    """What tracing said: a Program, or the reason why there is none."""

    program: Program | None
    reason: str = ""
    mixes: bool = False  # samples of one batch depend on each other


class Entry:
    """All that is known about one model."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.live = threading.RLock()  # held where a forward changes the model's buffers
        self._verdicts: OrderedDict[Hashable, Verdict] = OrderedDict()
        self._facts: OrderedDict[Hashable, Facts] = OrderedDict()
        self._spent: OrderedDict[Hashable, float] = OrderedDict()
        self._warned: set[str] = set()

    def verdict(self, key: Hashable) -> Verdict | None:
        with self.lock:
            return self._verdicts.get(key)

    def facts(self, key: Hashable, measure: Callable[[], Facts]) -> Facts:
        """The model's measured facts; ``measure`` is called where they are not known yet."""
        with self.lock:
            known = self._facts.get(key)
        if known is None:
            with self.live:
                known = measure()
            with self.lock:
                _remember(self._facts, key, known)
        return known

    def spend(self, key: Hashable, seconds: float) -> None:
        """Note time spent on autograd that a Program might have saved."""
        with self.lock:
            _remember(self._spent, key, self._spent.get(key, 0.0) + seconds)

    def worth_tracing(self, key: Hashable, predicted: float) -> bool:
        """Would tracing have paid by now?  ``predicted``: seconds of autograd that this call still needs."""
        with self.lock:
            spent = self._spent.get(key, 0.0)
        return SAVED_SHARE * (spent + predicted) >= trace_cost()

    def trace(self, key: Hashable, module: nn.Module, samples: Callable[[], tuple[Tensor, ...]]) -> Verdict:
        """Trace and verify now, unless another thread has done so meanwhile; warns once where autograd takes over."""
        with self.lock:
            known = self._verdicts.get(key)
            if known is not None:
                return known
            verdict = _traced(module, samples())
            _remember(self._verdicts, key, verdict)
        self.report(module, verdict)
        return verdict

    def report(self, module: nn.Module, verdict: Verdict) -> None:
        """One warning for a model that stays on autograd, or for the steps that do."""
        name = type(module).__name__
        if verdict.program is None:
            self.warn(f"{name} runs on autograd as a whole: {verdict.reason}.")
            return
        opaque = [s for s in verdict.program.steps if isinstance(s.form, Opaque)]
        if opaque:
            listed = "; ".join(dict.fromkeys(f"{s.op or s.form.call.op} in {s.module or name}" for s in opaque))
            self.warn(
                f"{name}: torch differentiates these steps, which have no kernel: {listed}. See gradkern.explain."
            )

    def warn(self, message: str) -> None:
        with self.lock:
            if message in self._warned:
                return
            self._warned.add(message)
        warnings.warn(message, GradkernWarning, stacklevel=_stack_level())


def _traced(module: nn.Module, samples: tuple[Tensor, ...]) -> Verdict:
    begin = time.perf_counter()
    try:
        check_followed(module, samples)
        with torch.inference_mode(False), torch.no_grad(), buffers_kept(module):
            program = tracer.trace(module, samples)
            tracer.verify(program, module, samples)
        return Verdict(program)
    except tracer.Untraceable as error:
        return Verdict(None, _one_line(error.reason), error.mixes)
    except Complaint:
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


def _remember(table: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > KEPT:
        table.popitem(last=False)


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """A warning about a plain callable, which has no entry: once per process and message."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, GradkernWarning, stacklevel=_stack_level())


def _stack_level() -> int:
    """Steps from the function that warns to the first caller outside gradkern and Captum."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("gradkern", "captum", "contextlib"):
            break
    return level


# ---------------------------------------------------------------------------------------------------------------
# One entry per model


_entries: dict[int, tuple[weakref.ref[nn.Module], Entry]] = {}  # by identity: a module may define == as it likes
_entries_lock = threading.Lock()


def entry(module: nn.Module) -> Entry:
    """What is known about this model; forgotten with the model."""
    number = id(module)
    with _entries_lock:
        found = _entries.get(number)
        if found is not None and found[0]() is module:
            return found[1]
        made = Entry()
        _entries[number] = (weakref.ref(module, lambda gone: _forget(number, gone)), made)
        return made


def _forget(number: int, gone: weakref.ref[nn.Module]) -> None:
    # No lock: a garbage collection may come while this thread holds it, and popping is atomic.
    found = _entries.get(number)
    if found is not None and found[0] is gone:
        _entries.pop(number, None)


def key_of(module: nn.Module, inputs: Sequence[Tensor]) -> Hashable:
    """Structure of the model, and shapes, dtypes and devices of the inputs."""
    signature = tuple((tuple(x.shape[1:]), x.dtype, str(x.device)) for x in inputs)
    if isinstance(module, torch.jit.ScriptModule):  # it has no attributes to look at, and is never traced
        return (tuple(part.training for part in module.modules()), signature, autocast(inputs))
    return (binding.structure_key(module), signature, autocast(inputs))
