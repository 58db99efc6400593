"""The choice between kernels and autograd for a whole call, as measured on some of the caller's samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

#: How a call runs: on the Program's kernels, or on autograd with one backward pass per seed or one for all of them.
Way = Literal["kernels", "loop", "batched"]
TITLES: Mapping[Way, str] = {
    "kernels": "calls take the {kernels}",
    "loop": "calls take autograd (one backward per seed) instead of this plan",
    "batched": "calls take autograd (all seeds batched) instead of this plan",
}
TIE = 1.05  # kernels are chosen unless they take longer than autograd by this factor: a smaller difference may be noise


@dataclass(frozen=True)
class Timing:
    """Seconds of one call with ``samples`` of the caller's samples, for each way that could run it."""

    samples: int
    seconds: Mapping[Way, float]

    @cached_property
    def way(self) -> Way:
        """The fastest way; kernels if they are as fast as any other."""
        best = min(self.seconds, key=self.seconds.__getitem__)
        return "kernels" if self.seconds["kernels"] <= TIE * self.seconds[best] else best

    def text(self, kernels: str = "kernels") -> str:
        """The result as a sentence.  ``kernels``: what the plan runs on."""
        peers = {way: t for way, t in self.seconds.items() if way != "kernels"}
        best = f", autograd {1e3 * min(peers.values()):.3g} ms" if peers else ""
        samples = f"{self.samples} sample{'s' * (self.samples != 1)}"
        result = TITLES[self.way].format(kernels=kernels)
        return f"measured on {samples}: {kernels} {1e3 * self.seconds['kernels']:.3g} ms{best}: {result}"
