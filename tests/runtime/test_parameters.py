"""Live values by name: never stale, and never captured again for new values."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gradkern.dispatch.guards import find_graph, stand_ins
from gradkern.frontend.capture import GraphCache
from gradkern.ir.program import Program
from gradkern.runtime import reference
from tests.cases import CASES
from tests.support.capturing import bind, to_program


@functools.cache
def program_of(name: str) -> Program:
    return to_program(CASES[name].build(), CASES[name].inputs(2))


def agrees(name: str, model: nn.Module) -> bool:
    """The Program bound to the model gives what the model gives now."""
    program, inputs = program_of(name), CASES[name].inputs(3)
    with torch.no_grad():
        return torch.allclose(reference.forward(program, bind(program, model), inputs)[-1], model(*inputs), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Never stale: every way in which values change


def fused_step(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    model(*CASES["residual"].inputs(4)).square().sum().backward()
    optimizer.step()


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.fc.weight.mul_(3)


def by_data(model: nn.Module) -> None:
    model.fc.weight.data.add_(1)
    model.conv1.weight.data = model.conv1.weight.data * 2


def numpy_view(model: nn.Module) -> None:
    model.fc.weight.detach().numpy()[0] = 5


def assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() * 2 for k, v in model.state_dict().items()}, assign=True)


def loaded(model: nn.Module) -> None:
    model.load_state_dict(CASES["residual"].build(seed=4).state_dict())


def vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()) * 0.5, model.parameters())


def recalibrated(model: nn.Module) -> None:
    model.train()
    model(*CASES["residual"].inputs(8, seed=9))
    model.eval()


def replaced(model: nn.Module) -> None:
    model.fc = nn.Linear(12, 4).eval()


def new_parameter(model: nn.Module) -> None:
    model.fc.bias = nn.Parameter(torch.full((4,), 7.0))


@pytest.mark.parametrize(
    "change",
    [fused_step, in_place, by_data, numpy_view, assigned, loaded, vector, recalibrated, replaced, new_parameter],
    ids=lambda f: f.__name__,
)
def test_bound_values_follow_every_edit(change) -> None:
    model = CASES["residual"].build()
    capture, inputs = GraphCache(), CASES["residual"].inputs(3)
    graph = capture.capture(model, stand_ins(inputs)).graph
    assert agrees("residual", model)
    old = model(*inputs).detach()
    change(model)
    assert not torch.allclose(old, model(*inputs).detach())
    assert agrees("residual", model)
    held = find_graph(capture, model, inputs)
    assert held is not None
    assert held.graph is graph  # none of these asks for another capture
    assert all(name in held.tensors for name in ("fc.weight", "fc.bias"))
    assert held.tensors["fc.weight"].data_ptr() == model.fc.weight.data_ptr()


def test_values_are_detached_and_derived_ones_follow() -> None:
    model = CASES["weight_norm"].build()
    assert agrees("weight_norm", model)
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2)
    assert agrees("weight_norm", model)
    assert not any(t.requires_grad for t in bind(program_of("weight_norm"), model).values())


def test_bound_tensors_are_the_live_ones() -> None:
    model = CASES["mlp"].build()
    bound = bind(program_of("mlp"), model)
    assert bound["0.weight"].data_ptr() == model[0].weight.data_ptr()


def test_missing_parameter_is_an_error_that_names_it() -> None:
    model = CASES["residual"].build()
    model.fc = nn.Identity()
    with pytest.raises((KeyError, AttributeError)):
        bind(program_of("residual"), model)


@pytest.mark.slow
def test_binders_do_not_keep_programs() -> None:
    case = CASES["mlp"]
    program = to_program(case.build(), case.inputs(2))
    bind(program, case.build())
    gone = weakref.ref(program)
    del program
    gc.collect()
    assert gone() is None
