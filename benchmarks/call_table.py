"""Calls with few samples: the callable that `gradkern.prepare` returns, `gradkern.jacobian`, torch's and JAX's ways.

All ways of a network at one size take turns.  A way leaves the rounds once its calls have taken `SECONDS`, and is left
out at sizes where one of its calls would take longer than `SLOWEST`.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev

import gradkern
from benchmarks import baselines, few_inputs, jax_peer, measure, report
from benchmarks.baselines import Chunk
from benchmarks.few_inputs import Problem as FewInputs
from benchmarks.measure import Say
from benchmarks.problems import PROBLEMS, Problem

SAMPLES = (1, 8, 64)
WARM_UP = 3  # rounds
LEAST = 3  # timed calls, however long they take
SECONDS = 4.0
SLOWEST = 10.0
HANDLE, PLAIN = "handle", "jacobian"
PLAIN_GOAL = 50.0  # µs that a call of `jacobian` may take beyond one of the handle
JAX = importlib.util.find_spec("jax") is not None

Call = Callable[[Tensor], Tensor]
Network = Problem | FewInputs


@dataclass
class Row:
    """One network at one size.  ``us``: median µs of a call, by way; ``first``: seconds of the first call, compilation
    included; ``left_out``: why a way has no figure."""

    net: str
    samples: int
    us: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def best_peer(self) -> str | None:
        peers = [name for name in self.us if name not in (HANDLE, PLAIN)]
        return min(peers, key=self.us.__getitem__, default=None)


def problems() -> list[Network]:
    return [*PROBLEMS.values(), *few_inputs.PROBLEMS]


def makers(compiled: bool) -> Iterator[tuple[str, Callable[[nn.Module, int, Tensor], Call]]]:
    """Every way by name, and what makes it for a model, its number of outputs and samples of its size."""

    def peer(make: Callable[[nn.Module, int], Chunk]) -> Callable[[nn.Module, int, Tensor], Call]:
        def made(model: nn.Module, outputs: int, x: Tensor) -> Call:
            chunk = make(model, outputs)
            return lambda x: chunk(x, None)

        return made

    yield HANDLE, lambda model, outputs, x: gradkern.prepare(model, x)
    yield PLAIN, lambda model, outputs, x: partial(gradkern.jacobian, model)
    yield "class loop", peer(baselines.loop_classes)
    yield "is_grads_batched", peer(baselines.grads_batched)
    for name, transform in (("jacrev", jacrev), ("jacfwd", jacfwd)):
        plain = partial(baselines.vmap_jacrev, transform=transform)
        yield f"vmap({name})", peer(plain)
        if compiled:
            yield f"compiled {name}", peer(lambda model, outputs, plain=plain: torch.compile(plain(model, outputs)))  # type: ignore[misc]
        if JAX:
            yield f"JAX {name}", peer(partial(jax_peer.chunk, transform=name))


def rows(problem: Network, rounds: int, compiled: bool, say: Say) -> Iterator[Row]:
    """A row for each size of `SAMPLES`."""
    model = problem.model()
    with torch.no_grad():
        outputs = model(problem.fresh(1, torch.Generator().manual_seed(22))).shape[1]
    before: Row | None = None
    for n in SAMPLES:
        row = Row(problem.name, n)
        with measure.quiet():
            _time(row, _ready(row, before, problem, model, outputs, compiled, say), problem, rounds, say)
        yield row
        before = row


def _ready(
    row: Row, before: Row | None, problem: Network, model: nn.Module, outputs: int, compiled: bool, say: Say
) -> dict[str, Call]:
    """Every way that a row has, after its first call."""
    calls: dict[str, Call] = {}
    x = problem.fresh(row.samples, torch.Generator().manual_seed(22))
    for name, make in makers(compiled):
        if before is not None and name not in before.us:
            row.left_out[name] = before.left_out[name]
            continue
        expected = 0.0 if before is None else before.us[name] * 1e-6 * row.samples / before.samples
        if expected > SLOWEST and name not in (HANDLE, PLAIN):
            row.left_out[name] = f"a call would take about {expected:.0f} s"
            continue
        say(f"calls: {row.net}: {row.samples} samples: {name}, first call")
        begin = time.perf_counter()
        try:
            calls[name] = make(model, outputs, x)
            calls[name](x)
        except Exception as error:  # what a peer cannot do is a finding, not a failure of the benchmark
            if name in (HANDLE, PLAIN):
                raise
            calls.pop(name, None)
            row.left_out[name] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:120]}"
        row.first[name] = time.perf_counter() - begin
    return calls


def _time(row: Row, calls: dict[str, Call], problem: Network, rounds: int, say: Say) -> None:
    """Fill in the medians of a row."""
    generator = torch.Generator().manual_seed(23)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for number in range(rounds + WARM_UP):
        say(f"calls: {row.net}: {row.samples} samples: rounds, {number + 1} of {rounds + WARM_UP}")
        x = problem.fresh(row.samples, generator)
        for name, call in calls.items():
            if spent[name] > SECONDS and len(taken[name]) >= LEAST:
                continue
            seconds, _ = measure.timed(call, x)
            spent[name] += seconds
            if number >= WARM_UP or seconds > SECONDS:  # of such calls the first is as good as any
                taken[name].append(seconds)
    row.us.update({name: 1e6 * statistics.median(times) for name, times in taken.items()})


def table(found: Sequence[Row]) -> str:
    """µs per call of every way, and whether the goals are met."""
    names = list(dict.fromkeys(name for row in found for name in row.us))
    cells: list[tuple[str, ...]] = [("net", "samples", *names, "handle first", f"jacobian +{PLAIN_GOAL:.0f}")]
    for row in found:
        times = (f"{row.us[name]:.0f}" if name in row.us else "-" for name in names)
        beyond = row.us[PLAIN] - row.us[HANDLE]
        peer = row.best_peer
        first = "met" if peer is None or row.us[HANDLE] <= row.us[peer] else f"MISSED: {peer}"
        near = "met" if beyond <= PLAIN_GOAL else f"MISSED: {beyond:.0f}"
        cells.append((row.net, str(row.samples), *times, first, near))
    lines = report.align(cells)
    lines += [f"{row.net}, {row.samples}: no {name}: {why}" for row in found for name, why in row.left_out.items()]
    return "\n".join(lines)
