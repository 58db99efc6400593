"""Whole data sets: stream samples to a store, reduce on the fly, resume after a kill, shard, merge.

Needs the ``data`` extra: ``pip install 'gradkern[data]'``.::

    results = gradkern.run(model, "samples.npy", "maps.zarr", reductions=["mean_abs"])
    results.array("attributions")   # zarr [N, S, *in]
    results.reduction("mean_abs")   # [C, *in]
"""

from __future__ import annotations

from ..util import renamed
from .export import to_modisco
from .methods import METHODS, Batch, Outcome, register_method
from .ranking import Curve, Importance, importance
from .runs.fingerprint import Mismatch
from .runs.planning import plan
from .runs.runner import DiskFull, run
from .runs.settings import Settings
from .runs.shards import merge
from .runs.verify import Verdict, repair, verify
from .sources import Source, open_source, register_source
from .statistics import REDUCTIONS
from .store.durable import Damaged
from .store.locks import Busy
from .store.results import Results

open_store = Results.open
__getattr__ = renamed.old_names(
    globals(), {"open": "open_store", "register": "register_source", "method": "register_method"}
)

__all__ = [
    "METHODS",
    "REDUCTIONS",
    "Batch",
    "Busy",
    "Curve",
    "Damaged",
    "DiskFull",
    "Importance",
    "Mismatch",
    "Outcome",
    "Results",
    "Settings",
    "Source",
    "Verdict",
    "importance",
    "merge",
    "open_source",
    "open_store",
    "plan",
    "register_method",
    "register_source",
    "repair",
    "run",
    "to_modisco",
    "verify",
]
