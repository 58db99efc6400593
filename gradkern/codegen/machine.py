"""Machines, which determine the layout of weights and scratch memory, and the error for a chain that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Machine:
    """A processor by its instruction set: a CPU, or a `Device`."""

    isa: str
    vector_bytes: int
    tile_vectors: int = 2  # the most vectors of output channels in a tile of forward weights


@dataclass(frozen=True)
class Device(Machine):
    """A GPU as the planner sees it: `isa` is ``"cuda"``; weights are read four elements at a time.

    The facts are an H200's, unless the device is asked for its own.
    """

    shared_bytes: int = 232448  # the most shared memory of a block
    threads: int = 256
    processors: int = 132
    kilohertz: int = 1_755_000  # clocks of a multiprocessor per millisecond
    capability: int = 90  # compute capability, times ten

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability}"

    def milliseconds(self, clocks: float, samples: int) -> float:
        """The time of ``samples`` samples that take ``clocks`` of one multiprocessor each."""
        return clocks * samples / self.processors / self.kilohertz


@dataclass(frozen=True)
class NoKernels:
    """Stands in place of a machine if torch's own kernels run every step, with all seeds folded into the batch.

    Its truth value is False.  ``reason``: why gradkern's own kernels do not run.
    """

    reason: str = "the compiled extension is missing or has no kernels for this device"

    def __bool__(self) -> Literal[False]:
        return False


class TooLarge(Exception):
    """A chain that does not fit with any tiling; ``.bytes``: what a single sample and seed needs."""

    def __init__(self, needed: int, limit: int):
        super().__init__(f"needs {needed / 1024:.0f} KiB of shared memory for one sample, of {limit / 1024:.0f}")
        self.bytes = needed
