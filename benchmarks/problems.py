"""The measured problems: the five networks of the table in `tests/cases.py`, their set sizes and their floors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.cases import CASES


@dataclass(frozen=True)
class Problem:
    """A network and how many samples it is measured on.

    ``samples`` is the full N, ``quick`` the N of ``--quick``, ``checked`` how many samples of a timed result are
    compared with float64, and ``floor`` the smallest ratio to the best peer that the project accepts.
    """

    name: str
    samples: int
    quick: int
    checked: int
    floor: float
    what: str

    def model(self) -> nn.Module:
        """The network in eval mode, float32, with random batch-norm statistics.

        Parameters do not require gradients: that spares torch's own ways some work and changes nothing for
        gradkern, so the peers are measured at their best.
        """
        return CASES[self.name].build().requires_grad_(False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Per-sample input shape."""
        return CASES[self.name].shapes[0]

    def fresh(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` samples ``[n, *shape]`` that nobody has seen before."""
        return torch.randn(n, *self.shape, generator=generator, dtype=dtype)


PROBLEMS: dict[str, Problem] = {
    p.name: p
    for p in (
        Problem("cnn1d", 2048, 64, 256, 4.0, "1×224, two conv-pool blocks, 3 classes"),
        Problem("cnn1d_strided", 2048, 64, 256, 1.8, "the same with strides for pools, 3 classes"),
        Problem("lenet5", 2048, 64, 128, 8.0, "1×28×28, LeNet-5, 10 classes"),
        Problem("mlp", 2048, 64, 256, 1.1, "224-256-256-10"),
        Problem("fcn", 128, 8, 16, 1.0, "1×224, 128-256-128 channels with batch norm, 5 classes"),
    )
}


def batch_sizes(samples: int) -> list[int]:
    """8, 16, 32 … up to the full N, which is always one of them."""
    sizes = []
    size = 8
    while size < samples:
        sizes.append(size)
        size *= 2
    return [*sizes, samples]
