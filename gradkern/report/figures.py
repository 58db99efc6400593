"""Matplotlib figures of gradients.  Each function takes arrays, draws, and returns a figure; nothing is shown.

Figures are made without pyplot, so they need no display and may be drawn from any thread.  Arrays are NumPy or
anything ``numpy.asarray`` takes.  Colours: orange for magnitudes; blue to red, symmetric about zero, for signed
values.  Panels of one figure that are to be compared share one scale; other panels say that they do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..plot import ACCENT, INK, MAGNITUDE, PALE, SIGNED, limits, strip


def bars(
    labels: Sequence[str], values: Sequence[float] | np.ndarray, unit: str, *, highlight: int | None = 0
) -> Figure:
    """Horizontal bars with their values written at the ends; bar ``highlight`` stands out (None: none does)."""
    figure = Figure(figsize=(8.5, 0.55 * len(labels) + 0.5), layout="constrained")
    axes = figure.add_subplot()
    colours = [ACCENT if i == highlight else PALE for i in range(len(labels))]
    drawn = axes.barh(range(len(labels)), values, color=colours, height=0.62)
    axes.bar_label(drawn, [f" {value:,.0f}" for value in values], padding=2, color=INK)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def signal_classes(x: np.ndarray, importance: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Per class, the importance of every time step behind the mean signal of that class.

    ``x``: signals ``[N, T]``.  ``importance`` ``[C, T]``, not negative.  ``labels`` ``[N]``: the class of each signal.
    """
    x, importance, labels = np.asarray(x), np.asarray(importance), np.asarray(labels)
    figure = Figure(figsize=(9, 1.75 * len(names) + 0.4), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    top = float(importance.max()) or 1.0
    low, high = limits(x)
    steps = np.arange(x.shape[1])
    for c, (axes, name) in enumerate(zip(panels, names, strict=True)):
        shade = strip(axes, importance[c], steps, low, high, {"cmap": MAGNITUDE, "vmin": 0.0, "vmax": top})
        signals = x[labels == c]  # [n, T]
        if len(signals):
            mean, spread = signals.mean(0), signals.std(0)
            axes.fill_between(steps, mean - spread, mean + spread, color=INK, alpha=0.12, linewidth=0)
            axes.plot(mean, color=INK, linewidth=1.5)
        axes.set_title(f"{name} (n = {len(signals)})", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("time step")
    figure.colorbar(shade, ax=list(panels), label="importance", fraction=0.03, pad=0.01)
    return figure


def image_classes(x: np.ndarray, importance: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Per class, the importance of every pixel, with the outline of the mean image of that class over it.

    ``x``: images ``[N, H, W]``.  ``importance`` ``[C, H, W]``, not negative.  ``labels`` ``[N]``: the class of each.
    """
    x, labels = np.asarray(x), np.asarray(labels)
    figure, panels = image_grid(np.asarray(importance), names, "importance")
    for c, axes in enumerate(panels):
        if (labels == c).any():
            outline(axes, x[labels == c].mean(0))
    return figure


def image_grid(images: Sequence[np.ndarray] | np.ndarray, names: Sequence[str], unit: str) -> tuple[Figure, list[Axes]]:
    """Magnitudes ``[C, H, W]`` of one scale, five in a row under their names; the figure and its panels."""
    columns = min(5, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(1.8 * columns + 0.6, 1.95 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    top = max(float(np.nanmax(image)) for image in images) or 1.0
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, image, name in zip(panels.flat, images, names, strict=False):
        shade = axes.imshow(image, cmap=MAGNITUDE, vmin=0.0, vmax=top)
        axes.set_title(name, fontsize=10)
    figure.colorbar(shade, ax=panels, label=unit, fraction=0.03, pad=0.01)
    return figure, list(panels.flat[: len(names)])


def outline(axes: Axes, image: np.ndarray) -> None:
    """The contour at half height of an image ``[H, W]`` that is not constant."""
    if np.ptp(image) > 0:
        axes.contour(image, levels=[image.min() + 0.5 * np.ptp(image)], colors=INK, linewidths=1.0)


def signal_samples(
    x: np.ndarray, gradients: np.ndarray, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> Figure:
    """Single signals (rows) and the gradient of every class (columns) behind them; a row shares one scale.

    ``x``: signals ``[S, T]``.  ``gradients`` ``[S, C, T]``.  ``labels`` and ``predicted`` ``[S]``: classes.
    """
    x, gradients = np.asarray(x), np.asarray(gradients)
    figure = Figure(figsize=(3.1 * len(names), 1.55 * len(x) + 0.4), layout="constrained")
    panels = figure.subplots(len(x), len(names), sharex=True, sharey=True, squeeze=False)
    low, high = limits(x)
    steps = np.arange(x.shape[1])
    for row, signal in enumerate(x):
        top = float(np.abs(gradients[row]).max()) or 1.0
        for c, name in enumerate(names):
            axes = panels[row, c]
            shade = strip(axes, gradients[row, c], steps, low, high, {"cmap": SIGNED, "vmin": -top, "vmax": top})
            axes.plot(signal, color=INK, linewidth=1.1)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(f"gradient of “{name}”", fontsize=10)
            _frame(axes, c == predicted[row])
        panels[row, 0].set_ylabel(f"sample {row + 1}\ntrue: {names[labels[row]]}", fontsize=9)
        figure.colorbar(shade, ax=list(panels[row]), label="gradient", fraction=0.02, pad=0.01)
    for axes in panels[-1]:
        axes.set_xlabel("time step")
    return figure


def image_samples(
    x: np.ndarray, gradients: np.ndarray, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> Figure:
    """Single images (rows): the image, then the gradient of every class; a row shares one scale.

    ``x``: images ``[S, H, W]``.  ``gradients`` ``[S, C, H, W]``.  ``labels`` and ``predicted`` ``[S]``: classes.
    """
    x, gradients = np.asarray(x), np.asarray(gradients)
    figure = Figure(figsize=(0.98 * (len(names) + 1), 1.02 * len(x) + 0.3))
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.02, wspace=0.02, hspace=0.02))
    panels = figure.subplots(len(x), len(names) + 1, squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    for row, image in enumerate(x):
        top = float(np.abs(gradients[row]).max()) or 1.0
        panels[row, 0].imshow(image, cmap="gray_r")
        panels[row, 0].set_ylabel(f"true: {names[labels[row]]}", fontsize=9)
        for c, name in enumerate(names):
            axes = panels[row, c + 1]
            shade = axes.imshow(gradients[row, c], cmap=SIGNED, vmin=-top, vmax=top)
            _frame(axes, c == predicted[row])
            if row == 0:
                axes.set_title(name, fontsize=10)
        figure.colorbar(shade, ax=list(panels[row]), label="gradient", fraction=0.02, pad=0.01)
    panels[0, 0].set_title("image", fontsize=10)
    return figure


def _frame(axes: Axes, predicted: bool) -> None:
    """A heavy frame marks the class that the network predicts."""
    for spine in axes.spines.values():
        spine.set_visible(predicted or spine.get_visible())
        spine.set(linewidth=2.2 if predicted else 0.6, edgecolor=ACCENT if predicted else PALE)
