"""Measures whether kernels or autograd are faster for a kind of call.

A Program whose steps mostly run one by one on ATen may be slower than autograd on the model itself.  No static rule
predicts this well, so both are timed on some of the caller's own samples when a Program is first used, for a few
milliseconds if the network is small.  The result is remembered with the Program, by everything that it depends on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..planner.timing import Timing, Way
from ..runtime.whole_chain import Whole
from ..util.memo import Memo
from . import batching, eager
from .profile import ModelProfile
from .request import Request
from .state import BoundProgram
from .targets import Seeds

#: Calls of 1, 2–7, 8–31, and 32 or more samples are measured apart: in small ones the cost per call weighs more.
SIZES = (2, 8, 32)
MOST_SAMPLES = SIZES[-1]
# A round runs every way once.  Many samples show how the cost of reading the weights is shared, so a network is timed
# on fewer only if a round would take longer than this.
SLOW_ROUND = 3.0  # seconds
SLOW_NETWORK_SAMPLES = SIZES[-2]
WARM_UP = 2  # samples of a first run, which also packs weights and compiles primitives
MOST_SEEDS = 32  # the most seeds in a measurement on autograd, whose time is proportional to them
ROUNDS = 7  # the most rounds
PATIENCE = (0.9, 0.3, 0.03)  # seconds of measuring after which the first, the second, or a later round is the last
HOPELESS = 2.0  # a way that takes this many times as long as the fastest is not measured again

#: Measurements by everything that they depend on (`CallSetup.timing_key`).
timings: Memo[Timing] = Memo(256)

#: The way of all calls in this context, which a data set's store has recorded.
pinned_way: ContextVar[Way | None] = ContextVar("gradkern_way", default=None)


@contextmanager
def pinned(way: Way | None) -> Iterator[None]:
    """All calls inside that have a Program go this way; None keeps the setting outside."""
    token = pinned_way.set(way or pinned_way.get())
    try:
        yield
    finally:
        pinned_way.reset(token)


@dataclass(frozen=True, eq=False)
class CallSetup:
    """What the calls of a Program for the same seeds and inputs have in common.

    It does not depend on the values of tensors.  ``timing_key``: the key under which the fastest way of such calls is
    remembered.  ``whole``: the kernels that compute the whole network in such calls, if they do.
    """

    seeds: Seeds
    timing_key: Hashable
    whole: Whole[Any] | None


def measure(request: Request, bound: BoundProgram, setup: CallSetup, profile: ModelProfile) -> Timing:
    """Time kernels and autograd on the first samples of a request.  ``profile``: of the model on autograd."""
    seeds, whole = setup.seeds, setup.whole
    few = _fewer(seeds)
    torch_bytes = profile.per_sample if bound.verified.opaque_steps else 0

    def run(way: Way, samples: int) -> float:
        part = request.part(0, samples, seeds if way == "kernels" else few)

        def work() -> None:
            packed = whole.packed(bound.tensors) if whole is not None and way == "kernels" else None
            if whole is not None and packed is not None:
                whole(packed, [x.detach() for x in part.inputs])
            elif way == "kernels":
                batching.run(part, bound.program, bound.tensors, "auto", torch_bytes=torch_bytes)
            else:
                eager.run_as_measured(part, profile, 0, None, few.count, batched=way == "batched")

        took = seconds_of(work, request.inputs[0].device)
        return took if way == "kernels" else took * seeds.count / few.count

    warm = min(WARM_UP, request.samples)
    possible = [way for way in _ways(seeds) if _runs(run, way, warm)]
    best, spent = dict.fromkeys(possible, float("inf")), 0.0
    samples = min(request.samples, MOST_SAMPLES)
    if samples > SLOW_NETWORK_SAMPLES and sum(run(way, warm) for way in possible) / warm * samples > PATIENCE[0]:
        first = {way: run(way, SLOW_NETWORK_SAMPLES) for way in possible}
        if sum(first.values()) / SLOW_NETWORK_SAMPLES * samples > SLOW_ROUND:
            samples, best, spent = SLOW_NETWORK_SAMPLES, first, sum(first.values())
    for number in range(int(spent > 0.0), ROUNDS):
        if number and spent > PATIENCE[min(number, len(PATIENCE)) - 1]:
            break
        shortest = min(best.values())
        for way in best:
            if best[way] <= HOPELESS * shortest or number == 0:
                took = run(way, samples)
                best[way] = min(best[way], took)
                spent += took
    return Timing(samples, best)


def _ways(seeds: Seeds) -> tuple[Way, ...]:
    return ("kernels", "loop", "batched") if seeds.count > 1 else ("kernels", "loop")


def _runs(run: Callable[[Way, int], float], way: Way, samples: int) -> bool:
    """Run for the first time, and return whether torch can go this way: not every operation can be batched."""
    try:
        run(way, samples)
    except RuntimeError:
        if way != "batched":
            raise
        return False
    return True


def _fewer(seeds: Seeds) -> Seeds:
    """At most `MOST_SEEDS` of them."""
    if seeds.count <= MOST_SEEDS:
        return seeds
    indices = torch.arange(MOST_SEEDS) if seeds.indices is None else seeds.indices[..., :MOST_SEEDS]
    return replace(seeds, count=MOST_SEEDS, axes=(MOST_SEEDS,), indices=indices)


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Seconds that a piece of work takes on a device.  With one thread this is CPU time, which leaves out other work on
    the machine."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begin
