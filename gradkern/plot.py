"""Pictures of attributions: heat strips under signals, images, sequence logos, and matrices of outputs and features.

Every function takes arrays or tensors of **one** sample or of a mean over samples, with the outputs first, as
`gradkern.jacobian` and ``attribute_all`` give them, and returns a matplotlib figure (``figure.savefig("a.png")``; a
notebook shows it).  All panels of a figure share one scale.  Signed values go from blue to red, symmetric about zero;
values of one sign go from white to orange; both can be told apart by colour-blind readers.  Where there are more
outputs than a figure can hold, those with the largest mean absolute attribution are drawn, and the title says so.

Needs matplotlib, and `logo` needs logomaker: ``pip install 'gradkern[plot]'``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError(f"gradkern.plot needs matplotlib ({error}): pip install 'gradkern[plot]'") from error

from .util.options import BadValue

MAGNITUDE, SIGNED = "Oranges", "RdBu_r"
INK, ACCENT, PALE = "#1d2329", "#c2560c", "#b8c4cf"
MOST_PANELS = 12
MOST_CELLS = 1200  # columns or rows of a matrix; a figure has no more pixels to show them

__all__ = ["image", "logo", "matrix", "signal"]


def signal(
    attributions: Any, data: Any = None, *, names: Sequence[str] | None = None, x: Any = None, xlabel: str = "position"
) -> Figure:
    """One panel per output: its attributions as a heat strip behind the signal.

    ``attributions``: ``[C, T]`` or ``[C, channels, T]``, one output also ``[T]``.  Channels are summed, as attributions
    of one position add up.  ``data``: the signal, ``[T]`` or ``[channels, T]``, drawn as one line per channel.
    ``names``: one per output.  ``x``: the coordinates of the T positions.  Raises `BadValue` if shapes do not fit.
    """
    values = _outputs(attributions, 2)  # [C, T]
    lines = np.zeros((0, values.shape[-1])) if data is None else np.atleast_2d(_array(data))  # [channels, T]
    if lines.ndim != 2 or lines.shape[-1] != values.shape[-1]:
        raise BadValue(f"data has shape {np.shape(data)}, attributions have {values.shape[-1]} positions")
    positions = np.arange(values.shape[-1]) if x is None else _array(x)
    if positions.shape != values.shape[-1:]:
        raise BadValue(f"x has shape {positions.shape}, attributions have {values.shape[-1]} positions")
    shown, labels, note = _largest(values, names, MOST_PANELS)
    figure = Figure(figsize=(9, 1.3 * len(shown) + 0.7), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    style = _scale(values[shown])
    low, high = limits(lines) if len(lines) else (0.0, 1.0)
    for axes, c, label in zip(panels, shown, labels, strict=True):
        shade = strip(axes, values[c], positions, low, high, style)
        for line in lines:
            axes.plot(positions, line, color=INK, linewidth=1.1, alpha=1.0 if len(lines) == 1 else 0.6)
        if not len(lines):
            axes.set_yticks([])
        axes.set_title(label, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(xlabel)
    _finish(figure, shade, list(panels), note)
    return figure


def image(attributions: Any, data: Any = None, *, names: Sequence[str] | None = None, alpha: float = 0.75) -> Figure:
    """The attributions of every output over the image.

    ``attributions``: ``[C, H, W]`` or ``[C, channels, H, W]``, one output also ``[H, W]``; channels are summed.
    ``data``: the image, ``[H, W]``, ``[1, H, W]`` or ``[3, H, W]``; it lies in grey under the attributions, whose
    opacity is ``alpha``.  Raises `BadValue` if shapes do not fit.
    """
    values = _outputs(attributions, 3)  # [C, H, W]
    picture = None if data is None else _grey(data, values.shape[1:])
    shown, labels, note = _largest(values, names, MOST_PANELS)
    columns = min(5, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(1.9 * columns + 0.7, 2.05 * rows + 0.2), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    style = _scale(values[shown])
    for axes, c, label in zip(panels, shown, labels, strict=False):
        if picture is not None:
            axes.imshow(picture, cmap="gray")
        shade = axes.imshow(values[c], alpha=1.0 if picture is None else alpha, **style)
        axes.set_title(label, fontsize=10)
    _finish(figure, shade, panels, note)
    return figure


def matrix(attributions: Any, *, names: Sequence[str] | None = None, features: Sequence[str] | None = None) -> Figure:
    """All outputs (rows) against all features (columns) in one picture.

    ``attributions``: ``[C, *features]``; more axes are flattened.  ``names``, ``features``: labels, of which as many
    are written as fit.  Of more rows or columns than a figure has pixels, neighbours share a cell, which shows the one
    that is largest in magnitude.
    """
    values = _array(attributions)
    if values.ndim < 2:
        raise BadValue(f"a matrix is drawn from [C, *features], not from shape {values.shape}")
    values = values.reshape(len(values), -1)
    cells = _reduce(_reduce(values, 0), 1)
    height = min(max(1.4, 0.22 * len(values)), 8.0)
    figure = Figure(figsize=(9, height + 0.8), layout="constrained")
    axes = figure.subplots()
    extent = (-0.5, values.shape[1] - 0.5, len(values) - 0.5, -0.5)
    shade = axes.imshow(cells, aspect="auto", interpolation="nearest", extent=extent, **_scale(cells))
    _ticks(axes.yaxis, len(values), _names(names, len(values)), 36)
    _ticks(axes.xaxis, values.shape[1], None if features is None else _names(features, values.shape[1]), 12)
    if features is not None:
        axes.tick_params("x", rotation=45)
    axes.set_xlabel("feature")
    _finish(figure, shade, [axes], "")
    return figure


def logo(attributions: Any, *, names: Sequence[str] | None = None, alphabet: str = "ACGT", start: int = 0) -> Figure:
    """Sequence logos: the characters of every position, as tall as their attributions, upside down below zero.

    ``attributions``: ``[C, bases, L]`` or ``[bases, L]``: gradient × input (one base per position) or hypothetical
    contributions (all bases).  ``alphabet``: the characters in the order of the channels.  ``start``: the
    coordinate of the first position.  Drawn by logomaker (Tareen & Kinney, Bioinformatics 2020).
    """
    try:
        import logomaker
        import pandas as pd
    except ImportError as error:
        raise ImportError(f"gradkern.plot.logo needs logomaker ({error}): pip install 'gradkern[plot]'") from error
    values = _array(attributions)
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[1] != len(alphabet):
        raise BadValue(f"a logo is drawn from [C, {len(alphabet)}, L] ({alphabet}), not from shape {values.shape}")
    shown, labels, note = _largest(values, names, MOST_PANELS)
    figure = Figure(
        figsize=(min(max(4.0, 0.14 * values.shape[-1]), 24.0), 1.4 * len(shown) + 0.6), layout="constrained"
    )
    panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    positions = np.arange(start, start + values.shape[-1])
    for axes, c, label in zip(panels, shown, labels, strict=True):
        letters = pd.DataFrame(values[c].T, columns=list(alphabet), index=positions)  # [L, letters]
        logomaker.Logo(letters, ax=axes, color_scheme="colorblind_safe", flip_below=True)
        axes.set_title(label, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    stacks = values[shown].clip(max=0.0).sum(1), values[shown].clip(min=0.0).sum(1)  # [C, L] each: below, above zero
    panels[0].set_ylim(limits(np.stack(stacks)))  # logomaker keeps 1 as the top of panels that share an axis
    panels[-1].set_xlabel("position")
    if note:
        figure.suptitle(note, fontsize=9)
    return figure


def strip(
    axes: Axes, values: np.ndarray, positions: np.ndarray, low: float, high: float, style: dict[str, Any]
) -> AxesImage:
    """Colours the area behind a signal, one stripe per position (values ``[T]``), between ``low`` and ``high``."""
    step = float(positions[-1] - positions[0]) / max(len(positions) - 1, 1) or 1.0
    extent = (float(positions[0]) - step / 2, float(positions[-1]) + step / 2, low, high)
    axes.set_xlim(extent[:2])
    return axes.imshow(values[None], aspect="auto", extent=extent, interpolation="nearest", zorder=0, **style)


# ---------------------------------------------------------------------------------------------------------------
# What is drawn, and at which scale


def _array(values: Any) -> np.ndarray:
    """``values`` as a float64 NumPy array, on the CPU and without a graph."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _outputs(attributions: Any, axes: int) -> np.ndarray:
    """``[C, *positions]`` with ``axes`` axes: one output gets its axis, channels are summed."""
    values = _array(attributions)
    if values.ndim == axes - 1:
        values = values[None]
    if values.ndim == axes + 1:
        values = values.sum(1)
    if values.ndim != axes or values.size == 0:
        places = "T" if axes == 2 else "H, W"
        raise BadValue(
            f"attributions have shape {np.shape(attributions)}; expected [C, {places}] or [C, channels, {places}] of "
            "one sample: pass attributions[i], or their mean over samples"
        )
    return values


def _largest(values: np.ndarray, names: Sequence[str] | None, most: int) -> tuple[np.ndarray, list[str], str]:
    """The outputs to draw, in their order, with their names and a note if some are left out."""
    labels = _names(names, len(values))
    if len(values) <= most:
        return np.arange(len(values)), labels, ""
    size = np.nan_to_num(np.abs(values)).reshape(len(values), -1).mean(1)
    shown = np.sort(np.argsort(-size, kind="stable")[:most])
    note = f"{most} of {len(values)} outputs: those with the largest mean |attribution|"
    return shown, [labels[c] for c in shown], note


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [f"output {c}" for c in range(count)]
    if len(names) != count:
        raise BadValue(f"{len(names)} names for {count}")
    return [str(name) for name in names]


def _scale(values: np.ndarray) -> dict[str, Any]:
    """Colour map and limits that all panels share."""
    finite = values[np.isfinite(values)]
    top = float(np.abs(finite).max(initial=0.0)) or 1.0
    signed = bool((finite < 0).any())
    return {"cmap": SIGNED if signed else MAGNITUDE, "vmin": -top if signed else 0.0, "vmax": top}


def _reduce(values: np.ndarray, axis: int) -> np.ndarray:
    """At most `MOST_CELLS` along an axis: the entry of each span that is largest in magnitude."""
    count = values.shape[axis]
    if count <= MOST_CELLS:
        return values
    edges = np.linspace(0, count, MOST_CELLS + 1).astype(int)[:-1]
    highest, lowest = np.maximum.reduceat(values, edges, axis), np.minimum.reduceat(values, edges, axis)
    return np.where(highest >= -lowest, highest, lowest)


def _grey(data: Any, shape: tuple[int, ...]) -> np.ndarray:
    picture = _array(data)
    picture = picture.mean(0) if picture.ndim == 3 and picture.shape[0] in (1, 3) else picture
    if picture.shape != shape:
        raise BadValue(f"data has shape {np.shape(data)}; expected {shape}, or that with 1 or 3 channels before it")
    return picture


def limits(lines: np.ndarray) -> tuple[float, float]:
    """The range of a panel: that of the signals, and a margin."""
    low, high = float(np.nanmin(lines)), float(np.nanmax(lines))
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _ticks(axis: Any, count: int, labels: list[str] | None, most: int) -> None:
    """Every label where they fit, else some of them at round places."""
    if labels is not None and count <= most:
        axis.set_ticks(range(count), labels)
        return
    axis.set_major_locator(MaxNLocator(most, integer=True))
    if labels is not None:
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: labels[int(value)] if 0 <= value < count and value == int(value) else "")
        )


def _finish(figure: Figure, shade: AxesImage, panels: list[Axes], note: str) -> None:
    figure.colorbar(shade, ax=panels, label="attribution", fraction=0.03, pad=0.01)
    if note:
        figure.suptitle(note, fontsize=9)
