"""Pools and input numbers for which DeepLift's multipliers are compared bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

# Planes, and kernel, stride, padding before, dilation per axis; no window of its own for a ReLU alone.
POOLS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "relu": ((3, 11), ()),
    "halves": ((1, 14), (1, 2, 1, 2, 0, 0, 1, 1)),
    "squares": ((6, 8), (2, 2, 2, 2, 0, 0, 1, 1)),
    "overlap_pad": ((1, 13), (1, 3, 1, 2, 0, 1, 1, 1)),
    "overhang": ((7, 9), (3, 2, 2, 3, 1, 1, 1, 1)),
    "gaps": ((8, 9), (1, 2, 3, 4, 0, 0, 1, 1)),
    "dilated": ((7, 10), (2, 3, 1, 2, 1, 1, 2, 3)),
    "everything": ((5, 4), (5, 4, 1, 1, 0, 0, 1, 1)),
}


def with_counts(plane: tuple[int, int], pool: tuple[int, ...]) -> tuple[int, ...]:
    """The op's ten integers: the windows' counts behind the geometry."""
    if not pool:
        return ()
    kernel, stride, before, dilation = (pool[i : i + 2] for i in range(0, 8, 2))
    axes = zip(plane, kernel, stride, before, dilation, strict=True)
    return (*pool, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes))


def numbers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Few different ones, so that maxima tie and places hardly move, and some that are any."""
    coarse = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    fine = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) < 0.7, coarse, fine)


def equal(got: Tensor, want: Tensor) -> None:
    """To the bit, NaN in the same places."""
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
