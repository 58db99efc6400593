"""Integers from callers: Python's own, numpy's, and tensors of one."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_int(value: Any) -> int | None:
    """An int from anything that is one (numpy's ints and tensors without axes too); None for the rest and for bools."""
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, Tensor) and (value.dim() or value.is_floating_point() or value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None
