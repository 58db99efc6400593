"""Networks for tests of attribution rules, and functions that build them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradkern.attr.rules.linear import rule_values, values_needed
from gradkern.attr.rules.rule import Values
from gradkern.ir.calls import Params
from gradkern.ir.program import Program
from tests.support.case import randomise_norm


def build(make, *args):
    torch.manual_seed(0)
    model = make(*args).double()
    for module in model.modules():
        randomise_norm(module)
    return model.eval()


class UsedOnce(nn.Module):
    """Modules that are used once, and no ReLU directly before a max pool: Captum is right on it, for every method."""

    def __init__(self, features: int, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.act1, self.pool = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2)
        self.conv2, self.act2 = nn.Conv2d(4, 5, 2), nn.Tanh()
        self.fc1, self.act3, self.fc2 = nn.Linear(features, 6), nn.ReLU(), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv2(self.pool(self.act1(self.conv1(x)))))
        return self.fc2(self.act3(self.fc1(x.flatten(1))))


def chain(*modules, shape, classes=3):
    body = nn.Sequential(*modules)
    width = body(torch.zeros(1, *shape)).flatten(1).shape[1]
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(width, classes))


DEEP = {
    "relu_pool_1d": (lambda: chain(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(3, 2, 2), nn.ReLU(),
                                   nn.MaxPool1d(2), shape=(1, 14)), (1, 14)),
    "relu_pool_2d": (lambda: chain(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), shape=(1, 8, 8)), (1, 8, 8)),
    "overlap": (lambda: chain(nn.Conv1d(1, 3, 3), nn.MaxPool1d(3, 2, 1), nn.ELU(), shape=(1, 12)), (1, 12)),
    "pool_first": (lambda: chain(nn.MaxPool2d(2), nn.Conv2d(1, 2, 2), nn.Tanh(), shape=(1, 6, 6)), (1, 6, 6)),
    "softmax": (lambda: nn.Sequential(*chain(nn.Linear(6, 5), nn.ReLU(), shape=(6,)), nn.Softmax(1)), (6,)),
}  # fmt: skip


def values_of(program: Program, params: Params, rows: Sequence[Tensor], by_reference: bool) -> Values:
    """The values of a forward pass that a rule uses, by the kernels or by plain torch."""
    if by_reference:
        return Values(program, params, dict(enumerate(rows)))
    return rule_values(program, params, rows, values_needed(program, False))
