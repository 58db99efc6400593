"""One network in this process: its error, its time against plain torch, and why it is not faster.

Times are CPU seconds of interleaved calls: on a machine that others use, too, they vary much less than wall-clock
seconds.  On two threads they add up over the threads.
"""

from __future__ import annotations

import copy
import math
import random
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradkern
from benchmarks.zoo.networks import Apply, build, randomized
from tests.support import oracle

BATCHES = (8, 32)
OUTPUTS = 4
SEED = 0
MOST_ROUNDS, LEAST_ROUNDS = 25, 5
RESAMPLES = 1000
SHORTEST = 0.01  # seconds of one timing, for which short calls are repeated: the clock of CPU time may stand still
LEAST_SECONDS = 1e-4
SLOW = 0.5  # seconds of a call of torch that needs no warming up
HOPELESS = 1.15  # a peer that takes this many times the better one is not timed again
NEURAL = {"recurrent": (nn.RNNBase,), "convolutional": (nn.modules.conv._ConvNd,)}


def measured(name: str, threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Everything about one network, each time that one more batch size has been measured.

    ``seconds``: of timing, per batch size.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    net, shape = build(name)
    model = Apply(randomized(net), after=flat_output)
    x = torch.randn(max(BATCHES), *shape)
    with torch.no_grad():
        width = model(x[:2]).shape[1]
    targets = [round(k) for k in torch.linspace(0, width - 1, min(OUTPUTS, width)).tolist()]
    found: dict[str, Any] = {"name": name, "threads": threads, "kind": kind(net), "input": list(shape), "width": width}
    found["parameters"] = sum(p.numel() for p in net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin = time.process_time()
        gradkern.prepare(model, x[: BATCHES[0]])
        gradkern.jacobian(model, x[: BATCHES[0]], targets)
        found["first_call"] = time.process_time() - begin
        found |= explained(model, x, targets)
        found["error"] = error(model, x[:3], targets)
        times = found["times"] = {}
        for n in BATCHES:
            times[str(n)] = compared(model, x[:n], targets, seconds)
            yield found


def flat_output(y: Any) -> Tensor:
    """The first tensor of an output, flat per sample."""
    while not isinstance(y, Tensor):
        y = next(iter(y.values() if isinstance(y, dict) else y))
    return y.flatten(1)


def kind(net: nn.Module) -> str:
    """Recurrent, transformer, convolutional, or other: the first kind of which the network has a layer."""
    parts = list(net.modules())
    if any(isinstance(part, nn.RNNBase) for part in parts):
        return "recurrent"
    if any("attention" in type(part).__name__.lower() for part in parts):
        return "transformer"
    return "convolutional" if any(isinstance(part, nn.modules.conv._ConvNd) for part in parts) else "other"


def explained(model: nn.Module, x: Tensor, targets: list[int]) -> dict[str, Any]:
    """The fused share, the groups, the ways that were measured, and the reason if autograd runs all of it."""
    plan = gradkern.explain(model, x[: BATCHES[0]], targets, show=False)
    found: dict[str, Any] = {"fused": plan.fused_share, "native": plan.native_share}
    if not plan.steps:
        return found | {"reason": re.sub(r"\S*/site-packages/", "", plan.reason)}  # no paths of this machine
    slow = [f"{s.op or s.form}: {s.why}" for s in plan.steps if not s.implementation.fused]
    ways = {str(n): gradkern.explain(model, x[:n], targets, show=False).timing.way for n in BATCHES}
    return found | {"groups": plan.group_count, "ways": ways, "by_autograd": sorted(set(slow))}


def error(model: nn.Module, x: Tensor, targets: list[int]) -> float:
    """The largest difference from autograd, both in float64, as a share of the largest gradient."""
    with torch.no_grad():
        model(x)  # leaves no computed weight with a graph behind, which could not be copied
    exact = copy.deepcopy(model).double()
    want = class_loop(exact, x.double(), targets)
    got = gradkern.jacobian(exact, x.double(), targets, engine="kernel")
    return oracle.relative_error(got, want)


# ---------------------------------------------------------------------------------------------------------------
# Time


def class_loop(model: nn.Module, x: Tensor, targets: Sequence[int]) -> Tensor:
    """``[N, S, *in]``: one forward, and a backward per output."""
    leaf = x.detach().requires_grad_()
    sums = model(leaf).sum(0)  # [C]
    grads = [torch.autograd.grad(sums[t], leaf, retain_graph=True)[0] for t in targets]
    return torch.stack(grads, dim=1)


def batched(model: nn.Module, x: Tensor, targets: Sequence[int]) -> Tensor:
    """The same with one backward for all outputs, by ``is_grads_batched``."""
    leaf = x.detach().requires_grad_()
    sums = model(leaf).sum(0)
    hot = torch.eye(sums.shape[0], dtype=x.dtype)[list(targets)]
    (grads,) = torch.autograd.grad(sums, leaf, hot, is_grads_batched=True)
    return grads.movedim(0, 1)


def compared(model: nn.Module, x: Tensor, targets: list[int], seconds: float) -> dict[str, Any]:
    """Interleaved calls of gradkern and of plain torch: medians, and the ratio of the better peer to gradkern."""
    calls: dict[str, Callable[[], Tensor]] = {
        "gradkern": lambda: gradkern.jacobian(model, x, targets),
        "class loop": lambda: class_loop(model, x, targets),
        "batched": lambda: batched(model, x, targets),
    }
    once: dict[str, float] = {}
    for name in list(calls):
        try:
            first = cpu_seconds(calls[name])
            warm = name != "gradkern" and first > SLOW
            once[name] = max(first if warm else cpu_seconds(calls[name]), LEAST_SECONDS)
        except RuntimeError:
            if name != "batched":
                raise
            del calls[name]  # not every operation can be batched
    peers = [name for name in calls if name != "gradkern"]
    peers = [name for name in peers if once[name] <= HOPELESS * min(once[p] for p in peers)]
    repeats = {name: math.ceil(SHORTEST / once[name]) for name in ("gradkern", *peers)}
    slow = all(times == 1 for times in repeats.values())
    spent: dict[str, list[float]] = {name: [once[name]] if slow else [] for name in repeats}
    order, shuffle = list(repeats), random.Random(SEED)
    begin = time.process_time()
    while len(spent["gradkern"]) < MOST_ROUNDS:
        shuffle.shuffle(order)
        for name in order:
            spent[name].append(cpu_seconds(calls[name], repeats[name]))
        if len(spent["gradkern"]) >= LEAST_ROUNDS and time.process_time() - begin > seconds:
            break
    best = min(peers, key=lambda name: statistics.median(spent[name]))
    ratios = [theirs / ours for theirs, ours in zip(spent[best], spent["gradkern"], strict=True)]
    low, high = interval(ratios)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    return {"seconds": medians, "peer": best, "ratio": statistics.median(ratios), "low": low, "high": high,
            "rounds": len(ratios)}  # fmt: skip


def cpu_seconds(call: Callable[[], Tensor], times: int = 1) -> float:
    """Of one call, on average over so many calls, or more if the clock has stood still."""
    start, made = time.process_time(), 0
    while made < times or time.process_time() <= start:
        call()
        made += 1
    return (time.process_time() - start) / made


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """A bootstrap interval of the median: its 5th and 95th percentile, each a bound with 95 % confidence."""
    draw = random.Random(SEED)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 20], medians[-1 - RESAMPLES // 20]
