"""The route of a call: `decide` chooses a `Route` once, and everything after it follows that route.

A route holds for one public call only, because a model may change between two calls; `decide` then checks it again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.program import Program, Shape
from ..planner.timing import Timing, Way
from ..runtime.ops import Statistics
from ..runtime.parameters import bind
from ..runtime.whole_chain import whole_chain
from ..util import options
from ..util.buffers import buffers_kept
from ..util.callables import is_same, name_of
from ..util.memory import out_of_memory
from ..util.options import Engine
from . import batching, eager, guards, repeated, state, ways
from .eager import ModelProfile
from .first_use import AutogradWork, clock
from .guards import EagerReason
from .request import JacobianResult, Request, allocate, check_devices, check_fits_in_memory, check_reached, too_large
from .state import BoundProgram, CacheEntry, CallSetup, ModelState, Verdict
from .watch import SAMPLES, OutputsChanged

VERIFY_SAMPLES = 4  # that a new Program is compared with autograd on
PROBE_SAMPLES = 3  # that a model runs on to learn its memory, its output's shape, and whether it changes buffers
CHANGED = "its outputs are not those of the network that was captured: something that no guard sees has changed (an "
CHANGED += "environment variable, a file, a random number). gradkern.reset() captures it again"
MOST_UNPROFILED_SAMPLES = 48  # with so few samples, profiling the model would take much of the time of the call


#: The state when a call begins.  `EagerReason`: autograd has to take the call, whatever the network computes.
#: `BoundProgram`: its guards hold.  `Verdict`: the reason why there is no Program.  None: nothing is known yet.
Decision = EagerReason | BoundProgram | Verdict | None


@dataclass(eq=False)
class Route:
    """How the calls of one model at inputs like these are run: the decision, and the state kept for the model.

    `decide` sets ``decision``.  Only two methods change it later: `capture` replaces an unknown decision, and `refuse`
    withdraws a Program.
    """

    engine: Engine
    fn: Any
    module: nn.Module | None
    inputs: tuple[Tensor, ...]
    signature: Hashable
    state: ModelState
    entry: CacheEntry
    decision: Decision
    way_by_seed_count: dict[int, Way] = field(default_factory=dict)  # the way that all parts of the call go

    @property
    def eager_reason(self) -> EagerReason | None:
        """Why autograd has to take the calls, whatever the network computes."""
        return self.decision if isinstance(self.decision, EagerReason) else None

    @property
    def verdict(self) -> Verdict | None:
        """The result of the capture, if it is known and counts."""
        if isinstance(self.decision, BoundProgram):
            return self.decision.verdict
        return self.decision if isinstance(self.decision, Verdict) else None

    @property
    def program(self) -> Program | None:
        """The model's Program, if it is known and the engine uses one."""
        return self.decision.program if isinstance(self.decision, BoundProgram) else None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live tensors that the Program names."""
        assert isinstance(self.decision, BoundProgram)
        return self.decision.tensors

    def params(self) -> dict[str, Tensor]:
        """The parameters of the Program, as they are in this call."""
        assert isinstance(self.decision, BoundProgram)
        return bind(self.decision.program, self.decision.tensors)

    def capture(self, samples: Callable[[], tuple[Tensor, ...]]) -> BoundProgram | Verdict:
        """The result of the capture, which is done now if it has not been."""
        assert not isinstance(self.decision, EagerReason)
        if self.decision is None:
            self.decision = self.state.capture(self.entry, self.fn, self.inputs, samples)
        return self.decision

    def refuse(self, reason: str) -> None:
        """Leave this model to autograd from now on."""
        self.decision = self.state.refuse(self.entry, self.fn, reason)

    def check_reached(self, request: Request) -> None:
        """Raise `Unused` for an input that the output is known not to depend on."""
        if isinstance(self.decision, BoundProgram):
            check_reached(request, self.decision.verdict.unused)

    def serves(self, request: Request, engine: Engine) -> bool:
        """Whether another request can take this route."""
        return (
            is_same(self.fn, request.fn)
            and self.engine == engine
            and self.signature == guards.signature(request.inputs)
            and all(type(x) in guards.PLAIN_TENSORS for x in request.inputs)
        )

    @property
    def work(self) -> AutogradWork:
        """The work of autograd that a Program might have done."""
        return self.entry.work

    def warn(self, message: str) -> None:
        """Warn, once per model and message."""
        state.warn(self.fn, message)


def decide(request: Request, engine: Engine | None = None) -> Route:
    """Decide which route a request takes.  ``engine`` as in `gradkern.use`.

    Raises `BadValue` if the model or the inputs are on the meta device.
    """
    fn, name = request.fn, options.engine(engine)
    try:
        model_state = state.models.of(request.owner)
    except TypeError:  # the object takes no weak reference, so nothing is remembered
        model_state = ModelState()
    signature = guards.signature(request.inputs)
    entry = model_state.entries.get_or_make((request.access_path, signature), CacheEntry)
    decision = _decision(request, name, entry)
    return Route(name, fn, request.module, request.inputs, signature, model_state, entry, decision)


def _decision(request: Request, engine: Engine, entry: CacheEntry) -> Decision:
    """The first decision that applies; the cheapest checks come first.

    The guards of a Program also cover the state of the model, which is checked separately only without a Program.
    """
    of_call = guards.call_reason(request.inputs)
    if of_call is None and engine != "autograd" and entry.verdicts:
        captured = _bound_program(request, entry)
        if captured is not None:
            return captured
    of_call = of_call or guards.guarded_reason(request.module, request.inputs)
    check_devices(request.module, request.inputs)
    scripted = isinstance(request.module, torch.jit.ScriptModule)
    of_model = None if request.module is None or scripted else guards.model_reason(request.module)
    if of_model is not None and of_model.couples_batch:  # the batch may not be cut, which outweighs any other reason
        return of_model
    return of_call or of_model or entry.refusal(request.fn)


def _bound_program(request: Request, entry: CacheEntry) -> BoundProgram | None:
    """The Program whose guards hold now, if there is one."""
    captured = guards.find_graph(entry.capture, request.fn, request.inputs)
    verdict = None if captured is None else entry.verdicts.get(captured.graph)
    if captured is None or verdict is None or verdict.program is None:
        return None
    entry.misses = 0
    return BoundProgram(verdict, verdict.program, captured.tensors, captured.graph)


_decided: ContextVar[list[Route] | None] = ContextVar("gradkern_routes", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """Make everything inside one public call, whose parts share their routes by `shared_route`."""
    if _decided.get() is not None:
        yield
        return
    token = _decided.set([])
    try:
        yield
    finally:
        _decided.reset(token)


def shared_route(request: Request, engine: Engine | None = None) -> Route:
    """`decide`, or the decision that has already been made for the enclosing public call.

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
# Facts about a model that are known, or have to be measured


def ensure_captured(request: Request, route: Route) -> Verdict | None:
    """Capture if that has not been done; None if autograd takes the call at once (and a warning says why)."""
    if route.eager_reason is not None:
        _say_why_eager(route, route.eager_reason)
        return None
    route.capture(lambda: request.pick(VERIFY_SAMPLES))
    return route.verdict


def output_shape(request: Request, route: Route) -> Shape:
    """Per-sample shape of the model's output, from its Program or else from a run of one or two samples."""
    if route.program is not None:
        return route.program.output_shape
    return eager.measured_output_shape(request)


def whole_batch_reason(request: Request, route: Route) -> str:
    """Why one forward must see the whole batch: its samples depend on each other, or the model draws random numbers or
    changes its buffers.  Empty if the batch may be cut."""
    return "" if route.program is not None else _profile(request, route).whole_batch_reason


def _profile(request: Request, route: Route) -> ModelProfile:
    """Whether the batch may be cut, whether buffers change, and how much memory a sample takes.  This is measured again
    in every call, since nothing guards a model that runs on autograd."""
    reason, verdict = route.eager_reason, route.verdict
    if reason is not None and reason.couples_batch:
        return ModelProfile(reason.text, mutates=True)
    with route.state.forward_lock:
        profile = route.entry.profile = eager.probe(request.fn, route.module, request.pick(PROBE_SAMPLES), request.wrt)
    if verdict is not None and verdict.couples_batch:
        return replace(profile, whole_batch_reason=verdict.reason)
    return profile


def _say_why_eager(route: Route, reason: EagerReason) -> None:
    route.warn(f"{name_of(route.fn)} runs on autograd: {reason.text}.")


# ---------------------------------------------------------------------------------------------------------------
# Taking the route


def solve(request: Request, route: Route) -> JacobianResult:
    """The request's results.  Raises `Unused` for an input that the output does not depend on."""
    if request.samples == 0:
        with eager.outside_modes():
            return allocate(request, output_shape(request, route))
    start, results = 0, None
    if route.decision is None and route.engine == "auto":
        start, results = _on_autograd_until_capture_pays(request, route)
    if start < request.samples:
        captured = _program_of(request, route)
        if captured is not None:
            try:
                return _by_program(request, route, captured, start, results)
            except OutputsChanged:
                route.refuse(CHANGED)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or not out_of_memory(error):  # a GPU's own error says more
                    raise
                count = request.resolve_seeds(request.samples, captured.program.output_shape).count
                work = f" beside memory_budget={options.memory_budget()} bytes of work"
                raise too_large(request.gradient_bytes * request.samples * count, work) from error
        return _on_autograd(request, route, start, results)
    assert results is not None
    return results


def _program_of(request: Request, route: Route) -> BoundProgram | None:
    """The Program that the engine uses, captured now if need be; None if autograd takes the call."""
    if route.engine == "autograd":
        return None
    if isinstance(route.decision, EagerReason):
        _say_why_eager(route, route.decision)
        return None
    captured = route.decision or route.capture(lambda: request.pick(VERIFY_SAMPLES))
    return None if isinstance(captured, Verdict) else captured


def _by_program(
    request: Request, route: Route, captured: BoundProgram, start: int, results: JacobianResult | None
) -> JacobianResult:
    """The results for the samples from ``start`` on by the way that is taken.  Raises `OutputsChanged`."""
    setup = _call_setup(request, route, captured)
    way = _way(request, route, captured, setup)
    if way != "kernels":
        profile, batched = _profile_of_program(request, route), way == "batched"
        with _restored(route, profile):
            return eager.run_as_measured(request, profile, start, results, setup.seeds.count, batched=batched)
    whole = (
        None if results is not None or route.engine == "reference" else _by_whole_chain(request, route, captured, setup)
    )
    if whole is not None:
        return whole
    torch_bytes = _profile_of_program(request, route).per_sample if captured.verdict.opaque else 0
    return batching.run(
        request,
        captured.program,
        captured.tensors,
        route.engine,
        start,
        results,
        torch_bytes=torch_bytes,
        watch=route.entry.watch,
    )


def _call_setup(request: Request, route: Route, captured: BoundProgram) -> CallSetup:
    """The `CallSetup` of calls like this one, remembered if their seeds do not depend on the samples."""
    # Parts of a call have the size of the whole.
    kind = request.wrt, torch.get_num_threads(), bisect_right(ways.SIZES, request.call_samples)
    seeds_key = request.seeds_key
    if seeds_key is None:
        return _make_setup(request, route, captured, kind)
    return captured.verdict.calls.get_or_make((seeds_key, *kind), lambda: _make_setup(request, route, captured, kind))


def _make_setup(request: Request, route: Route, captured: BoundProgram, kind: tuple[Hashable, ...]) -> CallSetup:
    route.check_reached(request)
    x, program = request.inputs[request.wrt[0]], captured.program
    seeds = request.resolve_seeds(request.samples, program.output_shape)
    whole = None
    # On a GPU, whether its kernels are wanted depends on the engine, and their first results are compared.
    if request.seeds_key is not None and seeds.count and x.device.type == "cpu" and batching.has_kernels(x):
        whole = whole_chain(program, route.params(), request.inputs, seeds.indices, seeds.axes, request.wrt)
    timing_key = program.key, seeds.awaits_outputs, seeds.count, x.dtype, x.device, *kind
    return CallSetup(seeds, timing_key, whole)


def _way(request: Request, route: Route, captured: BoundProgram, setup: CallSetup) -> Way:
    """The way that all parts of this public call go: the one that a store has pinned, kernels if the caller asks for
    them, or else the faster one."""
    pinned, count = ways.pinned_way.get(), setup.seeds.count
    if pinned is not None and route.engine != "reference":
        return pinned
    if route.engine != "auto" or not count:
        return "kernels"
    way = route.way_by_seed_count.get(count)
    if way is None:
        way = route.way_by_seed_count[count] = _timing(request, route, captured, setup).way
    return way


def _timing(request: Request, route: Route, captured: BoundProgram, setup: CallSetup) -> Timing:
    """How long calls like this one take on kernels and on autograd; measured now if that has not been done."""

    def measure() -> Timing:
        profile = _profile_of_program(request, route)
        with _restored(route, profile):
            return ways.measure(request, captured, setup, profile)

    return ways.timings.get_or_make(setup.timing_key, measure)


def _by_whole_chain(request: Request, route: Route, captured: BoundProgram, setup: CallSetup) -> JacobianResult | None:
    """The results by a single call of the kernel; None if the call needs anything more."""
    whole, watch = setup.whole, route.entry.watch
    if whole is None or request.out is not None or request.keep_outputs or torch.is_inference_mode_enabled():
        return None
    if watch.due():
        return None
    check_fits_in_memory(request.samples * whole.gradient_bytes)
    begin = clock()
    jacobians = repeated.run(whole, watch, captured.tensors, request.inputs)
    if jacobians is None:
        return None
    if clock() - begin < repeated.SHORT:
        repeated.note(request, route.engine, route.entry, captured.graph, whole)
    seeds, shaped = setup.seeds, whole.shaped(jacobians)
    return JacobianResult(seeds, captured.program.output_shape, tuple(jacobians), shaped)


def add_to_sums(request: Request, route: Route, sums: Statistics) -> Tensor | None:
    """The outputs ``[N, *out]``, with the Jacobians of one input added to ``sums`` and none of them kept.

    None, with nothing added, if that is not one chain of kernels on a CPU.
    """
    captured = _program_of(request, route)
    if captured is None or len(request.wrt) != 1 or not request.samples or route.engine == "reference":
        return None
    setup, watch = _call_setup(request, route, captured), route.entry.watch
    if setup.whole is None or _way(request, route, captured, setup) != "kernels":
        return None
    packed = setup.whole.packed(captured.tensors)
    if packed is None:
        return None
    with torch.inference_mode(False), torch.no_grad():
        inputs, rows = [x.detach() for x in request.inputs], setup.whole.rows(packed)
        if watch.due():  # afterwards it would be too late
            few = [x[:SAMPLES] for x in inputs]
            y = setup.whole.add_to(Statistics.none(len(few[0])), packed, rows, few)
            try:
                watch.compare(request.fn, request.module, few, y)
            except OutputsChanged:
                route.refuse(CHANGED)
                return None
        begin = clock()
        y = setup.whole.add_to(sums, packed, rows, inputs)
        watch.add(clock() - begin)
    return y


def timing(request: Request, route: Route) -> Timing | None:
    """How long a request takes on kernels and on autograd; None for a route that does not depend on that."""
    captured = route.decision
    if route.engine != "auto" or not isinstance(captured, BoundProgram) or not request.samples:
        return None
    if captured.verdict.unused.intersection(request.wrt):
        return None
    setup = _call_setup(request, route, captured)
    return _timing(request, route, captured, setup) if setup.seeds.count else None


def _profile_of_program(request: Request, route: Route) -> ModelProfile:
    """The profile on autograd of a model that has a Program: its samples do not mix, whatever it keeps in buffers."""
    profile = route.entry.profile or _profile(request, route)
    return replace(profile, whole_batch_reason="") if profile.whole_batch_reason else profile


def _on_autograd(
    request: Request, route: Route, start: int = 0, results: JacobianResult | None = None
) -> JacobianResult:
    profile = _profile_of_run(request, route)
    with _restored(route, profile):
        return eager.run(request, profile, start, results)


def _on_autograd_until_capture_pays(request: Request, route: Route) -> tuple[int, JacobianResult | None]:
    """Run on autograd, piece by piece, until a capture pays; return the number of samples done."""
    work, seeds, results = route.work, 0, None
    if work.output_shape is not None:
        seeds = request.resolve_seeds(request.samples, work.output_shape).count
    if work.capture_pays((request.samples + request.ahead) * seeds):
        return 0, None
    profile = _profile_of_run(request, route)
    with _restored(route, profile):
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


def _profile_of_run(request: Request, route: Route) -> ModelProfile:
    """The profile for one call on autograd.  One sample is not measured, nor are a few that fit in one forward."""
    samples, profile, reason = request.samples, route.entry.profile, route.eager_reason
    if reason is None or not reason.couples_batch:
        fits = profile is not None and samples <= MOST_UNPROFILED_SAMPLES and _fit(request, profile)
        if samples == 1 or fits:
            return ModelProfile(mutates=True, one_piece=True)
    return _profile(request, route)


def _fit(request: Request, profile: ModelProfile) -> bool:
    loose = replace(profile, whole_batch_reason="")
    return loose.chunk(request.samples, request.sample_bytes, request.inputs[0].device) >= request.samples


@contextmanager
def _restored(route: Route, profile: ModelProfile) -> Iterator[None]:
    """Restore the buffers afterwards if a forward changes them; such calls run one at a time."""
    if not profile.mutates or route.module is None:
        yield
        return
    with route.state.forward_lock, buffers_kept(route.module):
        yield
