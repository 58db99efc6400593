"""Never stale: whatever is done to a model between two calls, the second is about the model as it is now.

Every test changes a traced model in one way and compares with live autograd on the changed model.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.dispatch import state
from gradkern.util.options import Engine

pytestmark = [pytest.mark.real_export, pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")]


class ConvNormAndAttributes(nn.Module):
    """Convolution, batch norm, a Python number and a plain tensor attribute, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(40, 3)
        self.scale = 1.5
        self.settings = {"shift": [0.25]}
        self.gain = torch.full((4, 1), 2.0, dtype=torch.float64)

    def forward(self, x):  # [N, 2, 10] -> [N, 3]
        h = self.act(self.norm(self.conv(x)) * self.scale + self.settings["shift"][0]) * self.gain
        return self.fc(self.drop(h).flatten(1))


@pytest.fixture(params=["kernel", "auto"])
def traced(request):
    """A traced model, its input, and a function that checks the model as it is now."""
    torch.manual_seed(0)
    model = ConvNormAndAttributes().double()
    x = torch.randn(6, 2, 10, dtype=torch.float64)
    for _ in range(3):
        model(x)  # statistics that are not 0 and 1
    model.eval()
    assert gradkern.prepare(model, x).program is not None

    return model, x, Agrees(model, x, request.param)


class Agrees:
    """Checks that results are those of live autograd.  ``before``: the Jacobian when the check was made."""

    def __init__(self, model: nn.Module, x: torch.Tensor, engine: Engine) -> None:
        self.model, self.x, self.engine = model, x, engine
        self.before = self().clone()

    def __call__(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """The Jacobian, after the check."""
        x = self.x if x is None else x
        got = gradkern.jacobian(self.model, x, engine=self.engine)
        want = gradkern.jacobian(self.model, x, engine="autograd")
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        return got


def changed(agrees: Agrees) -> None:
    """The change matters (autograd itself gives something else now) and is seen."""
    assert not torch.allclose(agrees(), agrees.before, rtol=1e-6)


def captures(model):
    """How many graphs of this model have been captured."""
    return sum(len(entry.programs) for entry in state.models.of(model).entries.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.5),
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    ],
    ids=["sgd", "adam-fused", "sgd-fused", "adamw-foreach"],
)
def test_optimizer_step(traced, make):
    model, x, agrees = traced
    optimizer = make(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    changed(agrees)
    assert captures(model) == 1  # never traced again for new values


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(traced, assign):
    model, _x, agrees = traced
    state = {k: v + 0.5 if v.is_floating_point() else v for k, v in copy.deepcopy(model.state_dict()).items()}
    model.load_state_dict(state, assign=assign)
    changed(agrees)


def test_in_place_edit(traced):
    model, _x, agrees = traced
    with torch.no_grad():
        model.fc.weight.mul_(2.0)
        model.conv.weight[0, 0, 1] += 1.0
    changed(agrees)


def test_data_edit(traced):
    model, _x, agrees = traced
    model.fc.weight.data[1] = 7.0
    model.conv.bias.data += 1.0
    changed(agrees)


def test_data_replaced(traced):
    model, _x, agrees = traced
    model.fc.weight.data = torch.randn_like(model.fc.weight)
    changed(agrees)


def test_numpy_view(traced):
    model, _x, agrees = traced
    view = model.fc.weight.detach().numpy()
    view[0, ::2] = 3.0
    changed(agrees)
    np.negative(view, out=view)
    agrees()


def test_swapped_values(traced):
    """The same numbers in another order: a hash that does not see order would miss it."""
    model, _x, agrees = traced
    with torch.no_grad():
        model.fc.weight.copy_(model.fc.weight.flip(0))
    changed(agrees)
    model.fc.weight.data[:, [0, 1]] = model.fc.weight.data[:, [1, 0]]
    agrees()


def test_vector_to_parameters(traced):
    model, _x, agrees = traced
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 1.5, model.parameters())
    changed(agrees)


def test_parameter_replaced(traced):
    model, _x, agrees = traced
    model.fc.weight = nn.Parameter(torch.randn_like(model.fc.weight))
    changed(agrees)


def test_recalibrated_running_statistics(traced):
    model, x, agrees = traced
    model.train()
    with torch.no_grad():
        model(5 * x + 3)
    model.eval()
    changed(agrees)
    model.norm.reset_running_stats()
    agrees()
    model.norm.running_var.data.fill_(9.0)
    agrees()
    model.norm.eps = 0.5
    agrees()


def test_python_number_on_a_module(traced):
    model, _x, agrees = traced
    model.scale = -2.0
    changed(agrees)
    model.settings["shift"][0] = -1.0
    agrees()


def test_plain_tensor_attribute(traced):
    model, _x, agrees = traced
    model.gain[1] = -3.0
    changed(agrees)
    model.gain = torch.rand(4, 1, dtype=torch.float64)
    agrees()


def test_bias_taken_away(traced):
    model, _x, agrees = traced
    model.conv.bias = None
    changed(agrees)


def test_to_another_dtype(traced):
    model, x, agrees = traced
    model.float()
    model.gain = model.gain.float()
    got = gradkern.jacobian(model, x.float(), engine="kernel")
    want = gradkern.jacobian(model, x.float(), engine="autograd")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    model.double()
    model.gain = model.gain.double()
    agrees()


def test_to_another_device_and_back(traced):
    model, _x, agrees = traced
    state = copy.deepcopy(model.state_dict())
    model.to("meta")
    with pytest.raises(ValueError, match="meta device"):
        agrees()
    model.to_empty(device="cpu")
    model.load_state_dict({k: v * 2 for k, v in state.items()})
    changed(agrees)


def test_train_and_eval(traced):
    model, _x, agrees = traced
    model.train()
    model.drop.p = 0.0
    changed(agrees)  # the batch's own statistics
    model.eval()
    agrees()
    model.norm.train()
    agrees()


def test_replaced_submodule(traced):
    model, _x, agrees = traced
    model.act = nn.Tanh()
    changed(agrees)
    model.act = nn.LeakyReLU(0.2)
    agrees()
    model.act.negative_slope = -0.7
    agrees()
    model.fc = nn.Sequential(nn.Linear(40, 5), nn.ELU(), nn.Linear(5, 3)).double()
    agrees()


def test_replaced_forward(traced):
    model, _x, agrees = traced
    model.act.forward = torch.sin
    changed(agrees)
    del model.act.forward
    agrees()


@pytest.mark.parametrize("kind", ["forward", "pre", "forward_kwargs", "pre_kwargs", "backward", "backward_pre"])
def test_registered_hook(traced, kind):
    model, _x, agrees = traced
    if kind == "forward":
        handle = model.act.register_forward_hook(lambda m, i, o: o * 3)
    elif kind == "pre":
        handle = model.act.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    elif kind == "forward_kwargs":
        handle = model.act.register_forward_hook(lambda m, i, k, o: o * 3, with_kwargs=True)
    elif kind == "pre_kwargs":
        handle = model.act.register_forward_pre_hook(lambda m, i, k: ((i[0] * 2,), k), with_kwargs=True)
    elif kind == "backward":
        handle = model.act.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    else:
        handle = model.act.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))
    changed(agrees)
    handle.remove()
    agrees()


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_global_hook(traced, kind):
    _model, _x, agrees = traced

    def double(module, inputs, outputs=None):
        if not isinstance(module, nn.ReLU):
            return None
        return outputs * 2 if kind == "forward" else (inputs[0] * 2,)

    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(double)
    try:
        changed(agrees)
    finally:
        handle.remove()
    agrees()


def test_freezing_changes_no_result(traced):
    model, _, agrees = traced
    model.requires_grad_(False)
    agrees()
    model.requires_grad_(True)
    agrees()
    assert captures(model) <= 2  # Dynamo guards requires_grad: a frozen model is captured once more


def test_other_shapes(traced):
    model, x, agrees = traced
    model.fc = nn.Linear(4 * 7, 3).double()
    agrees(x[..., :7])
    agrees(x[:1, :, :7])


def test_weight_norm_is_evaluated_live(traced):
    model, _x, agrees = traced
    nn.utils.parametrizations.weight_norm(model.fc)
    agrees()
    with torch.no_grad():
        model.fc.parametrizations.weight.original0.mul_(2.0)
    changed(agrees)
    nn.utils.parametrize.remove_parametrizations(model.fc, "weight")
    agrees()


def test_graphs_that_are_given_up_are_forgotten() -> None:
    """Dynamo keeps a few graphs per code object; those of settings that have passed do not pile up."""

    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.temperature = nn.Linear(4, 3).double(), 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) / self.temperature

    model, x, changes = Annealed(), torch.randn(2, 4, dtype=torch.float64), 12
    for step in range(changes):
        model.temperature = 1.0 + step
        for _ in range(2):
            got = gradkern.jacobian(model, x, engine="kernel")
    torch.testing.assert_close(got, gradkern.jacobian(model, x, engine="autograd"))
    (entry,) = state.models.of(model).entries.values()
    assert 0 < len(entry.programs) < changes
