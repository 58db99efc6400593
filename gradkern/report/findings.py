"""Sentences on an importance ranking: which features matter, how sure that is, and what deletion shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data import Curve, Importance
from ..data.ranking import position_text

NAMED = 3  # features that a sentence names
SURE, WEAK = 0.9, 0.5  # rank correlations of two halves of the data that count as sure, and as weak


def of_output(importance: Importance, output: int, name: str) -> str:
    """One sentence on one output."""
    scores, low = importance.scores[output].ravel(), importance.low[output].ravel()
    total = float(np.nansum(scores))
    if why := importance.unranked(output):
        return f"{name}: {why}."
    order, shape = importance.ranking[output], importance.scores.shape[1:]
    named = ", ".join(position_text(np.unravel_index(f, shape), shape) for f in order[:NAMED])
    half = int(np.searchsorted(np.cumsum(np.nan_to_num(scores[order])), 0.5 * total)) + 1
    agreement = float(importance.agreement[output])
    sure = "firm" if agreement >= SURE else "rough" if agreement >= WEAK else "not reliable"
    above = int((low > np.nanmean(scores)).sum())
    return (
        f"{name} depends most on the features {named}; {half:,} of {len(order):,} carry half of its importance, and "
        f"{above:,} are above the average with {importance.level:.0%} confidence. "
        f"The order is {sure}: two halves of the data agree to {agreement:.2f}."
    )


def of_curve(curve: Curve) -> str:
    """A sentence on the effect of replacing features in order of importance, compared with a random order."""
    at = int(np.argmax(curve.random_deletion - curve.deletion))
    deletion, insertion = curve.gain
    verdict = "better than a random order" if min(deletion, insertion) > 0 else "not better than a random order"
    return (
        f"With the {curve.shares[at]:.0%} most important features replaced by their mean, “{curve.measure}” "
        f"falls to {curve.deletion[at]:.2f}; with as many random ones to {curve.random_deletion[at]:.2f}. By both "
        f"curves the ranking is {verdict} ({deletion:+.3f} and {insertion:+.3f} in area)."
    )


def all_of(importance: Importance, names: Sequence[str]) -> list[str]:
    """A sentence for each named output, and one for the curves."""
    sentences = [of_output(importance, c, name) for c, name in enumerate(names)]
    return sentences if importance.curve is None else [*sentences, of_curve(importance.curve)]
