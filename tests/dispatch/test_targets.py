"""Reading of ``targets``: every form against plain indexing of the full Jacobian, and every error."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.dispatch.targets import TopSeeds, resolve
from gradkern.util.options import BadType, BadValue
from tests.cases import CASES

pytestmark = pytest.mark.real_export
N, C = 4, 3
CPU = torch.device("cpu")
ENGINES = ("autograd", "kernel")


@pytest.fixture(scope="module")
def flat_case():
    """A network with 3 outputs, 4 samples, and its full Jacobian ``[4, 3, *in]``."""
    case = CASES["relu_inplace"]
    model, (x,) = case.build(dtype=torch.float64), case.inputs(N, dtype=torch.float64)
    full = gradkern.jacobian(model, x, engine="autograd")
    assert full.shape == (N, C, *x.shape[1:])
    return model, x, full


@pytest.fixture(scope="module")
def deep_case():
    """A network with outputs ``[N, 4, 4]``, and its full Jacobian ``[N, 4, 3, *in]``."""
    case = CASES["softmax_axis"]
    model, (x,) = case.build(dtype=torch.float64), case.inputs(N, dtype=torch.float64)
    full = gradkern.jacobian(model, x, engine="autograd")
    assert full.shape == (N, 4, 4, *x.shape[1:])
    return model, x, full


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        (None, [0, 1, 2]),
        (1, [1]),
        (-1, [2]),
        (np.int64(2), [2]),
        (torch.tensor(1), [1]),
        ((2,), [2]),
        ([2, 0], [2, 0]),
        ([-1, 0], [2, 0]),
        ([np.int32(1), torch.tensor(0)], [1, 0]),
        (range(2), [0, 1]),
        (np.array(1), [1]),
        (np.array([[0, 1], [0, 1], [0, 1], [0, 1]], dtype=np.uint16), [0, 1]),
        ([(1,), (0,)], [1, 0]),
    ],
)
def test_same_outputs_for_all_samples(flat_case, targets, classes, engine):
    model, x, full = flat_case
    same(gradkern.jacobian(model, x, targets, engine=engine), full[:, classes])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["tensor", "lists", "numpy"])
def test_outputs_of_each_sample(flat_case, form, engine):
    model, x, full = flat_case
    rows = [[0, -1], [1, 1], [2, 0], [-3, 1]]
    targets = {"tensor": torch.tensor(rows), "lists": rows, "numpy": np.array(rows)}[form]
    want = torch.stack([full[n, rows[n]] for n in range(N)])
    same(gradkern.jacobian(model, x, targets, engine=engine), want)


@pytest.mark.parametrize("engine", ENGINES)
def test_targets_of_outputs_with_several_axes(deep_case, engine):
    model, x, full = deep_case
    same(gradkern.jacobian(model, x, None, engine=engine), full)
    same(gradkern.jacobian(model, x, (1, 2), engine=engine), full[:, 1:2, 2])
    same(gradkern.jacobian(model, x, (-1, -3), engine=engine), full[:, 3:4, 1])
    pairs = [(0, 0), (3, 2), (-2, 1)]
    want = torch.stack([full[:, a, b] for a, b in pairs], dim=1)
    same(gradkern.jacobian(model, x, pairs, engine=engine), want)
    index = torch.tensor([[[0, 1]], [[3, 2]], [[2, 0]], [[1, -1]]])  # [N, S = 1, axes]
    want = torch.stack([full[n, int(a), int(b)][None] for n, (a, b) in enumerate(index[:, 0])])
    same(gradkern.jacobian(model, x, index, engine=engine), want)


@pytest.mark.parametrize("engine", ENGINES)
def test_topk(flat_case, engine):
    model, x, full = flat_case
    jac, index = gradkern.jacobian(model, x, gradkern.TopK(np.int64(2)), engine=engine)
    assert index.dtype == torch.int64
    assert torch.equal(index, model(x).topk(2, dim=1).indices)
    same(jac, torch.stack([full[n, index[n]] for n in range(N)]))


@pytest.mark.parametrize("engine", ENGINES)
def test_topk_with_several_axes(deep_case, engine):
    model, x, full = deep_case
    jac, index = gradkern.jacobian(model, x, gradkern.TopK(3), engine=engine)
    assert index.shape == (N, 3, 2)
    order = model(x).flatten(1).topk(3, dim=1).indices
    assert torch.equal(index[..., 0] * 4 + index[..., 1], order)
    same(jac, torch.stack([full[n].flatten(0, 1)[order[n]] for n in range(N)]))
    same(gradkern.jacobian(model, x, index, engine=engine), jac)  # what comes out goes in


def test_topk_is_chosen_chunk_by_chunk(flat_case):
    model, x, _ = flat_case
    many = x.repeat(60, *[1] * (x.dim() - 1))
    with gradkern.use("autograd", memory_budget=20_000):
        jac, index = gradkern.jacobian(model, many, gradkern.TopK(1))
    want, order = gradkern.jacobian(model, x, gradkern.TopK(1), engine="autograd")
    assert torch.equal(index, order.repeat(60, 1))
    same(jac, want.repeat(60, *[1] * (want.dim() - 1)))


def test_targets_of_one_number_per_sample():
    case = CASES["scalar_output"]
    model, (x,) = case.build(dtype=torch.float64), case.inputs(N, dtype=torch.float64)
    assert model(x).shape == (N,)
    for engine in ENGINES:
        assert gradkern.jacobian(model, x, engine=engine).shape == x.shape
        with pytest.raises(BadValue, match="one number per sample"):
            gradkern.jacobian(model, x, 0, engine=engine)


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        (3, BadValue, "index 3, expected -3 … 2"),
        (-4, BadValue, "index -4"),
        ([0, 7], BadValue, "index 7"),
        (torch.tensor([[0], [1], [5], [0]]), BadValue, "index 5"),
        (torch.zeros(5, 1, dtype=torch.long), BadValue, r"\[5, 1\].*for 4 samples"),
        ([[0], [1]], BadValue, "2 lists, expected one for each of the 4"),
        ([[0], [1, 2], [0], [0]], BadValue, "different lengths"),
        (torch.zeros(4, 1, 1, dtype=torch.long), BadValue, r"expected \[N, S\]"),
        ([0, 0], BadValue, "output 0 more than once"),
        ([2, -1], BadValue, "output 2 more than once"),
        ([0, 1, 2, 0], BadValue, r"more than once.*\[:, None\]"),  # as long as the batch: labels
        (
            torch.eye(4, 3, dtype=torch.long) + torch.tensor([[0], [0], [0], [1]]) * torch.tensor([1, 0, 0]),
            BadValue,
            "one-hot labels.*argmax",
        ),
        ([2**80], BadValue, "expected -3"),
        (np.array([[2**64 - 1]] * 4, dtype=np.uint64), BadValue, "expected -3"),
        (np.array([["a"]] * 4), BadType, "array of <U1"),
        (np.array([[True]] * 4), BadType, "array of bool"),
        ([], BadValue, "empty list"),
        (torch.zeros(0, dtype=torch.long), BadValue, "empty tensor"),
        ((0, 1), BadValue, "expected 1 indices"),
        (1.0, BadType, "float"),
        (True, BadType, "bool"),
        ("1", BadType, "str"),
        ([0, 1.5], BadType, "float"),
        (torch.tensor([0.0]), BadType, "float32"),
        (torch.tensor([True]), BadType, "bool"),
        (gradkern.TopK(4), BadValue, "3 outputs"),
    ],
)
def test_bad_targets(targets, error, words):
    with pytest.raises(error, match=words):
        resolve(targets, N, (C,))


class Column:
    """Something like a pandas Series."""

    def __init__(self, count: int) -> None:
        self.values = np.arange(count)

    def __array__(self, dtype=None, copy=None):
        return self.values


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("samples", [1, 2, N, 7])
@pytest.mark.parametrize("make", [torch.arange, np.arange, lambda n: torch.arange(n, dtype=torch.uint8), Column])
@pytest.mark.parametrize("out", [(7,), (7, 2)])
def test_one_axis_of_indices_is_refused_for_every_length(make, samples, count, out):
    with pytest.raises(BadValue, match=r"targets\.tolist\(\).*(\[N, 1\].*\[:, None\]|\[N, S, axes\])"):
        resolve(make(count), samples, out)


def test_a_list_of_tuples_that_repeats_an_output():
    with pytest.raises(BadValue, match=r"output \(1, 2\) more than once"):
        resolve([(1, 2), (0, 0), (-3, -1)], N, (4, 3))


def test_indices_of_two_classes_are_no_one_hot_labels():
    """What `TopK(2)` returns for two outputs is a permutation of them in every sample."""
    index = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]])
    assert torch.equal(resolve(index, N, (2,)).indices, index)


@pytest.mark.parametrize("targets", [1, [0, 1], torch.zeros(4, 1, dtype=torch.long), (1,), (1, 3)])
def test_bad_targets_for_several_axes(targets):
    with pytest.raises(BadValue, match=r"2 indices|expected -3"):
        resolve(targets, N, (4, 3))


@pytest.mark.parametrize("k", [0, -1, 1.5, True, None])
def test_bad_k(k):
    with pytest.raises(BadValue, match="TopK"):
        gradkern.TopK(k)


def test_errors_reach_the_caller(flat_case):
    model, x, _ = flat_case
    for engine in ENGINES:
        with pytest.raises(ValueError, match="index 3"):
            gradkern.jacobian(model, x, 3, engine=engine)
        with pytest.raises(TypeError, match="float"):
            gradkern.jacobian(model, x, 0.5, engine=engine)


def test_seeds_are_per_chunk():
    seeds = resolve(torch.arange(8).view(4, 2) % 3, 4, (3,))
    assert seeds.part(1, 3).targets(3, CPU).tolist() == [[2, 0], [1, 2]]
    assert seeds.part(1, 3).part(1, 2).targets(3, CPU).tolist() == [[1, 2]]
    assert seeds.part(1, 3).repeat(2).targets(3, CPU).tolist() == [[2, 0], [1, 2], [2, 0], [1, 2]]
    assert seeds.part(1, 3).repeat_interleave(2).targets(3, CPU).tolist() == [[2, 0], [2, 0], [1, 2], [1, 2]]
    shared = resolve([2, 0], 4, (3,))
    assert shared.part(1, 3).repeat(2).repeat_interleave(2) is shared
    assert not shared.per_sample
    assert resolve(None, 4, (3,)).targets(3, CPU).tolist() == [0, 1, 2]
    top = resolve(gradkern.TopK(1), 4, (3,))
    assert isinstance(top, TopSeeds)
    known = top.chosen_by(torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 2.0, 4.0], [0.0, 1.0, 0.0]]))
    assert known.indices_per_sample().tolist() == [[1], [0], [2], [1]]
    assert known.part(1, 3).indices_per_sample().tolist() == [[0], [2]]
    assert top.indices is None  # a value: nothing was filled in


def test_a_list_as_long_as_the_batch_is_noted_once() -> None:
    """Captum would read it as one target per sample."""
    net = nn.Sequential(nn.Linear(4, 5)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradkern.jacobian(net, torch.randn(3, 4), [0, 4])
        gradkern.jacobian(net, torch.randn(1, 4), [2])
        gradkern.jacobian(net, torch.randn(3, 4), [[0], [4], [1]])
    with pytest.warns(
        gradkern.GradkernWarning, match=r"3 outputs is differentiated for each of the 3 samples.*\[N, 1\]"
    ):
        assert gradkern.jacobian(net, torch.randn(3, 4), [2, 0, 4]).shape == (3, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(gradkern.iter_jacobian(net, torch.randn(3, 4), [2, 0, 4]))
