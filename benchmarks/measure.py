"""Timing: a screening pass that finds every peer's best batch size, and a duel of the best with gradkern.

Every timed call gets samples that no call has seen before, drawn outside of the timed region.
"""

from __future__ import annotations

import contextlib
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.baselines import PEERS, Chunk, Peer, run
from benchmarks.problems import Problem, batch_sizes

HOPELESS = 3.0  # a peer this many times behind the best, at batch sizes far apart, is not tried at the rest
FINALIST = 1.5  # peers within this factor of the best go to the duel
MOST_FINALISTS = 4

Say = Callable[[str], None]
Runner = Callable[..., Tensor]
"""``runner(x, out=None)``: the whole Jacobian ``[N, C, *in]`` of ``x`` ``[N, *in]``, in ``out`` where that helps."""


@dataclass(frozen=True)
class Screened:
    """One peer at one batch size: µs per sample, or why there is no figure."""

    peer: str
    batch: int
    us: float | None
    note: str = ""


@dataclass
class Contender:
    """Somebody in the duel, and the seconds of each of its rounds."""

    name: str
    title: str
    batch: int
    runner: Runner
    seconds: list[float] = field(default_factory=list)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Compilers warn and log a lot; none of it is news here."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def timed(runner: Runner, x: Tensor, out: Tensor | None = None) -> tuple[float, Tensor]:
    """Seconds of one call, and its result (freed by the caller, outside of the time)."""
    start = time.perf_counter()
    result = runner(x) if out is None else runner(x, out)
    return time.perf_counter() - start, result


def screen_one(chunk: Chunk, problem: Problem, batch: int, generator: torch.Generator, seconds: float) -> float:
    """µs per sample of one chunk size: the median of at least 3 chunks that fill about ``seconds``."""

    def runner(x: Tensor) -> Tensor:
        return chunk(x, None)

    timed(runner, problem.fresh(batch, generator))  # warm-up: allocations, primitives, compilation
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        times.append(timed(runner, problem.fresh(batch, generator))[0])
        if len(times) == 1 and times[0] > 4 * seconds:
            break
    return statistics.median(times) / batch * 1e6


def probe_order(sizes: list[int]) -> list[int]:
    """Batch sizes with three that are far apart first, so that a hopeless peer shows early."""
    first = list(dict.fromkeys(sizes[i] for i in (len(sizes) // 2, -1, min(1, len(sizes) - 1))))
    return [*first, *[s for s in sizes if s not in first]]


def screen(
    problem: Problem, model: nn.Module, samples: int, outputs: int, generator: torch.Generator, seconds: float,
    peers: tuple[str, ...], say: Say,
) -> list[Screened]:  # fmt: skip
    """Every peer at 8, 16, 32 … ``samples``; hopeless ones at a few batch sizes only."""
    found: list[Screened] = []
    best = float("inf")
    for name in peers:
        peer = PEERS[name]
        sizes = probe_order(list(peer.batches) or batch_sizes(samples))
        own = float("inf")
        for i, batch in enumerate(sizes):
            if i >= 3 and own > HOPELESS * best:
                break
            say(f"{problem.name}: {peer.title}, batch {batch}")
            found.append(screen_peer(peer, problem, model, outputs, batch, generator, seconds))
            own = min(own, found[-1].us or float("inf"))
            best = min(best, own)
            if found[-1].us is None and peer.fixed_size:
                break  # what does not compile for one batch size does not for another
    return found


def screen_peer(
    peer: Peer, problem: Problem, model: nn.Module, outputs: int, batch: int, generator: torch.Generator, seconds: float
) -> Screened:
    try:
        with quiet():
            us = screen_one(peer.make(model, outputs), problem, batch, generator, seconds)
    except Exception as error:  # a peer that cannot do this network is a finding, not a failure of the benchmark
        return Screened(peer.name, batch, None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}")
    return Screened(peer.name, batch, us)


def best_of(screened: list[Screened]) -> dict[str, Screened]:
    """Each peer at its best batch size, the best peer first."""
    best: dict[str, Screened] = {}
    for row in sorted((r for r in screened if r.us is not None), key=lambda r: r.us):
        best.setdefault(row.peer, row)
    return best


def finalists(screened: list[Screened]) -> list[Screened]:
    """Every peer within `FINALIST` of the best at its best batch size, and the best peer's second-best batch size."""
    best = list(best_of(screened).values())
    if not best:
        raise RuntimeError("no peer gave a result: " + "; ".join(sorted({r.note for r in screened})))
    chosen = [row for row in best if row.us <= FINALIST * best[0].us][:MOST_FINALISTS]
    others = sorted((r for r in screened if r.peer == best[0].peer and r.us and r is not best[0]), key=lambda r: r.us)
    return chosen + others[:1]


def contender(row: Screened, model: nn.Module, outputs: int) -> Contender:
    """A screened peer that handles the full set in chunks of its batch size."""
    peer = PEERS[row.peer]
    chunk = peer.make(model, outputs)
    return Contender(row.peer, peer.title, row.batch, lambda x, out=None: run(peer, chunk, x, row.batch, outputs, out))


def duel(
    contenders: list[Contender],
    problem: Problem,
    samples: int,
    outputs: int,
    rounds: int,
    generator: torch.Generator,
    say: Say,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Interleaved rounds in random order.  Returns, per contender, the inputs and the result of its last round.

    Everybody gets the same piece of memory for the result, faulted in and poisoned before each call: what a fresh
    64 MiB cost depends on the system's mood, for all alike.  (`fresh` measures that.)
    """
    shuffle = random.Random(0)
    last: dict[str, tuple[Tensor, Tensor]] = {}
    with quiet():
        for c in contenders:
            for _ in range(2):
                c.runner(problem.fresh(samples, generator))
        room = torch.empty(samples, outputs, *problem.fresh(1, generator).shape[1:])
        for r in range(rounds):
            say(f"{problem.name}: duel, round {r + 1} of {rounds}")
            for c in shuffle.sample(contenders, len(contenders)):
                x = problem.fresh(samples, generator)
                room.fill_(torch.nan)
                seconds, result = timed(c.runner, x, room)
                c.seconds.append(seconds)
                if r + 1 == rounds:
                    last[f"{c.name}@{c.batch}"] = (
                        x,
                        result.clone() if result.data_ptr() == room.data_ptr() else result,
                    )
                del result
    return last


def fresh(runner: Runner, problem: Problem, samples: int, rounds: int, generator: torch.Generator) -> float:
    """Median seconds of a call that allocates its own result, the one before still being alive."""
    seconds, result = [], None
    with quiet():
        for _ in range(rounds):
            took, result = timed(runner, problem.fresh(samples, generator))
            seconds.append(took)
    del result
    return statistics.median(seconds)


def paired_ratio(peer: list[float], ours: list[float]) -> dict[str, float]:
    """How many times longer the peer takes: the median of the rounds' ratios, and their quartiles."""
    ratios = sorted(p / o for p, o in zip(peer, ours, strict=True))
    if len(ratios) < 2:
        return {"median": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
