"""`gradkern.importance`: a ranking of the features that a model's outputs depend on, and measures of its quality.

The score of a feature is the mean |gradient| over the data set, times the feature's own standard deviation: how much
an output moves when the feature moves as it does in the data.  Samples are divided into groups by their index; the
bootstrap draws groups, and the two halves are the even and the odd groups, so no map has to be kept.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..util.options import BadValue
from ..util.outputs import OneOutput, Output
from . import statistics
from .runs.probe import device_of
from .runs.runner import run
from .sources import Source, open_source
from .statistics import GROUPS
from .store.results import Results

STEPS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85, 1.0)
RANDOM_ORDERS = 3


@dataclass(frozen=True)
class Curve:
    """The predictions when features are replaced by their mean, or inserted into a sample of means.

    ``shares`` [P] of the features, most important first.  The four curves [P] hold the share of samples whose
    prediction (the highest output) is still that of the unchanged sample; for a single output, R².  A ranking is good
    if ``deletion`` falls faster and ``insertion`` rises faster than with features in random order.
    """

    shares: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray
    random_deletion: np.ndarray
    random_insertion: np.ndarray
    samples: int
    measure: str

    @property
    def gain(self) -> tuple[float, float]:
        """Area between ranking and random order, for deletion and for insertion; 0 is no better than random."""
        return (
            float(np.trapezoid(self.random_deletion - self.deletion, self.shares)),
            float(np.trapezoid(self.insertion - self.random_insertion, self.shares)),
        )


@dataclass(frozen=True)
class Importance:
    """Scores and their stability.  Features are numbered row-major over a sample's shape.

    ``scores``, ``low``, ``high`` ``[C, *in]`` with the bootstrap interval of ``level``; ``ranking`` ``[C, F]``, most
    important first; ``agreement`` ``[C]``, Spearman's rank correlation between the two halves of the data;
    ``counts`` ``[C]``, the samples behind each row.
    """

    scores: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ranking: np.ndarray
    agreement: np.ndarray
    counts: np.ndarray
    level: float
    curve: Curve | None = None

    @property
    def overall(self) -> np.ndarray:
        """One score per feature ``[*in]``: the largest over the classes, each class scaled to its own largest."""
        flat = self.scores.reshape(len(self.scores), -1)
        top = np.nanmax(flat, axis=1, keepdims=True)
        return np.nanmax(flat / np.where(top > 0, top, 1), axis=0).reshape(self.scores.shape[1:])

    def top(self, k: int = 10) -> list[list[tuple[int, ...]]]:
        """Per class, the positions of its k most important features."""
        shape = self.scores.shape[1:]
        return [[tuple(int(i) for i in np.unravel_index(f, shape)) for f in row[:k]] for row in self.ranking]

    def select(self, k: int) -> np.ndarray:
        """A mask ``[*in]`` of the k features that matter most to any class."""
        overall = self.overall
        if not 1 <= k <= overall.size:
            raise BadValue(f"select(k): got {k!r}, expected 1 … {overall.size}.")
        mask = np.zeros(overall.size, dtype=bool)
        mask[np.argsort(-overall.ravel(), kind="stable")[:k]] = True
        return mask.reshape(overall.shape)

    def __str__(self) -> str:
        lines = []
        for c, features in enumerate(self.top(5)):
            names = ", ".join(position_text(f, self.scores.shape[1:]) for f in features)
            lines.append(f"output {c}: features {names}   (halves agree to {self.agreement[c]:.2f})")
        if self.curve is not None:
            lines.append("deletion and insertion against random order: {:+.3f} {:+.3f}".format(*self.curve.gain))
        return "\n".join(lines)


def position_text(index: Sequence[int], shape: Sequence[int]) -> str:
    """A feature's position for people: without the axes of length one."""
    kept = [str(int(i)) for i, size in zip(index, shape, strict=True) if size > 1]
    return kept[0] if len(kept) == 1 else "(" + ",".join(kept) + ")" if kept else "0"


def importance(
    model: nn.Module, source: Any, out: str | Path | None = None, *, targets: Any = None, columns: Any = None,
    input_dtype: torch.dtype | None = None, level: float = 0.95, draws: int = 200, curve_samples: int = 256,
    progress: bool | None = None, output: Output = None, **options: Any,
) -> Importance:  # fmt: skip
    """Rank the features of a data set by their effect on the model's outputs, without storing any map.

    ``out`` keeps the run (it then resumes, as `gradkern.run` does); without it, nothing is kept.  ``level`` and
    ``draws`` belong to the bootstrap; ``curve_samples`` is the number of samples for the deletion and insertion curves
    (0: no curves).  ``output`` (of a model that returns several) and ``options`` go to `gradkern.run`.
    """
    rows = open_source(source, columns, input_dtype)
    with tempfile.TemporaryDirectory(prefix="gradkern-") as folder:
        place = Path(folder, "run.zarr") if out is None else out
        results = run(
            model, rows, place, "jacobian", targets, maps=False, reductions=("mean_abs", "importance"),
            progress=progress, output=output, **options,
        )  # fmt: skip
        model = model if output is None else OneOutput(model, output)
        return of_results(results, model if curve_samples else None, rows, level, draws, curve_samples)


def of_results(
    results: Results, model: nn.Module | None = None, source: Source | None = None, level: float = 0.95,
    draws: int = 200, curve_samples: int = 256,
) -> Importance:  # fmt: skip
    """The importance in a finished store that was made with the reduction ``"importance"``."""
    if "importance" not in results.about["reductions"]:
        raise BadValue(f"{results.place} was made without the reduction 'importance'.")
    if len(results.about["inputs"]) != 1:
        raise BadValue(f"importance: the model has {len(results.about['inputs'])} floating inputs, expected one.")
    total = results.ledger.total()
    if total is None:
        raise BadValue(f"{results.place}: {results.done} of {results.chunks} chunks are finished, expected all.")
    name = results.about["inputs"][0]
    sums = {k.removeprefix(name + "/"): v for k, v in total.sums.items()}
    scores = statistics.scores(sums, np.ones(GROUPS))
    low, high = _bootstrap(sums, level, draws)
    flat = scores.reshape(len(scores), -1)
    ranking = np.argsort(-np.nan_to_num(flat, nan=-1.0), axis=1, kind="stable")
    even = np.arange(GROUPS) % 2 == 0
    first, second = (statistics.scores(sums, w.astype(float)).reshape(flat.shape) for w in (even, ~even))
    agreement = np.array([_spearman(a, b) for a, b in zip(first, second, strict=True)])
    curves = None
    if model is not None and source is not None and curve_samples:
        mean = sums["sum_group_inputs"].sum(0) / sums["count_group_inputs"].sum()
        curves = curve(model, source, ranking, mean, curve_samples)
    return Importance(scores, low, high, ranking, agreement, sums["count_group"].sum(0), level, curves)


def _bootstrap(sums: Mapping[str, np.ndarray], level: float, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of the scores over draws of groups, each ``[C, *in]``; the features' spread is drawn with them."""
    if not 0 < level < 1 or draws < 2:
        raise BadValue(f"importance: got level={level!r}, draws={draws!r}, expected 0 < level < 1 and draws > 1.")
    used = np.flatnonzero(sums["count_group_inputs"])  # a small data set fills only some groups
    drawn = np.random.default_rng(0).multinomial(len(used), [1 / len(used)] * len(used), size=draws)  # [D, used]
    weights = np.zeros((draws, GROUPS))
    weights[:, used] = drawn
    spreads = np.stack([statistics.spread(sums, w) for w in weights])  # [D, *in]
    ends = [(1 - level) / 2, (1 + level) / 2]
    pairs = []
    for c in range(sums["sum_group_abs"].shape[1]):  # class by class: D maps at a time
        n = weights @ sums["count_group"][:, c]  # [D]
        valid = n > 0
        means = np.tensordot(weights, sums["sum_group_abs"][:, c], 1)[valid] / n[valid].reshape(
            -1, *[1] * (spreads.ndim - 1)
        )
        empty = np.full((2, *spreads.shape[1:]), np.nan)
        pairs.append(np.quantile(means * spreads[valid], ends, axis=0) if valid.any() else empty)
    low, high = np.stack(pairs, axis=1)  # each [C, *in]
    return low, high


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or a.size < 2:
        return float("nan")
    first, second = _average_ranks(a), _average_ranks(b)
    if min(first.std(), second.std()) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _average_ranks(v: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


# ---------------------------------------------------------------------------------------------------------------
# Curves


def curve(model: nn.Module, source: Source, ranking: np.ndarray, mean: np.ndarray, samples: int) -> Curve:
    """Deletion and insertion curves of ``ranking`` [C, F], with ``mean`` [*in] in place of a missing feature."""
    samples_read = np.unique(np.linspace(0, source.samples - 1, min(samples, source.samples)).astype(int))
    parts = [source.read(int(i), int(i) + 1) for i in samples_read]
    if len(parts[0]) != 1:
        raise BadValue(f"curve: the model has {len(parts[0])} inputs, expected one.")
    device = device_of(model)
    x = torch.cat([p[0] for p in parts]).to(device)  # [n, *in]
    baseline = torch.as_tensor(mean).to(x)
    with torch.no_grad():
        y = model(x).flatten(1)  # [n, C]
    kind = "prediction unchanged" if y.shape[1] > 1 else "R²"
    rows = y.argmax(1).cpu().numpy() if y.shape[1] == len(ranking) else np.zeros(len(y), dtype=int)
    orders = [torch.as_tensor(ranking[rows], device=device)]  # [n, F]: the ranking of the predicted class
    generator, features = torch.Generator().manual_seed(0), ranking.shape[1]
    for _ in range(RANDOM_ORDERS):
        orders.append(torch.stack([torch.randperm(features, generator=generator) for _ in range(len(x))]).to(device))
    shares = np.array(sorted({math.ceil(s * features) / features for s in STEPS}))
    both = [[_track(model, x, baseline, y, order, shares, insert) for insert in (False, True)] for order in orders]
    random = np.mean(both[1:], axis=0)
    return Curve(shares, both[0][0], both[0][1], random[0], random[1], len(x), kind)


def _track(
    model: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, y: Tensor, order: Tensor,
    shares: np.ndarray, insert: bool,
) -> np.ndarray:  # fmt: skip
    """The share of unchanged predictions, step by step, for features in ``order`` [n, F]."""
    start, end = (baseline.expand_as(x), x) if insert else (x, baseline.expand_as(x))
    held = []
    for share in shares:
        chosen = order[:, : round(share * order.shape[1])]
        mask = torch.zeros(x.shape[0], order.shape[1], dtype=torch.bool, device=x.device).scatter_(1, chosen, True)
        with torch.no_grad():
            now = model(torch.where(mask.view_as(x), end, start)).flatten(1)
        held.append(_holds(y, now))
    return np.array(held)


def _holds(y: Tensor, now: Tensor) -> float:
    if y.shape[1] > 1:
        return float((y.argmax(1) == now.argmax(1)).double().mean())
    spread = float((y - y.mean()).square().sum())
    return 1.0 - float((y - now).square().sum()) / spread if spread else float("nan")
