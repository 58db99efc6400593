"""Bad input: the right result, or an error that says what was got, what was expected and what to do."""

from __future__ import annotations

import collections
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.dispatch.checks import explain_failure
from tests.cases import CASES

ENGINES = ("auto", "autograd", "kernel")
pytestmark = [pytest.mark.real_export, pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")]


class Returns(nn.Module):
    """Applies a function to its input; for models with a bad output."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


@pytest.fixture(params=ENGINES)
def engine(request):
    with gradkern.use(request.param):
        yield request.param


def net(n=4, dtype=torch.float32):
    case = CASES["relu_inplace"]
    return case.build(dtype=dtype), case.inputs(n, dtype=dtype)[0]


def test_wrong_dtype(engine):
    model, x = net()
    with pytest.raises(TypeError, match=r"inputs: number 0 has torch.float64, the model torch.float32.*\.to\(dtype\)"):
        gradkern.jacobian(model, x.double())
    gradkern.jacobian(model, x)
    with pytest.raises(TypeError, match=r"torch\.float16"):
        gradkern.jacobian(model, x.half())


def test_a_model_that_converts_its_input_may_get_any_dtype(engine):
    model, x = net()
    want = gradkern.jacobian(model, x)
    got = gradkern.jacobian(Returns(lambda t: model(t.float())), x.double())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want)


def test_integer_and_complex_inputs(engine):
    model, x = net()
    for wrong in (x.long(), x.to(torch.uint8), x > 0, x.to(torch.complex64)):
        with pytest.raises(TypeError, match=f"{wrong.dtype}, expected a floating dtype"):
            gradkern.jacobian(model, wrong)


def test_wrong_device(engine):
    model, x = net()
    with pytest.raises(ValueError, match="meta device"):
        gradkern.jacobian(net()[0].to("meta"), x)
    with pytest.raises(ValueError, match=r"number 0 is on the meta device"):
        gradkern.jacobian(model, x.to("meta"))


def test_a_failure_is_explained_by_devices_and_dtypes():
    model, x = net()
    failure = RuntimeError("the model's own words")
    found = explain_failure(failure, model, (x.to("meta"),))
    assert isinstance(found, ValueError)
    assert "number 0 is on meta, the model on cpu. Move one of them" in str(found)
    assert "the model's own words" in str(found)
    assert isinstance(explain_failure(failure, model, (x.double(),)), TypeError)
    assert explain_failure(failure, model, (x,)) is failure
    assert explain_failure(failure, None, (x.double(),)) is failure
    (note,) = failure.__notes__
    assert f"called the model with {list(x.shape)}" in note and "x.unsqueeze(0)" in note and "(a, b)" in note


def test_a_model_made_under_inference_mode(engine):
    with torch.inference_mode():
        model, _ = net()
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        gradkern.jacobian(model, net()[1])


def test_empty_batch(engine):
    model, x = net()
    assert gradkern.jacobian(model, x[:0]).shape == (0, 3, *x.shape[1:])
    assert list(gradkern.iter_jacobian(model, x[:0])) == []
    with pytest.raises(ValueError, match="index 3"):
        gradkern.jacobian(model, x[:0], 3)
    trained = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    state = torch.get_rng_state()
    assert gradkern.jacobian(trained, torch.empty(0, 3)).shape == (0, 4, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert trained[1].num_batches_tracked == 0


def test_wrong_kinds_of_inputs(engine):
    model, x = net()
    for wrong, words in (
        (x.numpy(), r"numpy array.*torch.from_numpy"),
        (None, "NoneType"),
        ({"x": x}, "dict.*Pass a function"),
        ((x, None), "number 1 is NoneType"),
        (x.to_sparse(), "to_dense"),
    ):
        with pytest.raises(TypeError, match=words):
            gradkern.jacobian(model, wrong)
    for wrong, words in (
        ((), "empty tuple"),
        (torch.tensor(1.0), r"no axes.*unsqueeze"),
        ((x, x[:2]), "number 1 has 2 samples and number 0 has 4"),
    ):
        with pytest.raises(ValueError, match=words):
            gradkern.jacobian(model, wrong)


def test_wrong_kinds_of_models(engine):
    _, x = net()
    with pytest.raises(TypeError, match="model: got int"):
        gradkern.jacobian(3, x)
    with pytest.raises(TypeError, match="model: got str"):
        gradkern.prepare("model", x)


Pair = collections.namedtuple("Pair", "logits features")


@pytest.mark.parametrize(
    ("fn", "error", "words"),
    [
        (lambda x: (x, x), TypeError, "returned tuple.*Wrap"),
        (lambda x: {"logits": x}, TypeError, "returned dict"),
        (lambda x: Pair(x, x), TypeError, "returned Pair"),
        (lambda x: None, TypeError, "returned NoneType"),
        (lambda x: 1.0, TypeError, "returned float"),
        (lambda x: x.flatten(1).argmax(1), TypeError, "torch.int64"),
        (lambda x: x.sum(), ValueError, r"shape \[\] for \d samples"),
        (lambda x: x.flatten(), ValueError, r"expected \[N, ...\] with N.*unsqueeze"),
        (lambda x: x.flatten(1).t(), ValueError, "one row of outputs per sample"),
        (lambda x: x.detach().flatten(1) * 2, ValueError, "cut off"),
    ],
)
def test_bad_outputs(engine, fn, error, words):
    _, x = net()
    with pytest.raises(error, match=words):
        gradkern.jacobian(Returns(fn), x)


def test_a_no_grad_inside_the_model_is_an_error(engine):
    model, x = net()
    with pytest.raises(ValueError, match="no_grad"):
        gradkern.jacobian(Returns(torch.no_grad()(model.forward)), x)


def test_shapes_that_do_not_fit_raise_the_models_own_error(engine):
    model, _ = net()
    with pytest.raises(RuntimeError):
        gradkern.jacobian(model, torch.randn(4, 5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_propagate_as_in_torch(engine, value):
    """Exactly the entries that are NaN in torch are NaN here, and the other samples are untouched."""
    for name in ("relu_inplace", "maxpool1d", "tanh", "bn_after_conv"):
        case = CASES[name]
        model, (x,) = case.build(dtype=torch.float64), case.inputs(4, dtype=torch.float64)
        x.view(4, -1)[1, 3] = value
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        want = torch.stack([torch.autograd.grad(c.sum(), leaf, retain_graph=True)[0] for c in y.unbind(1)], dim=1)
        got = gradkern.jacobian(model, x)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_non_finite_weights_give_torchs_jacobian_on_every_engine(engine):
    model, x = net(dtype=torch.float64)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.inf
    want = gradkern.jacobian(model, x, engine="autograd")
    torch.testing.assert_close(gradkern.jacobian(model, x), want, equal_nan=True)


def test_inputs_that_are_all_nan_give_torchs_jacobian(engine):
    model, x = net(dtype=torch.float64)
    broken = torch.full_like(x, torch.nan)
    want = gradkern.jacobian(model, broken, engine="autograd")
    torch.testing.assert_close(gradkern.jacobian(model, broken), want, equal_nan=True)


def test_read_only_inputs(engine, tmp_path):
    model, x = net()
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a tensor that is not writable
        tensor = torch.from_numpy(mapped)
    torch.testing.assert_close(gradkern.jacobian(model, tensor), gradkern.jacobian(model, x))


def test_a_model_without_parameters(engine):
    x = torch.randn(3, 4)
    got = gradkern.jacobian(nn.ReLU(), x)
    torch.testing.assert_close(got, torch.diag_embed((x > 0).float()))


def test_inputs_without_features(engine):
    x = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(gradkern.jacobian(nn.Tanh(), x), 1 - torch.tanh(x) ** 2)
