"""The route of a call: `decide` chooses a `Route` once, and everything after it follows that route.

A route holds for one public call only, because a model may change between two calls; `decide` then checks it again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.program import Program
from ..planner.timing import Way
from ..util import options
from ..util.callables import is_same, name_of
from ..util.options import Engine
from . import guards, state
from .checks import check_devices, check_reached
from .guards import EagerReason
from .request import Request
from .state import BoundProgram, CacheEntry, ModelState, Refusal

VERIFY_SAMPLES = 4  # that a new Program is compared with autograd on


@dataclass(eq=False)
class Route:
    """How the calls of one model at inputs like these are run, and the state kept for the model.

    When `decide` returns, at most one of three things is known: ``eager_reason``, why autograd has to take the calls,
    whatever the network computes; ``refusal``, why the model has no Program; ``bound``, the Program whose guards hold.
    If none is, `bound_program` captures the model and sets one of the last two.
    """

    engine: Engine
    fn: Any
    module: nn.Module | None
    inputs: tuple[Tensor, ...]
    signature: Hashable
    state: ModelState
    entry: CacheEntry
    eager_reason: EagerReason | None = None
    refusal: Refusal | None = None
    bound: BoundProgram | None = None
    way_by_seed_count: dict[int, Way] = field(default_factory=dict)  # the way that all parts of the call go

    @property
    def undecided(self) -> bool:
        """Whether only a capture can tell if the model has a Program."""
        return self.eager_reason is None and self.refusal is None and self.bound is None

    @property
    def program(self) -> Program | None:
        """The model's Program, if it is known and the engine uses one."""
        return None if self.bound is None else self.bound.program

    @property
    def why_eager(self) -> str:
        """Why autograd takes the calls, as far as that is known; empty if it does not."""
        if self.eager_reason is not None:
            return self.eager_reason.text
        if self.engine == "autograd":
            return "the engine is 'autograd'"
        return "" if self.refusal is None else self.refusal.reason

    def bound_program(self, request: Request) -> BoundProgram | None:
        """The Program that the engine uses, captured now if nothing is known; None if autograd takes the calls.

        Then a warning says why, once per model, unless the engine is autograd.
        """
        if self.engine == "autograd":
            return None
        if self.eager_reason is not None:
            self.warn(f"{name_of(self.fn)} runs on autograd: {self.eager_reason.text}.")
        elif self.undecided:
            result = self.state.capture(self.entry, self.fn, self.inputs, lambda: request.pick(VERIFY_SAMPLES))
            if isinstance(result, Refusal):
                self.refusal = result
            else:
                self.bound = result
        return self.bound

    def refuse(self, reason: str) -> None:
        """Leave this model to autograd from now on."""
        self.bound, self.refusal = None, self.state.refuse(self.entry, self.fn, reason)

    def check_reached(self, request: Request) -> None:
        """Raise `Unused` for an input that the output is known not to depend on."""
        if self.bound is not None:
            check_reached(request.wrt, self.bound.verified.unused)

    def serves(self, request: Request, engine: Engine) -> bool:
        """Whether another request can take this route."""
        return (
            is_same(self.fn, request.fn)
            and self.engine == engine
            and self.signature == guards.signature(request.inputs)
            and all(type(x) in guards.PLAIN_TENSORS for x in request.inputs)
        )

    def warn(self, message: str) -> None:
        """Warn, once per model and message."""
        state.warn(self.fn, message)


def decide(request: Request, engine: Engine | None = None) -> Route:
    """Decide which route a request takes.  ``engine`` as in `gradkern.use`.

    The cheapest checks come first, and the first that applies decides.  The guards of a Program also cover the state of
    the model, which is checked separately only without a Program.  Raises `BadValue` if the model or the inputs are on
    the meta device.
    """
    fn, name = request.fn, options.engine(engine)
    try:
        model_state = state.models.of(request.owner)
    except TypeError:  # the object takes no weak reference, so nothing is remembered
        model_state = ModelState()
    signature = guards.signature(request.inputs)
    entry = model_state.entries.get_or_make((request.access_path, signature), CacheEntry)
    route = Route(name, fn, request.module, request.inputs, signature, model_state, entry)
    of_call = guards.call_reason(request.inputs)
    if of_call is None and name != "autograd" and entry.programs:
        route.bound = _guarded_program(request, entry)
        if route.bound is not None:
            return route
    of_call = of_call or guards.guarded_reason(request.module, request.inputs)
    check_devices(request.module, request.inputs)
    scripted = isinstance(request.module, torch.jit.ScriptModule)
    of_model = None if request.module is None or scripted else guards.model_reason(request.module)
    # If the batch may not be cut, that outweighs any other reason.
    couples_batch = of_model is not None and of_model.couples_batch
    route.eager_reason = of_model if couples_batch else of_call or of_model
    if route.eager_reason is None:
        route.refusal = entry.refusal(fn)
    return route


def _guarded_program(request: Request, entry: CacheEntry) -> BoundProgram | None:
    """The Program whose guards hold now, if there is one."""
    match = guards.find_graph(entry.graphs, request.fn, request.inputs)
    verified = None if match is None else entry.programs.get(match.graph)
    if match is None or verified is None:
        return None
    entry.misses = 0
    return BoundProgram(verified, match.tensors)


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
