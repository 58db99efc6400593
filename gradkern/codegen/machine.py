"""Machines, which determine the layout of weights and scratch memory, and the error for a chain that does not fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A processor by its instruction set: a CPU, or a `Device`."""

    isa: str
    vector_bytes: int


@dataclass(frozen=True)
class Device(Machine):
    """A GPU as the planner sees it: `isa` is ``"cuda"``; weights are read four elements at a time."""

    shared_bytes: int = 232448  # that one block may have
    threads: int = 256


class TooLarge(Exception):
    """A chain that does not fit with any tile; ``.bytes`` is the need of a single sample and seed."""

    def __init__(self, needed: int, limit: int):
        super().__init__(f"needs {needed / 1024:.0f} KiB of shared memory for one sample, of {limit / 1024:.0f}")
        self.bytes = needed
