"""Reasons for autograd that a user can act on: what, and the file and the line; and what is no reason."""

from __future__ import annotations

import logging
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradkern.frontend import refusal
from gradkern.frontend.refusal import NoProgram
from gradkern.ir.program import Contract
from tests.support.capturing import to_program, verify

pytestmark = pytest.mark.real_export
LOGGER = logging.getLogger(__name__)


class LinearAndFunction(nn.Module):
    def __init__(self, fn: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.fn = fn
        self.kept: Tensor | None = None
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


def says(net: Any, x: Tensor) -> Tensor:
    print("input", x.shape, net)
    warnings.warn("look", UserWarning, stacklevel=1)
    LOGGER.info("%s", x.shape)
    logging.warning("mean %s", x.mean())
    return net.fc(x)


def keeps_an_attribute(net: Any, x: Tensor) -> Tensor:
    net.kept = net.fc(x)
    return net.kept * 2


def keeps_in_a_list(net: Any, x: Tensor) -> Tensor:
    net.log.append(net.fc(x))
    return net.log[-1] * 2


def branches(net: Any, x: Tensor) -> Tensor:
    return net.fc(x) if x.sum() > 0 else -net.fc(x)


def reads_a_number(net: Any, x: Tensor) -> Tensor:
    return net.fc(x) * float(net.fc.weight.sum())


def draws(net: Any, x: Tensor) -> Tensor:
    return net.fc(x) + torch.rand(4)


def draws_in_python(net: Any, x: Tensor) -> Tensor:
    return net.fc(x) * random.gauss(0, 1)


def works_on_three_samples(net: Any, x: Tensor) -> Tensor:
    return torch.cat(net.fc(x).chunk(3))


def mixes(net: Any, x: Tensor) -> Tensor:
    return net.fc(x) - x.mean()


REASONS = {
    keeps_an_attribute: "keeps a tensor in the attribute kept of LinearAndFunction",
    keeps_in_a_list: "keeps a tensor in a Python object",
    branches: "data-dependent branching",
    reads_a_number: "makes a tensor a Python number",
    draws: "draws random numbers",
    draws_in_python: "cannot capture it",
    works_on_three_samples: "depends on the number of samples",
    mixes: "mixes samples",
}


@pytest.mark.parametrize("fn", REASONS, ids=lambda fn: fn.__name__)
def test_reasons_name_the_line(fn: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(NoProgram, match=REASONS[fn]) as caught:
        to_program(LinearAndFunction(fn).eval(), (torch.randn(3, 4),))
    where = re.search(r", (\S+):(\d+)$", caught.value.reason)
    assert where is not None, caught.value.reason
    first = fn.__code__.co_firstlineno
    assert where.group(1) == __file__ and first < int(where.group(2)) <= first + 2
    assert len(caught.value.reason) < 300 + len(__file__)


@pytest.mark.filterwarnings("ignore:look")
def test_what_a_forward_prints_is_no_reason() -> None:
    model, inputs = LinearAndFunction(says).eval(), (torch.randn(3, 4),)
    program = to_program(model, inputs)
    verify(program, model, inputs)
    assert [type(step.form) for step in program.steps] == [Contract]


def test_a_line_of_the_users_is_neither_torchs_nor_pythons() -> None:
    packages = os.path.dirname(os.path.dirname(torch.__file__))
    theirs = os.path.join(packages, "torch_ecg", "models.py")
    inside = [
        os.path.join(packages, "torch", "nn", "modules", "linear.py"),
        os.path.join(sysconfig.get_path("stdlib"), "logging", "__init__.py"),
        "<eval_with_key>.3",
        refusal.__file__,
    ]
    text = "".join(f'File "{name}", line 7, in f\n' for name in ("net.py", theirs, *inside))
    node = type("Node", (), {"meta": {"stack_trace": text}})
    assert refusal.location(node) == f", {theirs}:7"
