"""Live values by name, and the key that guards a Program."""

from __future__ import annotations

import copy
import functools
import gc
import time
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from gradkern.dispatch.guards import structure_key
from gradkern.ir.program import Program
from gradkern.runtime import reference
from tests.cases import CASES
from tests.support.tracing import bind, trace


@functools.cache
def program_of(name: str) -> Program:
    return trace(CASES[name].build(), CASES[name].inputs(2))


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
def test_values_are_those_of_now(change) -> None:
    model = CASES["residual"].build()
    before = structure_key(model)
    assert agrees("residual", model)
    old = model(*CASES["residual"].inputs(3)).detach()
    change(model)
    assert not torch.allclose(old, model(*CASES["residual"].inputs(3)).detach())
    assert agrees("residual", model)
    assert structure_key(model) == before  # none of these asks for another trace


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


def test_missing_names_are_told() -> None:
    model = CASES["residual"].build()
    model.fc = nn.Identity()
    with pytest.raises((KeyError, AttributeError)):
        bind(program_of("residual"), model)


def test_binders_do_not_keep_programs() -> None:
    case = CASES["mlp"]
    program = trace(case.build(), case.inputs(2))
    bind(program, case.build())
    gone = weakref.ref(program)
    del program
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------------------------------------------------------
# The structure key


class Config:
    def __init__(self) -> None:
        self.gain = 2.0
        self.inner = {"steps": [1, 2, (3, 4)]}


def scaled(factor: float):
    return lambda x: x * factor


class Rich(nn.Module):
    """A module with every kind of attribute that a forward pass may read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)
        self.gain = 1.0
        self.flag = False
        self.mode = "plain"
        self.nested = {"a": [1, 2.0, (3, {"b": 4})], "c": {1, 2}}
        self.config = Config()
        self.function = scaled(2.0)
        self.bound = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.table = torch.ones(4)
        self.array = torch.ones(3).numpy()
        self.activations = [nn.ReLU(), nn.ELU()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.bn(self.second(self.bound(self.first(x)))) * self.gain)


def replace_forward(m: Rich) -> None:
    m.first.forward = types.MethodType(lambda self, x: x, m.first)


CHANGES = {
    "number": lambda m: setattr(m, "gain", 1.5),
    "flag": lambda m: setattr(m, "flag", True),
    "string": lambda m: setattr(m, "mode", "other"),
    "nested_number": lambda m: m.nested["a"][2][1].__setitem__("b", 5),
    "nested_list": lambda m: m.nested["a"].append(9),
    "nested_set": lambda m: m.nested["c"].add(3),
    "config_number": lambda m: setattr(m.config, "gain", 3.0),
    "config_nested": lambda m: m.config.inner["steps"].append(5),
    "closure": lambda m: setattr(m, "function", scaled(3.0)),
    "other_function": lambda m: setattr(m, "function", torch.tanh),
    "partial": lambda m: setattr(m, "bound", functools.partial(F.leaky_relu, negative_slope=0.3)),
    "tensor_shape": lambda m: setattr(m, "table", torch.ones(2, 4)),
    "array": lambda m: m.array.__setitem__(0, 7),
    "listed_module": lambda m: setattr(m.activations[1], "alpha", 0.5),
    "new_attribute": lambda m: setattr(m, "extra", 1),
    "eval": lambda m: m.eval(),
    "part_eval": lambda m: m.bn.eval(),
    "other_module": lambda m: setattr(m, "second", nn.Sequential(nn.Linear(4, 4))),
    "new_module": lambda m: m.add_module("third", nn.ReLU()),
    "eps": lambda m: setattr(m.bn, "eps", 1e-3),
    "double": lambda m: m.double(),
    "half_of_it": lambda m: m.first.half(),
    "meta_device": lambda m: m.to("meta"),
    "other_width": lambda m: setattr(m, "first", nn.Linear(4, 4, bias=False)),
    "tied": lambda m: setattr(m.second, "weight", m.first.weight),
    "shared_module": lambda m: setattr(m, "second", m.first),
    "forward_hook": lambda m: m.first.register_forward_hook(lambda *a: None),
    "forward_pre_hook": lambda m: m.first.register_forward_pre_hook(lambda *a: None),
    "backward_hook": lambda m: m.bn.register_full_backward_hook(lambda *a: None),
    "backward_pre_hook": lambda m: m.bn.register_full_backward_pre_hook(lambda *a: None),
    "parametrized": lambda m: orthogonal(m.first),
    "weight_norm": lambda m: weight_norm(m.first),
    "instance_forward": replace_forward,
    "no_bias": lambda m: setattr(m.first, "bias", None),
    "buffer": lambda m: m.register_buffer("more", torch.ones(2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str) -> None:
    model = Rich()
    before = structure_key(model)
    assert structure_key(model) == before
    hash(before)
    CHANGES[name](model)
    after = structure_key(model)
    hash(after)
    assert after != before


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_global_hooks_are_seen(kind: str) -> None:
    model = Rich()
    before = structure_key(model)
    handle = getattr(torch_module, f"register_module_{kind}")(lambda *a: None)
    try:
        assert structure_key(model) != before
    finally:
        handle.remove()
    assert structure_key(model) == before


def test_a_removed_hook_is_seen() -> None:
    model = Rich()
    before = structure_key(model)
    handle = model.first.register_forward_hook(lambda *a: None)
    with_hook = structure_key(model)
    handle.remove()
    assert structure_key(model) == before
    model.first.register_forward_hook(lambda *a: None)
    assert structure_key(model) not in (before, with_hook)


def test_class_level_forward_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Rich()
    before = structure_key(model)
    monkeypatch.setattr(Rich, "forward", lambda self, x: x)
    assert structure_key(model) != before


def test_copies_share_a_key() -> None:
    model = CASES["residual"].build()
    assert structure_key(copy.deepcopy(model)) == structure_key(model)
    assert structure_key(CASES["residual"].build(seed=3)) == structure_key(model)


def test_keys_do_not_keep_the_model() -> None:
    model = Rich()
    model.itself = model.forward
    key = structure_key(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert key != structure_key(Rich())


def test_cycles_end() -> None:
    model = Rich()
    model.config.owner = model
    model.config.itself = model.config
    hash(structure_key(model))


def test_the_key_is_cheap() -> None:
    """Every call pays for it: 85 modules in well under a few milliseconds, whatever else the machine does."""
    block = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout()]
    model = nn.Sequential(*[nn.Sequential(*copy.deepcopy(block)) for _ in range(12)])
    assert sum(1 for _ in model.modules()) == 85
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        structure_key(model)
        times.append(time.perf_counter() - begin)
    assert min(times) < 3e-3
