"""What would make a result wrong without a word: numbers that are not finite, per-sample arguments, dead samples, two
runs at once, a method that was edited, numbers too large or too small for the stored dtype."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.data import Busy, DiskFull, Mismatch, Outcome, Results, run
from gradkern.data import methods as data_methods
from gradkern.data.ranking import curve
from gradkern.data.runs import probe
from gradkern.data.runs.reading import SpotSamples
from gradkern.data.sources import open_source
from gradkern.data.store import locks
from gradkern.util.options import GradkernWarning
from tests.support import forks
from tests.support.stores import assert_same
from tests.support.tiny import net, samples

# ---------------------------------------------------------------------------------------------------------------
# Not finite


def damaged(where: list[int], value: float) -> torch.Tensor:
    x = samples()
    x[where, 2] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_statistics_stop_at_what_is_not_finite_and_name_it(tmp_path, value):
    given = {"method": "input_x_gradient", "reductions": ["mean_abs"], "chunk": 16}
    with pytest.raises(ValueError, match=r"sample 19 are not finite .* 2 others of the samples 16 … 31: 20, 31"):
        run(net(), damaged([19, 20, 31, 38], value), tmp_path / "a.zarr", **given)
    assert Results.open(tmp_path / "a.zarr").finished_chunks == 1, "what is finished is kept"


@pytest.mark.parametrize("reductions", [["mean_abs"], ["mean", "variance", "max_abs"], ["importance"], ["ranks"]])
def test_skipped_samples_leave_the_statistics_of_the_others(tmp_path, reductions):
    bad = [0, 19, 20, 38]
    given = {"method": "input_x_gradient", "reductions": reductions, "chunk": 7, "nonfinite": "skip"}
    with pytest.warns(GradkernWarning, match=r"4 of 40 samples .* \(samples 0, 19, 20, 38\); they are left out"):
        found = run(net(), damaged(bad, float("nan")), tmp_path / "a.zarr", **given)
    assert found.about["counts"] == {"nonfinite": 4, "nonfinite_first": bad}
    whole = run(net(), samples(), tmp_path / "b.zarr", "input_x_gradient")
    good = [i for i in range(40) if i not in bad]
    maps = whole.maps(0, 40)[good].double()
    expected = {
        "mean_abs": maps.abs().mean(0), "mean": maps.mean(0), "variance": maps.var(0, unbiased=False),
        "max_abs": maps.abs().amax(0),
        "importance": maps.abs().mean(0) * samples()[good].double().std(0, unbiased=False),
    }  # fmt: skip
    for name in reductions:
        value = found.reduction(name)
        if name == "ranks":
            assert (value.sum(-1) == len(good)).all()
        else:
            np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-6, atol=1e-9)


def test_kept_samples_are_counted(tmp_path):
    with pytest.warns(GradkernWarning, match="1 of 40 samples are not finite"):
        maps = run(net(), damaged([5], float("nan")), tmp_path / "a.zarr", "input_x_gradient")
    assert not np.isfinite(maps.array("attributions")[5]).all()
    with pytest.warns(GradkernWarning, match="they are kept"):
        run(
            net(), damaged([5], float("nan")), tmp_path / "b.zarr", "input_x_gradient", reductions=["mean"],
            nonfinite="keep",
        )  # fmt: skip


def test_importance_counts_samples_that_are_not_finite(tmp_path):
    x = damaged([7], float("nan"))
    with pytest.raises(ValueError, match="sample 7 are not finite"):
        gradkern.importance(net(), x, curve_samples=0)
    with pytest.warns(GradkernWarning):
        found = gradkern.importance(net(), x, curve_samples=0, nonfinite="skip")
    assert found.nonfinite == 1
    assert np.isfinite(found.scores).all()
    assert "1 samples are not finite" in str(found)
    ranking, mean = found.ranking, found.means
    finite = open_source(torch.cat([x[:7], x[8:]]))
    with_and_without = [curve(net(), source, ranking, mean, 40) for source in (open_source(x), finite)]
    assert len({c.gain for c in with_and_without}) == 1
    assert curve(net(), finite, ranking, mean * float("nan"), 40) is None
    found = gradkern.importance(net(), samples(4), targets=torch.tensor([[0], [2], [0], [2]]), curve_samples=0)
    assert str(found).splitlines()[1] == "output 1: no sample has it among its targets"
    with pytest.raises(ValueError, match="got one sample, expected several"):
        gradkern.importance(net(), samples(1))


def test_run_that_stopped_at_nan_continues_with_another_nonfinite_setting(tmp_path):
    given = {"method": "input_x_gradient", "reductions": ["mean_abs"], "chunk": 8}
    x = damaged([30], float("nan"))
    with pytest.raises(ValueError, match="sample 30 are not finite"):
        run(net(), x, tmp_path / "a.zarr", **given)
    with pytest.warns(GradkernWarning):
        run(net(), x, tmp_path / "a.zarr", **given, nonfinite="skip")
    with pytest.warns(GradkernWarning):
        run(net(), x, tmp_path / "b.zarr", **given, nonfinite="skip")
    assert_same(tmp_path / "a.zarr", tmp_path / "b.zarr")


@pytest.mark.parametrize(("scale", "words"), [(1e6, "too large for float16"), (1e-7, "too small for float16")])
def test_what_a_narrow_dtype_loses_is_counted_and_said(tmp_path, scale, words):
    def scaled(batch):
        return Outcome((batch.inputs[0][:, None] * scale,), batch.model(batch.inputs[0]).detach())

    data_methods.METHODS["scaled"] = scaled
    try:
        given = {"method": "scaled", "dtype": "float16", "engine": "autograd", "chunk": 16}
        with pytest.warns(GradkernWarning, match=words):
            results = run(net(), samples(), tmp_path / "a.zarr", **given)
    finally:
        del data_methods.METHODS["scaled"]
    wide = (samples().double() * scale).float()
    narrow, counts = wide.half(), results.about["counts"]
    assert counts["overflow"] == int(narrow.isinf().sum())
    assert counts["underflow"] == int((narrow == 0).sum())
    assert counts["narrowed"] == wide.numel()


# ---------------------------------------------------------------------------------------------------------------
# Arguments with a row per sample


@pytest.mark.parametrize("method", ["IntegratedGradients", "DeepLift"])
@pytest.mark.parametrize("chunk", [4, 7, 40])
def test_baselines_of_each_sample_go_with_their_samples(tmp_path, method, chunk):
    x, baselines = samples(), samples(seed=5)
    kind = getattr(gradkern.attr, method)
    for name, given in (("tensor", baselines), ("tuple", (baselines,)), ("array", baselines.double().numpy())):
        results = run(
            net(), x, tmp_path / f"{name}.zarr", method, chunk=chunk, arguments={"baselines": given}, dtype="float64"
        )
        expected = kind(net()).attribute_all(x, baselines=baselines)
        torch.testing.assert_close(results.maps(0, 40).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("baselines", "words"),
    [
        (torch.zeros(6), r"'baselines' is \[6\], expected a tensor of references"),
        ([[0.0] * 6], "'baselines' is a list, expected a tensor of references"),
        (type("Frame", (), {"__array__": None})(), "'baselines' is Frame, expected a tensor"),
    ],
)
def test_baseline_distribution_of_a_wrong_shape_is_refused_by_name(tmp_path, baselines, words):
    with pytest.raises(ValueError, match=words):
        run(net(), samples(), tmp_path / "a.zarr", "DeepLiftShap", arguments={"baselines": baselines})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"baselines": torch.zeros(8, 6)}, "'baselines' has 8 rows for 40 samples"),
        ({"baselines": (torch.zeros(8, 6),)}, "number 0 of 'baselines' has 8 rows"),
        ({"baselines": torch.zeros(40, 5)}, r"rows of shape \[5\], expected \[6\]"),
        ({"additional_forward_args": torch.zeros(40)}, r"further inputs, with source=\(x, more\)"),
        ({"baselines": [0.0] * 40}, "is a list with a value per sample"),
        ({"baselines": lambda x: x}, "got a function as baselines, but IntegratedGradients takes no references"),
    ],
)
def test_tensor_argument_of_another_length_is_refused_by_name(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        run(net(), samples(), tmp_path / "a.zarr", "IntegratedGradients", arguments=arguments, chunk=8)
    assert not (tmp_path / "a.zarr").exists()


# ---------------------------------------------------------------------------------------------------------------
# The samples that decide


class OnlyPositive(nn.Module):
    """Dead where the first feature is not positive."""

    def forward(self, x):
        return torch.relu(x[:, :1]) * x[:, 1:]


@pytest.mark.parametrize("alive", [[39], [0, 20], list(range(30, 40)), [13, 14, 15, 16, 17]])
def test_the_samples_that_decide_are_spread_and_not_dead(alive):
    x = -torch.rand(40, 6)
    x[alive, 0] = 1.0
    source = open_source(x)
    alone = SpotSamples.of(source)
    chosen = probe.choose_samples(OnlyPositive(), alone, torch.device("cpu"))
    read_and_alive = [i for i in alone.rows if i in alive]
    assert len(chosen) == 4
    assert len(set(chosen) & set(alive)) == min(4, len(read_and_alive))


def test_the_samples_that_decide_are_spread_over_a_live_source():
    chosen = probe.choose_samples(net(), SpotSamples.of(open_source(samples(400))), torch.device("cpu"))
    assert chosen[0] < 100
    assert chosen[-1] > 300


class Mixing(nn.Module):
    def forward(self, x):
        return x * x.mean(0, keepdim=True)


def test_mixed_samples_are_seen_behind_dead_ones(tmp_path):
    x = torch.zeros(40, 6)
    x[4:] = samples()[4:]
    with pytest.raises(ValueError, match="would depend on the chunk"):
        run(Mixing().eval(), x, tmp_path / "a.zarr", "jacobian")


# ---------------------------------------------------------------------------------------------------------------
# The code of a method


def test_an_edited_method_is_another_run(tmp_path, monkeypatch):
    def of(factor):
        def method(batch):
            return Outcome((batch.inputs[0][:, None] * factor,), batch.model(batch.inputs[0]).detach())

        return method

    given = {"method": "edited", "chunk": 8, "engine": "autograd"}
    monkeypatch.setitem(data_methods.METHODS, "edited", of(1))
    run(net(), samples(), tmp_path / "a.zarr", shard=(0, 2), **given)
    monkeypatch.setitem(data_methods.METHODS, "edited", of(2))
    with pytest.raises(Mismatch, match="the code of the method has changed"):
        run(net(), samples(), tmp_path / "a.zarr", **given)
    monkeypatch.setitem(data_methods.METHODS, "edited", of(1))
    assert run(net(), samples(), tmp_path / "a.zarr", **given).about["finished"]


# ---------------------------------------------------------------------------------------------------------------
# Two runs on one store, full disks, links


def test_a_second_run_is_refused_and_told_who_is_at_work_and_the_dead_hold_nothing(tmp_path):
    out, given = tmp_path / "a.zarr", {"chunk": 4, "method": "jacobian", "reductions": ["mean_abs"]}
    run(net(), samples(), out, shard=(4, 5), **given)  # chunks 8, 9
    partial = out / "attributions/c.1.0.0.0123.partial"
    partial.write_bytes(b"of a live run")
    reader, writer = os.pipe()

    def hold():
        with locks.hold(Results.open(out, read_only=False).store, range(3)):
            os.write(writer, b"held")
            time.sleep(600)

    holder = forks.start(hold)
    try:
        assert os.read(reader, 4) == b"held"
        with pytest.raises(Busy, match=rf"process {holder} on \S+ \(since \d{{4}}-.*, chunks 0 … 2\) is computing"):
            run(net(), samples(), out, **given)
        assert partial.exists()
        run(net(), samples(), out, shard=(1, 2), **given)  # the chunks 5 … 9 are free
    finally:
        os.kill(holder, signal.SIGKILL)
        forks.end(holder)
    assert run(net(), samples(), out, **given).about["exact"]
    assert not list(out.rglob("*.partial"))
    run(net(), samples(), tmp_path / "b.zarr", **given)
    assert_same(out, tmp_path / "b.zarr")


def test_a_second_run_in_another_thread_is_refused_too(tmp_path, monkeypatch):
    inside, go_on, original = threading.Event(), threading.Event(), data_methods.METHODS["saliency"]
    calls = []

    def waiting(batch):
        calls.append(batch.first)
        if len(calls) == 3:  # two are the look at some samples
            inside.set()
            assert go_on.wait(60)
        return original(batch)

    monkeypatch.setitem(data_methods.METHODS, "saliency", waiting)
    first = threading.Thread(target=run, args=(net(), samples(), tmp_path / "a.zarr"), kwargs={"chunk": 8})
    first.start()
    assert inside.wait(60)
    try:
        with pytest.raises(Busy, match="is computing the chunks 0 … 4"):
            run(net(), samples(), tmp_path / "a.zarr", chunk=8)
    finally:
        go_on.set()
        first.join()
    assert Results.open(tmp_path / "a.zarr").about["finished"]


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gradkern.data.store.durable.write_file", full)
        with pytest.raises(DiskFull, match="nothing was computed yet: free some space and run the same again"):
            run(net(), samples(), tmp_path / "a.zarr")
    assert run(net(), samples(), tmp_path / "a.zarr").about["finished"]


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert run(net(), samples(), tmp_path / "link").about["finished"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "zarr.json").exists()


class Unknowing(nn.Linear):
    """Predicts NaN where a sample has one, though its gradient stays finite."""


def test_a_prediction_that_is_nan_counts_as_not_finite(tmp_path):
    x = torch.ones(6, 4)
    x[2, 1] = float("nan")
    model = Unknowing(4, 2).eval()
    with pytest.raises(ValueError, match="sample 2 are not finite"):
        run(model, x, tmp_path / "a.zarr", reductions="mean_abs", engine="autograd")
    kept = run(model, x, tmp_path / "b.zarr", engine="autograd")
    assert kept.about["counts"] == {"nonfinite": 1, "nonfinite_first": [2]} | {
        k: v for k, v in kept.about["counts"].items() if not k.startswith("nonfinite")
    }
    with pytest.raises(ValueError, match="none of the 6 samples is finite"):
        gradkern.importance(model, x * float("nan"), nonfinite="skip", engine="autograd")
