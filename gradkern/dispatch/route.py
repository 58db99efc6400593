"""The route that a call takes, decided once: `decide` gives a `Route`, and everything after takes it.

A route holds for one public call: between two calls a model may change in ways that only its key shows.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from ..ir.program import Program
from ..util import options
from ..util.options import Engine
from . import batching, eager, guards, state
from .eager import ModelProfile
from .guards import EagerReason
from .request import JacobianResult, Request, allocate, check_devices
from .state import CacheEntry, ModelState, Verdict
from .targets import Shape

TRACE_SAMPLES = 4
PROBE_SAMPLES = 3


@dataclass(frozen=True, eq=False)
class Route:
    """How the calls of one model at inputs like these are run.

    ``eager_reason``: why autograd has to take them, whatever the network computes.
    """

    engine: Engine
    module: nn.Module | None
    inputs: tuple[Tensor, ...]
    eager_reason: EagerReason | None
    state: ModelState

    @cached_property
    def entry(self) -> CacheEntry:
        """What is known of the model as it is; a Program that is traced later in the call is put there, too."""
        if self.module is None or (self.eager_reason is not None and self.eager_reason.couples_batch):
            return CacheEntry()  # nothing to remember
        return self.state.entries.get_or_make(guards.key_of(self.module, self.inputs), CacheEntry)

    @cached_property
    def signature(self) -> Hashable:
        return guards.signature(self.inputs)

    @property
    def verdict(self) -> Verdict | None:
        """What tracing said, where it is known and counts."""
        return self.entry.verdict if self.eager_reason is None else None

    @property
    def program(self) -> Program | None:
        """The model's Program, where it is known and the engine uses one."""
        verdict = None if self.engine == "autograd" else self.verdict
        return None if verdict is None else verdict.program

    def serves(self, request: Request, engine: Engine) -> bool:
        """Is this the route of that request, too?"""
        return (
            self.module is not None
            and self.module is request.module
            and self.engine == engine
            and self.signature == guards.signature(request.inputs)
            and all(type(x) in guards.PLAIN_TENSORS for x in request.inputs)
        )

    def spend(self, seconds: float) -> None:
        """Note time spent on autograd that a Program might have saved."""
        with self.state.lock:
            self.entry.seconds += seconds

    @property
    def tracing_pays(self) -> bool:
        """Would tracing have paid by now?"""
        return state.worth_tracing(self.entry, 0.0)

    def warn(self, message: str) -> None:
        """Warn, once per model and message."""
        state.warn(self.module, message)


def decide(request: Request, engine: str | None = None) -> Route:
    """Decide which route a request takes.  ``engine`` as in `gradkern.use`.

    Raises `BadValue` where the model or the inputs are on the meta device.
    """
    name, module = options.engine(engine), request.module
    check_devices(module, request.inputs)
    reason = guards.eager_reason(request.fn, module, request.inputs)
    known = ModelState() if module is None else state.models.of(module)
    return Route(name, module, request.inputs, reason, known)


_decided: ContextVar[list[Route] | None] = ContextVar("gradkern_routes", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """Everything inside belongs to one public call, whose parts share their routes by `shared_route`."""
    if _decided.get() is not None:
        yield
        return
    token = _decided.set([])
    try:
        yield
    finally:
        _decided.reset(token)


def shared_route(request: Request, engine: str | None = None) -> Route:
    """`decide`, or what the public call that this is part of has decided already.

    Only for what looks at the model as the caller has handed it over: not where hooks are registered meanwhile.
    """
    known = _decided.get()
    name = options.engine(engine)
    for route in known or ():
        if route.serves(request, name):
            return route
    route = decide(request, name)
    if known is not None:
        known.append(route)
    return route


# ---------------------------------------------------------------------------------------------------------------
# What is known about a model, or has to be measured


def verdict_now(request: Request, route: Route) -> Verdict | None:
    """Trace where that has not been done; None where autograd takes the call at once (and a warning says why)."""
    if route.eager_reason is not None:
        _say_why_eager(route)
        return None
    assert route.module is not None
    return route.state.trace(route.entry, route.module, lambda: request.pick(TRACE_SAMPLES))


def output_shape(request: Request, route: Route) -> Shape:
    """Per-sample shape of the model's output: as known from its Program, else from a run of one or two samples."""
    if route.verdict is not None and route.verdict.program is not None:
        return route.verdict.program.output_shape
    return eager.measured_output_shape(request)


def couples_batch(request: Request, route: Route) -> str:
    """Why one forward must see the whole batch: its samples depend on each other, or the model draws random numbers or
    changes its buffers.  Empty where the batch may be cut."""
    if route.verdict is not None and route.verdict.program is not None:
        return ""
    return _profile(request, route).couples_batch


def _profile(request: Request, route: Route) -> ModelProfile:
    """May the batch be cut, do buffers change, what does a sample take: measured once per structure."""
    reason, verdict = route.eager_reason, route.verdict
    if reason is not None and reason.couples_batch:
        return ModelProfile(reason.text, mutates=True)

    def measure() -> ModelProfile:
        return eager.probe(request.fn, route.module, request.pick(PROBE_SAMPLES), request.wrt)

    profile = route.state.profile(route.entry, measure)
    if verdict is not None and verdict.couples_batch:
        return replace(profile, couples_batch=verdict.reason)
    return profile


def _say_why_eager(route: Route) -> None:
    assert route.eager_reason is not None
    name = "This call" if route.module is None else type(route.module).__name__
    route.warn(f"{name} runs on autograd: {route.eager_reason.text}.")


# ---------------------------------------------------------------------------------------------------------------
# The decision


def solve(request: Request, route: Route, *, strict: bool = False) -> JacobianResult:
    """The request's results.  ``strict``: an input that the output does not depend on is an error, not zeros."""
    if request.samples == 0:
        with eager.outside_modes():
            return allocate(request, output_shape(request, route))
    if route.engine == "autograd" or route.eager_reason is not None:
        if route.engine != "autograd":
            _say_why_eager(route)
        return _on_autograd(request, route, strict=strict)
    start, results = 0, None
    if route.verdict is None and route.engine == "auto":
        start, results = _on_autograd_until_tracing_pays(request, route, strict)
        if results is not None and start == request.samples:
            return results
    verdict = route.verdict or verdict_now(request, route)
    if verdict is None or verdict.program is None:
        return _on_autograd(request, route, start, results, strict=strict)
    saved = _profile_of_run(request, route).per_sample if verdict.opaque else 0
    return batching.run(request, verdict.program, route.engine, start, results, strict=strict, saved=saved)


def _on_autograd(
    request: Request, route: Route, start: int = 0, results: JacobianResult | None = None, *, strict: bool
) -> JacobianResult:
    profile = _profile_of_run(request, route)
    with _restored(route, profile):
        return eager.run(request, profile, start, results, strict=strict)


def _on_autograd_until_tracing_pays(request: Request, route: Route, strict: bool) -> tuple[int, JacobianResult | None]:
    """Autograd, chunk by chunk, for as long as tracing would cost more than it saves; gives the samples done.

    The rule of the ski rental: by the time tracing pays, at most its own cost has been spent without it.
    """
    if route.tracing_pays:
        return 0, None
    profile = _profile_of_run(request, route)
    results = None
    with _restored(route, profile):
        for start, stop in eager.pieces(request, profile):
            begin = time.perf_counter()
            results = eager.fill(request, results, start, stop, strict=strict)
            seconds = time.perf_counter() - begin
            if profile.couples_batch and request.samples > 1:
                continue  # it cannot be traced
            route.spend(seconds)
            left = request.samples - stop
            predicted = seconds / (stop - start) * (left + request.ahead)
            if left and state.worth_tracing(route.entry, predicted):
                return stop, results
    return request.samples, results


def _profile_of_run(request: Request, route: Route) -> ModelProfile:
    """The profile for one call on autograd; one sample alone needs no measuring."""
    if request.samples == 1 and (route.eager_reason is None or not route.eager_reason.couples_batch):
        return ModelProfile("there is one sample", mutates=True)
    return _profile(request, route)


@contextmanager
def _restored(route: Route, profile: ModelProfile) -> Iterator[None]:
    """Put the buffers back afterwards, one call at a time, where a forward changes them."""
    if not profile.mutates or route.module is None:
        yield
        return
    with route.state.live, eager.buffers_kept(route.module):
        yield
