"""The HTML report: self-contained, escaped, and its figures drawable from plain arrays."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gradkern.report import Report, figures

NAMES = ("first", "second", "third")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_report_loads_nothing_from_anywhere(tmp_path, rng):
    report = Report("Title", "Summary")
    section = report.section("One").text("Words.").facts([("97 %", "accuracy")])
    section.picture(figures.bars(["a", "b"], [2.0, 1.0], "per second"), "Bars.", vector=True)
    section.picture(
        figures.signal_classes(rng.normal(size=(9, 20)), rng.random((3, 20)), np.arange(9) % 3, NAMES), "Signals."
    )
    section.table(["class", "features"], [("first", "t=1 t=2")]).printed("a  b\n1  2", "Details")
    path = report.write(tmp_path / "deep" / "report.html")
    assert report.write(tmp_path / "deep") == tmp_path / "deep" / "index.html"
    page = path.read_text(encoding="utf-8")
    assert path.is_absolute()
    assert re.findall(r'src="([^"]{10})', page) == ["data:image", "data:image"]
    assert not re.search(r"(href|src|url)\W{0,2}(https?:)?//", page)
    for shown in ("Title", "Summary", "Words.", "97 %", "Bars.", "t=1 t=2", "1  2"):
        assert shown in page


def test_report_escapes_what_it_is_given(tmp_path):
    report = Report("a < b")
    report.section("<script>").text("1 & 2").table(["<i>"], [("<b>",)])
    page = report.html()
    assert "<script>" not in page
    assert "<b>" not in page.split("<tbody>")[1]
    assert "a &lt; b" in page


def test_table_with_a_ragged_row_says_which():
    with pytest.raises(ValueError, match="2 cells under 1 headings"):
        Report("x").section("y").table(["one"], [("a", "b")])


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_figures_for_any_number_of_classes(rng, classes):
    names = tuple(map(str, range(classes)))
    labels = np.zeros(6, dtype=int)  # all but the first class have no sample
    signals, images = rng.normal(size=(6, 12)), rng.normal(size=(6, 5, 4))
    drawn = [
        figures.signal_classes(signals, rng.random((classes, 12)), labels, names),
        figures.image_classes(images, rng.random((classes, 5, 4)), labels, names),
        figures.signal_samples(signals[:2], rng.normal(size=(2, classes, 12)), labels[:2], labels[:2], names),
        figures.image_samples(images[:2], rng.normal(size=(2, classes, 5, 4)), labels[:2], labels[:2], names),
    ]
    for figure in drawn:
        figure.canvas.draw()


def test_figures_of_zero_gradients_and_constant_inputs():
    zeros = np.zeros((2, 3, 4, 4))
    figures.image_samples(zeros[:, 0], zeros, np.zeros(2, int), np.zeros(2, int), NAMES).canvas.draw()
    figures.image_classes(zeros[:, 0], zeros[0], np.zeros(2, int), NAMES).canvas.draw()
    figures.signal_classes(zeros[:, 0, 0], zeros[0, :, 0], np.zeros(2, int), NAMES).canvas.draw()
