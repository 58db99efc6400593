"""A request on live autograd: how it runs depends on what a forward pass of the model does to its batch and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..ir.program import Shape
from ..util.buffers import buffers_kept
from . import eager
from .first_use import clock
from .live_model import measured_output_shape
from .profile import ModelProfile, profile_model
from .request import JacobianResult, Request
from .route import Route

PROBE_SAMPLES = 3  # that a model runs on to learn its memory, its output's shape, and whether it changes buffers
MOST_UNPROFILED_SAMPLES = 48  # with so few samples, profiling the model would take much of the time of the call


class AutogradCall:
    """One request of a model, on live autograd."""

    def __init__(self, request: Request, route: Route) -> None:
        self.request, self.route = request, route

    def profile(self) -> ModelProfile:
        """Whether the batch may be cut, whether buffers change, and how much memory a sample takes.  This is measured
        again in every call, since nothing guards a model that runs on autograd."""
        request, route = self.request, self.route
        reason, refusal = route.eager_reason, route.refusal
        if reason is not None and reason.couples_batch:
            return ModelProfile(reason.text, mutates=True)
        with route.state.forward_lock:
            profile = profile_model(request.fn, route.module, request.pick(PROBE_SAMPLES), request.wrt)
            route.entry.profile = profile
        if refusal is not None and refusal.couples_batch:
            return replace(profile, whole_batch_reason=refusal.reason)
        return profile

    def profile_beside_program(self) -> ModelProfile:
        """The profile of a model that has a Program: its samples do not mix, whatever it keeps in buffers."""
        profile = self.route.entry.profile or self.profile()
        return replace(profile, whole_batch_reason="") if profile.whole_batch_reason else profile

    def _profile_to_run(self) -> ModelProfile:
        """The profile for one call.  One sample is not measured, nor are a few that fit in one forward."""
        reason, known, samples = self.route.eager_reason, self.route.entry.profile, self.request.samples
        if reason is None or not reason.couples_batch:
            fits = known is not None and samples <= MOST_UNPROFILED_SAMPLES and self._fits(known)
            if samples == 1 or fits:
                return ModelProfile(mutates=True, one_piece=True)
        return self.profile()

    def _fits(self, profile: ModelProfile) -> bool:
        request, loose = self.request, replace(profile, whole_batch_reason="")
        return loose.chunk(request.samples, request.sample_bytes, request.inputs[0].device) >= request.samples

    @contextmanager
    def restoring_buffers(self, profile: ModelProfile) -> Iterator[None]:
        """Restore the buffers afterwards if a forward changes them; such calls run one at a time."""
        if not profile.mutates or self.route.module is None:
            yield
            return
        with self.route.state.forward_lock, buffers_kept(self.route.module):
            yield

    def run(self, start: int = 0, results: JacobianResult | None = None) -> JacobianResult:
        """The results of the samples from ``start`` on; ``results``: those before."""
        profile = self._profile_to_run()
        with self.restoring_buffers(profile):
            return eager.run(self.request, profile, start, results)

    def run_until_capture_pays(self) -> tuple[int, JacobianResult | None]:
        """Run piece by piece until a capture pays; return the number of samples done, and their results."""
        request, route = self.request, self.route
        work, seed_count, results = route.entry.work, 0, None
        if work.output_shape is not None:
            seed_count = request.resolve_seeds(request.samples, work.output_shape).count
        if work.capture_pays((request.samples + request.ahead) * seed_count):
            return 0, None
        profile = self._profile_to_run()
        with self.restoring_buffers(profile):
            for start, stop in eager.pieces(request, profile):
                begin = clock()
                results = eager.fill(request, results, start, stop)
                seconds = clock() - begin
                if profile.whole_batch_reason:
                    continue  # it cannot be captured
                with route.state.lock:
                    work.add((stop - start) * results.seeds.count, seconds)
                left = request.samples - stop
                if left and work.capture_pays((left + request.ahead) * results.seeds.count):
                    return stop, results
        with route.state.lock:
            work.calls += 1
            work.output_shape = None if results is None or profile.whole_batch_reason else results.output_shape
        return request.samples, results


def output_shape(request: Request, route: Route) -> Shape:
    """Per-sample shape of the model's output, from its Program or else from a run of one or two samples."""
    if route.program is not None:
        return route.program.output_shape
    return measured_output_shape(request)


def whole_batch_reason(request: Request, route: Route) -> str:
    """Why one forward must see the whole batch: its samples depend on each other, or the model draws random numbers or
    changes its buffers.  Empty if the batch may be cut."""
    return "" if route.program is not None else AutogradCall(request, route).profile().whole_batch_reason
