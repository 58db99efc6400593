"""Random DeepLift networks: attributions add up to the change of the output; with Captum's rules they are Captum's.

`GRADKERN_FUZZ` sets how many other networks are tried each time, as in `tests/runtime/test_random_programs.py`.
"""

from __future__ import annotations

import pytest
import torch
from captum import attr as stock
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from gradkern import attr as ours
from gradkern.attr.rules import linear
from gradkern.attr.rules.rescale import Rescale
from gradkern.runtime import reference
from tests.support.deeplift_operations import OPERATIONS, Mixed, by_tape, ends, incomplete
from tests.support.properties import FAST, FUZZ
from tests.support.random_programs import programs
from tests.support.rule_networks import values_of

EXACT = 1e-8  # secants of numbers that hardly move cost digits
pytestmark = pytest.mark.filterwarnings("ignore")


@settings(FAST, max_examples=FUZZ or 12, derandomize=not FUZZ)
@given(st.lists(st.sampled_from(OPERATIONS), min_size=2, max_size=4), st.integers(0, 1 << 20))
def test_random_networks_of_operations_complete(names, seed):
    torch.manual_seed(seed)
    model, (x, r) = Mixed(*names).double().eval(), ends(seed)
    with torch.no_grad():
        assume(bool(torch.isfinite(model(x)).all() and torch.isfinite(model(r)).all()))
    assert incomplete(model, by_tape(model, x, r), x, r) < EXACT


@settings(FAST, max_examples=FUZZ or 60, derandomize=not FUZZ)
@given(programs(foreign=True), st.integers(0, 1 << 20), st.booleans(), st.booleans())
def test_random_programs_complete(net, seed, native, shared):
    """On the kernels and in plain torch, with one reference for all samples and with one for each."""
    program, params = net.program, net.params(seed)
    xs = net.inputs(3, seed + 1)
    base = tuple(x[:1] if shared else x for x in net.inputs(3, seed + 2))
    targets = torch.arange(min(program.outputs, 5))
    with torch.no_grad():
        values, start = (values_of(program, params, z, not native) for z in (xs, base))
        rule = Rescale(program, params, values, start, 1e-10, native)
        multipliers = linear.rule_multipliers(rule, xs, targets, tuple(range(len(xs))), native=native)
        ends = [reference.forward(program, params, z)[program.output].flatten(1)[:, targets] for z in (xs, base)]
    assume(all(bool(torch.isfinite(e).all()) for e in ends))
    parts = [m * (x - b).unsqueeze(1) for m, x, b in zip(multipliers, xs, base, strict=True)]
    found = sum(p.flatten(2).sum(2) for p in parts)
    size = sum(p.abs().flatten(2).sum(2) for p in parts).clamp(min=1.0)
    if not rule.unruled:
        assert float(((found - (ends[0] - ends[1])).abs() / size).max()) < EXACT


LAYERS = {
    **{kind.__name__: kind for kind in (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)},
    "Linear": lambda: nn.Linear(6, 6),
    "Conv1d": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "MaxPool1d": lambda: nn.Sequential(nn.MaxPool1d(2), nn.Upsample(scale_factor=2)),
    "Softmax": lambda: nn.Softmax(-1),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "GELU": nn.GELU,
}


@settings(FAST, max_examples=FUZZ or 20, derandomize=not FUZZ)
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5), st.integers(0, 1 << 20))
def test_captums_rules_are_captums_on_random_networks(names, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*(LAYERS[name]() for name in names), nn.Flatten(), nn.Linear(24, 3)).double().eval()
    x, r = ends(seed)
    got, want = (
        method.attribute(x, r, target=1, return_convergence_delta=True)
        for method in (ours.DeepLift(model, rules="captum"), stock.DeepLift(model))
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
