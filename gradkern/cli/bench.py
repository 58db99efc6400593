"""`gradkern bench`: gradkern on the user's own model and data, compared with autograd's loop over outputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from timeit import repeat

import torch
from torch import Tensor, nn

from .. import api
from ..data import Source

BATCHES = (32, 128, 512)


def bench(model: nn.Module, source: Source, samples: int, repeats: int) -> Iterator[str]:
    """Lines of a small table: samples per second for all outputs, the best of ``repeats``."""
    inputs = source.read(0, min(samples, source.samples))
    given = inputs[0] if len(inputs) == 1 else inputs
    begin = time.perf_counter()
    prepared = api.prepare(model, given)
    our_call = partial(api.jacobian, model, given, engine="kernel" if prepared.program else "autograd", progress=False)
    yield f"captured and verified in {time.perf_counter() - begin:.2f} s" + (
        "" if prepared.program else ": stays on autograd"
    )
    our_call()
    ours = min(repeat(our_call, number=1, repeat=repeats))
    n = inputs[0].shape[0]
    yield f"{'gradkern':<38} {n / ours:>12,.0f} samples/s"
    calls = {b: partial(by_classes, model, inputs, b) for b in BATCHES if b <= n or b == BATCHES[0]}
    best, batch = min((min(repeat(call, number=1, repeat=repeats)), b) for b, call in calls.items())
    name = f"autograd, a backward per output, by {batch}"
    yield f"{name:<38} {n / best:>12,.0f} samples/s   gradkern is {best / ours:.1f}× as fast"


def by_classes(model: nn.Module, inputs: tuple[Tensor, ...], batch: int) -> None:
    """One forward per batch, one backward per output; the results are dropped."""
    for first in range(0, inputs[0].shape[0], batch):
        leaves = [x[first : first + batch].detach().requires_grad_(x.is_floating_point()) for x in inputs]
        wanted = [x for x in leaves if x.requires_grad]
        y = model(*leaves).flatten(1).sum(0)  # [C]
        for c in range(len(y)):
            torch.autograd.grad(y[c], wanted, retain_graph=c + 1 < len(y), allow_unused=True)
