"""When a model is captured: as soon as a capture costs less than autograd would take for the calls to come.

The number of calls to come is unknown.  A first call is expected to be the only one, so the capture has to pay within
it.  A model that is called again is expected to be called ten times in all, with as many samples and seeds each time.
After these ten calls, it is captured once autograd has taken as long as a capture (the ski-rental rule), so that never
more than about twice the cost of the better choice is spent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..ir.program import Shape

CALLS = 10  # expected calls of a model that is called a second time
FIRST_CAPTURE = 1.0  # seconds of the first capture in a process (measured: 0.7 … 1.2)
LATER_CAPTURE = 0.3  # seconds of a later capture (measured: 0.2 … 0.5)
OVERHEAD = 5e-3  # seconds of a pass that is mostly overhead, so that its time says little about more samples

clock = time.perf_counter

_seconds: list[float] = []  # the times of captures so far


@dataclass
class AutogradWork:
    """The work that autograd has ``done`` for one model so far, in samples × seeds, and its speed.

    ``rate``: seconds per sample and seed in the last pass, which did ``last`` samples × seeds.  ``other``: seconds of
    work that is not counted in samples.  ``output_shape``: that of the model's output, per sample.
    """

    calls: int = 0
    done: int = 0
    rate: float = 0.0
    last: int = 0
    other: float = 0.0
    output_shape: Shape | None = None

    def add(self, work: int, seconds: float) -> None:
        """Note one pass."""
        self.done, self.last, self.rate = self.done + work, work, seconds / max(work, 1)

    def capture_pays(self, left: int = 0) -> bool:
        """Whether a capture costs less than it saves, with ``left`` samples × seeds of this call still to do."""
        if left > 2 * self.last and self.rate * self.last < OVERHEAD:
            left = 0
        calls = max(1, CALLS - self.calls) if self.calls else 1
        return self.other + self.rate * (self.done + calls * left) >= capture_cost()


def capture_cost() -> float:
    """Seconds that the next capture should take: the median so far, not counting the first in the process."""
    if not _seconds:
        return FIRST_CAPTURE
    later = sorted(_seconds[1:]) or [LATER_CAPTURE]
    return later[len(later) // 2]


def note_capture(seconds: float) -> None:
    _seconds.append(seconds)
    del _seconds[1:-8]  # the first capture of the process and the latest eight
