"""Statistics of attributions over samples, taken chunk by chunk and merged exactly, and the reductions based on them.

The *statistics* of two parts of the data merge into one: ``sum``s and ``count``s add (in float64 or int64), ``max``ima
take the larger, and ``deviations`` (squared, from the mean) add together with what lies between the two means.  The
first word of the name says which.  A *reduction* is reported to the user, such as the mean absolute attribution or the
variance.  It names the statistics that it needs and computes its result from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..runtime import ops
from ..util.options import BadValue

GROUPS = 32  # groups of samples, by index; the bootstrap draws groups instead of samples
RANK_BINS = 10  # of the histogram of a feature's rank

#: By the name of a sum of squared deviations from the mean: the sum and the count that give the mean, and the plain sum
#: of squares, which stores of earlier versions have in its place.  Plain sums of squares lose digits where the mean is
#: large, but a run that was begun with them continues with them.
DEVIATIONS = {
    "deviations": ("sum", "count", "sum_square"),
    "deviations_group_inputs": ("sum_group_inputs", "count_group_inputs", "sum_group_inputs_square"),
}

Sums = Mapping[str, np.ndarray]


def merge(a: Sums, b: Sums) -> dict[str, np.ndarray]:
    """The statistics of two neighbouring parts merged."""
    if set(a) != set(b):
        raise ValueError(f"parts with different statistics: {sorted(a)} and {sorted(b)}")
    joined = {}
    for name, left in a.items():
        prefix, own = name[: name.rfind("/") + 1], name.rsplit("/", 1)[-1]
        joined[name] = np.maximum(left, b[name]) if own.startswith("max") else left + b[name]
        if own in DEVIATIONS:
            total, count, _ = (prefix + n for n in DEVIATIONS[own])
            joined[name] += between((a[count], a[total]), (b[count], b[total]))
    return joined


def between(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The squared deviations due to the distance of two parts' means; a part is a count ``[G]`` and a sum ``[G, ...]``.

    Following Chan, Golub and LeVeque (1979); a difference of sums of squares would lose the digits of a large mean.
    """
    n, m = (_column(count, total) for count, total in (a, b))
    weight = n * m / np.maximum(n + m, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        distance = a[1] / np.maximum(n, 1) - b[1] / np.maximum(m, 1)
        return np.where(weight > 0, distance * distance * weight, 0.0)


def _column(count: np.ndarray, of: np.ndarray) -> np.ndarray:
    """A count ``[G]`` along the first axis of ``of`` ``[G, ...]``."""
    return count.reshape(-1, *[1] * (of.ndim - 1))


@dataclass(frozen=True)
class Reduction:
    """``needs``: names of statistics.  ``make(sums) -> [C, *in]`` (or more axes), from the statistics of one input."""

    about: str
    needs: tuple[str, ...]
    make: Callable[[Sums], np.ndarray]


def _divide_by_count(sums: Sums, name: str) -> np.ndarray:
    count = _column(sums["count"], sums[name])
    return sums[name] / np.where(count > 0, count, np.nan)


def _variance(sums: Sums) -> np.ndarray:
    if "sum_square" not in sums:
        return _divide_by_count(sums, "deviations")
    mean = _divide_by_count(sums, "sum")
    return np.maximum(_divide_by_count(sums, "sum_square") - mean * mean, 0.0)


def spread(sums: Sums, weights: np.ndarray) -> np.ndarray:
    """Standard deviation of the inputs ``[*in]`` with every group counted ``weights`` [G] times.

    With weights [D, G]: that of every draw, ``[D, *in]``.
    """
    total, count = sums["sum_group_inputs"], sums["count_group_inputs"]
    n = weights @ count
    n = np.reshape(n, (*n.shape, *[1] * (total.ndim - 1)))
    if "sum_group_inputs_square" in sums:
        square = sums["sum_group_inputs_square"]
    else:
        center = total.sum(0) / max(1, count.sum())
        total = np.where(_column(count, total) > 0, total - _column(count, total) * center, 0.0)
        square = sums["deviations_group_inputs"] + total * total / np.maximum(_column(count, total), 1)
    mean = np.tensordot(weights, total, 1) / n
    return np.sqrt(np.maximum(np.tensordot(weights, square, 1) / n - mean * mean, 0.0))


def scores(sums: Sums, weights: np.ndarray) -> np.ndarray:
    """Mean |attribution| × spread of the feature ``[C, *in]``, every group counted ``weights`` [G] times.

    NaN for a class that no sample belongs to.
    """
    total = np.tensordot(weights, sums["sum_group_abs"], 1)
    n = (weights @ sums["count_group"]).reshape(-1, *[1] * (total.ndim - 1))
    return total / np.where(n > 0, n, np.nan) * spread(sums, weights)


REDUCTIONS: dict[str, Reduction] = {
    "mean_abs": Reduction("mean |attribution|", ("sum_abs",), lambda s: _divide_by_count(s, "sum_abs")),
    "mean": Reduction("mean attribution", ("sum",), lambda s: _divide_by_count(s, "sum")),
    "variance": Reduction("variance of the attribution", ("sum", "deviations"), _variance),
    "max_abs": Reduction("largest |attribution|", ("max_abs",), lambda s: s["max_abs"]),
    "ranks": Reduction(
        f"how often a feature's |attribution| is in each of {RANK_BINS} equal classes of rank, highest first",
        ("count_ranks",), lambda s: s["count_ranks"],
    ),
    "importance": Reduction(
        "mean |attribution| × standard deviation of the feature", ("sum_group_abs", "sum_group_inputs"),
        lambda s: scores(s, np.ones(GROUPS)),
    ),
}  # fmt: skip


def check_reductions(names: Iterable[str]) -> tuple[str, ...]:
    """The requested reductions, in a fixed order."""
    wanted = (names,) if isinstance(names, str) else tuple(names)
    unknown = [n for n in wanted if n not in REDUCTIONS]
    if unknown:
        raise BadValue(f"reductions: got {unknown[0]!r}, expected some of {', '.join(REDUCTIONS)}.")
    return tuple(n for n in REDUCTIONS if n in wanted)


def nbytes(wanted: Iterable[str], classes: int, shape: tuple[int, ...]) -> int:
    """Bytes of the statistics that these reductions need, for one chunk and one input."""
    needs, maps, features = (
        {n for r in wanted for n in REDUCTIONS[r].needs},
        classes * math.prod(shape),
        math.prod(shape),
    )
    numbers = {"count_ranks": RANK_BINS * maps, "sum_group_abs": GROUPS * maps, "max_abs": maps / 2}
    return int(8 * sum(2 * GROUPS * features if n == "sum_group_inputs" else numbers.get(n, maps) for n in needs))


class Accumulator:
    """The statistics of one chunk of one input.

    ``classes`` is C if the targets are outputs common to all samples (the rows are those targets).  If every sample has
    its own targets, it is the number of the model's outputs, and a row goes to the class of its output.  ``squares``:
    take sums of squares in place of deviations, as an earlier version did.
    """

    def __init__(self, wanted: Iterable[str], classes: int, shape: tuple[int, ...], squares: bool = False) -> None:
        needs = {n for r in wanted for n in REDUCTIONS[r].needs}
        self.needs = needs if not squares else {DEVIATIONS[n][2] if n in DEVIATIONS else n for n in needs}
        full = (classes, *shape)
        self.sums: dict[str, Tensor] = {"count": torch.zeros(classes, dtype=torch.int64)}
        for name in sorted(self.needs & {"sum_abs", "sum", "deviations", "sum_square"}):
            self.sums[name] = torch.zeros(full, dtype=torch.float64)
        if "max_abs" in self.needs:
            self.sums["max_abs"] = torch.zeros(full)
        if "count_ranks" in self.needs:
            self.sums["count_ranks"] = torch.zeros(*full, RANK_BINS, dtype=torch.int64)
        if "sum_group_abs" in self.needs:
            self.sums["sum_group_abs"] = torch.zeros(GROUPS, *full, dtype=torch.float64)
            self.sums["count_group"] = torch.zeros(GROUPS, classes, dtype=torch.int64)
        if "sum_group_inputs" in self.needs:
            self.sums["sum_group_inputs"] = torch.zeros(GROUPS, *shape, dtype=torch.float64)
            second = "sum_group_inputs_square" if squares else "deviations_group_inputs"
            self.sums[second] = torch.zeros_like(self.sums["sum_group_inputs"])
            self.sums["count_group_inputs"] = torch.zeros(GROUPS, dtype=torch.int64)

    def running(self, first: int, finite: Tensor, skip: bool) -> ops.Statistics:
        """The sums in the form that kernels add to; `add_counts` must follow.  ``finite [n]``, ``skip``: see
        `ops.Statistics`."""
        groups, of = (torch.arange(len(finite)) + first) % GROUPS, self.sums.get
        sums = of("sum"), of("sum_square"), of("sum_abs"), of("max_abs"), of("sum_group_abs")
        return ops.Statistics(finite, groups, *sums, skip=skip)

    def add_counts(self, first: int, x: Tensor, keep: Tensor | None) -> None:
        """Add everything that `add` adds besides the maps, for targets common to all samples."""
        number = torch.arange(len(x)) if keep is None else keep
        self._add_inputs(first, x if keep is None else x[keep], number)
        self._count(slice(None), (number + first) % GROUPS)

    def add(self, first: int, maps: Tensor, x: Tensor, rows: Tensor | None, keep: Tensor | None = None) -> None:
        """Add samples numbered from ``first`` on: ``maps`` [n, S, *in], ``x`` [n, *in], ``rows`` [n, S] or None.

        ``keep``: the indices of those that count; all if it is None.
        """
        number = torch.arange(len(x)) if keep is None else keep
        if keep is not None:
            maps, x, rows = maps[keep], x[keep], None if rows is None else rows[keep]
        if len(x) == 0:
            return
        self._add_inputs(first, x, number)
        if rows is None:
            self._add(slice(None), first, maps, number)
            return
        for c in rows.unique().tolist():
            for s in range(maps.shape[1]):
                chosen = (rows[:, s] == c).nonzero()[:, 0]
                if len(chosen):
                    self._add(slice(c, c + 1), first, maps[chosen, s : s + 1], number[chosen])

    def _add_inputs(self, first: int, x: Tensor, number: Tensor) -> None:
        """Add the inputs ``x`` [n, *in] of the samples ``number``, each to its group."""
        if "sum_group_inputs" not in self.needs:
            return
        group, wide = (number + first) % GROUPS, x.double()
        count, total = torch.bincount(group, minlength=GROUPS), torch.zeros_like(self.sums["sum_group_inputs"])
        total.index_add_(0, group, wide)
        mean = total / count.clamp(min=1).view(-1, *[1] * (wide.dim() - 1))
        if (squares := self.sums.get("sum_group_inputs_square")) is not None:
            squares.index_add_(0, group, wide.square())
        else:
            deviations = torch.zeros_like(total).index_add_(0, group, (wide - mean[group]).square_())
            self._add_deviations("deviations_group_inputs", slice(None), count, total, deviations)
        self.sums["sum_group_inputs"] += total
        self.sums["count_group_inputs"] += count

    def _add_deviations(self, name: str, at: slice, count: Tensor, total: Tensor, deviations: Tensor) -> None:
        """Add the deviations of further samples from their own mean, before their ``count`` and ``total`` are added."""
        count_before, total_before = (self.sums[n][at].numpy() for n in DEVIATIONS[name][1::-1])
        self.sums[name][at] += deviations
        self.sums[name][at] += torch.from_numpy(between((count_before, total_before), (count.numpy(), total.numpy())))

    def _count(self, at: slice, group: Tensor) -> None:
        self.sums["count"][at] += len(group)
        if "count_group" in self.sums:
            self.sums["count_group"][:, at] += torch.bincount(group, minlength=GROUPS)[:, None]

    def _add(self, at: slice, first: int, maps: Tensor, number: Tensor) -> None:
        """``maps`` [n, C or 1, *in] of the classes ``at``; ``number`` [n] of the samples within the batch."""
        group = (number + first) % GROUPS  # [n]
        if "deviations" in self.sums:
            center = maps.mean(0)  # close to the mean, so that no digits are lost below
            near, squares = (torch.zeros_like(center, dtype=torch.float64) for _ in range(2))
            add(maps - center.double(), group, near, squares)
            n = len(group)
            count = torch.full((len(center),), n)
            deviations = (squares - near.square() / n).clamp_(min=0)
            self._add_deviations("deviations", at, count, near + n * center.double(), deviations)
        rows = [self.sums[k][at] if k in self.sums else None for k in ("sum", "sum_square", "sum_abs", "max_abs")]
        groups = self.sums["sum_group_abs"][:, at] if "sum_group_abs" in self.sums else None  # [G, C or 1, *in]
        self._count(at, group)
        if "count_ranks" in self.sums:
            self.sums["count_ranks"][at] += ranks(maps.abs())
        total, square, size, largest = rows
        add(maps, group, total, square, size, largest, groups)

    def result(self, prefix: str) -> dict[str, np.ndarray]:
        return {f"{prefix}/{name}": value.numpy() for name, value in self.sums.items()}


def add(
    maps: Tensor, group: Tensor, total: Tensor | None, square: Tensor | None = None, size: Tensor | None = None,
    largest: Tensor | None = None, groups: Tensor | None = None,
) -> None:  # fmt: skip
    """Add maps to these sums, by `ops.accumulate` or in plain torch."""
    if ops.accumulate(maps, group, (total, square, size, largest, groups)):
        return
    wide = maps.double()
    if total is not None:
        total += wide.sum(0)
    if square is not None:
        square += wide.square().sum(0)
    wide = wide.abs()  # not in place: float64 maps belong to the caller
    if size is not None:
        size += wide.sum(0)
    if largest is not None:
        largest.copy_(torch.maximum(largest, wide.amax(0).float()))
    if groups is not None:
        groups.index_add_(0, group, wide)


def finite_rows(values: Tensor) -> Tensor:
    """Which samples of ``[n, ...]`` have finite values only, ``[n]``."""
    if not values.is_floating_point() or values.numel() == 0:
        return torch.ones(values.shape[0], dtype=torch.bool, device=values.device)
    flat = values.detach().reshape(len(values), -1)
    finite = flat.sum(1).isfinite()  # one pass without a copy; a sum may overflow, so the others are looked at closely
    suspects = (~finite).nonzero()[:, 0]
    finite[suspects] = flat[suspects].isfinite().all(1)
    return finite


def ranks(size: Tensor) -> Tensor:
    """How many samples have each feature in each class of rank: ``[n, C, *in]`` → int64 ``[C, *in, RANK_BINS]``."""
    flat = size.reshape(*size.shape[:2], -1)  # [n, C, F]
    features = flat.shape[2]
    order = flat.argsort(dim=2, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(2, order, torch.arange(features).expand_as(order))
    bins = place * RANK_BINS // features  # [n, C, F]
    counts = torch.stack([(bins == b).sum(0) for b in range(RANK_BINS)], dim=-1)  # [C, F, bins]
    return counts.view(*size.shape[1:], RANK_BINS)


def finish(wanted: Iterable[str], sums: Sums, prefix: str) -> dict[str, np.ndarray]:
    """The results of the reductions for one input, by name."""
    of_input = {name.removeprefix(prefix + "/"): value for name, value in sums.items() if name.startswith(prefix + "/")}
    return {name: REDUCTIONS[name].make(of_input) for name in wanted}
