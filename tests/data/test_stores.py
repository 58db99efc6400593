"""Stores written by an earlier version: they open, read the same, and the unfinished one is completed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.data import Mismatch, Outcome, Results, Settings, open_store, run
from gradkern.data.runs import fingerprint
from gradkern.data.runs.shards import merge
from tests.support.old_stores import OPTIONS, STORES, problem

ROOT = Path(__file__).parents[2]


def oracle() -> torch.Tensor:
    """The Jacobian in float64 ``[9, 3, 1, 10]``."""
    model, x = problem()
    model = model.double()
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda s: model(s[None])[0], sample) for sample in x.double()]
    )


def test_a_finished_store_reads_the_same():
    results = Results.open(STORES / "finished.zarr")
    assert (results.samples, results.chunk, results.chunks, results.finished_chunks) == (9, 2, 5, 5)
    assert (results.finished, results.exact, results.notes, results.tolerance) == (True, True, [], None)
    assert (results.method, results.inputs, results.pinned["chunk"]) == ("jacobian", ["attributions"], 2)
    assert results.reductions == ["mean_abs", "variance", "max_abs"]
    maps = results.maps(0, 9)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), oracle(), rtol=1e-5, atol=1e-6)
    wide = maps.double()
    expected = {"mean_abs": wide.abs().mean(0), "variance": wide.var(0, unbiased=False), "max_abs": wide.abs().amax(0)}
    for name, value in expected.items():
        np.testing.assert_allclose(results.reduction(name), value.numpy(), rtol=1e-9, atol=1e-12)
    top = results.array("top_features")[...]
    np.testing.assert_array_equal(top, maps.abs().flatten(2).topk(2).indices.numpy())
    np.testing.assert_array_equal(results.array("targets")[...], [0, 1, 2])


def test_an_unfinished_store_reads_as_far_as_it_is():
    results = Results.open(STORES / "unfinished.zarr")
    assert results.ledger.finished() == {0, 1}
    assert (results.finished, results.exact) == (False, None)
    assert torch.equal(results.maps(0, 4), Results.open(STORES / "finished.zarr").maps(0, 4))
    with pytest.raises(ValueError, match="2 of 5 chunks are finished"):
        results.reduction("mean_abs")


RESUME = """
import json, sys
import torch
torch.set_num_threads(1)
from gradkern.data import run
from tests.support.old_stores import OPTIONS, problem
results = run(*problem(), sys.argv[1], **OPTIONS)
run(*problem(), sys.argv[2], chunk=2, **OPTIONS)
print(json.dumps(results.about))
"""


@pytest.mark.slow
def test_an_unfinished_store_is_completed(tmp_path):
    shutil.copytree(STORES / "unfinished.zarr", tmp_path / "a.zarr")
    environment = {name: value for name, value in os.environ.items() if name != "GRADKERN_ISA"}
    command = [sys.executable, "-c", RESUME, str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout.splitlines()[-1])
    assert about["finished"]
    assert not list((tmp_path / "a.zarr").rglob("*.partial"))
    completed = Results.open(tmp_path / "a.zarr")
    for version, uninterrupted in enumerate(map(Results.open, (STORES / "finished.zarr", tmp_path / "b.zarr"))):
        names = [*uninterrupted.arrays(), *(f"reductions/{name}" for name in OPTIONS["reductions"])]
        for name in names:
            a, b = (np.asarray(r.array(name)[...]) for r in (completed, uninterrupted))
            if version and name == "reductions/variance":  # it sums other numbers, which round in another way
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * float(np.abs(b).max()), err_msg=name)
            elif about["exact"]:  # the versions and the instruction set that the store pins can be had here
                assert a.tobytes() == b.tobytes(), name
            elif name != "top_features":  # ties may fall the other way
                np.testing.assert_allclose(a, b, atol=about["tolerance"] * float(np.abs(b).max()), err_msg=name)
    pinned = completed.about["pinned"]
    if torch.__version__ == pinned["torch"]:
        assert about["exact"], about["notes"]


def test_another_model_is_refused_by_an_earlier_store(tmp_path):
    shutil.copytree(STORES / "unfinished.zarr", tmp_path / "a.zarr")
    model, x = problem()
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(Mismatch, match="other weights"):
        run(model, x, tmp_path / "a.zarr", **OPTIONS)


# ---------------------------------------------------------------------------------------------------------------
# Keys of graph and plan that were made in another way


def with_other_keys(out: Path, name: str) -> None:
    """A copy of a store whose keys say nothing to this version."""
    shutil.copytree(STORES / name, out)
    change_keys(out)


def change_keys(out: Path, **pinned: str) -> None:
    path = out / "zarr.json"
    content = json.loads(path.read_text())
    about = content["attributes"]["gradkern"]
    about["fingerprint"]["model"]["graph"] = about["pinned"]["plan"] = "0" * 16
    about["pinned"] |= pinned
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["unfinished.zarr", "finished.zarr"])
def test_an_earlier_store_is_told_by_a_finished_chunk(tmp_path, name):
    with_other_keys(tmp_path / "a.zarr", name)
    results = run(*problem(), tmp_path / "a.zarr", **OPTIONS)
    finished = Results.open(STORES / "finished.zarr")
    torch.testing.assert_close(results.maps(0, 9), finished.maps(0, 9), rtol=1e-4, atol=1e-5)
    assert results.about["finished"]


class Doubled(nn.Sequential):
    """Another network with the same weights."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_an_earlier_store_of_another_graph_is_refused(tmp_path):
    with_other_keys(tmp_path / "a.zarr", "unfinished.zarr")
    model, x = problem()
    with pytest.raises(Mismatch, match=r"now predicts something else for the samples 0 … 1"):
        run(Doubled(*model).eval(), x, tmp_path / "a.zarr", **OPTIONS)


def test_bits_that_differ_from_an_earlier_store_are_noted(tmp_path):
    with_other_keys(tmp_path / "a.zarr", "unfinished.zarr")
    path = tmp_path / "a.zarr/attributions/c.0.0.0.0"
    rows = np.fromfile(path, np.float32)
    np.nextafter(rows, np.float32(np.inf)).tofile(path)
    about = run(*problem(), tmp_path / "a.zarr", **OPTIONS).about
    assert "another version of gradkern began the store" in about["notes"]
    assert not about["exact"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_prediction_that_is_not_finite_leaves_an_earlier_store_its_model(tmp_path, bad):
    """Each chunk is compared relative to its largest prediction, which must be a finite one."""
    model, x = problem()
    x[1] = bad
    options = OPTIONS | {"nonfinite": "skip"}
    run(model, x, tmp_path / "a.zarr", **options, chunk=2, shard=(0, 2))
    change_keys(tmp_path / "a.zarr", gradkern="0.0.9")
    with pytest.raises(Mismatch, match=r"now predicts something else for the samples 0 … 1"):
        run(Doubled(*model).eval(), x, tmp_path / "a.zarr", **options)
    assert run(model, x, tmp_path / "a.zarr", **options).done == 5


def test_keys_of_another_version_are_not_compared(tmp_path):
    run(*problem(), tmp_path / "a.zarr", **OPTIONS, chunk=2, shard=(0, 2))
    change_keys(tmp_path / "a.zarr", gradkern="0.0.9")
    about = run(*problem(), tmp_path / "a.zarr", **OPTIONS).about
    assert about["finished"]
    assert len(about["notes"]) == 1
    assert about["notes"][0].endswith("instead of 0.0.9")


def test_the_keys_of_today_are_compared(tmp_path):
    model, x = problem()
    assert run(model, x, tmp_path / "a.zarr", **OPTIONS).about["keys"] == fingerprint.KEYS
    with pytest.raises(Mismatch, match="computes something else"):
        run(Doubled(*model).eval(), x, tmp_path / "a.zarr", **OPTIONS)


def test_a_store_of_kernels_that_round_differently_is_read_but_not_continued(tmp_path, monkeypatch):
    for out, given in (("begun.zarr", {"chunk": 2, "shard": (0, 2)}), ("finished.zarr", {"chunk": 2})):
        assert run(*problem(), tmp_path / out, **OPTIONS, **given).about["numerics"] == fingerprint.NUMERICS
    monkeypatch.setattr(fingerprint, "NUMERICS", fingerprint.NUMERICS + 1)
    with pytest.raises(Mismatch, match="kernels round differently"):
        run(*problem(), tmp_path / "begun.zarr", **OPTIONS)
    assert run(*problem(), tmp_path / "finished.zarr", **OPTIONS).finished
    run(*problem(), tmp_path / "rest.zarr", **OPTIONS, chunk=2, shard=(1, 2))
    with pytest.raises(Mismatch, match="are of versions whose kernels round differently"):
        merge(tmp_path / "begun.zarr", [tmp_path / "rest.zarr"])
    assert Results.open(tmp_path / "begun.zarr").maps(0, 2).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------
# Opening, and settings as one value


@pytest.mark.parametrize(
    ("old", "new"), [("open", "open_store"), ("register", "register_source"), ("method", "register_method")]
)
def test_old_names_warn(old, new):
    with pytest.warns(DeprecationWarning, match=f"gradkern.data.{old} is now gradkern.data.{new};") as caught:
        assert getattr(gradkern.data, old) is getattr(gradkern.data, new)
    assert caught[0].filename == __file__


def test_old_names_of_arguments_warn():
    results, one = open_store(STORES / "finished.zarr"), torch.ones(1)
    with pytest.warns(DeprecationWarning, match="of= is now input=") as caught:
        assert torch.equal(results.mask(0, 2, of=0), results.mask(0, 2, 0))
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="Results.done is now Results.finished_chunks;"):
        assert results.done == results.finished_chunks
    with pytest.warns(DeprecationWarning, match="place= is now store="):
        assert gradkern.data.verify(place=STORES / "finished.zarr").ok
    with pytest.raises(TypeError, match="input"), pytest.warns(DeprecationWarning):
        results.mask(0, 2, input=0, of=0)
    with pytest.warns(DeprecationWarning, match="rows= is now targets="):
        outcome = Outcome((), one, rows=one)
    with pytest.warns(DeprecationWarning, match="Outcome.rows is now Outcome.targets"):
        assert outcome.rows is one is outcome.targets


def test_settings_as_one_value_are_the_keywords(tmp_path):
    settings = Settings(**OPTIONS, chunk=4)
    one = run(*problem(), tmp_path / "a.zarr", settings=settings)
    other = run(*problem(), tmp_path / "b.zarr", **OPTIONS, chunk=4)
    assert one.about == other.about
    assert torch.equal(one.maps(0, 9), other.maps(0, 9))
    assert settings.reductions == ("mean_abs", "variance", "max_abs")
    assert Settings(reductions="mean").reductions == ("mean",)
    planned = gradkern.data.plan(*problem(), settings=settings)
    assert (planned.samples, planned.chunk) == (9, 4)
    with pytest.raises(ValueError, match="plan: got chunk together with settings="):
        gradkern.data.plan(*problem(), settings=settings, chunk=4)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"method": "saliency"}, r"run: got method together with settings=. .*replace\(settings, method=\.\.\.\)"),
        ({"chunk": 3, "targets": [0]}, "got chunk, targets together with settings="),
    ],
)
def test_a_field_beside_settings_is_an_error(tmp_path, keywords, words):
    with pytest.raises(ValueError, match=words):
        run(*problem(), tmp_path / "a.zarr", settings=Settings(), **keywords)
    assert not (tmp_path / "a.zarr").exists()


def test_a_keyword_that_does_not_exist(tmp_path):
    with pytest.raises(TypeError, match=r"run\(\) got an unexpected keyword argument 'chunks'"):
        run(*problem(), tmp_path / "a.zarr", chunks=3)
