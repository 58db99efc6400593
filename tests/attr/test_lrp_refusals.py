"""LRP where Captum raises: rules that do not fit, activations that have no rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captum import attr as stock
from captum.attr._utils.lrp_rules import EpsilonRule, IdentityRule
from torch import nn

from gradkern import attr as ours
from gradkern.util.options import GradkernWarning

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = {
    "last": ((nn.Linear, 6, 5), (nn.ReLU,), (nn.Linear, 5, 3)),
    "square": ((nn.Linear, 6, 5), (nn.ReLU,), (nn.Linear, 5, 5), (nn.Tanh,), (nn.Linear, 5, 3)),
    "norm": ((nn.Linear, 6, 5), (nn.BatchNorm1d, 5), (nn.ReLU,), (nn.Linear, 5, 3)),
    "silu": ((nn.Linear, 6, 5), (nn.SiLU,), (nn.Linear, 5, 3)),
    "sigmoid": ((nn.Linear, 6, 5), (nn.Sigmoid,), (nn.Linear, 5, 3)),
    "gelu": ((nn.Linear, 6, 5), (nn.GELU,), (nn.Linear, 5, 3)),
    "hardtanh": ((nn.Linear, 6, 5), (nn.Hardtanh,), (nn.Linear, 5, 3)),
}


def network_of(name):
    torch.manual_seed(0)
    return nn.Sequential(*(kind(*args) for kind, *args in LAYERS[name])).double().eval()


def outcome(package, name, place, rule, every=False):
    """What a call gives: its attributions, or the type and the text of its error."""
    model, x = network_of(name), torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if rule is not None:
        model[place].rule = rule()
    try:
        method = package.LRP(model)
        return method.attribute_all(x)[:, 1] if every else method.attribute(x, target=1)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    ("name", "place", "rule"),
    [
        ("last", 2, IdentityRule), ("last", 0, IdentityRule), ("last", 1, IdentityRule), ("square", 2, IdentityRule),
        ("norm", 1, IdentityRule), ("silu", 1, IdentityRule), ("silu", 1, EpsilonRule), ("last", 1, EpsilonRule),
        ("silu", None, None), ("sigmoid", None, None), ("gelu", None, None), ("hardtanh", None, None),
    ],
)  # fmt: skip
def test_rules_and_activations_are_taken_or_refused_as_by_captum(name, place, rule):
    want = outcome(stock, name, place, rule)
    for every in (False, True):
        got = outcome(ours, name, place, rule, every)
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        else:
            assert got == want


def test_a_function_without_a_rule_is_named():
    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(F.silu(self.first(x)))

    with pytest.warns(GradkernWarning, match=r"no LRP rule for aten\.silu"):
        ours.LRP(Gates().eval()).attribute(torch.randn(2, 6), target=1)
