"""Machines: what the layout of weights and scratch memory depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A CPU by its instruction set."""

    isa: str
    vector_bytes: int
