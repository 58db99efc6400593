"""How much two results may differ by rounding: two measures, and the tolerances of every comparison.

The tolerances are relative, by dtype.  Results of the same operations are compared element by element.  A Program and
live autograd may compute a sample's gradient in different orders, so these are compared per sample, in the norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PROGRAM = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
_PROGRAM |= {torch.complex128: 1e-8, torch.complex64: 2e-3}
TF32 = 5e-2  # for a Program if float32 is rounded to ten bits of mantissa, which also flips a few patterns


def for_program(dtype: torch.dtype) -> float:
    """Between a Program and live autograd, for outputs and for gradients without flipped activation patterns."""
    return _PROGRAM.get(dtype, 0.0)


def for_batch(dtype: torch.dtype) -> float:
    """Between one sample alone and the same sample in a batch."""
    return 1e-9 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 3e-2


def for_layer(dtype: torch.dtype) -> float:
    """Between a layer's output and its value in the Program: distinct values must not count as equal."""
    return 1e-10 if dtype == torch.float64 else 1e-4


def close_elements(got: Any, want: Tensor, tolerance: float) -> bool:
    """Compare every number, relative to its own size and to the largest; NaN and Inf must be in the same places.
    Integers must be equal."""
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not (want.is_floating_point() or want.is_complex()):
        return torch.equal(got, want)
    largest = float(want.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()) if want.numel() else 0.0
    atol = tolerance * largest
    return bool(torch.allclose(got.detach(), want.detach(), rtol=tolerance, atol=atol, equal_nan=True))


def unit(dtype: torch.dtype, tolerance: float) -> float:
    """The unit of rounding of computations with this ``tolerance``."""
    return 2.0**-10 if dtype == torch.float32 and tolerance >= TF32 else torch.finfo(dtype).eps


def of_terms(dtype: torch.dtype, tolerance: float) -> float:
    """How much a sum may differ relative to the terms that cancel in it, given its ``tolerance`` relative to itself.

    Sums of thousands of terms were off by some tens of units of rounding."""
    return min(tolerance / 4, 256 * unit(dtype, tolerance))


def sample_errors(got: Tensor, want: Tensor, slack: Tensor | float = 0.0) -> Tensor:
    """Per sample, the 2-norm of the error of its finite numbers relative to that of ``want``, ``[N]``.

    It is infinite if a number is finite in only one of the two, and NaN if no number is finite, for then there is
    nothing to compare.  The error of a sample without gradient is relative to the others' gradients.  ``slack [N]``:
    an error up to this is no difference, however small ``want`` is."""
    a, b = (t.double().reshape(t.shape[0], -1) for t in (got, want))  # [N, *]
    finite = b.isfinite()
    differs, nothing = (a.isfinite() != finite).any(1), ~finite.any(1) & bool(b.shape[1])  # [N]
    a, b = a.where(finite, 0.0), b.where(finite, 0.0)
    size = torch.maximum(b.norm(dim=1), 1e-6 * b.norm())
    error = ((a - b).norm(dim=1) - slack).clamp(min=0.0) / (size + 1e-30)
    return error.masked_fill(nothing, torch.nan).masked_fill(differs, torch.inf)


def close_samples(got: Tensor, want: Tensor, tolerance: float, slack: Tensor | None = None) -> bool:
    """Compare, per sample, the 2-norm of the error with that of ``want``; NaN and Inf must be in the same places.

    ``slack [N]``: an error up to this is no difference, however small ``want`` is."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    a, b = (t.double().reshape(t.shape[0], -1) for t in (got, want))  # [N, *]
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return False
    a, b = a.where(finite, 0.0), b.where(finite, 0.0)
    size = torch.maximum(b.norm(dim=1), 1e-6 * b.norm())  # a sample without gradient is measured against the others
    most = tolerance * size + 1e-30
    if slack is not None:
        most = torch.maximum(most, slack.to(most))
    return bool(((a - b).norm(dim=1) <= most).all())
