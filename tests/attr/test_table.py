"""The Captum family: per method the largest difference to stock Captum, over all forms of targets.

Times are in benchmarks/captum_family.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum import attr as stock
from torch import nn

import gradkern
from gradkern import attr as ours
from tests.support import oracle
from tests.support.rule_networks import UsedOnce

N = 4
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
pytestmark = [pytest.mark.filterwarnings("ignore")]


class PerStep(nn.Module):
    """Outputs ``[N, 3, 2]``, for targets that are tuples."""

    def __init__(self):
        super().__init__()
        self.net = UsedOnce(20)
        self.head = nn.Linear(3, 6)

    def forward(self, x):
        return self.head(self.net(x)).view(-1, 3, 2)


TARGETS = [
    1,
    -1,
    torch.tensor(2),
    torch.tensor([0]),
    torch.tensor([0, 2, 1, 1]),
    [2, 0, 0, 1],
    [(0,), (1,), (2,), (0,)],
]
TUPLES = [(1, 0), (-1, 1), [(0, 1), (2, 0), (1, 1), (0, 0)]]


def options_of(name, dtype):
    base = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    return {
        "IntegratedGradients": {"n_steps": 7},
        "GradientShap": {"baselines": base, "n_samples": 3, "stdevs": 0.1},
        "NoiseTunnel": {"nt_samples": 3, "stdevs": 0.1},
        "DeepLift": {"baselines": base[:1]},
        "DeepLiftShap": {"baselines": base},
        "LayerDeepLift": {"baselines": base[:1]},
        "LayerDeepLiftShap": {"baselines": base},
        "LayerGradientShap": {"baselines": base, "n_samples": 3, "stdevs": 0.1},
        "LayerIntegratedGradients": {"n_steps": 5},
        "InternalInfluence": {"n_steps": 5},
        "LayerConductance": {"n_steps": 5},
    }.get(name, {})


def explainer(package, name, model):
    net = model.net if isinstance(model, PerStep) else model
    cls = getattr(package, name)
    if name == "NoiseTunnel":
        return cls(package.Saliency(model))
    if name.startswith("Layer") or name in ("InternalInfluence", "GuidedGradCam"):
        return cls(model, net.conv2)
    return cls(model)


def drawn(call):
    torch.manual_seed(1)
    np.random.seed(1)
    return call()


def largest_error(name, dtype):
    """The largest difference over all targets, relative to the largest attribution."""
    errors = []
    for make, targets in ((lambda: UsedOnce(20), TARGETS), (PerStep, TUPLES)):
        torch.manual_seed(0)
        model = make().to(dtype).eval()
        x = torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
        options = options_of(name, dtype)
        with gradkern.use("kernel"):
            every = drawn(lambda: explainer(ours, name, model).attribute_all(x, **options))  # noqa: B023
        for target in targets:
            want = drawn(lambda: explainer(stock, name, model).attribute(x, target=target, **options))  # noqa: B023
            with gradkern.use("kernel"):
                got = drawn(lambda: explainer(ours, name, model).attribute(x, target=target, **options))  # noqa: B023
            errors.append(oracle.relative_error(got, want))
            if isinstance(target, int):
                errors.append(oracle.relative_error(every[:, target], want))
            elif isinstance(target, tuple):
                errors.append(oracle.relative_error(every[:, target[0], target[1]], want))
    return max(errors)


METHODS = [kind.__name__ for kind in ours.REPLACEMENTS if not kind.__name__.startswith("Neuron")]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_difference_to_stock_captum(name, dtype):
    assert largest_error(name, dtype) <= LIMITS[dtype]


@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
def test_attributions_that_are_nan_differ_from_captums(call, monkeypatch):
    right = getattr(ours.Saliency, call)
    monkeypatch.setattr(ours.Saliency, call, lambda *args, **options: right(*args, **options) * torch.nan)
    assert largest_error("Saliency", torch.float64) == torch.inf
