"""The report of a dataset run: what is on it, for any shape, and that a browser shows it without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gradkern.data import open_source, run
from gradkern.report import datafigures
from gradkern.report.dataset import report
from tests.cases import CASES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def signals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    case = CASES["cnn1d_strided"]
    model, x = case.build(), case.inputs(60)[0]
    results = run(model, x, folder / "a.zarr", method="jacobian", chunk=16, reductions=["importance"])
    return results, model, open_source(x), folder


def test_report_of_a_run_shows_every_section_and_loads_nothing(signals):
    results, model, source, folder = signals
    path = report(results, folder / "a.html", model=model, source=source, names=["left", "middle", "right"])
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(href|src|url)\W{0,2}(https?:)?//", page)
    assert page.count("data:image/png") + page.count("data:image/svg+xml") == 4
    for shown in ("100%", "left", "bit-equal", "cosine", "random order", "pinned: isa", "bootstrap interval"):
        assert shown in page
    bare = report(results, folder / "b.html").read_text(encoding="utf-8")
    assert "What the ranking is worth" not in bare
    assert "output 0" in bare


def test_an_unfinished_run_is_reported_as_far_as_it_is(signals, tmp_path):
    _, model, source, _ = signals
    results = run(model, source, tmp_path / "a.zarr", chunk=16, shard=(0, 2))
    page = report(results, tmp_path / "a.html").read_text(encoding="utf-8")
    assert "53%" in page
    assert "2 chunks are missing. Run the same call again to continue." in page


@pytest.mark.parametrize("name", ["lenet5", "mlp"])
@pytest.mark.parametrize("maps", [True, False])
def test_images_and_tables(name, maps, tmp_path):
    case = CASES[name]
    model, x = case.build(), case.inputs(25)[0]
    results = run(model, x, tmp_path / "a.zarr", chunk=16, reductions=["mean_abs", "importance"], maps=maps)
    page = report(results, tmp_path / "a.html", model=model, source=open_source(x)).read_text(encoding="utf-8")
    assert ("Typical and atypical" in page) == maps


def test_the_most_typical_sample_is_the_nearest_to_the_mean(signals):
    from gradkern.report.dataset import StoreSections

    results, *_ = signals
    view = StoreSections(results, None, None, None)
    maps = results.maps(0, 60).abs().numpy()
    rows = np.asarray(results.array("predictions")[...]).argmax(1)
    for found in view._extremes():
        numbers = np.flatnonzero(rows == found.output)
        mine = maps[numbers, found.output].reshape(len(numbers), -1)
        mean = mine.mean(0)
        cosines = mine @ mean / np.linalg.norm(mine, axis=1) / np.linalg.norm(mean)
        assert found.samples == (numbers[cosines.argmax()], numbers[cosines.argmin()])
        assert found.cosines == pytest.approx((cosines.max(), cosines.min()), abs=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (1, 9), (3, 40), (8, 9), (1, 8, 9), (3, 8, 9), (2, 1, 30)])
def test_figures_for_any_shape(shape):
    values = np.random.default_rng(0).standard_normal((2, *shape))
    datafigures.scores(np.abs(values), ["a", "b"], None, None).canvas.draw()
    datafigures.scores(np.abs(values), ["a", "b"], 0.9 * np.abs(values), 1.1 * np.abs(values)).canvas.draw()
    pair = np.stack([values, values])
    datafigures.extremes(pair, None, [["a", "b"]] * 2, ["c", "d"]).canvas.draw()
    datafigures.extremes(np.zeros_like(pair), pair, [["a", "b"]] * 2, ["c", "d"]).canvas.draw()


def browse(path: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", *options]
    return subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_browser_shows_the_report_without_an_error(signals, tmp_path):
    results, model, source, _ = signals
    page = report(results, tmp_path / "a.html", model=model, source=source)
    picture = tmp_path / "a.png"
    done = browse(page, tmp_path, "--window-size=1100,3000", f"--screenshot={picture}", "--virtual-time-budget=3000")
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (3000, 1100)
    colours = pixels.reshape(-1, 3)
    orange = (colours[:, 0] > 0.6) & (colours[:, 2] < 0.3)
    assert orange.sum() > 200, "the curves are not drawn"
    assert (colours.max(1) < 0.3).sum() > 5000, "there is no text"


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_browser_errors_reach_the_test(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<html><body><script>throw new Error('seen')</script></body></html>")
    done = browse(page, tmp_path, f"--screenshot={tmp_path / 'b.png'}", "--virtual-time-budget=1000")
    assert "CONSOLE" in done.stderr
