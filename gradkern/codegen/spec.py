"""The input of the lowering of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .aliasing import Cotangents
from .machine import Machine
from .units import UnitGraph


@dataclass(frozen=True)
class ChainSpec:
    """The units of one group, on one machine, for a number of seeds."""

    graph: UnitGraph
    machine: Machine
    itemsize: int  # bytes of an element
    seeds: int
    wrt: tuple[int, ...]  # the external inputs whose cotangents are wanted
    onehot: bool  # the seeds are one-hot at the single output; otherwise the caller gives a cotangent of every output
    linear: bool  # no values are computed, because the slopes of every scale in the group are given

    @property
    def lanes(self) -> int:
        """Elements of a vector register."""
        return self.machine.vector_bytes // self.itemsize

    @cached_property
    def cotangents(self) -> Cotangents:
        return Cotangents(self.graph, self.wrt, self.onehot)
