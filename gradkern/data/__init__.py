"""Whole data sets: stream samples to a store, reduce on the fly, resume after a kill, shard, merge.

Needs the ``data`` extra: ``pip install 'gradkern[data]'``.

    results = gradkern.run(model, "samples.npy", "maps.zarr", reductions=["mean_abs"])
    results.array("attributions")   # zarr [N, S, *in]
    results.reduction("mean_abs")   # [C, *in]
"""

from __future__ import annotations

from .fingerprint import Mismatch
from .importance import Curve, Importance, importance
from .methods import METHODS, Batch, Outcome, method
from .results import Results
from .runner import DiskFull, run
from .shards import merge
from .sources import Source, open_source
from .statistics import REDUCTIONS

open = Results.open

__all__ = [
    "METHODS",
    "REDUCTIONS",
    "Batch",
    "Curve",
    "DiskFull",
    "Importance",
    "Mismatch",
    "Outcome",
    "Results",
    "Source",
    "importance",
    "merge",
    "method",
    "open",
    "open_source",
    "run",
]
