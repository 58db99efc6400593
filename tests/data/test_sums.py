"""Runs that store statistics alone: kernels add the maps to them and keep none.  The bits are those of other runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.data import methods, run
from gradkern.runtime import ops, whole_chain
from gradkern.runtime.whole_network import whole_network
from tests.support import capturing

REDUCTIONS = ["mean_abs", "mean", "max_abs", "importance"]


def problem() -> tuple[nn.Module, torch.Tensor]:
    """Rows of 3 × 37 numbers, which fill no whole number of vectors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 8, 5), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(128, 4)).eval()
    return net, torch.randn(150, 3, 37)


def stored(place, net, x, monkeypatch=None, **options):
    """All statistics of a run, and how often kernels took sums; with ``monkeypatch``, maps are computed first."""
    calls, plain = [], ops.chain_statistics

    def counted(*arguments):
        calls.append(1)
        plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "chain_statistics", counted)
        if monkeypatch:
            patch.setattr(methods, "add_to_sums", lambda *arguments: None)
        given = {"reductions": REDUCTIONS, "chunk": 64, "engine": "kernel"} | options
        results = run(net, x, place, maps=False, progress=False, **given)
    return {name: results.reduction(name) for name in results.about["reductions"]}, results, len(calls)


def same(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("method", ["saliency", "jacobian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits_as_by_way_of_maps(tmp_path, monkeypatch, method, dtype) -> None:
    net, x = problem()
    net, x = net.to(dtype), x.to(dtype)
    monkeypatch.setattr(whole_chain, "HOT_BYTES", 16 * 4 * 111 * 4)  # pieces of 16 samples or 8, and a rest
    sums, results, calls = stored(tmp_path / "a.zarr", net, x, method=method)
    assert calls == 4  # the probe and three chunks
    by_maps, others, none = stored(tmp_path / "b.zarr", net, x, monkeypatch, method=method)
    assert none == 0
    same(sums, by_maps)
    assert torch.equal(results.maps(0, 150, "predictions"), others.maps(0, 150, "predictions"))
    shared, _, _ = stored(tmp_path / "c.zarr", net, x, method=method, threads=2, batch=20)
    same(sums, shared)


@pytest.mark.parametrize("nonfinite", ["skip", "keep", "error"])
def test_samples_that_are_not_finite(tmp_path, monkeypatch, nonfinite) -> None:
    net, x = problem()
    x[70, 1, 3], x[149, 0, 0], x[3] = float("nan"), float("inf"), 3e38
    options = {"nonfinite": nonfinite, "reductions": REDUCTIONS[:3]}
    if nonfinite == "error":
        with pytest.raises(ValueError, match=r"sample 70 are not finite"):
            stored(tmp_path / "a.zarr", net, x, **options)
        return
    sums, results, calls = stored(tmp_path / "a.zarr", net, x, **options)
    by_maps, others, _ = stored(tmp_path / "b.zarr", net, x, monkeypatch, **options)
    assert calls
    same(sums, by_maps)
    assert results.about["counts"] == others.about["counts"]


@pytest.mark.parametrize(
    "options",
    [{"reductions": ["ranks", "mean"]}, {"method": "input_x_gradient"}, {"targets": gradkern.TopK(1)},
     {"top_features": 2}, {"engine": "autograd"}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_needs_maps_makes_them(tmp_path, options) -> None:
    net, x = problem()
    assert stored(tmp_path / "a.zarr", net, x[:20], **options)[2] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(5, 4, dtype=torch.int64)}, r"targets \[5, 4\]"),
        ({"finite": torch.ones(4, dtype=torch.bool)}, r"finite must be contiguous bool \[5\], got Bool \[4\]"),
        ({"sum": torch.zeros(4, 3, 36, dtype=torch.float64)}, "sum must be contiguous Double with 444"),
        ({"group": torch.zeros(2, 4, 3, 37, dtype=torch.float64), "groups": torch.full((5,), 2)}, "group 2 of 2"),
    ],
)
def test_malformed_arguments_are_refused(change, message) -> None:
    net, x = problem()
    x, eye = x[:5], torch.arange(4)
    with torch.no_grad():
        program = capturing.to_program(net, (x,))
        params = capturing.bind(program, net)
        whole = whole_network(program, params, (x,), eye, (4,), (0,))
        packed = whole.packed(params)
    given = {"finite": torch.ones(5, dtype=torch.bool), "groups": torch.zeros(5, dtype=torch.int64)} | change
    whole.targets = given.pop("targets", eye)
    with pytest.raises(RuntimeError, match=message):
        whole.add_to(ops.Statistics(**given), packed, whole.rows(packed) if whole.targets is eye else None, [x])
