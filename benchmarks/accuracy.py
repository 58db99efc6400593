"""Is a float32 Jacobian right?  Compared with the float64 oracle, sample by sample.

Where an activation lies within rounding of a kink (a ReLU at zero, two equal candidates in a max pool), float32 and
float64 may take different sides, and the gradient of that sample jumps: neither is wrong.  So samples are split by
their margin in float64: the largest error is reported on those that are *clear* of every kink, and for the others
only the share that differs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import oracle

aten = torch.ops.aten

MARGIN = 4e-6
"""How near to a kink float32 may be wrong about the side, relative to the root mean square of the layer."""

FLIPPED = 1e-5
"""A sample whose relative error is above this has another activation pattern, or is wrong."""


@dataclass(frozen=True)
class Accuracy:
    """``max_error`` relative to each sample's largest entry, on samples clear of kinks; shares are of all samples."""

    samples: int
    max_error: float
    share_near_kink: float
    share_disagreeing: float
    wrong: int  # clear samples with an error above FLIPPED: there must be none


class Margins(TorchDispatchMode):
    """Watches a forward pass and marks the samples that come near a kink."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.near = torch.zeros(samples, dtype=torch.bool)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        if name in (aten.relu, aten.relu_):
            self.mark(args[0].abs(), args[0])
        result = func(*args, **kwargs)
        if name is aten.max_pool2d_with_indices:
            x, (best, indices) = args[0], result  # [N, C, H, W], [N, C, h, w]
            rest = x.flatten(-2).scatter(-1, indices.flatten(-2), -torch.inf).view_as(x)
            second = func(rest, *args[1:], **kwargs)[0]
            # Candidates that a ReLU before or after sets to zero carry no gradient, whichever of them wins.
            self.mark(torch.where(best > 0, best - second, torch.inf), x)
        return result

    def mark(self, margin: Tensor, layer: Tensor) -> None:
        scale = layer.square().mean().sqrt()
        lowest = margin.flatten(1).amin(1) if margin.shape[0] == self.near.shape[0] else margin.min()  # [N]
        self.near |= lowest <= MARGIN * scale


def near_kink(model: nn.Module, x: Tensor) -> Tensor:
    """``[N]``: which samples of ``x`` (float64) come within rounding of a kink of ``model`` (float64)."""
    margins = Margins(x.shape[0])
    x = x.detach().requires_grad_()  # so that pools go through the operator that returns indices
    with margins:
        model(x)
    return margins.near


def errors(jacobian: Tensor, want: Tensor) -> Tensor:
    """``[N]``: the largest error of each sample relative to its largest entry; infinite where only one is finite."""
    if jacobian.shape != want.shape:
        raise ValueError(f"got a Jacobian of shape {tuple(jacobian.shape)}, expected {tuple(want.shape)}")
    return oracle.sample_errors(jacobian, want)


def compare(model: nn.Module, x: Tensor, jacobian: Tensor, want: Tensor | None = None) -> Accuracy:
    """``jacobian`` ``[N, C, *in]`` of the float32 ``model`` at ``x`` ``[N, *in]`` against float64 (``want``)."""
    error = errors(jacobian, oracle.jacobian(model, x)[1][0] if want is None else want)
    near = near_kink(copy.deepcopy(model).double(), x.double())  # [N]
    clear = error[~near]
    return Accuracy(
        samples=x.shape[0],
        max_error=float(clear.max()) if clear.numel() else 0.0,
        share_near_kink=float(near.double().mean()),
        share_disagreeing=float((error > FLIPPED).double().mean()),
        wrong=int((clear > FLIPPED).sum()),
    )
