"""LSTM, GRU and RNN layers: all seeds in one walk, exact."""

import pytest
import torch
from torch import nn

from gradkern.ir.program import Param
from gradkern.ir.recurrent import Recurrent
from gradkern.runtime import executor, ops, recurrent
from tests.support import capturing, oracle
from tests.support.capturing import bind


class ReadsRecurrentLayer(nn.Module):
    """A recurrent layer and what is read of it."""

    def __init__(self, layer, read):
        super().__init__()
        self.layer, self.read = layer, read

    def forward(self, x):  # [N, T, I] -> [N, T, H] or [N, H]
        y, state = self.layer(x)
        if self.read == "all":
            return y
        hidden = state[0] if isinstance(state, tuple) else state
        return y[:, -1] if self.read == "last" else hidden[-1]


OPTIONS = {
    "plain": {},
    "two": {"num_layers": 2},
    "both": {"num_layers": 2, "bidirectional": True},
    "nobias": {"bias": False},
}


@pytest.mark.parametrize("read", ["all", "last", "state"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_exact_and_fused(layer, options, read):
    torch.manual_seed(0)
    model = ReadsRecurrentLayer(layer(3, 4, batch_first=True, **OPTIONS[options]), read).double().eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    program = capturing.to_program(model, (x,))
    capturing.verify(program, model, (x,))
    (want,) = oracle.jacobian(model, x)[1]
    (got,) = executor.jacobian(program, bind(program, model), (x,))[1]
    assert oracle.relative_error(got, want) <= 1e-10
    assert executor.plan_for(program, 4, torch.float64).fused_share == 1.0


def test_relu_rnn():
    torch.manual_seed(0)
    model = ReadsRecurrentLayer(nn.RNN(3, 4, nonlinearity="relu", batch_first=True), "all").double().eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    program = capturing.to_program(model, (x,))
    (got,) = executor.jacobian(program, bind(program, model), (x,))[1]
    assert oracle.relative_error(got, oracle.jacobian(model, x)[1][0]) <= 1e-10


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize(("n", "s", "t"), [(1, 1, 1), (1, 1, 4), (3, 1, 1), (2, 3, 1)])
def test_the_cotangent_is_not_written_to(kind, n, s, t):
    """Also where its steps are already in the order of the walk."""
    torch.manual_seed(0)
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}[kind](3, 4, batch_first=True).double()
    names = tuple(Param(name) for name, _ in layer.named_parameters())
    tensors = dict(layer.named_parameters())
    x, g = torch.randn(n, t, 3, dtype=torch.float64, requires_grad=True), torch.randn(n, s, t, 4, dtype=torch.float64)
    y, kept = layer(x)[0], g.clone()
    want = torch.stack([torch.autograd.grad(y, x, g[:, k], retain_graph=True)[0] for k in range(s)], 1)
    with torch.no_grad():
        got = recurrent.vjp(Recurrent(kind, (names,), 1), x.detach(), y.detach(), g, lambda p: tensors[p.name])
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(g, kept)


@pytest.mark.parametrize("walk", ["compiled", "torch"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kind", recurrent.SLOPES)
def test_walk_back_through_time_is_torchs_on_kernels_and_without(kind, biases, walk, monkeypatch):
    """Both directions, more samples than a block has, cotangents and inputs of any strides."""
    if walk == "torch":
        monkeypatch.setattr(ops, "_native", lambda *_: False)
    else:
        monkeypatch.delattr(recurrent, "_walk")
    torch.manual_seed(0)
    n, s, t, i, h = 50, 3, 6, 5, 7
    make = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)
    options = {"nonlinearity": kind.removeprefix("rnn_")} if kind.startswith("rnn") else {}
    layer = make(i, h, bias=biases, bidirectional=True, batch_first=True, **options).double()
    tensors = dict(layer.named_parameters())
    names, per = [Param(name) for name in tensors], 4 if biases else 2
    x = torch.randn(t, n, i, dtype=torch.float64).transpose(0, 1).requires_grad_()
    g = torch.randn(n, s, 2 * h, t, dtype=torch.float64).transpose(2, 3)
    y = layer(x)[0]
    want = torch.stack([torch.autograd.grad(y, x, g[:, k], retain_graph=True)[0] for k in range(s)], 1)
    r = Recurrent(kind, (tuple(names[:per]), tuple(names[per:])), 2)
    with torch.no_grad():
        got = recurrent.vjp(r, x.detach(), y.detach(), g, lambda p: tensors[p.name])
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", recurrent.KINDS)
def test_recurrent_forward_kernel_equals_torch(kind, dtype):
    """Of more samples than a block has, in several layers and both directions, against torch."""
    torch.manual_seed(0)
    make = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)
    options = {"nonlinearity": kind.removeprefix("rnn_")} if kind.startswith("rnn") else {}
    layer = make(5, 19, num_layers=2, bidirectional=True, batch_first=True, **options).to(dtype)
    tensors = dict(layer.named_parameters())
    names = [Param(name) for name in tensors]
    r = Recurrent(kind, tuple(tuple(names[k : k + 4]) for k in range(0, len(names), 4)), 2)
    x = 3 * torch.randn(4, 70, 5, dtype=dtype).transpose(0, 1)
    with torch.no_grad():
        want, got = layer(x)[0], recurrent.forward(r, x, lambda p: tensors[p.name])
    assert torch.allclose(got, want, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("bad", ["input", "weight", "neither"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_steps_that_no_cotangent_has_reached(kind, bad):
    """Their gradients are zero, but NaN where torch has NaN, because zero times a slope may be NaN."""
    torch.manual_seed(0)
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}[kind](3, 4, bidirectional=True, batch_first=True)
    layer = layer.double()
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    if bad == "input":
        x[1, 2, 0] = torch.nan
    if bad == "weight":
        with torch.no_grad():
            layer.weight_ih_l0_reverse[0, 0] = torch.inf
    x.requires_grad_()
    tensors = dict(layer.named_parameters())
    names = [Param(name) for name in tensors]
    g = torch.zeros(3, 2, 6, 8, dtype=torch.float64)
    g[:, :, 3] = torch.randn(3, 2, 8, dtype=torch.float64)
    y = layer(x)[0]
    want = torch.stack([torch.autograd.grad(y, x, g[:, k], retain_graph=True)[0] for k in range(2)], 1)
    with torch.no_grad():
        r = Recurrent(kind, (tuple(names[:4]), tuple(names[4:])), 2)
        got = recurrent.vjp(r, x.detach(), y.detach(), g, lambda p: tensors[p.name])
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14, equal_nan=True)
    assert bool(want.isnan().any()) == (bad != "neither")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x must be float32 or float64 \[N, T, I\]"),
        ({"g": torch.zeros(2, 5, 4)}, r"g must be \[N, S, T, H\]"),
        ({"y": torch.zeros(2, 4, 4)}, "y must be"),
        ({"weights": [torch.zeros(16, 3)]}, "two weights, with or without two biases, got 1 tensors"),
        ({"weights": [torch.zeros(16, 3), torch.zeros(15, 4)]}, "W_hh must be"),
        ({"weights": [torch.zeros(3, 16).t(), torch.zeros(16, 4)]}, "must be contiguous"),
        ({"cell": 4}, "cell must be 0"),
        ({"result": torch.zeros(2, 1, 5, 4)}, "result must be"),
    ],
)
def test_recurrent_op_refuses_wrong_arguments(change, message):
    ops.extension()
    given = {"g": torch.zeros(2, 1, 5, 4), "x": torch.zeros(2, 5, 3), "y": torch.zeros(2, 5, 4), "cell": 3}
    given |= {"weights": [torch.zeros(16, 3), torch.zeros(16, 4)], "reverse": False, "add": False}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gradkern.recurrent_vjp(**given | {"result": torch.zeros(2, 1, 5, 3)} | change)
