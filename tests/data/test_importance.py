"""`gradkern.importance` finds the features that were put into the data, and says how sure it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.data import merge, run
from gradkern.data.ranking import _average_ranks, _quantiles, _spearman, of_results
from gradkern.data.ranking import curve as curve_of
from tests.cases import CASES
from tests.support.stores import assert_same

PLANTED = (7, 21)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor]:
    """A network whose two classes hang on two features only; the first weighs more."""
    torch.manual_seed(0)
    x = torch.randn(600, 1, 30)
    y = (2 * x[:, 0, PLANTED[0]] + x[:, 0, PLANTED[1]] > 0).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x


def test_planted_features_come_first_with_intervals_and_curves(trained):
    model, x = trained
    found = gradkern.importance(model, x)
    assert [row[:2] for row in found.top(2)] == [[(0, 7), (0, 21)]] * 2
    assert np.flatnonzero(found.select(2).ravel()).tolist() == list(PLANTED)
    assert ((found.low <= found.scores) & (found.scores <= found.high)).mean() > 0.95
    assert (found.low[:, 0, 7] > found.high[:, 0, 3]).all()
    assert (found.agreement > 0.9).all()
    assert found.counts.tolist() == [600, 600]
    expected = gradkern.jacobian(model, x).double().abs().mean(0) * x.double().std(0, unbiased=False)
    np.testing.assert_allclose(found.scores, expected.numpy(), rtol=1e-5)
    curve = found.curve
    assert curve.deletion[0] == curve.insertion[-1] == 1.0
    assert curve.gain[0] > 0.1
    assert curve.gain[1] > 0.1
    assert "features 7, 21" in str(found)


def test_intervals_cover_as_they_say(trained):
    """The bootstrap's spread against the spread of the score over independent data sets of the same kind."""
    model, _ = trained
    generator = torch.Generator().manual_seed(1)
    runs = [
        gradkern.importance(model, torch.randn(600, 1, 30, generator=generator), curve_samples=0) for _ in range(12)
    ]
    truth = np.mean([r.scores for r in runs], axis=0)
    covered = np.mean([(r.low <= truth) & (truth <= r.high) for r in runs])
    assert 0.85 < covered <= 1.0


def test_a_worthless_ranking_gains_nothing(trained):
    model, x = trained
    source = gradkern.data.open_source(x)
    worst = np.stack([np.r_[[i for i in range(30) if i not in PLANTED], PLANTED]] * 2)
    curve = curve_of(model, source, worst, np.zeros((1, 30)), 200)
    assert curve.gain[0] < 0
    assert curve.gain[1] < 0


def test_a_single_output_is_measured_by_r_squared():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).eval()
    found = gradkern.importance(model, torch.randn(100, 12))
    assert found.curve.measure == "R²"
    assert found.curve.insertion[-1] == pytest.approx(1.0)
    assert found.scores.shape == (1, 12)


def test_a_kept_run_resumes_and_is_read_again(trained, tmp_path):
    model, x = trained
    first = gradkern.importance(model, x, tmp_path / "i.zarr", chunk=64)
    again = gradkern.importance(model, x, tmp_path / "i.zarr")
    np.testing.assert_array_equal(first.low, again.low)
    with pytest.raises(ValueError, match="without the reduction 'importance'"):
        of_results(run(model, x, tmp_path / "b.zarr"))


def test_two_inputs_and_few_samples(tmp_path):
    case = next(c for c in CASES.values() if len(c.shapes) == 2 and c.traceable and not c.opaque)
    with pytest.raises(ValueError, match="2 floating inputs, expected one"):
        gradkern.importance(case.build(), case.inputs(4))
    few = gradkern.importance(nn.Linear(4, 2).eval(), torch.randn(3, 4))
    assert np.isfinite(few.low).all()
    with pytest.raises(ValueError, match="expected 1 … 4"):
        few.select(5)
    with pytest.raises(ValueError, match="level=2"):
        gradkern.importance(nn.Linear(4, 2).eval(), torch.randn(3, 4), level=2)


def test_rank_correlation_with_ties():
    scipy = pytest.importorskip("scipy.stats")
    a, b = np.array([3.0, 1, 1, 2, 5, 5, 5]), np.array([1.0, 0, 2, 2, 9, 4, 4])
    assert _spearman(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic)
    assert _average_ranks(np.array([2.0, 1, 2])).tolist() == [1.5, 0, 1.5]
    assert np.isnan(_spearman(np.ones(3), a[:3]))


@pytest.mark.parametrize("kernel", [True, False])
def test_float64_samples_and_maps_are_left_as_they_are(tmp_path, monkeypatch, kernel):
    """Statistics are taken in float64, but never in the memory of the samples or of the maps to be stored."""
    if not kernel:
        monkeypatch.setattr("gradkern.runtime.ops.accumulate", lambda *given: False)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x = torch.randn(40, 4, dtype=torch.float64)
    before, jacobian = x.clone(), gradkern.jacobian(model, x)
    results = run(model, x, tmp_path / "a.zarr", "jacobian", reductions=["mean_abs", "importance"], dtype="float64")
    assert torch.equal(x, before)
    np.testing.assert_allclose(results.array("attributions")[...], jacobian.numpy(), rtol=1e-12, atol=1e-12)


class Bent(nn.Module):
    """Attributions and inputs with offsets of a billion times their spread."""

    def forward(self, x):
        z = x - 1e9
        return torch.stack([1e9 * z.sum(1) + z.sin().sum(1), z.square().sum(1)], dim=1)


@pytest.mark.parametrize("own", [False, True])
def test_large_offsets_cost_no_digits_in_shards_and_resumes(tmp_path, own):
    """Not those of features (the time in seconds, say), nor of attributions; also with targets of each sample's own."""
    x = 1e9 + torch.randn(90, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:4], x[50] = 0.0, 7.0  # neither the first samples nor outliers decide what is near
    targets = (torch.arange(90) % 2)[:, None] if own else None
    given = {"targets": targets, "reductions": ["variance", "importance", "mean"], "dtype": "float64", "chunk": 7}
    whole = run(Bent().eval(), x, tmp_path / "whole.zarr", "jacobian", engine="kernel", **given)
    maps = whole.maps(0, 90)
    of_class = [maps[targets[:, 0] == c, 0] if own else maps[:, c] for c in range(2)]
    expected = np.stack([m.numpy().astype(np.longdouble).var(0) for m in of_class]).astype(float)
    np.testing.assert_allclose(whole.reduction("variance"), expected, rtol=1e-6)
    means = np.stack([m.abs().mean(0).numpy() for m in of_class])
    spread = x.numpy().astype(np.longdouble).std(0).astype(float)
    np.testing.assert_allclose(whole.reduction("importance"), means * spread, rtol=1e-6)
    parts = [tmp_path / f"{i}.zarr" for i in range(3)]
    for i, part in enumerate(parts):
        run(Bent().eval(), x, part, "jacobian", shard=(i, 4), **given)
    run(Bent().eval(), x, parts[1], "jacobian", shard=(3, 4), **given)
    merge(parts[1], [parts[2], parts[0]])
    assert_same(parts[1], whole.place)


@pytest.mark.parametrize("targets", [None, [2, 0, 1]])
def test_outputs_in_parts_are_the_outputs_together(monkeypatch, targets):
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval(), torch.randn(50, 6)
    whole = gradkern.importance(model, x, targets=targets)
    monkeypatch.setattr("gradkern.data.ranking.PART_BYTES", 1)
    monkeypatch.setattr("gradkern.data.ranking.TRACK_BYTES", 6 * 8 * 7)
    monkeypatch.setattr("gradkern.data.ranking.BLOCK", 4)
    parts = gradkern.importance(model, x, targets=targets)
    for name in ("scores", "low", "high", "agreement", "counts", "means"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-9, err_msg=name)
    assert parts.top(6) == whole.top(6)
    np.testing.assert_allclose(parts.curve.random_deletion, whole.curve.random_deletion)
    np.testing.assert_allclose(parts.curve.deletion, whole.curve.deletion)


@pytest.mark.parametrize("draws", [2, 7, 200])
def test_quantiles_are_those_of_numpy(draws):
    values = np.random.default_rng(0).standard_normal((draws, 9))
    values[0, 3] = np.nan
    shares = (0.025, 0.5, 0.975, 1.0)
    np.testing.assert_allclose(_quantiles(values, shares), np.quantile(values, shares, axis=0), rtol=1e-12)


def test_large_records_are_joined_from_the_store(tmp_path, monkeypatch):
    """Records with many statistics are not kept in memory, and the result is the same."""
    model, x = nn.Sequential(nn.Linear(6, 3)).eval(), torch.randn(50, 6)
    given = {"method": "jacobian", "reductions": ["importance", "mean_abs"], "chunk": 4}
    run(model, x, tmp_path / "a.zarr", **given)
    monkeypatch.setattr("gradkern.data.store.ledger.KEPT_BYTES", 0)
    run(model, x, tmp_path / "b.zarr", **given, shard=(0, 2))
    assert_same(tmp_path / "a.zarr", run(model, x, tmp_path / "b.zarr", **given).place)
