"""Forward passes that do more than compute: they work in place on their input, log, and warn."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern
from tests.support.modules import Net

pytestmark = pytest.mark.real_export
log = logging.getLogger(__name__)


def plus(net: Net, x: Tensor) -> Tensor:
    x += 1
    return net.fc(x)


def column(net: Net, x: Tensor) -> Tensor:
    x[:, 0] = 0
    return net.fc(x)


def rectified(net: Net, x: Tensor) -> Tensor:
    nn.functional.relu_(x)
    return net.fc(x) * x


def through_a_view(net: Net, x: Tensor) -> Tensor:
    x.view(-1, 2, 2)[:, 1].mul_(2)
    return net.fc(x)


def logging_if_wanted(net: Net, x: Tensor) -> Tensor:
    if log.isEnabledFor(logging.INFO):
        log.info("mean %s", x.mean())
    return net.fc(x)


def warning_muted(net: Net, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("said at every call", stacklevel=1)
    return net.fc(x)


@pytest.mark.parametrize("forward", [plus, column, rectified, through_a_view, logging_if_wanted, warning_muted])
def test_forward_with_a_side_effect_is_captured(forward: Callable[[Net, Tensor], Tensor]) -> None:
    model, x = Net(forward).double().eval(), torch.randn(3, 4, dtype=torch.float64)
    before = x.clone()
    assert gradkern.prepare(model, x).program is not None
    got = gradkern.jacobian(model, x, engine="kernel")
    assert torch.equal(x, before)
    torch.testing.assert_close(got, gradkern.jacobian(model, x, engine="autograd"))
