"""nn.Module to Program: what is traced, what is refused, and that the model stays as it is."""

from __future__ import annotations

import dataclasses
import random
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradkern.dispatch.guards import stand_ins
from gradkern.frontend.capture import GraphCache
from gradkern.frontend.lowerings import conv
from gradkern.frontend.lowerings.builder import NoForm, ProgramBuilder
from gradkern.frontend.refusal import NoProgram
from gradkern.ir.program import (
    Channels,
    Contract,
    LowRank,
    Opaque,
    Positions,
    Scale,
    Select,
    Sum,
    Value,
    View,
    Windows,
)
from gradkern.runtime import reference
from tests.cases import CASES, TRACEABLE
from tests.support import oracle
from tests.support.capturing import bind, to_program, verify
from tests.support.case import Case, Fn
from tests.support.case_runs import forms, lowered, proposed
from tests.support.modules import Net

pytestmark = pytest.mark.real_export
REFUSED = tuple(c for c in CASES.values() if not c.traceable)


# ---------------------------------------------------------------------------------------------------------------
# What is traced


@pytest.mark.parametrize("case", TRACEABLE, ids=lambda c: c.name)
def test_every_case_is_traced(case: Case) -> None:
    model, program = lowered(case.name)
    assert program.inputs == case.shapes
    assert any(isinstance(s.form, Opaque) for s in program.steps) == case.opaque, str(program)
    for n in (1, 5):  # the batch size is free
        inputs = case.inputs(n, seed=7, dtype=torch.float64)
        values = reference.forward(program, bind(program, model), inputs)
        assert oracle.relative_error(values[program.output], model(*inputs).detach()) < 1e-12
        assert all(v.shape == (n, *program.shape(i)) for i, v in enumerate(values))


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.name)
def test_model_that_cannot_be_lowered_names_the_reason(case: Case) -> None:
    model, inputs = case.build(), case.inputs(3)
    with pytest.raises(NoProgram) as caught:
        verify(to_program(model, inputs), model, inputs)
    error = caught.value
    assert error.reason
    assert "\n" not in error.reason
    assert error.mixes == (case.name in ("mixes_samples", "bn_no_statistics", "freezes_one", "attends_to_samples"))


def test_custom_backward_is_named() -> None:
    model, inputs = CASES["resnet1d_custom"].build(), CASES["resnet1d_custom"].inputs(3)
    with pytest.raises(NoProgram, match=r"custom autograd\.Function.*modules\.py:\d+"):
        verify(to_program(model, inputs), model, inputs)


def test_forms_of_a_small_cnn() -> None:
    _, program = lowered("bn_after_pool")
    assert forms(program) == [Contract, Scale, Select, Contract, Scale, View, Contract]
    assert isinstance(program.steps[3].form.map, Channels)
    assert program.steps[2].form.windows == Windows((2,), (2,), ((0, 0),), (1,))


def test_dropout_and_identity_vanish() -> None:
    _, program = lowered("dropout")
    assert forms(program) == [Contract, Scale, View, Contract]
    assert lowered("identity")[1].steps == ()


def test_even_same_padding_is_asymmetric() -> None:
    _, program = lowered("conv1d_same_even")
    assert program.steps[2].form.map.padding == ((1, 2),)


def test_residual_adds_and_fans_out() -> None:
    _, program = lowered("residual")
    assert forms(program).count(Sum) == 2
    assert max(len(readers) for readers in program.consumers.values()) == 3


def test_softmax_is_low_rank() -> None:
    assert lowered("softmax")[1].steps[-1].form == LowRank("softmax", 0)
    assert lowered("log_softmax")[1].steps[-1].form == LowRank("log_softmax", 0)


def test_mean_without_keepdim_is_positions_and_view() -> None:
    program = lowered("mean_rows")[1]
    i = next(i for i, s in enumerate(program.steps) if isinstance(getattr(s.form, "map", None), Positions))
    assert program.steps[i].shape == (4, 1, 8)
    assert program.steps[i + 1].shape == (4, 8)


def test_steps_know_their_module() -> None:
    _, program = lowered("residual")
    assert {"stem", "bn0", "conv1", "down", "fc", "relu"} <= {s.module for s in program.steps}
    opaque = [s for s in lowered("resnet1d_opaque")[1].steps if isinstance(s.form, Opaque)]
    assert [(s.op, s.module) for s in opaque] == [("aten.logcumsumexp.default", "middle")]
    assert all(s.form.reason for s in opaque)


def test_programs_of_one_architecture_are_equal() -> None:
    case = CASES["residual"]
    one, two = (to_program(case.build(seed), case.inputs(2)) for seed in (0, 1))
    assert one == two
    assert one.key == two.key
    assert one.key != lowered("shared_conv")[1].key


def test_keys_tell_coefficients_apart() -> None:
    """Two maps over positions that print alike are still two programs, for every cache that goes by the key."""
    pools = (nn.AvgPool1d(3, 1, 1), nn.AvgPool1d(3, 1, 1, count_include_pad=False), nn.AvgPool1d(5, 1, 2))
    programs = [proposed(nn.Sequential(pool, nn.Flatten()), (1, 6)) for pool in pools]
    assert len({str(p.steps[0]) for p in programs}) == 1
    assert len({p.key for p in programs}) == 3


OPAQUE_LAYERS = [
    nn.GRU(4, 4, batch_first=True),
]
MADE_OF_FORMS = [
    nn.AdaptiveMaxPool1d(2),
    nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    nn.GroupNorm(5, 5),
    nn.InstanceNorm1d(5),
    nn.PReLU(),
    nn.GLU(),
    nn.ConvTranspose1d(5, 2, 3, stride=2),
]


@pytest.mark.parametrize("layer", [*OPAQUE_LAYERS, *MADE_OF_FORMS], ids=lambda m: type(m).__name__)
def test_layers_with_and_without_a_form(layer: nn.Module) -> None:
    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = net.layer(net.fc(x))
        return (y[0] if isinstance(y, tuple) else y).flatten(1)

    model = Net(run, layer=layer).double().eval()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    program = to_program(model, (x,))
    verify(program, model, (x,))
    assert (Opaque in forms(program)) == any(layer is other for other in OPAQUE_LAYERS)
    got = reference.jacobian(program, bind(program, model), (x,))[1][0]
    assert oracle.relative_error(got, oracle.jacobian(model, x)[1][0]) < 1e-10


# ---------------------------------------------------------------------------------------------------------------
# What is refused

MIXING = {
    "gram": lambda net, x: net.fc(x) @ net.fc(x).T,
    "softmax": lambda net, x: net.fc(x).softmax(0),
    "cumsum": lambda net, x: net.fc(x).cumsum(0),
    "flip": lambda net, x: net.fc(x).flip(0),
    "mean": lambda net, x: net.fc(x) - x.mean(0, keepdim=True),
    "count": lambda net, x: net.fc(x) / x.shape[0],
}
REFUSALS = {
    "batch_size": (lambda net, x: net.fc(x) * (2 if x.shape[0] == 1 else 1), "depends on the other samples"),
    "loop": (lambda net, x: torch.stack([net.fc(row) for row in x]), r"depends on the number of samples, .*\.py:\d+"),
    "two_outputs": (lambda net, x: (net.fc(x), x), "not one tensor"),
    "whole_numbers": (lambda net, x: net.fc(x).argmax(1), "no gradient"),
    "constant": (lambda net, x: torch.ones(x.shape[0], 2), "samples as axis 0"),
    "random": (lambda net, x: net.fc(x) + torch.randn_like(x), "draws random numbers"),
    "dropout": (lambda net, x: F.dropout(net.fc(x), 0.5, True), "draws random numbers"),
    "buffer": (lambda net, x: net.fc(x) + net.count.add_(1), "changes the buffer count"),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixed_samples_are_refused(name: str) -> None:
    with pytest.raises(NoProgram) as caught:
        proposed(Net(MIXING[name]), (4,))
    assert caught.value.mixes


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_why(name: str) -> None:
    fn, reason = REFUSALS[name]
    model = Net(fn)
    model.register_buffer("count", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(NoProgram, match=reason):
        proposed(model, (4,))


def test_no_grad_region_is_a_detach() -> None:
    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            z = net.fc(x).tanh()
        return net.fc(x) + z

    assert Opaque in forms(proposed(Net(run), (4,)))


def test_detach_is_no_identity() -> None:
    program = proposed(Net(lambda net, x: net.fc(x) * 2 + net.fc(x).tanh().detach()), (4,))
    assert Opaque in forms(program)


# ---------------------------------------------------------------------------------------------------------------
# Constants


def test_literals_are_part_of_the_program() -> None:
    model = Net(lambda net, x: net.fc(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.tensor(0.5))
    program = proposed(model, (4,))
    assert Opaque not in forms(program)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.allclose(reference.forward(program, bind(program, model), (x,))[-1], model(x).detach())


@pytest.mark.parametrize("times", [1, 0])
def test_constants_with_the_size_of_the_batch(times: int) -> None:
    """A row that all samples share is a constant; numbers that differ between samples are not."""

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(x.shape[0], dtype=x.dtype).view(-1, 1) ** (1 - times)  # ones, or 0, 1, 2, …
        return net.fc(x).tanh() + rows + torch.full((x.shape[0], 1), 0.5, dtype=x.dtype)

    model = Net(run)
    program = proposed(model, (4,))
    assert (Opaque in forms(program)) == (times == 0)
    x = torch.randn(5, 4, dtype=torch.float64)
    got = reference.forward(program, bind(program, model), (x,))[-1]
    assert torch.allclose(got, model(x).detach(), rtol=1e-12)


def test_tensor_attributes_are_bound_live() -> None:
    model = Net(lambda net, x: net.fc(x) * net.factor, factor=torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    program = proposed(model, (4,))
    model.factor.mul_(10)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.allclose(reference.forward(program, bind(program, model), (x,))[-1], model(x).detach())


def test_tensors_of_a_closure_are_bound_live() -> None:
    hidden = [torch.ones(4, dtype=torch.float64)]
    model = Net(lambda net, x: net.fc(x) * hidden[0]).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    for _ in range(3):
        captured = GraphCache().capture(model, stand_ins((x,)))
        (name,) = [name for name in captured.tensors if not name.startswith("fc.")]
        assert captured.tensors[name].data_ptr() == hidden[0].data_ptr()
        hidden[0] = hidden[0] * 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_hook_based_reparametrisations(norm) -> None:
    model = norm(nn.Linear(4, 3))
    program = proposed(model, (4,))
    assert forms(program) == [Contract]
    with torch.no_grad():
        (model.weight_g if hasattr(model, "weight_g") else model.weight_orig).mul_(3)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.allclose(reference.forward(program, bind(program, model), (x,))[-1], model(x).detach())


# ---------------------------------------------------------------------------------------------------------------
# Verification


def test_a_wrong_program_is_caught() -> None:
    model, program = lowered("tanh")
    inputs = CASES["tanh"].inputs(3, dtype=torch.float64)
    for form in (Scale("relu"), Scale("sigmoid")):
        steps = list(program.steps)
        steps[1] = dataclasses.replace(steps[1], form=form)
        with pytest.raises(NoProgram):
            verify(dataclasses.replace(program, steps=tuple(steps)), model, inputs)


@pytest.mark.parametrize("name", ["cnn1d", "fcn", "bn_before_conv", "maxpool1d_overlap_pad"])
def test_samples_on_kinks_are_no_mismatch(name: str) -> None:
    """Constant and zero samples put many activations within rounding of a kink."""
    case = CASES[name]
    model = case.build()
    for inputs in (tuple(torch.zeros(2, *s) for s in case.shapes), tuple(torch.ones(1, *s) for s in case.shapes)):
        verify(to_program(model, inputs), model, inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_no_mismatch(value: float) -> None:
    case = CASES["maxpool1d"]
    inputs = case.inputs(2)
    inputs[0][0, 0, 3] = value
    verify(to_program(case.build(), inputs), case.build(), inputs)


@pytest.mark.parametrize("name", ["cnn1d", "elu", "residual"])
def test_bfloat16_network_is_verified(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(dtype=torch.bfloat16), case.inputs(3, dtype=torch.bfloat16)
    verify(to_program(model, inputs), model, inputs)


def test_empty_batches_can_be_traced() -> None:
    case = CASES["mlp"]
    verify(to_program(case.build(), case.inputs(0)), case.build(), case.inputs(0))


def test_nothing_is_left_changed() -> None:
    case = CASES["residual"]
    model, inputs = case.build(), case.inputs(2)
    attributes = {name: dict(m.__dict__) for name, m in model.named_modules()}
    content = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state()
    kept = [x.clone() for x in inputs]
    verify(to_program(model, inputs), model, inputs)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(x.grad is None and torch.equal(x, k) for x, k in zip(inputs, kept, strict=True))
    assert all(torch.equal(v, content[k]) for k, v in model.state_dict().items())
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == attributes


def test_buffers_changed_by_the_live_model_are_put_back() -> None:
    """Export sees through `torch.no_grad` tricks; a forward that counts its calls is refused and not counted."""
    model = Net(lambda net, x: net.fc(x) + 0 * net.count.add_(1))
    model.register_buffer("count", torch.zeros(1))
    inputs = (torch.randn(2, 4),)
    fine = to_program(Net(lambda net, x: net.fc(x)), inputs)
    verify(fine, model, inputs)
    assert float(model.count) == 0


# ---------------------------------------------------------------------------------------------------------------
# Threads, noise


def test_modules_in_plain_lists_and_replaced_forwards() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].forward = lambda x: x * 3
    assert forms(proposed(model, (4,))) == [Contract, Scale]

    net = Net(lambda net, x: net.layers[1](net.layers[0](x)))
    net.layers = [net.fc, nn.Tanh()]
    assert forms(proposed(net, (4,))) == [Contract, Scale]


def test_tracing_while_other_threads_use_the_model() -> None:
    case = CASES["cnn1d"]
    model, inputs = case.build(), case.inputs(4)
    want = model(*inputs).detach()
    wrong: list[object] = []
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            with torch.no_grad():
                error = oracle.relative_error(model(*inputs), want)
                if not error < 1e-5:  # rounding depends on the thread
                    wrong.append(error)

    def propose() -> None:
        try:
            verify(to_program(model, inputs), model, inputs)
        except Exception as error:
            wrong.append(error)

    user = threading.Thread(target=use)
    tracers = [threading.Thread(target=propose) for _ in range(3)]
    user.start()
    for thread in tracers:
        thread.start()
    for thread in tracers:
        thread.join()
    done.set()
    user.join()
    assert not wrong


def test_refusals_are_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES["value_branch"]
    with pytest.raises(NoProgram):
        to_program(case.build(), case.inputs(2))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_warnings_as_errors_do_not_end_a_trace() -> None:
    case = CASES["residual"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify(to_program(case.build(), case.inputs(2)), case.build(), case.inputs(2))


def test_inference_mode() -> None:
    case = CASES["resnet1d_opaque"]
    model = case.build(dtype=torch.float64)
    with torch.inference_mode():
        inputs = case.inputs(3, dtype=torch.float64)
        program = to_program(model, inputs)
        verify(program, model, inputs)
        got = reference.jacobian(program, bind(program, model), inputs)[1][0]
    want = oracle.jacobian(model, case.inputs(3, dtype=torch.float64))[1][0]
    assert oracle.relative_error(got, want) < 1e-10


def test_signatures_with_names_and_defaults() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, *, scale: float = 2.0) -> torch.Tensor:
            return self.fc(x) * scale

    assert forms(proposed(Named(), (4,))) == [Contract, Scale]
    assert forms(proposed(Fn(lambda x: x * 2), (4,))) == [Scale]


def test_a_convolution_whose_weight_is_computed_from_samples_says_so():
    arguments = SimpleNamespace(weight=Value(0), transposed=False)
    with pytest.raises(NoForm, match="its weight depends on the samples"):
        conv.general(ProgramBuilder.__new__(ProgramBuilder), arguments)
