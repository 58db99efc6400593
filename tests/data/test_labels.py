"""Names of samples and outputs: kept in the store, shown everywhere, and those of the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import gradkern
from gradkern import TopK
from gradkern.cli import choices
from gradkern.cli.main import main
from gradkern.data import Damaged, Mismatch, merge, open_source, open_store, ranking, repair, run, verify
from gradkern.report.dataset import report

X = np.random.default_rng(0).standard_normal((11, 4)).astype(np.float32)
IDS = [f"patient {i}" for i in range(11)]
GIVEN = {"engine": "autograd", "chunk": 4}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def test_store_keeps_and_shows_sample_ids_and_output_names(tmp_path):
    model = network()
    results = run(model, X, tmp_path / "a.zarr", ids=IDS, names=["cat", "dög", "<b>"], reductions="importance", **GIVEN)
    assert (results.ids, results.names) == (tuple(IDS), ("cat", "dög", "<b>"))
    assert results.sample_name(3) == "3 (patient 3)"
    import xarray

    opened = xarray.open_zarr(tmp_path / "a.zarr", consolidated=False)
    assert opened["ids"].values.tolist() == IDS
    text = report(results, tmp_path / "a.html").read_text(encoding="utf-8")
    for shown in ("(patient ", "dög", "&lt;b&gt;"):
        assert shown in text
    assert "cat, dög, <b>" in CliRunner().invoke(main, ["info", str(tmp_path / "a.zarr")]).stdout
    again = run(model, X, tmp_path / "a.zarr", reductions="importance", **GIVEN)  # without saying it again
    assert again.ids == tuple(IDS)
    for other in ({"ids": IDS[::-1]}, {"names": list("abc")}):
        with pytest.raises(Mismatch, match=f"{next(iter(other))}: .* was started with others"):
            run(model, X, tmp_path / "a.zarr", reductions="importance", **other, **GIVEN)


@pytest.mark.parametrize(
    ("targets", "names", "rows"),
    [
        (None, "abc", "abc"),
        ([2, 0], "abc", "ca"),
        ([2, 0], "xy", "xy"),
        ([2, 0, 1], "abc", "cab"),
        (range(1, 3), "abc", "bc"),
        (TopK(1), "abc", "abc"),
        ((np.arange(11) % 3)[:, None], "abc", "abc"),
    ],
)
def test_the_rows_of_statistics_have_the_names_of_their_outputs(targets, names, rows, tmp_path):
    results = run(network(), X, tmp_path / "a.zarr", targets=targets, names=list(names), reductions="mean", **GIVEN)
    assert results.row_names() == list(rows)


@pytest.mark.parametrize("parts", [False, True])
def test_importance_takes_output_names(parts, monkeypatch):
    if parts:
        monkeypatch.setattr(ranking, "PART_BYTES", 8 * (ranking.GROUPS + 1) * 4 * 2)
    given = {"targets": [2, 0, 1], "engine": "autograd", "curve_samples": 0}
    found = gradkern.importance(network(), X, names=list("abc"), **given)
    assert found.names == ("c", "a", "b")
    assert str(found).startswith("c: features")
    assert gradkern.importance(network(), X, **given).names == ("output 2", "output 0", "output 1")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ids": IDS[:3]}, "ids: got 3, expected one for each of 11 samples"),
        ({"ids": [None] * 11}, "ids: number 0 is missing"),
        ({"ids": np.zeros((11, 2))}, "expected one axis"),
        ({"names": "abc"}, "expected a sequence of names"),
        ({"names": ["a", "b"]}, "names: got 2, expected one for each of 3 outputs, or one for each of 1 targets"),
        ({"names": ["a", "b"], "targets": TopK(1)}, "names: got 2, expected one for each of 3 outputs"),
    ],
)
def test_labels_of_a_wrong_number_or_kind_are_refused(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(network(), X, tmp_path / "a.zarr", **{"targets": [1], **given}, **GIVEN)
    assert not (tmp_path / "a.zarr").exists()


def test_errors_name_the_sample(tmp_path):
    x = X.copy()
    x[6, 1] = np.nan
    with pytest.raises(ValueError, match=r"sample 6 \(patient 6\) are not finite"):
        run(network(), x, tmp_path / "a.zarr", ids=IDS, reductions="mean_abs", **GIVEN)


def test_shards_of_other_names_are_not_merged(tmp_path):
    for i, ids in enumerate((IDS, IDS[::-1])):
        run(network(), X, tmp_path / f"{i}.zarr", shard=(i, 2), ids=ids, chunk=4, engine="autograd")
    with pytest.raises(Mismatch, match="has other ids or names"):
        merge(tmp_path / "0.zarr", [tmp_path / "1.zarr"])


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff\xff", b"\x0b\0\0\0\xff\xff\xff\xff"])
def test_damaged_names_are_an_error_and_repaired(content, tmp_path):
    out = tmp_path / "a.zarr"
    run(network(), X, out, ids=IDS, **GIVEN)
    (out / "ids/c.0").write_bytes(content)
    with pytest.raises((Damaged, ValueError), match="damaged"):
        assert open_store(out).ids
    assert verify(out).files == ("ids/c.0",)
    repair(out, network(), X)
    assert open_store(out).ids == tuple(IDS)


def factory() -> nn.Module:
    return network()


@pytest.mark.parametrize("kind", ["txt", "npy", "csv"])
def test_labels_on_the_command_line(kind, tmp_path):
    import pandas

    np.save(tmp_path / "x.npy", X)
    (tmp_path / "ids.txt").write_text("\n".join(IDS))
    np.save(tmp_path / "ids.npy", np.array(IDS))
    pandas.DataFrame({"who": IDS, "age": 1}).to_csv(tmp_path / "ids.csv", index=False)
    ids = f"{tmp_path}/ids.{kind}" + (":who" if kind == "csv" else "")
    words = ["run", "tests.data.test_labels:factory", f"{tmp_path}/x.npy", f"{tmp_path}/a.zarr", "--engine", "autograd"]
    done = CliRunner().invoke(main, [*words, "--ids", ids, "--names", "a,b,c"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (open_store(tmp_path / "a.zarr").ids, open_store(tmp_path / "a.zarr").names) == (tuple(IDS), tuple("abc"))
    if kind == "txt":
        words = ["importance", *words[1:3], "--engine", "autograd", "--names", "a,b,c", "--targets", "2,1"]
        assert CliRunner().invoke(main, words).stdout.startswith("c: ")


def test_names_as_they_are_written(tmp_path):
    """With a mark of the byte order, ends of lines of Windows, zeros in front, and words that pandas takes for NaN."""
    (tmp_path / "a.txt").write_bytes("\ufeffca\u2028t\r\ndog\r\n\r\n".encode())
    assert choices.read_names(f"{tmp_path}/a.txt") == ["ca\u2028t", "dog"]
    (tmp_path / "a.csv").write_text(",who,age\n0,007,1\n1,NA,2\n")
    assert list(choices.read_ids(f"{tmp_path}/a.csv:who")) == ["007", "NA"]
    np.save(tmp_path / "a.npy", np.array(["a", None], dtype=object))
    with pytest.raises(ValueError, match="Save text"):
        choices.read_ids(f"{tmp_path}/a.npy")


def test_tilde_is_the_home_folder_in_every_option(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(network(), tmp_path / "net.pt")
    torch.save(network().state_dict(), tmp_path / "state.pt")
    np.save(tmp_path / "x.npy", X)
    words = ["--engine", "autograd", "--allow-pickle"]
    for model, out in (
        (["~/net.pt"], "~/a.zarr"),
        (["tests.data.test_labels:factory", "--weights", "~/state.pt"], "~/b.zarr"),
    ):
        done = CliRunner().invoke(main, ["run", *model, "~/x.npy", out, *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert {p.name for p in tmp_path.iterdir()} >= {"a.zarr", "b.zarr"}
    assert open_source("~/x.npy").samples == 11
