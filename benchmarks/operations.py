"""The operations that all-class input gradients really need, counted on measured activation patterns.

Convention: one multiply-add is two operations; only contractions (convolution, linear) are counted, as batch norm
folds into its neighbour and the elementwise rest is small.

* **dense**: one forward pass, and for each of C classes one backward pass through every contraction.
* **needed**: one forward pass, and for each class the backward pass of those entries alone whose cotangent is not
  exactly zero (dead ReLU units, positions that a max pool did not choose), each towards all its inputs.  The first
  gradient is free: where the last contraction gives the outputs themselves, a one-hot cotangent through it is a
  row of its weight.

The zeros are measured, not modelled: a random cotangent is sent back through the network in float64, and whatever
arrives at a contraction as exactly zero is zero for every class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Operations:
    """Operations per sample, for all ``outputs`` classes."""

    outputs: int
    forward: float
    backward_dense: float  # one class
    backward_needed: float  # one class

    @property
    def dense(self) -> float:
        return self.forward + self.outputs * self.backward_dense

    @property
    def needed(self) -> float:
        return self.forward + self.outputs * self.backward_needed


class Counter(TorchDispatchMode):
    """Sees every ATen call of one forward and one backward pass, below autograd, and counts multiply-adds."""

    def __init__(self, cotangent: Tensor) -> None:
        super().__init__()
        self.cotangent = cotangent
        self.backward = False
        self.first = True  # the backward contraction to come is the first one
        self.macs = {"forward": 0, "dense": 0, "needed": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.convolution_backward.default:
            per_entry = math.prod(args[2].shape[1:])  # weight [O, I/groups, *kernel]
            self.count_backward(args[0], per_entry)
        elif func is aten.convolution.default:
            self.macs["forward"] += result.numel() * math.prod(args[1].shape[1:])
        elif func in (aten.mm.default, aten.addmm.default):
            left, right = args[-2], args[-1]  # [N, K], [K, M]
            if self.backward:
                self.count_backward(left, right.shape[1])
            else:
                self.macs["forward"] += left.numel() * right.shape[1]
        return result

    def count_backward(self, grad: Tensor, per_entry: int) -> None:
        """``grad`` arrives at the output of a contraction; each entry costs ``per_entry`` multiply-adds."""
        self.macs["dense"] += grad.numel() * per_entry
        free = self.first and grad.shape == self.cotangent.shape and torch.equal(grad, self.cotangent)
        self.first = False
        if not free:
            self.macs["needed"] += int(torch.count_nonzero(grad)) * per_entry


def count(model: Callable[[Tensor], Tensor], x: Tensor, *, onehot: bool = True) -> Operations:
    """Operations per sample of ``model`` (float64 outputs ``[N, C]``), averaged over the samples ``x`` ``[N, *in]``.

    ``onehot``: the seeds are, so that the first gradient is free.
    """
    if x.dtype != torch.float64:
        raise TypeError(f"got {x.dtype} inputs, expected float64: use model.double() and x.double()")
    x = x.detach().requires_grad_()
    n, outputs = model(x).shape
    cotangent = torch.randn(n, outputs, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
    counter = Counter(cotangent)
    counter.first = onehot
    with counter:
        y = model(x)
        counter.backward = True
        torch.autograd.grad(y, x, cotangent)
    per_sample = {k: 2.0 * v / n for k, v in counter.macs.items()}
    return Operations(outputs, per_sample["forward"], per_sample["dense"], per_sample["needed"])
