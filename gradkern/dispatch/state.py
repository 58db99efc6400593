"""State kept for each model: its graphs and Programs, or the reason why it has none, and its cost on autograd.

The state is tied weakly to the model, and kept by the shapes, dtypes and devices of the inputs.  A Program belongs to a
captured graph, whose guards are checked at every call.  Values of tensors are never kept here.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..frontend.capture import GraphCache, GuardedGraph
from ..frontend.refusal import NoProgram
from ..frontend.to_program import to_program
from ..frontend.verify import verify
from ..ir.program import Opaque, Program, Step
from ..runtime.parameters import bind
from ..util.buffers import buffers_kept
from ..util.callables import model_of, modules_behind, name_of
from ..util.memo import Memo, WeakMemo, on_reset
from ..util.options import GradkernWarning, InputError, debugging
from .first_use import AutogradWork, clock, note_capture
from .guards import refusal_key, stand_ins
from .live_model import check_runs
from .profile import ModelProfile
from .watch import Watch

SIGNATURES_PER_MODEL = 16
REFUSALS = 16  # per model and signature
MOST_MISSES = 8  # captures in a row that serve one call each, after which the model is left to autograd


@dataclass(frozen=True)
class Refusal:
    """Why a model has no Program in its present state.

    ``couples_batch``: samples of one batch depend on each other.
    """

    reason: str
    couples_batch: bool = False


@dataclass(frozen=True, eq=False)
class VerifiedProgram:
    """The Program of a captured graph, which gave the same results as live autograd.

    ``unused``: the inputs that autograd does not reach from the output.
    """

    program: Program
    graph: GuardedGraph
    unused: frozenset[int]

    @cached_property
    def opaque_steps(self) -> tuple[tuple[Step, Opaque], ...]:
        """The steps that torch differentiates, with their forms."""
        return tuple((step, step.form) for step in self.program.steps if isinstance(step.form, Opaque))


@dataclass(frozen=True, eq=False)
class BoundProgram:
    """A verified Program, and the live tensors that it names in this call."""

    verified: VerifiedProgram
    tensors: dict[str, Tensor]

    @property
    def program(self) -> Program:
        return self.verified.program

    def params(self) -> dict[str, Tensor]:
        """The parameters of the Program, as they are in this call."""
        return bind(self.program, self.tensors)


@dataclass(eq=False)
class CacheEntry:
    """The state of one model for inputs of one signature."""

    graphs: GraphCache = field(default_factory=GraphCache)
    programs: dict[GuardedGraph, VerifiedProgram] = field(default_factory=dict)
    refused: Memo[Refusal] = field(default_factory=lambda: Memo(REFUSALS))  # by `guards.refusal_key`
    profile: ModelProfile | None = None
    work: AutogradWork = field(default_factory=AutogradWork)  # work of autograd that a Program might have done
    watch: Watch = field(default_factory=Watch)
    misses: int = 0  # captures in a row of which none served a second call

    def refusal(self, fn: Any) -> Refusal | None:
        """Why the model has no Program in its present state, if that is known."""
        return self.refused.get(refusal_key(fn)) if len(self.refused) else None


class ModelState:
    """Everything that is known about one model."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.forward_lock = threading.RLock()  # held while a forward changes the model's buffers
        self.entries: Memo[CacheEntry] = Memo(SIGNATURES_PER_MODEL)  # by path to the callable, and `guards.signature`
        self._said: set[str] = set()

    def capture(
        self, entry: CacheEntry, fn: Any, inputs: Sequence[Tensor], samples: Callable[[], tuple[Tensor, ...]]
    ) -> BoundProgram | Refusal:
        """Capture, lower and verify now, unless that has been done; warns once if autograd takes over."""
        with self.lock:
            refusal = entry.refusal(fn)
            if refusal is not None:
                return refusal
            result = self._capture_and_verify(entry, fn, inputs, samples())
            if isinstance(result, Refusal):
                return self._remember(result, entry, fn)
        name, opaque = name_of(fn), result.verified.opaque_steps
        if opaque:
            listed = "; ".join(dict.fromkeys(f"{s.op or form.call.op} in {s.module or name}" for s, form in opaque))
            warn(
                fn,
                f"{name}: torch differentiates these steps, which have no kernel: {listed}. See gradkern.explain.",
            )
        return result

    def refuse(self, entry: CacheEntry, fn: Any, reason: str) -> Refusal:
        """Leave the model in its present state to autograd; warns once."""
        entry.programs.clear()
        return self._remember(Refusal(reason), entry, fn)

    def _remember(self, refusal: Refusal, entry: CacheEntry, fn: Any) -> Refusal:
        entry.refused.put(refusal_key(fn), refusal)
        warn(fn, f"{name_of(fn)} runs on autograd as a whole: {refusal.reason}.")
        return refusal

    def _capture_and_verify(
        self, entry: CacheEntry, fn: Any, inputs: Sequence[Tensor], samples: tuple[Tensor, ...]
    ) -> BoundProgram | Refusal:
        entry.misses += 1
        if entry.misses > MOST_MISSES:
            return Refusal("what its forward reads changes from call to call: it would be captured each time")
        begin = clock()
        try:
            with buffers_kept(nn.ModuleList(modules_behind(fn))):
                check_runs(fn, samples)
                match = entry.graphs.capture(fn, stand_ins(inputs))
                verified = entry.programs.get(match.graph)
                if verified is None:
                    program = to_program(match, inputs, name_of(fn))
                    unused = verify(program, fn, bind(program, match.tensors), samples)
                    match.graph.module = None
                    verified = entry.programs[match.graph] = VerifiedProgram(program, match.graph, unused)
                    for given_up in entry.programs.keys() - set(entry.graphs.graphs):
                        del entry.programs[given_up]
            return BoundProgram(verified, match.tensors)
        except NoProgram as error:
            if debugging():
                raise
            return Refusal(_one_line(error.reason), couples_batch=error.mixes)
        except InputError:
            raise
        except Exception as error:  # whatever a capture may raise, autograd still gives the right result
            if debugging():
                raise
            return Refusal(f"capturing failed with {type(error).__name__}: {_one_line(str(error))}")
        finally:
            note_capture(clock() - begin)

    def first_time(self, message: str) -> bool:
        """Whether this is asked for the first time; it is not from now on."""
        with self.lock:
            known = message in self._said
            self._said.add(message)
        return not known

    def warn(self, message: str) -> None:
        """Warn, once per model and message."""
        if self.first_time(message):
            warnings.warn(message, GradkernWarning, stacklevel=_stack_level())


models = WeakMemo(ModelState)
_callables = ModelState()  # only for the warnings about callables that are not modules, once per process


def warn(fn: Any, message: str) -> None:
    """Warn, once per model and message; about functions, which may be redefined for each call, once per process."""
    _of(fn).warn(message)


def first_time(fn: Any, what: str) -> bool:
    """Whether this is asked for the first time about a model, or about any function; it is not from now on."""
    return _of(fn).first_time(what)


def _of(fn: Any) -> ModelState:
    module = model_of(fn)
    return _callables if module is None else models.of(module)


on_reset(_callables._said.clear)


def _one_line(text: str) -> str:
    line = next((part.strip() for part in text.splitlines() if part.strip()), "no reason given")
    return line.rstrip(".")[:300]


def _stack_level() -> int:
    """Steps from the function that warns to the first caller outside gradkern and Captum."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("gradkern", "captum", "contextlib"):
            break
    return level
