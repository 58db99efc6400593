"""The command line, from an exported network to a report; errors in one line, exit codes, no pickles unasked."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import gradkern
from gradkern.cli.main import main
from gradkern.cli.models import load_model
from gradkern.cli.terminal import as_json_text
from gradkern.data import Results

ROOT = Path(__file__).parents[2]
COMMANDS = ("run", "importance", "explain", "report", "bench", "merge", "verify", "info", "export")


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv1d(1, 4, 5, padding="same"), nn.ReLU(), nn.MaxPool1d(2), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(40, 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with net.pt2, net.safetensors, net.pt (pickled), state.pt and x.npy."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("cli")
    model, x = small().eval(), torch.randn(30, 1, 20, generator=torch.Generator().manual_seed(0))
    free = ({0: torch.export.Dim("N")},)
    torch.export.save(torch.export.export(model, (x[:2],), dynamic_shapes=free), folder / "net.pt2")
    torch.export.save(torch.export.export(model, (x[:2],)), folder / "fixed.pt2")
    save_file(model.state_dict(), folder / "net.safetensors")
    torch.save(model.state_dict(), folder / "state.pt")
    torch.save(model, folder / "net.pt")
    np.save(folder / "x.npy", x.numpy())
    return folder


def call(*words: str, code: int = 0):
    done = CliRunner().invoke(main, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_from_an_exported_network_to_a_report(files, tmp_path):
    store = tmp_path / "maps.zarr"
    words = ("run", files / "net.pt2", files / "x.npy", store, "--method", "jacobian", "--chunk", "8")
    first = call(*words, "--reductions", "importance,mean_abs", "--shard", "1/2")
    assert "2 of 4 chunks finished" in first.stdout
    done = call(*words, "--reduce", "importance,mean_abs")
    assert "complete, 30 samples" in done.stdout
    x = torch.from_numpy(np.load(files / "x.npy"))
    results = Results.open(store)
    assert results.about["pinned"]["engine"] == "kernel", "an exported network runs on the kernels"
    expected = gradkern.jacobian(small().eval(), x, engine="kernel")
    torch.testing.assert_close(results.maps(0, 30), expected)
    said = call("info", store).stdout
    assert "4 of 4 chunks" in said
    assert "bit-equal to an uninterrupted run" in said
    assert json.loads(call("info", store, "--json").stdout)["finished_chunks"] == 4
    made_by = ("--model", files / "net.pt2", "--source", files / "x.npy")
    page = Path(call("report", store, "--names", "a,b,c", *made_by).stdout.strip())
    assert page == tmp_path / "maps.html"
    text = page.read_text(encoding="utf-8")
    for shown in ("Coverage", "100%", "Typical and atypical", "What the ranking is worth", "halves agree"):
        assert shown in text


def test_factories_weights_and_pickles(files, tmp_path):
    pairs = [("net.pt2", None), (None, "net.safetensors"), (None, "state.pt")]
    x = torch.from_numpy(np.load(files / "x.npy"))
    expected = small().eval()(x)
    for path, weights in pairs:
        spec = str(files / path) if path else "tests.cli.test_cli:small"
        model = load_model(spec, str(files / weights) if weights else None)
        assert not any(m.training for m in model.modules())
        torch.testing.assert_close(model(x), expected)
    refused = call("explain", files / "net.pt", files / "x.npy", code=1)
    assert "loading it can run any code" in refused.stderr
    assert "--weights" in refused.stderr  # the way for a state_dict
    assert "--allow-pickle" in refused.stderr
    allowed = call("explain", files / "net.pt", files / "x.npy", "--allow-pickle")
    assert "warning: loading a pickle, which can run any code" in allowed.stderr
    assert "fused" in allowed.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("run", "{net.pt2}", "{x.npy}", "{out}", "--method", "magic"), 1, "method: got 'magic'"),
        (("run", "{fixed.pt2}", "{x.npy}", "{out}"), 1, "exported for batches of exactly 2"),
        (("run", "{gone.pt2}", "{x.npy}", "{out}"), 1, "there is no"),
        (("run", "nowhere:build", "{x.npy}", "{out}"), 1, "cannot import 'nowhere:build'"),
        (("run", "{net.pt2}", "gone.npy", "{out}"), 1, "there is no 'gone.npy'"),
        (("run", "{net.pt2}", "{x.npy}", "{out}", "--targets", "a"), 2, "got 'a', expected numbers"),
        (("run", "{net.pt2}", "{x.npy}", "{out}", "--shard", "4"), 2, "expected i/n, such as 0/4"),
        (("run", "{net.pt2}", "{x.npy}"), 2, "Missing argument 'OUT'"),
        (("info", "{out}"), 1, "there is no store"),
        (("merge", "{out}"), 1, "there is no store"),
        (("fly",), 2, "No such command 'fly'"),
    ],
)
def test_errors_in_one_line(files, tmp_path, words, code, said):
    places = {"{out}": str(tmp_path / "o.zarr")}
    done = call(*(places.get(w) or (str(files / w[1:-1]) if w.startswith("{") else w) for w in words), code=code)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert len(done.stderr.strip().splitlines()) == 1


def test_another_model_has_its_own_exit_code(files, tmp_path):
    call("run", files / "net.pt2", files / "x.npy", tmp_path / "a.zarr")
    done = call("run", "tests.cli.test_cli:small", files / "x.npy", tmp_path / "a.zarr", "--method", "jacobian", code=3)
    assert "belongs to another run, and nothing was changed" in done.stderr
    other = call("report", tmp_path / "a.zarr", "--model", "tests.cases:lenet5_like", code=1)
    assert "cannot import" in other.stderr


def test_debug_shows_the_traceback(files, tmp_path):
    with pytest.raises(ValueError, match="there is no store"):
        call("--debug", "info", tmp_path / "none.zarr")


def test_importance_explain_and_bench(files):
    said = call("importance", files / "net.pt2", files / "x.npy", "--top", "3").stdout
    assert said.count("output") == 3
    assert "against random order" in said
    found = json.loads(call("importance", files / "net.pt2", files / "x.npy", "--json").stdout)
    assert len(found["top"]) == 3
    assert found["samples"] == [30, 30, 30]
    assert found["nonfinite"] == 0
    assert as_json_text({"a": [float("nan"), 1.5]}) == '{"a": [null, 1.5]}'
    assert "Contract" in call("explain", files / "net.pt2", files / "x.npy").stdout
    said = call("bench", files / "net.pt2", files / "x.npy", "--repeats", "1").stdout
    assert "gradkern is" in said


def test_verify_repairs_from_model_and_source(files, tmp_path):
    store = tmp_path / "a.zarr"
    call("run", files / "net.pt2", files / "x.npy", store, "--chunk", "8", "--reduce", "mean_abs")
    assert "everything that is finished is as it was written" in call("verify", store).stdout
    whole = (store / "attributions/c.1.0.0.0").read_bytes()
    for damage in (whole[:-1], whole[:99] + b"?" + whole[100:]):
        (store / "attributions/c.1.0.0.0").write_bytes(damage)
        said = call("verify", store, code=5).stdout
        assert "damaged chunks: 1 (attributions)" in said
        assert "samples to recompute: 8 … 15" in said
        asked = call("verify", store, "--repair", code=2).stderr
        assert f"The store says: --model {files / 'net.pt2'} --source {files / 'x.npy'}" in " ".join(asked.split())
        again = call("verify", store, "--repair", "--model", files / "net.pt2", "--source", files / "x.npy")
        assert "everything that is finished" in again.stdout
        assert (store / "attributions/c.1.0.0.0").read_bytes() == whole
    (store / "attributions/c.1.0.0.0").unlink()
    assert "damaged: 1 files are missing" in call("info", store).stdout
    again = call("run", files / "net.pt2", files / "x.npy", store, "--reduce", "mean_abs", code=5)
    assert "gradkern verify" in again.stderr


def test_a_report_refuses_a_model_that_has_changed(files, tmp_path):
    from safetensors.torch import save_file

    weights, page = tmp_path / "w.safetensors", tmp_path / "a.html"
    save_file(small().state_dict(), weights)
    words = ("tests.cli.test_cli:small", files / "x.npy", tmp_path / "a.zarr", "--weights", weights)
    call("run", *words, "--reduce", "importance", "--no-maps")
    save_file({k: v + 1 for k, v in small().state_dict().items()}, weights)
    assert "for samples and curves add --model tests.cli.test_cli:small" in call("report", tmp_path / "a.zarr").stderr
    assert page.exists()
    assert "belong to a --model" in call("report", tmp_path / "a.zarr", "--weights", weights, code=2).stderr
    model = ("--model", "tests.cli.test_cli:small", "--weights", weights)
    refused = call("report", tmp_path / "a.zarr", *model, code=3)
    assert "--model: it is not the model of the run" in refused.stderr


def test_the_page_of_a_store_elsewhere_comes_to_the_current_folder():
    from gradkern.cli.reading import _beside

    assert _beside("s3://bucket/maps.zarr/") == Path("maps.html")
    assert _beside("/data/maps.zarr") == Path("/data/maps.html")


def test_not_finite_samples_on_the_command_line(files, tmp_path):
    x = np.load(files / "x.npy")
    x[4, 0, 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    words = ("run", files / "net.pt2", tmp_path / "x.npy", tmp_path / "a.zarr", "--method", "input_x_gradient")
    stopped = call(*words, "--reduce", "mean_abs", code=1)
    assert "sample 4 are not finite" in stopped.stderr
    call(*words, "--reduce", "mean_abs", "--nonfinite", "skip")
    assert "1 of 30 samples are not finite (samples 4)" in call("info", tmp_path / "a.zarr").stdout
    page = Path(call("report", tmp_path / "a.zarr").stdout.strip())
    assert "1 of 30 samples are not finite" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"gradkern {command} " in call(command, "--help").stdout.split("Options:")[0].replace("Usage: main", "")


def test_as_a_program_quiet_and_interruptible(files, tmp_path):
    command = [sys.executable, "-m", "gradkern", "--threads", "1", "run", str(files / "net.pt2")]
    command += [str(files / "x.npy"), str(tmp_path / "a.zarr")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_the_arrowhead_example(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = runpy.run_path(str(ROOT / "examples" / "arrowhead.py"))
    model, data = example["main"](["--quick", "--folder", str(tmp_path)])
    call("run", model, data, tmp_path / "arrowhead.zarr", "--reduce", "importance")
    page = Path(call("report", tmp_path / "arrowhead.zarr").stdout.strip())
    assert "211" in page.read_text(encoding="utf-8")
