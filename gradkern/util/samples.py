"""Some of the samples: their targets, evenly spread ones, and perturbed ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def rows_of_targets(targets: Tensor, rows: slice | Tensor) -> Tensor:
    """The targets of the samples ``rows``, out of ``targets``: flat indices ``[S]`` that all samples share, or
    ``[N, S]``."""
    return targets[rows] if targets.dim() == 2 else targets


def spread_indices(count: int, most: int) -> list[int]:
    """``most`` of the indices below ``count`` (all, if these are fewer), evenly spread, the first and the last among
    them: ``spread_indices(10, 4) == [0, 3, 6, 9]``."""
    return [int(i) for i in np.linspace(0, max(count - 1, 0), min(count, most))]


def spread_rows(count: int, most: int) -> Tensor:
    """`spread_indices` as a tensor."""
    return torch.tensor(spread_indices(count, most), dtype=torch.int64)


def perturbed(x: Tensor, size: Tensor | float, generator: torch.Generator) -> Tensor:
    """``x`` plus normal noise times ``size``; unchanged if it holds no floating-point numbers."""
    if not x.is_floating_point():
        return x
    return x + size * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


def spread_of(x: Tensor) -> float:
    """The standard deviation of the finite numbers of ``x``; 1 if it is 0 or there are fewer than two."""
    finite = x[torch.isfinite(x)]
    return (float(finite.double().std()) if finite.numel() > 1 else 0.0) or 1.0
