"""Pictures: what is drawn, at which scale, and what is refused."""

from __future__ import annotations

import io
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from gradkern import plot
from gradkern.util.options import BadValue


def draw(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    return file.getvalue()


def images(figure: Figure) -> list:
    return [shade for axes in figure.axes for shade in axes.images if axes.get_label() != "<colorbar>"]


@pytest.mark.parametrize("shape", [(30,), (3, 30), (3, 2, 30)])
def test_a_signal_has_a_strip_per_output_in_one_scale(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, requires_grad=True)  # a graph is no obstacle
    figure = plot.signal(values, torch.randn(2, 30), x=np.linspace(0, 1, 30))
    strips = images(figure)
    outputs = 1 if len(shape) == 1 else shape[0]
    assert len(strips) == outputs
    assert len({s.get_clim() for s in strips}) == 1
    low, high = strips[0].get_clim()
    assert low == -high
    expected = values.detach().reshape(outputs, -1, 30).sum(1).numpy()
    np.testing.assert_allclose(np.concatenate([s.get_array() for s in strips]), expected, rtol=1e-6, atol=1e-6)
    assert draw(figure).startswith(b"\x89PNG")


def test_an_image_lies_under_its_attributions() -> None:
    values = np.random.default_rng(0).random((10, 3, 8, 9))
    figure = plot.image(values, np.random.default_rng(1).random((3, 8, 9)), names=list("abcdefghij"))
    shown = images(figure)
    assert len(shown) == 20  # the picture and the attributions of each output
    assert shown[1].get_clim() == (0.0, pytest.approx(values.sum(1).max()))  # no negative value: from zero
    draw(figure)


def test_of_900_outputs_the_largest_are_drawn_and_the_title_says_so() -> None:
    values = np.random.default_rng(0).standard_normal((900, 20))
    largest = [3, 70, 899]
    values[largest] *= 10
    figure = plot.signal(values)
    assert len(images(figure)) == plot.MOST_PANELS
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert {f"output {c}" for c in largest} <= set(titles)
    assert "12 of 900 outputs" in figure.get_suptitle()


@pytest.mark.parametrize("shape", [(3, 5), (900, 4, 700)])
def test_a_matrix_keeps_the_largest_of_cells_that_share_a_pixel(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape)
    values.reshape(shape[0], -1)[1, 3] = -50.0
    figure = plot.matrix(values, names=[f"class {c}" for c in range(shape[0])])
    (cells,) = (shade.get_array() for shade in images(figure))
    assert cells.shape == (min(shape[0], plot.MOST_CELLS), min(values[0].size, plot.MOST_CELLS))
    assert cells.min() == -50.0
    draw(figure)


@pytest.mark.skipif(not find_spec("logomaker"), reason="logomaker is not installed")
def test_letters_are_as_tall_as_their_attributions() -> None:
    values = np.zeros((2, 4, 12))
    values[0, 2, 5], values[1, 0, 3] = 0.2, -0.1
    figure = plot.logo(values, names=["up", "down"], start=100)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["up", "down"]
    low, high = figure.axes[0].get_ylim()
    assert -0.12 < low <= -0.1
    assert 0.2 <= high < 0.22
    draw(figure)
    with pytest.raises(BadValue, match="ACGT"):
        plot.logo(np.zeros((2, 5, 12)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.signal(np.zeros((8, 3, 2, 30))), r"expected \[C, T\].*of one sample"),
        (lambda: plot.signal(np.zeros((3, 30)), np.zeros(29)), "30 positions"),
        (lambda: plot.signal(np.zeros((3, 30)), x=np.zeros(29)), "30 positions"),
        (lambda: plot.signal(np.zeros((3, 30)), names=["one"]), "1 names for 3"),
        (lambda: plot.signal(np.zeros((0, 30))), "expected"),
        (lambda: plot.image(np.zeros((3, 8, 8)), np.zeros((9, 8))), r"expected \(8, 8\)"),
        (lambda: plot.matrix(np.zeros(5)), r"\[C, \*features\]"),
    ],
)
def test_plot_of_a_shape_it_cannot_draw_is_refused(call, message: str) -> None:
    with pytest.raises(BadValue, match=message):
        call()


def test_numbers_that_are_not_finite_are_drawn_as_gaps() -> None:
    values = np.array([[1.0, np.nan, -2.0, np.inf]])
    (strip,) = images(plot.signal(values))
    assert strip.get_clim() == (-2.0, 2.0)
    draw(plot.signal(np.full((2, 4), np.nan)))
