"""Figures of dataset runs, for samples of any shape: signals ``[T]``, ``[C, T]``, images ``[H, W]``, ``[C, H, W]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ..data import Curve
from .figures import ACCENT, INK, MAGNITUDE, SIGNED, image_grid, outline

SMALLEST_IMAGE = 5  # rows or columns: anything thinner is drawn as a line per row


def flat(values: np.ndarray) -> np.ndarray:
    """``[T]`` or ``[H, W]`` of one sample's values: channels are summed."""
    values = np.squeeze(np.asarray(values, dtype=float))
    if values.ndim <= 1:
        return np.atleast_1d(values)
    if values.ndim == 2:
        return values if min(values.shape) >= SMALLEST_IMAGE else values.sum(0)
    return flat(values.sum(0))


def coverage(finished: set[int], chunks: int) -> Figure:
    """A stripe of all chunks, the finished ones filled."""
    figure = Figure(figsize=(9, 0.7), layout="constrained")
    axes = figure.add_subplot()
    done = np.isin(np.arange(chunks), sorted(finished)).astype(float)
    axes.imshow(done[None], aspect="auto", cmap=MAGNITUDE, vmin=0, vmax=1.4, interpolation="nearest")
    axes.set(yticks=[], xlabel="chunk")
    return figure


def scores(values: np.ndarray, names: Sequence[str], low: np.ndarray | None, high: np.ndarray | None) -> Figure:
    """Scores ``[C, *in]`` per output: lines with their intervals, or images."""
    drawn = [flat(v) for v in values]
    if drawn[0].ndim == 2:
        return image_grid(drawn, names, "score")[0]
    figure = Figure(figsize=(9, 1.5 * len(names) + 0.4), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for c, (axes, name) in enumerate(zip(panels, names, strict=True)):
        steps = np.arange(len(drawn[c]))
        if low is not None and high is not None:
            axes.fill_between(steps, flat(low[c]), flat(high[c]), color=ACCENT, alpha=0.3, linewidth=0, step="mid")
        axes.step(steps, drawn[c], where="mid", color=INK, linewidth=1.1)
        axes.set_title(name, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    highest = [float(np.nanmax(d, initial=0.0)) for d in (*drawn, *([] if high is None else map(flat, high)))]
    panels[0].set_ylim(0, 1.05 * max(highest) or 1.0)
    panels[-1].set_xlabel("feature")
    return figure


def extremes(
    maps: np.ndarray, inputs: np.ndarray | None, titles: Sequence[Sequence[str]], names: Sequence[str]
) -> Figure:
    """Maps ``[R, 2, *in]`` of R outputs, typical left and atypical right, over the samples themselves (``inputs``)."""
    height = 2.3 if flat(maps[0, 0]).ndim == 2 else 1.6
    figure = Figure(figsize=(9, height * len(maps) + 0.3), layout="constrained")
    panels = figure.subplots(len(maps), 2, squeeze=False)
    for row in range(len(maps)):
        for column in range(2):
            axes, values = panels[row, column], flat(maps[row, column])
            shade = _one_map(axes, values, None if inputs is None else flat(inputs[row, column]))
            figure.colorbar(shade, ax=axes, label="attribution", fraction=0.03, pad=0.01)
            axes.set_title(titles[row][column], fontsize=9, loc="left")
        panels[row, 0].set_ylabel(names[row], fontsize=9)
    return figure


def _one_map(axes: Axes, values: np.ndarray, sample: np.ndarray | None) -> AxesImage:
    top = float(np.abs(values).max()) or 1.0
    signed = bool((values < 0).any())
    style: dict[str, Any] = {"cmap": SIGNED if signed else MAGNITUDE, "vmin": -top if signed else 0.0, "vmax": top}
    if values.ndim == 2:
        shade = axes.imshow(values, **style)
        axes.set(xticks=[], yticks=[])
        if sample is not None:
            outline(axes, sample)
        return shade
    low, high = (0.0, 1.0) if sample is None else (float(sample.min()), float(sample.max()) or 1.0)
    margin = 0.05 * (high - low) or 1.0
    extent = (-0.5, len(values) - 0.5, low - margin, high + margin)
    shade = axes.imshow(values[None], aspect="auto", extent=extent, interpolation="nearest", zorder=0, **style)
    if sample is None:
        axes.set_yticks([])
    else:
        axes.plot(sample, color=INK, linewidth=1.0)
    axes.spines[["top", "right"]].set_visible(False)
    return shade


def curves(curve: Curve) -> Figure:
    """Deletion and insertion, each against features in random order."""
    figure = Figure(figsize=(9, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, ranked, random in (
        (left, "deletion", curve.deletion, curve.random_deletion),
        (right, "insertion", curve.insertion, curve.random_insertion),
    ):
        axes.plot(curve.shares, random, color="#7b8792", linestyle="--", label="random order")
        axes.plot(curve.shares, ranked, color=ACCENT, linewidth=2, marker="o", markersize=3, label="by importance")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("share of the features")
        axes.set_xlim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(curve.measure)
    left.legend(frameon=False)
    return figure
