"""The drop-ins against tangermeme itself, where it is installed (the extra ``genomics``)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

shap = pytest.importorskip("tangermeme.deep_lift_shap")
stock_pisa = pytest.importorskip("tangermeme.pisa")

from gradkern.integrations.tangermeme import deep_lift_shap, pisa  # noqa: E402

PAIRS = [(deep_lift_shap, shap.deep_lift_shap), (pisa, stock_pisa.pisa)]


def make(*tail: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    trunk = nn.Conv1d(4, 6, 5, padding=2), nn.Tanh(), nn.MaxPool1d(2), nn.Conv1d(6, 3, 3), nn.ReLU()
    return nn.Sequential(*trunk, nn.Flatten(), nn.Linear(24, 3), *tail).double().train()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return make()


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return nn.functional.one_hot(torch.randint(4, (3, 20), generator=generator), 4).mT.double()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(
    "options",
    [{}, {"hypothetical": True}, {"raw_outputs": True, "batch_size": 2}],
    ids=["plain", "hypothetical", "raw"],
)
def test_results_are_tangermemes(ours: Any, theirs: Any, options: dict[str, Any], net: nn.Module, x: Tensor) -> None:
    options = options | {"random_state": 3, "n_shuffles": 4, "return_references": True}
    got, want = ours(net, x, **options), theirs(net, x, **options)
    torch.testing.assert_close(got.attributions, want.attributions)
    assert torch.equal(got.references, want.references)
    assert net.training


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_errors_are_tangermemes(ours: Any, theirs: Any, net: nn.Module, x: Tensor) -> None:
    deep = nn.Sequential(nn.Conv1d(4, 2, 3)).double()
    for model, bad, options in (
        (net, x * 2, {}),
        (net, x[:0], {}),
        (net, x, {"references": x}),
        (deep, x, {}),
        (net, x[..., :10], {}),
    ):
        with pytest.raises(Exception) as theirs_raised:
            theirs(model, bad, **options)
        with pytest.raises(theirs_raised.type):
            ours(model, bad, **options)
    assert net.training


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_own_rules_run_in_tangermeme_by_name(ours: Any, theirs: Any, x: Tensor) -> None:
    class Cube(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return y**3

    def own(module: Any, grad_input: Any, grad_output: Any) -> Any:
        return shap._nonlinear(module, grad_input, grad_output)

    net, options = make(Cube()), {"random_state": 0, "n_shuffles": 2}
    want = theirs(net, x, additional_nonlinear_ops={Cube: own}, **options)
    with pytest.warns(RuntimeWarning, match="additional_nonlinear_ops: Cube"):
        assert torch.equal(ours(net, x, additional_nonlinear_ops={Cube: own}, **options), want)
    torch.testing.assert_close(ours(net, x, additional_nonlinear_ops={Cube: shap._nonlinear}, **options), want)
    torch.testing.assert_close(ours(net, x, **options), want)  # gradkern's rules hold for any operation


class Total(nn.Module):
    def forward(self, x: Tensor, _: Any = None) -> Tensor:
        return x.sum((1, 2))[:, None]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("rows", [1, 2])
def test_an_argument_of_too_few_rows_is_an_index_error(ours: Any, theirs: Any, rows: int, x: Tensor) -> None:
    for call in (ours, theirs):
        with pytest.raises(IndexError):
            call(Total(), x, args=(torch.zeros(rows, 1),), n_shuffles=2)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_deltas_of_large_sums_are_the_models_own(ours: Any, theirs: Any) -> None:
    torch.manual_seed(3)  # the engine's own deltas are 1.6 times these
    model = nn.Sequential(nn.Conv1d(4, 8, 5), nn.ReLU(), Total())
    x, refs = (nn.functional.one_hot(torch.randint(4, (*s, 100)), 4).mT.float() for s in ((16,), (16, 20)))
    want = theirs(model, x, references=refs, raw_outputs=True).view_as(refs)
    with torch.no_grad():
        change = model(x) - model(refs.flatten(0, 1)).view(16, 20)
    limit = 1.25 * float(((want * (x[:, None] - refs)).sum((2, 3)) - change).abs().max())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ours(model, x, references=refs, warning_threshold=limit)
    with pytest.warns(RuntimeWarning, match="Convergence deltas too high"):
        ours(model, x[:2], references=refs[:2], warning_threshold=limit * 1e-5)
