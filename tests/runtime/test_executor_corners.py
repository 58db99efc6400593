"""The engine in corners: Programs that no module traces to, and models of several dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradkern
from gradkern.ir.program import Channels, Contract, Positions, Program, Scale, Select, Step, Sum, View, Windows
from gradkern.passes import direction
from gradkern.runtime import executor, reference
from tests.support import capturing, oracle
from tests.support.case import randomise_norm
from tests.support.case_runs import EXACT, run
from tests.support.programs import dense

CORNERS = {
    "input is the output": ((), 0),
    "dead step beside": ((dense(3, 4, 0), Step(Scale("tanh"), (1,), (3,)), Step(Scale("relu"), (1,), (3,))), 2),
    "dead branch of two": (
        (
            dense(3, 4, 0),
            Step(Scale("elu", (1.0, 1.0, 1.0)), (1,), (3,)),
            dense(5, 3, 1),
            Step(Scale("relu"), (3,), (5,)),
        ),
        2,
    ),
    "dead steps, input is the output": ((dense(3, 4, 0), Step(Scale("tanh"), (1,), (3,))), 0),
    "dead steps behind the output": ((dense(3, 4, 0), dense(5, 3, 1), Step(Scale("relu"), (2,), (5,))), 1),
    "output read further": ((dense(3, 4, 0), dense(5, 3, 1)), 1),
    "sum of one": ((dense(3, 4, 0), Step(Sum(), (1,), (3,))), 2),
    "x + x": ((Step(Sum(), (0, 0), (4,)),), 1),
    "x + x + x, of a layer": ((dense(3, 4, 0), Step(Sum(), (1, 1, 1), (3,)), Step(Scale("relu"), (2,), (3,))), 3),
    "one weight twice": ((dense(4, 4, 0), Step(Scale("relu"), (1,), (4,)), dense(4, 4, 2)), 3),
    "value and its ReLU": (
        (dense(3, 4, 0), Step(Scale("relu"), (1,), (3,)), Step(Sum(), (1, 2), (3,)), dense(2, 3, 3)),
        4,
    ),
    "value and its tanh": (
        (dense(3, 4, 0), Step(Scale("tanh"), (1,), (3,)), Step(Sum(), (2, 1), (3,)), dense(2, 3, 3)),
        4,
    ),
    "tanh of tanh in a sum": (
        (
            dense(4, 4, 0),
            Step(Scale("tanh"), (1,), (4,)),
            Step(Scale("tanh"), (2,), (4,)),
            Step(Sum(), (3, 0), (4,)),
            Step(Scale("sigmoid"), (4,), (4,)),
        ),
        5,
    ),
    "view is the output": ((dense(6, 4, 0), Step(View(), (1,), (2, 3))), 2),
    "transposing view": (
        (dense(6, 4, 0), Step(View(), (1,), (2, 3)), Step(Scale("relu"), (2,), (2, 3)), Step(View(), (3,), (3, 2))),
        4,
    ),
    "only views": ((Step(View(), (0,), (2, 2)), Step(View(), (1,), (4,))), 2),
    "no weight, no shift": ((Step(Contract(Channels()), (0,), (4,)), Step(Scale("relu"), (1,), (4,))), 2),
}


@pytest.mark.parametrize("wrt", [(0,), (1,), (1, 0)])
@pytest.mark.parametrize("name", CORNERS)
def test_rare_programs_equal_the_reference(name, wrt):
    steps, output = CORNERS[name]
    # A second input, which nobody reads, moves the numbers of all other values by one.
    shift = lambda v: v + (v > 0)  # noqa: E731
    steps = tuple(Step(s.form, tuple(shift(v) for v in s.inputs), s.shape) for s in steps)
    program = Program(((4,), (2,)), steps, shift(output))
    generator = torch.Generator().manual_seed(0)
    params = {
        s.form.weight.name: torch.randn(s.shape[-1], program.shape(s.inputs[0])[-1], generator=generator).double()
        for s in steps
        if isinstance(s.form, Contract) and s.form.weight
    }
    xs = tuple(torch.randn(5, *s, generator=generator).double() for s in program.inputs)
    y, jacobians = run(program, params, xs, None, wrt)
    want_y, want = reference.jacobian(program, params, xs, None, wrt)
    assert oracle.relative_error(y, want_y) <= EXACT
    assert oracle.largest_error(jacobians, want) <= EXACT


def test_programs_that_differ_in_coefficients_are_different():
    """Average pools of equal extents print alike; taking one for the other gives wrong results."""

    def net(count: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.AvgPool1d(3, 1, 1, count_include_pad=count), nn.Flatten(), nn.Linear(8, 2)).double()

    x = torch.randn(3, 2, 4, dtype=torch.float64)
    programs = []
    for count in (True, False):
        model = net(count).eval()
        with torch.no_grad():
            program = capturing.to_program(model, (x,))
            params = capturing.bind(program, model)
        programs.append(program)
        assert oracle.largest_error(run(program, params, (x,))[1], oracle.jacobian(model, x)[1]) <= EXACT
    assert programs[0].key != programs[1].key
    a, b = (Contract(Positions((((0, (1.0, c)),),))) for c in (1.0, 2.0))
    keys = {Program(((1, 2),), (Step(form, (0,), (1, 1)),), 1).key for form in (a, b)}
    assert len(keys) == 2


def test_the_key_is_the_same_in_every_process():
    """Stores keep it.  A change of `Program`, its forms or their printing that changes the key makes every store
    another run's: count `fingerprint.KEYS` up then, and put here what the failing assertion shows."""
    program = Program(((4,),), (dense(3, 4, 0), Step(Scale("elu", (1.0, 0.1, 1.0)), (1,), (3,))), 2)
    assert program.key == copy.deepcopy(program).key == "4c77612d6a8b6075"


class ChangesDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(5, 3).double()

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).double())


class TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(5, 3).double()

    def forward(self, x, z):
        return self.a(x).double() + self.b(z)


@pytest.mark.parametrize(
    ("model", "dtypes"), [(ChangesDtype(), (torch.float32,)), (TwoDtypes(), (torch.float32, torch.float64))]
)
def test_dtypes_that_change_on_the_way(model, dtypes):
    xs = tuple(torch.randn(6, 4 + i).to(d) for i, d in enumerate(dtypes))
    with torch.no_grad():
        program = capturing.to_program(model, xs)
        params = capturing.bind(program, model)
    _, jacobians = run(program, params, xs)
    assert oracle.largest_error(jacobians, oracle.jacobian(model, xs)[1]) <= 1e-5


class Gathers(nn.Module):
    """An integer input first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, index, x):
        return self.fc(torch.relu(self.fc(x) @ self.fc.weight + self.table(index)))


def test_an_integer_input_first_leaves_the_kernels_to_the_others():
    torch.manual_seed(0)
    model = Gathers().double()
    index, x = torch.randint(7, (5,)), torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        program = capturing.to_program(model, (index, x))
        params = capturing.bind(program, model)
    assert executor.leading((index, x)) is x
    _, (jac,) = run(program, params, (index, x), None, (1,))
    leaf = x.clone().requires_grad_()
    y = model(index, leaf)
    want = torch.stack([torch.autograd.grad(y[:, c].sum(), leaf, retain_graph=True)[0] for c in range(3)], 1)
    assert oracle.relative_error(jac, want) <= EXACT


OUTSIDE = Windows((1, 2), (1, 1), ((0, 0), (1, 1)), (1, 6))  # the only window along a row of 5: taps at -1 and 5


@pytest.mark.parametrize("forward_worthwhile", [0, float("inf")])
def test_a_window_that_lies_wholly_in_the_padding_passes_nothing(forward_worthwhile, monkeypatch, fresh):
    """torch names the first place of the next row there, or one outside of the input."""
    monkeypatch.setattr(direction, "FORWARD_WORTHWHILE", forward_worthwhile)
    pooled = (Step(Select(OUTSIDE), (0,), (2, 3, 1)), Step(Scale("relu"), (1,), (2, 3, 1)))
    steps = (*pooled, Step(View(), (2,), (6,)), Step(View(), (0,), (30,)), dense(6, 30, 4), Step(Sum(), (3, 5), (6,)))
    program = Program(((2, 3, 5),), steps, 6)
    params = {"w6x30": torch.randn(6, 30).double()}
    x = torch.randn(2, 2, 3, 5).double()
    want = params["w6x30"].view(6, 2, 3, 5).expand(2, -1, -1, -1, -1)
    for jacobian in (executor.jacobian, reference.jacobian):
        y, (got,) = jacobian(program, params, (x,))
        assert torch.allclose(y, x.flatten(1) @ params["w6x30"].T)
        assert torch.allclose(got, want)


def test_a_pool_that_torch_cannot_go_back_through_is_refused():
    model = nn.Sequential(nn.MaxPool1d(2, 1, 1, 6), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"has windows that read nothing of its input of \(5,\)"):
        gradkern.jacobian(model, torch.randn(2, 2, 5), engine="kernel")


class Joined(nn.Module):
    """Tokens, transposed and joined with others before a norm; they themselves are read later, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(7)
        self.first, self.second = nn.Linear(7 * 5, 3), nn.Linear(4 * 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, 5, 6]
        h = self.tokens(x)
        z = self.norm(torch.cat([h.transpose(1, 2), x.transpose(1, 2)[:, :3]], 1))
        return self.first(z.flatten(1)) + self.second(h.flatten(1))


def test_no_norm_is_folded_into_what_is_read_under_another_shape():
    model = Joined().double().eval()
    randomise_norm(model)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    want_y, (want,) = oracle.jacobian(model, x)
    program = capturing.to_program(model, (x,))
    y, (got,) = run(program, capturing.bind(program, model), (x,))
    assert oracle.relative_error(y, want_y) < EXACT
    assert oracle.relative_error(got, want) < EXACT


def test_zero_slopes_are_skipped_before_and_after_many_positions_without_any():
    """Zeros are looked for at every position, then seldom, then at every one again; the sums stay the same."""
    model = nn.Sequential(nn.Conv1d(1, 20, 5), nn.Hardswish(), nn.Conv1d(20, 3, 3), nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(3, 1, 400, dtype=torch.float64)
    x[:, :, :40] *= 9
    x[:, :, 40:300] *= 0.01  # no slope is zero here
    x[:, :, 300:] *= 9
    model.double()(x)
    model[0].bias.data.zero_()
    got = gradkern.jacobian(model.eval(), x, engine="kernel")
    assert oracle.relative_error(got, oracle.jacobian(model, x)[1][0]) < 1e-12
