"""`gradkern.importance`: a ranking of the features that a model's outputs depend on, and measures of its quality.

The score of a feature is the mean |gradient| over the data set, times the feature's own standard deviation: how much
an output moves when the feature moves as it does in the data.  Samples are divided into groups by their index; the
bootstrap draws groups, and the two halves are the even and the odd groups, so no map has to be kept.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from ..util.buffers import buffers_kept
from ..util.options import BadValue
from ..util.outputs import OneOutput, Output
from ..util.samples import spread_indices
from . import statistics
from .runs.forecast import Forecast
from .runs.planning import plan
from .runs.probe import device_of
from .runs.runner import run
from .runs.settings import CommonOptions
from .sources import Source, open_source
from .sources.padding import Pad
from .statistics import GROUPS, finite_rows
from .store.labels import of_rows
from .store.results import Results

PART_BYTES = 64 << 20  # the most bytes of statistics in one pass over the data
TRACK_BYTES = 16 << 20  # the most bytes for the orders of features of the samples that are tracked at a time
MOST_TRACKED = 64  # the most such samples: a forward pass of the live model, whose memory is not measured
BLOCK = 4096  # features whose bootstrap is drawn at a time
SPREAD = ("sum_group_inputs", "deviations_group_inputs", "sum_group_inputs_square", "sum_group_abs")
STEPS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85, 1.0)
RANDOM_ORDERS = 3
OF_A_RUN: dict[str, Any] = {"method": "jacobian", "maps": False, "reductions": ("mean_abs", "importance")}


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
    ``counts`` ``[C]``, the samples behind each row; ``means`` ``[*in]`` of the features.  ``nonfinite``: samples with
    NaN or Inf, which were left out or counted in as the run's ``nonfinite`` says.  ``names`` of the rows.
    """

    scores: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ranking: np.ndarray
    agreement: np.ndarray
    counts: np.ndarray
    level: float
    means: np.ndarray
    curve: Curve | None = None
    nonfinite: int = 0
    names: tuple[str, ...] = ()

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

    def unranked(self, c: int) -> str | None:
        """Why the features have no order for a row; None if they have one."""
        if not self.counts[c]:
            return "no sample has it among its targets"
        return None if np.nansum(self.scores[c]) > 0 else "depends on no feature"

    def __str__(self) -> str:
        lines = []
        for c, features in enumerate(self.top(5)):
            names = ", ".join(position_text(f, self.scores.shape[1:]) for f in features)
            name = self.names[c] if self.names else f"output {c}"
            order = f"features {names}   (halves agree to {self.agreement[c]:.2f})"
            lines.append(f"{name}: {self.unranked(c) or order}")
        if self.nonfinite:
            lines.append(f"{self.nonfinite} samples are not finite")
        if self.curve is not None:
            lines.append("deletion and insertion against random order: {:+.3f} {:+.3f}".format(*self.curve.gain))
        return "\n".join(lines)


def position_text(index: Sequence[int], shape: Sequence[int]) -> str:
    """A feature's position as text, without the axes of length one."""
    kept = [str(int(i)) for i, size in zip(index, shape, strict=True) if size > 1]
    return kept[0] if len(kept) == 1 else "(" + ",".join(kept) + ")" if kept else "0"


def importance(
    model: nn.Module, source: Any, out: str | Path | None = None, targets: Any = None, *, columns: Any = None,
    input_dtype: torch.dtype | None = None, level: float = 0.95, draws: int = 200, curve_samples: int = 256,
    progress: bool | None = None, output: Output = None, pad: Pad | None = None,
    names: Sequence[str] | None = None, **options: Unpack[CommonOptions],
) -> Importance:  # fmt: skip
    """Rank the features of a data set by their effect on the model's outputs, without storing any map.

    ``out``: the store of the run, which can then be resumed like that of `gradkern.run`; without it, nothing is kept.
    ``targets`` as in `gradkern.jacobian`.  ``level`` and ``draws``: of the bootstrap intervals.  ``curve_samples``: the
    number of samples for the deletion and insertion curves (0: no curves).  ``names``: of the model's outputs, or of
    the targets.  The other arguments, and ``options``, go to `gradkern.run`.

    Memory is bounded: if the statistics of all outputs would take more than 64 MiB, the outputs are divided into parts,
    each with its own pass over the data.  (With ``out``, or targets that differ by sample, there is one pass.)
    """
    rows = _ranked_source(model, source, columns, input_dtype, pad)

    def run_part(place: str | Path, targets: Any, names: Sequence[str] | None) -> Importance:
        results = run(
            model, rows, place, targets=targets, progress=progress, output=output, names=names, **OF_A_RUN, **options
        )
        return of_results(results, level=level, draws=draws)

    one = model if output is None else OneOutput(model, output)
    with tempfile.TemporaryDirectory(prefix="gradkern-") as folder:
        parts = [(targets, names)] if out is not None else _parts(one, rows, targets, names)
        computed = [run_part(Path(folder, f"{i}.zarr") if out is None else out, *part) for i, part in enumerate(parts)]
    whole = computed[0] if len(computed) == 1 else _join_parts(computed)
    if not curve_samples:
        return whole
    return replace(whole, curve=curve(one, rows, whole.ranking, whole.means, curve_samples))


def plan_importance(
    model: nn.Module, source: Any, out: str | Path | None = None, targets: Any = None, *, columns: Any = None,
    input_dtype: torch.dtype | None = None, output: Output = None, pad: Pad | None = None,
    names: Sequence[str] | None = None, **options: Unpack[CommonOptions],
) -> Forecast:  # fmt: skip
    """The size, memory and time of `importance` with the same arguments, from running a few samples.

    Its time is that of all passes over the data, without the curves.
    """
    rows = _ranked_source(model, source, columns, input_dtype, pad)
    one = model if output is None else OneOutput(model, output)
    parts = [(targets, names)] if out is not None else _parts(one, rows, targets, names)
    given: dict[str, Any] = {"targets": parts[0][0], "names": parts[0][1], "output": output, **OF_A_RUN, **options}
    forecast = plan(model, rows, out, **given)
    return replace(forecast, rate=forecast.rate / len(parts))


def _ranked_source(
    model: nn.Module, source: Any, columns: Any, input_dtype: torch.dtype | None, pad: Pad | None
) -> Source:
    """The source, after a check that it has samples and one input to rank the features of."""
    rows = open_source(source, columns, input_dtype, pad).for_model(model)
    if rows.samples < 2:
        raise BadValue("importance: got one sample, expected several: a score needs the feature's standard deviation.")
    floating = sum(x.is_floating_point() for x in rows.read(0, 1))
    if floating != 1:
        raise BadValue(
            f"importance: the source has {floating} floating inputs, expected one, whose features are ranked. With "
            "several use gradkern.run(..., reductions=['importance']), which keeps a score for each; whole numbers "
            "become floating with input_dtype=torch.float32 (--input-dtype float32)."
        )
    return rows


def _parts(
    model: nn.Module, source: Source, targets: Any, names: Sequence[str] | None
) -> list[tuple[Any, Sequence[str] | None]]:
    """The outputs and their names, in parts whose statistics take at most `PART_BYTES` each.  Every part takes a pass
    over the data."""
    if not (targets is None or (isinstance(targets, (list, range)) and all(isinstance(t, int) for t in targets))):
        return [(targets, names)]
    inputs = tuple(x.to(device_of(model)) for x in source.read(0, 1))
    with torch.no_grad(), buffers_kept(model):
        outputs = model(*inputs)
    wanted = list(range(outputs[0].numel())) if targets is None else list(targets)
    features = sum(x.numel() for x in inputs if x.is_floating_point())
    size = max(1, PART_BYTES // max(1, 8 * (GROUPS + 1) * features))
    if size >= len(wanted):
        return [(targets, names)]
    if names is not None:
        names = of_rows(names, np.array(wanted), outputs.shape[1:])
    parts = range(0, len(wanted), size)
    return [(wanted[i : i + size], None if names is None else names[i : i + size]) for i in parts]


def _join_parts(parts: Sequence[Importance]) -> Importance:
    """The importance for the outputs of all parts."""
    fields = ("scores", "low", "high", "ranking", "agreement", "counts")
    joined: dict[str, Any] = {name: np.concatenate([getattr(p, name) for p in parts]) for name in fields}
    names = tuple(name for p in parts for name in p.names)
    return replace(parts[0], **joined, nonfinite=max(p.nonfinite for p in parts), names=names)


def of_results(
    results: Results, model: nn.Module | None = None, source: Source | None = None, level: float = 0.95,
    draws: int = 200, curve_samples: int = 256,
) -> Importance:  # fmt: skip
    """The importance in a finished store that was made with the reduction ``"importance"``."""
    if "importance" not in results.reductions:
        raise BadValue(f"{results.place} was made without the reduction 'importance'.")
    if len(results.inputs) != 1:
        raise BadValue(f"importance: the model has {len(results.inputs)} floating inputs, expected one.")
    total = results.ledger.total()
    if total is None:
        raise BadValue(
            f"{results.place}: {results.finished_chunks} of {results.chunks} chunks are finished, expected all."
        )
    name = results.inputs[0]
    if not total.sums[f"{name}/count_group_inputs"].any():
        raise BadValue(f"importance: none of the {results.samples} samples is finite, so there is nothing to rank.")
    sums = {k.removeprefix(name + "/"): v for k, v in total.sums.items()}
    scores = statistics.scores(sums, np.ones(GROUPS))
    low, high = _bootstrap(sums, level, draws)
    flat = scores.reshape(len(scores), -1)
    ranking = np.argsort(-np.nan_to_num(flat, nan=-1.0), axis=1, kind="stable")
    even = np.arange(GROUPS) % 2 == 0
    first, second = (statistics.scores(sums, w.astype(float)).reshape(flat.shape) for w in (even, ~even))
    agreement = np.array([_spearman(a, b) for a, b in zip(first, second, strict=True)])
    means = sums["sum_group_inputs"].sum(0) / sums["count_group_inputs"].sum()
    curves = None
    if model is not None and source is not None and curve_samples:
        curves = curve(model, source, ranking, means, curve_samples)
    counts, nonfinite = sums["count_group"].sum(0), int(total.facts.get("nonfinite", 0))
    named = tuple(results.row_names())
    return Importance(scores, low, high, ranking, agreement, counts, level, means, curves, nonfinite, named)


def _bootstrap(sums: Mapping[str, np.ndarray], level: float, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of the scores over draws of groups, each ``[C, *in]``; the features' spread is drawn with them."""
    if not 0 < level < 1 or draws < 2:
        raise BadValue(f"importance: got level={level!r}, draws={draws!r}, expected 0 < level < 1 and draws > 1.")
    used = np.flatnonzero(sums["count_group_inputs"])  # a small data set fills only some groups
    drawn = np.random.default_rng(0).multinomial(len(used), [1 / len(used)] * len(used), size=draws)  # [D, used]
    weights = np.zeros((draws, GROUPS))
    weights[:, used] = drawn
    shape, classes = sums["sum_group_inputs"].shape[1:], sums["sum_group_abs"].shape[1]
    given = {name: sums[name] for name in SPREAD if name in sums}
    by_group = {name: value.reshape(*value.shape[: -len(shape) or None], -1) for name, value in given.items()}
    counted = weights @ sums["count_group"]  # [D, C]
    ends = np.full((2, classes, math.prod(shape)), np.nan)
    for at in range(0, ends.shape[2], BLOCK):  # some features at a time: [D, BLOCK] for every draw
        part = slice(at, at + BLOCK)
        few = {name: value[..., part] for name, value in by_group.items()}
        spreads = statistics.spread(few | {"count_group_inputs": sums["count_group_inputs"]}, weights)
        for c in range(classes):
            valid = counted[:, c] > 0
            if valid.any():
                means = (weights @ few["sum_group_abs"][:, c])[valid] / counted[valid, c][:, None]
                ends[:, c, part] = _quantiles(means * spreads[valid], ((1 - level) / 2, (1 + level) / 2))
    low, high = ends.reshape(2, classes, *shape)
    return low, high


def _quantiles(values: np.ndarray, shares: Sequence[float]) -> list[np.ndarray]:
    """`np.quantile` over the first axis of ``[D, F]``, which sorts faster along contiguous memory."""
    rows = np.sort(np.ascontiguousarray(values.T), axis=1)  # NaN comes last
    nan, quantiles = np.isnan(rows[:, -1]), []
    for share in shares:
        place = share * (rows.shape[1] - 1)
        low = math.floor(place)
        high = min(low + 1, rows.shape[1] - 1)
        quantiles.append(np.where(nan, np.nan, rows[:, low] + (rows[:, high] - rows[:, low]) * (place - low)))
    return quantiles


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


def curve(model: nn.Module, source: Source, ranking: np.ndarray, mean: np.ndarray, samples: int) -> Curve | None:
    """Deletion and insertion curves of ``ranking`` [C, F], with ``mean`` [*in] in place of a missing feature.

    The features are those of the only floating input; other inputs stay as they are.  Samples that are not finite, or
    whose outputs are not, are left out; None if all are, or the mean is not.
    """
    parts = [source.read(i, i + 1) for i in spread_indices(source.samples, samples)]
    device = device_of(model)
    inputs = [torch.cat(column).to(device) for column in zip(*parts, strict=True)]
    which = [i for i, t in enumerate(inputs) if t.is_floating_point()]
    if len(which) != 1:
        raise BadValue(f"curve: the model has {len(which)} floating inputs, expected one.")
    x = inputs[which[0]]  # [n, *in]
    baseline = torch.as_tensor(mean).to(x)

    def outputs(x: Tensor, rows: slice = slice(None)) -> Tensor:
        with torch.no_grad():
            y = model(*(x if i == which[0] else t[rows] for i, t in enumerate(inputs)))
        return y.reshape(len(y), -1)  # [n, C], of one output also [N]

    features = x[0].numel()
    size = max(1, min(MOST_TRACKED, TRACK_BYTES // (features * 8)))
    y = torch.cat([outputs(x[i : i + size], slice(i, i + size)) for i in range(0, len(x), size)])
    finite = finite_rows(x) & finite_rows(y)
    inputs, x, y = [t[finite] for t in inputs], x[finite], y[finite]
    if not len(x) or not baseline.isfinite().all():
        return None
    kind = "prediction unchanged" if y.shape[1] > 1 else "R²"
    rows = y.argmax(1).cpu().numpy() if y.shape[1] == len(ranking) else np.zeros(len(y), dtype=int)
    generator = torch.Generator().manual_seed(0)
    shares = np.array(sorted({math.ceil(s * features) / features for s in STEPS}))
    blocks = [slice(i, i + size) for i in range(0, len(x), size)]

    def both(order_of: Callable[[slice], Tensor]) -> np.ndarray:
        """Deletion and insertion ``[2, P]`` for the order ``[n, F]`` of each block of samples."""
        tracked = []
        for block in blocks:
            order = order_of(block).to(device)
            of_block = partial(outputs, rows=block)
            tracked.append([_track(of_block, x[block], baseline, order, shares, insert) for insert in (False, True)])
        joined = [torch.cat([t[k] for t in tracked], dim=1) for k in (0, 1)]  # [P, n, C] each
        return np.array([[_holds(y, now) for now in track] for track in joined])

    def drawn(block: slice) -> Tensor:
        return torch.stack([torch.randperm(features, generator=generator) for _ in range(len(x[block]))])

    curves = both(lambda block: torch.as_tensor(ranking[rows[block]]))  # the ranking of the predicted class
    random = np.mean([both(drawn) for _ in range(RANDOM_ORDERS)], axis=0)
    return Curve(shares, curves[0], curves[1], random[0], random[1], len(x), kind)


def _track(
    model: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, order: Tensor, shares: np.ndarray, insert: bool
) -> Tensor:
    """The outputs ``[P, n, C]``, step by step, for features replaced (or inserted) in ``order`` [n, F]."""
    start, end = (baseline.expand_as(x), x) if insert else (x, baseline.expand_as(x))
    outputs = []
    for share in shares:
        chosen = order[:, : round(share * order.shape[1])]
        mask = torch.zeros(x.shape[0], order.shape[1], dtype=torch.bool, device=x.device).scatter_(1, chosen, True)
        outputs.append(model(torch.where(mask.view_as(x), end, start)))
    return torch.stack(outputs)


def _holds(y: Tensor, now: Tensor) -> float:
    if y.shape[1] > 1:
        return float((y.argmax(1) == now.argmax(1)).double().mean())
    spread = float((y - y.mean()).square().sum())
    return 1.0 - float((y - now).square().sum()) / spread if spread else float("nan")
