"""NaN and Inf, in samples and in weights: results are where torch's are, and every other sample is untouched."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradkern
from gradkern.ir.functions import FUNCTIONS, RECTIFYING
from gradkern.ir.program import Program, Scale, Step
from gradkern.runtime import executor, reference
from tests.cases import CASES
from tests.support import oracle
from tests.support.capturing import bind, to_program
from tests.support.case import lazily, seq1d, seq2d
from tests.support.case_runs import EXACT
from tests.support.functions import ARGUMENTS, ORIGINALS

BAD = (math.nan, math.inf, -math.inf)
# Not ELU: at NaN torch's own derivative is 1 or NaN, depending on where in a vector the element lies.
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu_inplace": lazily(nn.ReLU, inplace=True),
    "leaky_relu": lazily(nn.LeakyReLU, 0.2),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
NETS = {
    **{name: seq1d(act, lazily(nn.Conv1d, 4, 5, 3, padding=1), act) for name, act in ACTIVATIONS.items()},
    "maxpool": seq1d(nn.ReLU, lazily(nn.MaxPool1d, 2), lazily(nn.Conv1d, 4, 4, 3), nn.ReLU),
    "maxpool_overlap": seq1d(lazily(nn.MaxPool1d, 3, 1, 1), nn.ReLU),
    "maxpool_alone": seq1d(lazily(nn.MaxPool1d, 4, 4)),
    "maxpool2d": seq2d(nn.ReLU, lazily(nn.MaxPool2d, 2), lazily(nn.Conv2d, 4, 4, 2), nn.ReLU),
    "maxpool_wide": seq2d(lazily(nn.MaxPool2d, 3, 2, 1, ceil_mode=True), nn.ReLU),
    "avgpool": seq1d(nn.ReLU, lazily(nn.AvgPool1d, 2), nn.Tanh),
    "bn": seq1d(lazily(nn.BatchNorm1d, 4), nn.ReLU, lazily(nn.Conv1d, 4, 3, 3)),
}


def net(name: str, dtype: torch.dtype = torch.float64):
    make, shape = NETS[name]
    torch.manual_seed(0)
    return make().to(dtype).eval(), torch.randn(6, *shape, dtype=torch.float64).to(dtype)


def agrees(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isposinf(), want.isposinf())
    assert torch.equal(got.isneginf(), want.isneginf())
    finite = want.isfinite()
    assert oracle.relative_error(got[finite], want[finite]) <= EXACT


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NETS)
def test_non_finite_number_in_a_sample_changes_no_other_sample(name, bad):
    model, x = net(name)
    clean = gradkern.jacobian(model, x, engine="kernel")
    x[2].view(-1)[x[2].numel() // 2] = bad
    found = gradkern.jacobian(model, x, engine="kernel")
    agrees(found, oracle.jacobian(model, x)[1][0])
    others = torch.arange(6) != 2
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["relu", "maxpool", "maxpool2d", "tanh", "maxpool_overlap"])
def test_sample_of_non_finite_numbers_alone_equals_the_oracle(name, bad):
    model, x = net(name)
    x[0] = bad
    agrees(gradkern.jacobian(model, x, engine="kernel"), oracle.jacobian(model, x)[1][0])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("name", ["relu", "maxpool", "bn", "maxpool2d"])
def test_non_finite_weight_spreads_as_in_torch(name, layer, bad):
    """Nothing may be skipped then: 0 · Inf is NaN."""
    model, x = net(name)
    with torch.no_grad():
        model[layer].weight.view(-1)[1] = bad
    agrees(gradkern.jacobian(model, x, engine="kernel"), oracle.jacobian(model, x)[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_maximum_among_nan_and_ties(dtype):
    """The first maximum wins, the last NaN does; of -inf everywhere, the first."""
    inf, nan = math.inf, math.nan
    rows = [
        [1, 1, 0, 1], [nan, 1, nan, 0], [nan, nan, nan, nan], [-inf, -inf, -inf, -inf], [0, -0.0, 0, 0],
        [inf, inf, 0, 0], [nan, 2, 3, 4], [-1, -2, -1, -3], [-inf, nan, -inf, inf],
    ]  # fmt: skip
    x = torch.tensor(rows, dtype=dtype).unsqueeze(1)
    for channels in (1, 5, 16, 19):
        wide = x.expand(-1, channels, -1).contiguous()
        for tail in ([], [nn.Flatten(), nn.Linear(channels, 2)]):
            pool = nn.Sequential(nn.MaxPool1d(4), *tail).to(dtype).eval()
            got = gradkern.jacobian(pool, wide, engine="kernel").double()
            want = oracle.jacobian(pool, wide.double())[1][0].reshape(got.shape)
            assert torch.equal(got.isnan(), want.isnan())
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_saturated_and_tiny_activations_keep_their_digits():
    """Large arguments neither overflow nor turn into NaN; small ones do not cancel."""
    x = torch.tensor(
        [-1e4, -200.0, -90.0, -20.0, -1.0, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 0.3, 1.0, 20.0, 90.0, 200.0, 1e4]
    )
    for act in (nn.ELU(), nn.ELU(0.3), nn.SELU(), nn.Tanh(), nn.Sigmoid(), nn.LeakyReLU()):
        # The product with the derivative of a square shows the value itself, to its last digits.
        model = nn.Sequential(act, Square())
        y = gradkern.jacobian(model, x.reshape(-1, 1), engine="kernel").flatten().double()
        want = oracle.jacobian(model, x.reshape(-1, 1))[1][0].flatten()
        assert torch.isfinite(y).all()
        near = x.abs() <= 1  # beyond, the derivative of tanh and sigmoid is what 1 - y leaves, as in torch
        assert ((y - want).abs() <= 2e-6 * want.abs())[near].all(), act
        slope = gradkern.jacobian(act, x.reshape(-1, 1), engine="kernel").flatten().double()
        want = oracle.jacobian(act, x.reshape(-1, 1))[1][0].flatten()
        assert ((slope - want).abs() <= 2e-6 * want.abs() + 1e-7).all(), act


SMOOTH = [
    nn.LogSigmoid(), nn.Softplus(), nn.Softplus(0.5, 30.0), nn.Mish(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ELU(),
    nn.CELU(2.0), nn.SELU(), nn.Tanh(), nn.Sigmoid(), nn.Softsign(), nn.Tanhshrink(), nn.Hardswish(), nn.Hardsigmoid(),
    nn.Hardtanh(), nn.ReLU6(), nn.Softshrink(), nn.Hardshrink(), nn.LeakyReLU(),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_of_large_arguments_are_torchs(dtype):
    """Outputs and derivatives of all activations at arguments where ``exp`` overflows."""
    sizes = [30.0, 60.0, 88.0, 89.0, 100.0, 700.0, 709.0, 710.0, 1e4]
    x = torch.tensor([s * v for v in sizes for s in (1, -1)], dtype=dtype).unsqueeze(1)
    model = Each(SMOOTH)
    program = to_program(model, (x,))
    y, (jacobian,) = executor.jacobian(program, bind(program, model), (x,))
    want_y, (want,) = oracle.jacobian(model, x)
    for k, act in enumerate(SMOOTH):
        torch.testing.assert_close(y[:, k].double(), want_y[:, k], rtol=2e-6, atol=1e-12, msg=f"{act} {dtype}")
        torch.testing.assert_close(
            jacobian[:, k].double(), want[:, k], rtol=1e-4, atol=1e-6, msg=f"slope, {act} {dtype}"
        )


class Each(nn.Module):
    """All activations of one number, side by side."""

    def __init__(self, activations):
        super().__init__()
        self.activations = nn.ModuleList(activations)

    def forward(self, x):
        return torch.cat([act(x) for act in self.activations], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [f for f in FUNCTIONS if f not in (*RECTIFYING, "negative_part", "affine")])
def test_every_function_at_the_largest_and_smallest_numbers_is_torchs(name, dtype):
    """Values and derivatives at NaN, at both infinities and at both zeros are those of torch's vector loops.

    Not GELU at +Inf in float, which torch makes NaN.
    """
    params = {"power": [(0.5,), (-0.5,), (1.5,), (3.0,), (-1.0,)]}.get(name, [ARGUMENTS.get(name, ())])
    ends = [math.nan, -math.inf, 0.0, -0.0] + [math.inf] * ((name, dtype) != ("gelu", torch.float32))
    for given in params:
        step = Step(Scale(name, tuple(map(float, given))), (0,), (64,))
        program = Program(((64,),), (step,), 1)
        x = torch.tensor(ends, dtype=dtype).unsqueeze(1).repeat(1, 64)
        rows = [z.clone().requires_grad_() for z in x]
        y = [ORIGINALS[name](z, *given) for z in rows]
        slopes = [torch.autograd.grad(v.sum(), z)[0][0] for v, z in zip(y, rows, strict=True)]
        want = torch.stack([torch.stack([v[0].detach() for v in y]), torch.stack(slopes)])
        for engine in (executor, reference):
            values, (jacobian,) = engine.jacobian(program, {}, (x,))
            got = torch.stack([values[:, 0], jacobian[:, 0, 0]])
            torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-6, atol=1e-30, msg=f"{engine} {given}")


class Square(nn.Module):
    def forward(self, x):
        return x.square()


def test_nan_sample_changes_no_other_sample_of_any_case():
    """No crash, and the other samples as they were, in every network with a kernel."""
    for name in (
        "lenet5",
        "residual",
        "elu",
        "softmax",
        "log_softmax",
        "maxpool2d_overlap",
        "conv1d_groups",
        "avgpool2d",
    ):
        model, (x,) = CASES[name].build(dtype=torch.float64), CASES[name].inputs(5, dtype=torch.float64)
        clean = gradkern.jacobian(model, x, engine="kernel")
        x[1] = math.nan
        found = gradkern.jacobian(model, x, engine="kernel")
        others = torch.arange(5) != 1
        assert torch.equal(found[others], clean[others]), name
