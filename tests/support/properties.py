"""Property-based tests of random Programs: the calls that are drawn, and the comparison of two results."""

from __future__ import annotations

import math
import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from gradkern.runtime import executor, reference
from tests.support import oracle
from tests.support.random_programs import Network

EXACT = 1e-10


FUZZ = int(os.environ.get("GRADKERN_FUZZ", "0"))  # `make fuzz`: that many other networks each time


# Derandomised: a run is the same everywhere. `--hypothesis-seed` or `derandomize=False` hunts further.
FAST = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@st.composite
def questions(draw, networks):
    """A network, samples (the first of them NaN now and then), targets and inputs to differentiate."""
    net = draw(networks)
    n, c = draw(st.sampled_from([1, 2, 3, 5, 9])), net.program.outputs
    index = st.integers(0, c - 1)
    shared = st.lists(index, min_size=1, max_size=13).map(torch.tensor)
    each = st.lists(st.lists(index, min_size=2, max_size=2), min_size=n, max_size=n).map(torch.tensor)
    targets = draw(st.one_of(st.none(), shared, each))
    wrt = draw(st.sampled_from([(0,), (1,), (1, 0), (0, 1)])) if len(net.program.inputs) == 2 else None
    return net, n, targets, wrt, draw(st.integers(0, 1 << 20)), n > 1 and draw(st.integers(0, 3)) == 0


def agrees(net: Network, n: int, targets: Tensor | None, wrt, seed: int, poisoned: bool) -> None:
    """Engine and reference agree; a NaN sample at the head of the batch must not leak into the others."""
    params, inputs = net.params(seed), net.inputs(n, seed + 1)
    want_y, want = reference.jacobian(net.program, params, inputs, targets, wrt)
    clean = slice(None)
    if poisoned:
        inputs[0][0], clean = math.nan, slice(1, None)
    out = tuple(torch.full_like(j, math.nan) for j in want)
    with torch.no_grad():
        y, found = executor.jacobian(net.program, params, inputs, targets, wrt, out=out)
    close(y[clean], want_y[clean])
    for got, right in zip(found, want, strict=True):
        close(got[clean], right[clean])


def agrees_in_float32(net: Network, n: int, targets: Tensor | None, wrt, seed: int) -> None:
    """Against float64 at the same numbers; torch's own float32 says how badly conditioned a sample is."""
    params, inputs = net.params(seed, torch.float32), net.inputs(n, seed + 1, torch.float32)
    with torch.no_grad():
        _, found = executor.jacobian(net.program, params, inputs, targets, wrt)
    wide = {k: v.double() for k, v in params.items()}
    xs = [x.double() for x in inputs]
    _, want = reference.jacobian(net.program, wide, xs, targets, wrt)
    _, plain = reference.jacobian(net.program, params, inputs, targets, wrt)
    for got, right, torch_own in zip(found, want, plain, strict=True):
        scale = max(float(oracle.largest(right)), 1e-2)
        for m in range(n):
            mine, theirs = (float(oracle.differences(j[m], right[m]).max()) / scale for j in (got, torch_own))
            assert theirs < math.inf, "torch's own float32 says nothing"
            assert mine <= max(1e-5, 20 * theirs), (m, mine, theirs)  # a pattern may flip in both


def close(got: Tensor, want: Tensor) -> None:
    # Where a gradient cancels (a mean over a softmax) rounding is all that is left of it, hence the floor.
    assert torch.isfinite(got).all()
    assert bool((oracle.differences(got, want) <= EXACT * max(float(oracle.largest(want)), 1e-3)).all())
