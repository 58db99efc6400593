"""The route that a call takes, decided once: `decide` gives a `Route`, and everything after takes it.

A route holds for one public call: between two calls a model may change in ways that only its key shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.program import Program, Shape
from ..runtime.parameters import bind
from ..util import options
from ..util.callables import anchor, is_same, name_of
from ..util.options import Engine
from . import batching, eager, guards, state
from .eager import ModelProfile
from .guards import EagerReason
from .request import JacobianResult, Request, allocate, check_devices, check_reached
from .state import CacheEntry, ModelState, Traced, Verdict
from .watch import OutputsChanged

TRACE_SAMPLES = 4
PROBE_SAMPLES = 3
CHANGED = "its outputs are not those of the network that was captured: something that no guard sees has changed (an "
CHANGED += "environment variable, a file, a random number). gradkern.reset() captures it again"
FEW_SAMPLES = 48  # for at most so many samples, measuring a model would take a good part of the time of a call


class Route:
    """How the calls of one model at inputs like these are run.

    The guards of a captured model are checked once, when they are first asked for; a Program that is traced later in
    the call is put here, too.
    """

    def __init__(self, engine: Engine, fn: Any, module: nn.Module | None, inputs: tuple[Tensor, ...]) -> None:
        self.engine, self.fn, self.module, self.inputs = engine, fn, module, inputs
        owner, way = anchor(fn)
        try:
            self.state = state.models.of(owner)
        except TypeError:  # it takes no weak reference, so nothing is remembered
            self.state = ModelState()
        self.signature = guards.signature(inputs)
        self.entry = self.state.entries.get_or_make((way, self.signature), CacheEntry)
        self._reason = guards.call_reason(module, inputs)
        self._traced: Traced | None = None
        if self._reason is None and engine != "autograd":
            self._traced = self._look()

    def _look(self) -> Traced | None:
        """The Program whose guards hold now; None where there is none."""
        entry = self.entry
        if not entry.verdicts:
            return None
        captured = guards.holding(entry.capture, self.fn, self.inputs)
        verdict = None if captured is None else entry.verdicts.get(captured.graph)
        if captured is None or verdict is None or verdict.program is None:
            return None
        entry.misses = 0
        return Traced(verdict, verdict.program, captured.tensors)

    @cached_property
    def eager_reason(self) -> EagerReason | None:
        """Why autograd has to take the calls, whatever the network computes."""
        if self._traced is not None:
            return self._reason
        check_devices(self.module, self.inputs)
        if self.module is None or isinstance(self.module, torch.jit.ScriptModule):
            return self._reason
        of_model = guards.model_reason(self.module)
        return of_model if of_model is not None and (of_model.couples_batch or not self._reason) else self._reason

    @cached_property
    def _refusal(self) -> Verdict | None:
        return self.entry.refusal(self.fn) if self.eager_reason is None else None

    @property
    def verdict(self) -> Verdict | None:
        """What tracing said, where it is known and counts."""
        return self._traced.verdict if self._traced is not None else self._refusal

    @property
    def program(self) -> Program | None:
        """The model's Program, where it is known and the engine uses one."""
        return None if self._traced is None else self._traced.program

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live tensors that the Program names."""
        assert self._traced is not None
        return self._traced.tensors

    def params(self) -> dict[str, Tensor]:
        """The parameters of the Program, as they are in this call."""
        assert self._traced is not None
        return bind(self._traced.program, self._traced.tensors)

    def trace(self, samples: Callable[[], tuple[Tensor, ...]]) -> Verdict:
        """Trace where that has not been done."""
        if self._traced is None:
            result = self.state.trace(self.entry, self.fn, self.inputs, samples)
            if isinstance(result, Verdict):
                self._refusal = result
                return result
            self._traced = result
        return self._traced.verdict

    def check_reached(self, request: Request) -> None:
        """Raise `Unused` for an input that the output is known not to depend on."""
        if self._traced is not None:
            check_reached(request, self._traced.verdict.unused)

    def refuse(self, reason: str) -> None:
        """Leave this model to autograd from here on."""
        self._traced, self._refusal = None, self.state.refuse(self.entry, self.fn, reason)

    def serves(self, request: Request, engine: Engine) -> bool:
        """Is this the route of that request, too?"""
        return (
            is_same(self.fn, request.fn)
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
        state.warn(self.fn, message)


def decide(request: Request, engine: str | None = None) -> Route:
    """Decide which route a request takes.  ``engine`` as in `gradkern.use`.

    Raises `BadValue` where the model or the inputs are on the meta device.
    """
    return Route(options.engine(engine), request.fn, request.module, request.inputs)


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

    Use it only on the model as the caller has passed it, not after hooks have been registered.
    """
    decided = _decided.get()
    name = options.engine(engine)
    for route in decided or ():
        if route.serves(request, name):
            return route
    route = decide(request, name)
    if decided is not None:
        decided.append(route)
    return route


# ---------------------------------------------------------------------------------------------------------------
# What is known about a model, or has to be measured


def verdict_now(request: Request, route: Route) -> Verdict | None:
    """Trace where that has not been done; None where autograd takes the call at once (and a warning says why)."""
    if route.eager_reason is not None:
        _say_why_eager(route)
        return None
    return route.trace(lambda: request.pick(TRACE_SAMPLES))


def output_shape(request: Request, route: Route) -> Shape:
    """Per-sample shape of the model's output: as known from its Program, else from a run of one or two samples."""
    if route.program is not None:
        return route.program.output_shape
    return eager.measured_output_shape(request)


def couples_batch(request: Request, route: Route) -> str:
    """Why one forward must see the whole batch: its samples depend on each other, or the model draws random numbers or
    changes its buffers.  Empty if the batch may be cut."""
    return "" if route.program is not None else _profile(request, route).couples_batch


def _profile(request: Request, route: Route) -> ModelProfile:
    """Whether the batch may be cut, whether buffers change, and how much memory a sample takes.  This is measured again
    in every call, since nothing guards a model that runs on autograd."""
    reason, verdict = route.eager_reason, route.verdict
    if reason is not None and reason.couples_batch:
        return ModelProfile(reason.text, mutates=True)
    with route.state.live:
        profile = route.entry.profile = eager.probe(request.fn, route.module, request.pick(PROBE_SAMPLES), request.wrt)
    if verdict is not None and verdict.couples_batch:
        return replace(profile, couples_batch=verdict.reason)
    return profile


def _say_why_eager(route: Route) -> None:
    assert route.eager_reason is not None
    route.warn(f"{name_of(route.fn)} runs on autograd: {route.eager_reason.text}.")


# ---------------------------------------------------------------------------------------------------------------
# The decision


def solve(request: Request, route: Route) -> JacobianResult:
    """The request's results.  Raises `Unused` for an input that the output does not depend on."""
    if request.samples == 0:
        with eager.outside_modes():
            return allocate(request, output_shape(request, route))
    if route.engine == "autograd" or route.eager_reason is not None:
        if route.engine != "autograd":
            _say_why_eager(route)
        return _on_autograd(request, route)
    start, results = 0, None
    if route.verdict is None and route.engine == "auto":
        start, results = _on_autograd_until_tracing_pays(request, route)
        if results is not None and start == request.samples:
            return results
    verdict = route.verdict or verdict_now(request, route)
    if verdict is None or verdict.program is None:
        return _on_autograd(request, route, start, results)
    route.check_reached(request)
    saved = (route.entry.profile or _profile(request, route)).per_sample if verdict.opaque else 0
    try:
        return batching.run(
            request, verdict.program, route.tensors, route.engine, start, results, saved=saved, watch=route.entry.watch
        )
    except OutputsChanged:
        route.refuse(CHANGED)
    return _on_autograd(request, route, start, results)


def _on_autograd(
    request: Request, route: Route, start: int = 0, results: JacobianResult | None = None
) -> JacobianResult:
    profile = _profile_of_run(request, route)
    with _restored(route, profile):
        return eager.run(request, profile, start, results)


def _on_autograd_until_tracing_pays(request: Request, route: Route) -> tuple[int, JacobianResult | None]:
    """Run on autograd, chunk by chunk, as long as tracing would cost more than it saves; return the samples done.

    The rule of the ski rental: by the time tracing pays, at most its own cost has been spent without it.
    """
    if route.tracing_pays:
        return 0, None
    profile = _profile_of_run(request, route)
    results = None
    with _restored(route, profile):
        for start, stop in eager.pieces(request, profile):
            begin = time.perf_counter()
            results = eager.fill(request, results, start, stop)
            seconds = time.perf_counter() - begin
            if profile.couples_batch:
                continue  # it cannot be traced
            route.spend(seconds)
            left = request.samples - stop
            predicted = seconds / (stop - start) * (left + request.ahead)
            if left and state.worth_tracing(route.entry, predicted):
                return stop, results
    return request.samples, results


def _profile_of_run(request: Request, route: Route) -> ModelProfile:
    """The profile for one call on autograd.  One sample is not measured, nor are a few that fit in one forward."""
    samples, profile, reason = request.samples, route.entry.profile, route.eager_reason
    if reason is None or not reason.couples_batch:
        fits = profile is not None and samples <= FEW_SAMPLES and _fit(request, profile)
        if samples == 1 or fits:
            return ModelProfile(mutates=True, one_piece=True)
    return _profile(request, route)


def _fit(request: Request, profile: ModelProfile) -> bool:
    loose = replace(profile, couples_batch="")
    return loose.chunk(request.samples, request.sample_bytes, request.inputs[0].device) >= request.samples


@contextmanager
def _restored(route: Route, profile: ModelProfile) -> Iterator[None]:
    """Restore the buffers afterwards if a forward changes them; such calls run one at a time."""
    if not profile.mutates or route.module is None:
        yield
        return
    with route.state.live, eager.buffers_kept(route.module):
        yield
