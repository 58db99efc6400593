"""Compares outputs with the live model's from time to time, to notice changes that no guard sees.

Guards see the Python state that a forward pass reads.  They do not see the environment, files, the clock, or random
numbers drawn outside of torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..frontend.verify import same_outputs
from ..util.buffers import buffers_kept

SHARE = 0.02  # comparisons take at most this share of the time of a model's calls
SAMPLES = 2  # that a comparison takes
FIRST_COST = 1e-3  # seconds that a comparison is assumed to take before the first one


class OutputsChanged(Exception):
    """The live model gives other outputs than its Program."""


class Watch:
    """Tells when the outputs of one model are due for a comparison: once the ``seconds`` of work since the last one
    exceed ``due_after``.  The last comparison took the share `SHARE` of ``due_after``."""

    def __init__(self) -> None:
        self.seconds, self.due_after = 0.0, FIRST_COST / SHARE

    def due(self) -> bool:
        return self.seconds > self.due_after

    def add(self, seconds: float) -> None:
        """Count work of the Program."""
        self.seconds += seconds

    def compare(self, fn: Callable[..., Any], module: nn.Module | None, inputs: Sequence[Tensor], y: Tensor) -> None:
        """``y [n, *out]``: the Program's outputs for ``inputs``.  Raises `OutputsChanged`."""
        begin = time.perf_counter()
        rows = [x[:SAMPLES].clone() for x in inputs]
        with buffers_kept(module):
            live = fn(*rows)
        if not isinstance(live, Tensor) or not same_outputs(y[:SAMPLES], live):
            raise OutputsChanged
        self.seconds, self.due_after = 0.0, (time.perf_counter() - begin) / SHARE
