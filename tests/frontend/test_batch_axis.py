"""Tensors that have the batch elsewhere than in front: what is followed sample by sample, and what is not; masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradkern
from gradkern.ir.calls import form_params
from gradkern.ir.program import Contract, Index, Opaque, View
from tests.cases import CASES
from tests.support import oracle
from tests.support.capturing import bind, to_program
from tests.support.case_runs import forms, proposed
from tests.support.modules import Net

pytestmark = pytest.mark.real_export


class LastState(nn.Module):
    """The last output, or the last cell, of an LSTM that has sequences first: the batch is axis 1 all the way."""

    def __init__(self, cell: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 4)
        self.fc, self.cell = nn.Linear(4, 3), cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, T, 2] -> [N, 3]
        _, states = self.lstm(x.transpose(0, 1))
        return self.fc(states[self.cell][-1])


def test_lstm_state_stays_inside_its_call() -> None:
    program = proposed(LastState(cell=True), (5, 2))
    assert forms(program)[-2:] == [Opaque, Contract]
    assert "aten.lstm.input" in program.steps[-2].op


def test_the_last_output_of_an_lstm_is_its_last_step() -> None:
    program = proposed(LastState(cell=False), (5, 2))
    assert forms(program) == [Opaque, Index, View, Contract]
    assert program.steps[0].form.call.args[-1] is True  # batch first


@pytest.mark.parametrize("name", ["heads_in_front", "heads_as_batches", "sequence_first", "sequence_first_last"])
def test_a_batch_that_moves_is_followed(name: str) -> None:
    case = CASES[name]
    program = to_program(case.build(), case.inputs(3))
    assert Opaque not in forms(program)
    assert all(len(step.shape) <= 3 for step in program.steps if not isinstance(step.form, View))


ACTIVATIONS = ["softplus", "mish", "hardswish", "hardsigmoid", "logsigmoid", "celu", "selu", "hardtanh", "relu6"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_a_sequence_first_network(name: str) -> None:
    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        hidden = getattr(F, name)(net.layer(x.transpose(0, 1)))  # [5, N, 6]
        return net.fc((1 - hidden).log_softmax(2).mean(0))

    program = proposed(Net(run, 6, layer=nn.Linear(4, 6)), (5, 4))
    assert Opaque not in forms(program)


class ViewedWrong(nn.Module):
    """Sequences first by a view instead of a transpose, for a table of positions: samples mix, once it is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.fc = nn.Parameter(torch.zeros(5, 1, 4)), nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, 5, 4] -> [N, 3]
        rows = x.tanh().reshape(x.shape[0] * 5, 4).view(5, x.shape[0], 4)
        return self.fc((rows * self.places).reshape(x.shape[0] * 5, 4).view(x.shape).flatten(1) + x.flatten(1))


def test_samples_that_are_viewed_in_another_order_are_not_followed() -> None:
    """Nothing mixes where the table is zero, so that comparing numbers cannot find it."""
    model = ViewedWrong().double().eval()
    program = to_program(model, (torch.randn(3, 5, 4, dtype=torch.float64),))
    assert any(isinstance(step.form, Opaque) and "view" in step.op for step in program.steps)


JOINED = {
    "samples in front": lambda net, x: rowwise(net, x.reshape(-1, 4)).view(-1, 5, 4).mean(1),
    "samples behind": lambda net, x: rowwise(net, x.transpose(0, 1).reshape(-1, 4)).view(5, -1, 4).mean(0),
}


def rowwise(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for _ in range(8):
        x = x + net.fc(x).tanh()
    return x


@pytest.mark.parametrize("name", JOINED)
def test_long_nets_of_rows_are_followed(name: str) -> None:
    """Where an op has no form that way (lgamma), the tensor so far is told by its value, not by all that made it."""
    assert Opaque not in forms(proposed(Net(JOINED[name]), (5, 4)))
    tail = proposed(
        Net(lambda net, x: JOINED[name](net, torch.lgamma(rowwise(net, x.reshape(-1, 4)).abs()).view_as(x))), (5, 4)
    )
    assert sum(isinstance(step.form, Opaque) for step in tail.steps) == 1


def test_constants_of_more_axes_than_a_moved_tensor() -> None:
    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scores = (x.transpose(0, 1) + net.places)[0].masked_fill(net.later, -torch.inf)  # [1, 5, N, 4]
        return net.fc(scores.softmax(3).mean(1)[0])

    model = Net(run, places=nn.Parameter(torch.randn(1, 5, 1, 4)), later=torch.ones(1, 5, 1, 4).triu(1).bool())
    assert Opaque not in forms(proposed(model, (5, 4)))


def test_a_recurrent_net_over_samples_and_channels() -> None:
    """Each sample has three sequences."""

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.fc(net.lstm(x.reshape(-1, 5, 2).transpose(0, 1))[0][-1].view(-1, 3, 4).mean(1))

    proposed(Net(run, lstm=nn.LSTM(2, 4)), (3, 5, 2))


@pytest.mark.parametrize("causal", ["flag", "numbers", "booleans", "written out", "filled"])
def test_masks_that_are_constant(causal: str) -> None:
    """Nothing infinite is left, so that kernels run; nothing looks ahead."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.fc = nn.Linear(4, 12), nn.Linear(4, 3)
            self.register_buffer("later", torch.ones(5, 5).triu(1).bool())

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, 5, 4] -> [N, 3]
            q, k, v = self.qkv(x).unflatten(2, (6, 2)).transpose(1, 2).chunk(3, dim=1)  # each [N, 2, 5, 2]
            numbers = torch.zeros(5, 5, dtype=x.dtype).masked_fill(self.later, -torch.inf)
            if causal in ("written out", "filled"):
                scores = q @ k.transpose(2, 3)
                scores = scores + numbers if causal == "written out" else scores.masked_fill(self.later, -torch.inf)
                y = scores.softmax(-1) @ v
            else:
                mask = {"flag": None, "numbers": numbers, "booleans": ~self.later}[causal]
                y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            return self.fc(y.transpose(1, 2).flatten(2)[:, 2])

    model, x = Masked().double().eval(), torch.randn(4, 5, 4, dtype=torch.float64)
    program = to_program(model, (x,))
    assert Opaque not in forms(program)
    bound = bind(program, model)
    assert all(bound[p.name].isfinite().all() for step in program.steps for p in form_params(step.form))
    found = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(found, oracle.jacobian(model, (x,))[1][0]) < 1e-12
    assert not found[:, :, 3:].any()


def test_all_samples_of_a_moved_tensor_are_a_slice() -> None:
    model = Net(lambda net, x: net.fc(x.transpose(0, 1)[:, :, 1:].relu()[1:, :].mean(0)), width=3)
    assert Opaque not in forms(proposed(model, (5, 4)))


EMPTY = {
    "beside": lambda net, x: net.fc(torch.cat([x, x[:, :0].tanh()], 1).mean(1)),
    "moved": lambda net, x: net.fc(torch.cat([x.transpose(0, 1), x.transpose(0, 1)[:0].unsqueeze(3)[..., 0]]).mean(0)),
    "viewed": lambda net, x: net.fc(
        torch.cat([x, x.transpose(0, 1)[:, :, :0].tanh().unsqueeze(2)[:, :, 0].transpose(0, 1)], 2).mean(1)
    ),
    "no mean": lambda net, x: net.fc(x[:, 0].where(x[:, :4, :0].mean(2).isnan(), 0.0)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_slices_without_elements_are_captured(name: str) -> None:
    model, x = Net(EMPTY[name]).double().eval(), torch.randn(3, 5, 4, dtype=torch.float64)
    to_program(model, (x,))
    found = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(found, oracle.jacobian(model, (x,))[1][0]) < 1e-12


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masked_attention_that_gives_its_weights(batch_first: bool, average: bool) -> None:
    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        later = torch.ones(5, 5).triu(1).bool()
        x = x if batch_first else x.transpose(0, 1)
        y, weights = net.layer(x, x, x, attn_mask=later, average_attn_weights=average)
        return net.fc(y.mean(1 if batch_first else 0)) + weights.flatten(1)[:, :4]

    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    assert Opaque not in forms(proposed(Net(run, layer=layer), (5, 4)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fills_hide_what_is_not_finite(value: float) -> None:
    model = Net(lambda net, x: net.fc(x.masked_fill(torch.arange(4) > 1, 0.0)).tanh()).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    x[1, 3] = value
    found = gradkern.jacobian(model, x, engine="kernel")
    assert oracle.relative_error(found, oracle.jacobian(model, (x,))[1][0]) < 1e-12


def test_fills_behind_a_logarithm_are_followed() -> None:
    """The logarithm of nothing is -inf, and is filled."""

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        later = torch.ones(5, 4).triu(1).bool()
        return net.fc(x.masked_fill(later, -torch.inf).log_softmax(2).masked_fill(later, 0.0))

    proposed(Net(run), (5, 4))


class HeadsBesideSamples(Net):
    """Heads as further samples (``[2 * N, T, 4]``) and back, by chunks that are as long as the batch."""

    def __init__(self) -> None:
        super().__init__(None, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, 5, 8] -> [N, 5, 8]
        heads = torch.cat(self.fc(x).split(4, -1), 0)
        weights = (heads @ heads.transpose(1, 2)).softmax(-1)
        return torch.cat((weights @ heads).split(x.shape[0], 0), -1)


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_a_guard_that_always_holds_is_no_reason(samples: int) -> None:
    model, x = HeadsBesideSamples().double().eval(), torch.randn(samples, 5, 8, dtype=torch.float64)
    assert gradkern.prepare(model, x).program is not None
    got = gradkern.jacobian(model, x, engine="kernel")
    torch.testing.assert_close(got, gradkern.jacobian(model, x, engine="autograd"), rtol=1e-12, atol=1e-12)


def test_padding_of_the_batch_by_nothing_has_a_form() -> None:
    program = proposed(Net(lambda net, x: F.pad(net.fc(x), (1, 2, 0, 0))), (4,))
    assert forms(program) == [Contract, Index]


LINEAR = nn.Linear(4, 4).double().requires_grad_(False)
CONV = nn.Conv1d(1, 2, 3).double().requires_grad_(False)


def apart(y: torch.Tensor, n: int) -> torch.Tensor:
    return torch.tanh(torch.cat([y[:n], y[n:]], 1))


def twice(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.flip(1)])


WHOLE_BATCHES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slices": lambda x: apart(LINEAR(twice(x)), x.shape[0]),
    "slices from the end": lambda x: apart(LINEAR(twice(x)), -x.shape[0]),
    "chunks of three": lambda x: sum(LINEAR(torch.cat([twice(x), 2 * x])).tanh().chunk(3)),
    "uneven pieces": lambda x: (lambda p: p[0][: x.shape[0]] * p[1])(
        LINEAR(torch.cat([twice(x), 2 * x])).split([2 * x.shape[0], x.shape[0]])
    ),
    "repeated": lambda x: apart(LINEAR(x.repeat(2, 1) * 1.5), x.shape[0]),
    "a mean over copies": lambda x: CONV(twice(x).unsqueeze(1)).view(2, -1, 2, 2).mean(0).flatten(1),
}
OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neighbours taken apart": lambda x: apart(LINEAR(x.repeat_interleave(2, 0)), x.shape[0]),
    "every second": lambda x: LINEAR(x.repeat_interleave(2, 0)).tanh()[::2],
    "beside a constant": lambda x: LINEAR(torch.cat([x, torch.ones_like(x)])).tanh()[: x.shape[0]],
    "rolled": lambda x: LINEAR(twice(x)).tanh().roll(x.shape[0], 0)[: x.shape[0]],
    "viewed wrong": lambda x: LINEAR(twice(x)).tanh().reshape(-1, 8),
}


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
@pytest.mark.parametrize("name", [*WHOLE_BATCHES, *OTHERS])
def test_copies_of_the_batch_along_its_own_axis_are_followed(name: str) -> None:
    net, x = (WHOLE_BATCHES | OTHERS)[name], torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(gradkern.jacobian(net, x, engine="kernel"), gradkern.jacobian(net, x, engine="autograd"))
    assert (gradkern.explain(net, x, show=False).native_share == 1.0) == (name in WHOLE_BATCHES)


def test_several_inputs_joined_to_one_batch() -> None:
    def siamese(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        p, q = LINEAR(torch.cat([a, b])).tanh().chunk(2)
        return (p - q).square().sum(1, keepdim=True)

    inputs = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(
        gradkern.jacobian(siamese, inputs, engine="kernel"), gradkern.jacobian(siamese, inputs, engine="autograd")
    )
    assert gradkern.explain(siamese, inputs, show=False).native_share == 1.0
