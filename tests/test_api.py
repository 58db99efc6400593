"""`gradkern.jacobian`: results, shapes, modes, and that it leaves everything as it was."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.util.options import ENGINES, BadValue
from tests.cases import net
from tests.support import oracle

SOME = ("relu_inplace", "maxpool1d", "elu", "residual", "bn_after_conv", "softmax_axis", "two_inputs", "scalar_output")


class Mixing(nn.Module):
    """Every sample's output depends on the others."""

    def forward(self, x):
        return (x - x.mean(0)).square()[:, :3]


class DetachedMixing(nn.Module):
    """The same, out of sight of the gradient."""

    def forward(self, x):
        return (x - x.mean(0).detach()).square()[:, :3]


# ---------------------------------------------------------------------------------------------------------------
# Values and shapes


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SOME)
def test_jacobian_equals_the_oracle(name, engine):
    model, inputs = net(name)
    y, want = oracle.jacobian(model, inputs)
    got = gradkern.jacobian(model, inputs, engine=engine)
    assert isinstance(got, tuple)
    for g, w, x in zip(got, want, inputs, strict=True):
        assert g.shape == (*y.shape, *x.shape[1:])
        assert oracle.relative_error(g.reshape(w.shape), w) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_one_tensor_or_a_tuple(engine):
    model, (x,) = net()
    alone = gradkern.jacobian(model, x, engine=engine)
    assert isinstance(alone, torch.Tensor)
    (wrapped,) = gradkern.jacobian(model, (x,), engine=engine)
    (listed,) = gradkern.jacobian(model, [x], engine=engine)
    assert torch.equal(alone, wrapped)
    assert torch.equal(alone, listed)


@pytest.mark.parametrize("engine", ENGINES)
def test_wrt_chooses_inputs(engine):
    model, inputs = net("two_inputs")
    both = gradkern.jacobian(model, inputs, engine=engine)
    torch.testing.assert_close(gradkern.jacobian(model, inputs, wrt=np.int64(1), engine=engine), both[1])
    (last,) = gradkern.jacobian(model, inputs, wrt=[np.int32(-1)], engine=engine)
    torch.testing.assert_close(last, both[1])
    swapped = gradkern.jacobian(model, inputs, wrt=(1, 0), engine=engine)
    torch.testing.assert_close(swapped[0], both[1])
    for wrong in (2, -3, [], [0.5], 0.5, True):
        with pytest.raises(BadValue, match="wrt"):
            gradkern.jacobian(model, inputs, wrt=wrong, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_integer_input_beside_a_floating_one(engine):
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x, ids):
            return self.last(torch.tanh(x) * self.table(ids))

    torch.manual_seed(0)
    model, x, ids = Embeds().double().eval(), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    with gradkern.use(engine), pytest.warns() if engine in ("reference", "kernel") else contextlib.nullcontext():
        got = gradkern.jacobian(model, (x, ids), wrt=0)
    w = model.last.weight  # [2, 4]
    want = w[None] * (model.table(ids) * (1 - torch.tanh(x) ** 2))[:, None]
    torch.testing.assert_close(got, want.detach())
    with pytest.raises(TypeError, match="int64"):
        gradkern.jacobian(model, (x, ids), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, engine):
    model, (x,) = net(dtype=dtype, n=4)
    got = gradkern.jacobian(model, x, engine=engine)
    assert got.dtype == dtype
    _, (want,) = oracle.jacobian(model, (x,))
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert oracle.relative_error(got, want) < bound


@pytest.mark.parametrize("engine", ENGINES)
def test_jacobian_of_one_sample_and_of_an_empty_batch(engine):
    model, (x,) = net()
    full = gradkern.jacobian(model, x, engine=engine)
    torch.testing.assert_close(gradkern.jacobian(model, x[:1], engine=engine), full[:1])
    empty = gradkern.jacobian(model, x[:0], engine=engine)
    assert empty.shape == (0, *full.shape[1:])
    assert empty.dtype == x.dtype
    assert gradkern.jacobian(model, x[:0], [1, 0], engine=engine).shape == (0, 2, *full.shape[2:])
    jac, index = gradkern.jacobian(model, x[:0], gradkern.TopK(2), engine=engine)
    assert jac.shape == (0, 2, *full.shape[2:])
    assert index.shape == (0, 2)


# ---------------------------------------------------------------------------------------------------------------
# What J means where samples mix


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", [Mixing(), DetachedMixing()], ids=["mixing", "detached"])
@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_mixed_samples_go_through_one_forward(engine, model):
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, (want,) = oracle.jacobian(model, (x,))
    with gradkern.use(engine, memory_budget=1):
        torch.testing.assert_close(gradkern.jacobian(model, x), want)
        torch.testing.assert_close(torch.cat(list(gradkern.iter_jacobian(model, x, chunk=7))), want)


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_training_mode_is_one_forward_with_buffers_and_randomness_as_after_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    want = torch.stack([torch.autograd.grad(y[:, c].sum(), leaf, retain_graph=True)[0] for c in range(3)], dim=1)
    state = torch.get_rng_state()
    model.load_state_dict(before)
    for engine in ENGINES:
        torch.manual_seed(7)
        with gradkern.use(engine, memory_budget=1):
            torch.testing.assert_close(gradkern.jacobian(model, x), want)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert model.training


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_random_draws_of_a_custom_module_are_found():
    class Noisy(nn.Module):
        def forward(self, x):
            return x * torch.rand_like(x)

    x = torch.randn(9, 4)
    torch.manual_seed(3)
    want = torch.diag_embed(torch.rand_like(x))
    state = torch.get_rng_state()
    for engine in ENGINES:
        torch.manual_seed(3)
        with gradkern.use(engine, memory_budget=1):
            torch.testing.assert_close(gradkern.jacobian(Noisy(), x), want)
        assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------
# Nothing of the caller's is touched


@pytest.mark.parametrize("engine", ENGINES)
def test_jacobian_leaves_model_inputs_and_random_state_unchanged(engine):
    model, (x,) = net("bn_after_conv")
    model.requires_grad_(True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x.requires_grad_()
    x.grad = torch.full_like(x, 2.0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    values = x.detach().clone()
    jac = gradkern.jacobian(model, x, engine=engine)
    assert not jac.requires_grad
    assert jac.grad_fn is None
    assert x.requires_grad
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert torch.equal(x.detach(), values)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_every_grad_mode(engine, mode):
    model, (x,) = net()
    want = gradkern.jacobian(model, x, engine="autograd")
    with mode():
        made_inside = x * 1.0  # an inference tensor under inference_mode
        torch.testing.assert_close(gradkern.jacobian(model, x, engine=engine), want)
        torch.testing.assert_close(gradkern.jacobian(model, made_inside, engine=engine), want)
        out = torch.empty_like(want)
        gradkern.jacobian(model, x, out=out, engine=engine)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(gradkern.jacobian(model, made_inside, engine=engine), want)


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_of_every_layout(engine):
    model, (x,) = net()
    want = gradkern.jacobian(model, x, engine="autograd")
    strided = torch.stack([x, x], dim=-1)[..., 0]
    torch.testing.assert_close(gradkern.jacobian(model, strided, engine=engine), want)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(gradkern.jacobian(model, turned, engine=engine), want)
    one = x[:1].expand(6, *x.shape[1:])
    got = gradkern.jacobian(model, one, engine=engine)
    torch.testing.assert_close(got, want[:1].expand_as(got))
    torch.testing.assert_close(gradkern.jacobian(model, nn.Parameter(x), engine=engine), want)


def test_a_model_that_works_in_place_on_its_input():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(3.0).relu_()

    x = torch.tensor([[1.0, -1.0]])
    kept = x.clone()
    for engine in ENGINES:
        got = gradkern.jacobian(InPlace(), x, engine=engine)
        torch.testing.assert_close(got, torch.tensor([[[3.0, 0.0], [0.0, 0.0]]]))
        assert torch.equal(x, kept)


def test_create_graph():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert not gradkern.jacobian(model, x).requires_grad  # detached, though the input requires grad
    jac = gradkern.jacobian(model, x, create_graph=True)
    torch.testing.assert_close(jac.detach(), gradkern.jacobian(model, x))
    (second,) = torch.autograd.grad(jac.square().sum(), x)
    assert second.abs().max() > 0
    for engine in ("kernel", "reference"):
        with pytest.raises(BadValue, match="create_graph"):
            gradkern.jacobian(model, x, create_graph=True, engine=engine)
    with pytest.raises(BadValue, match="create_graph"), torch.no_grad():
        gradkern.jacobian(model, x, create_graph=True)
    with pytest.raises(BadValue, match="out="):
        gradkern.jacobian(model, x, create_graph=True, out=torch.empty(3, 2, 4))


def test_importing_gradkern_loads_captum_at_its_first_use():
    code = (
        "import sys, gradkern; assert not {'captum', 'zarr'} & set(sys.modules); assert 'attr' in dir(gradkern);"
        "assert gradkern.attr.Saliency; assert 'captum' in sys.modules; from gradkern import accelerate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
