"""Computed rows in the form in which the store keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..store.checks import checksum
from ..store.ledger import ChunkRecord

LOST = ("overflow", "underflow", "narrowed")
COMPARED = 1 << 18  # values of maps that are compared with their narrower ones at a time


def to_stored(rows: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Rows as the store's arrays take them, with maps in ``dtype``, and the losses in a narrower dtype.

    The losses are the numbers of values that ``overflow`` to Inf or ``underflow`` to 0, and the number of values
    ``narrowed`` that are finite and not 0.
    """
    stored, lost = {}, dict.fromkeys(LOST, 0)
    for name, value in rows.items():
        if name.startswith("attributions") and dtype != value.dtype:
            narrow = value.to(dtype)
            if dtype.itemsize < value.dtype.itemsize:
                lost = {k: lost[k] + v for k, v in _lost(value, narrow).items()}
            value = narrow
        value = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
        stored[name] = value.detach().numpy()
    return stored, lost if lost["narrowed"] else {}


def _lost(value: Tensor, narrow: Tensor) -> dict[str, int]:
    lost = dict.fromkeys(LOST, 0)
    few = max(1, COMPARED // max(1, value[:1].numel()))  # the comparisons below make several copies
    for v, n in zip(value.split(few), narrow.split(few), strict=True):
        counted = v.isfinite() & (v != 0)
        for name, where in zip(LOST, (n.isinf() & counted, (n == 0) & counted, counted), strict=True):
            lost[name] += int(where.sum())
    return lost


def with_checksums(
    record: ChunkRecord, stored: Mapping[str, np.ndarray], read: int, lost: Mapping[str, int]
) -> ChunkRecord:
    """The record of a chunk with its checksums; ``read``: the checksum of what was read."""
    checks = {"source": read} | {name: checksum([rows]) for name, rows in stored.items()}
    entered = {name: np.array([value], np.uint32) for name, value in checks.items()}
    return replace(record, checks=entered, facts={**record.facts, **lost})
