"""`Case`, a network with the shapes of its inputs, and the building blocks of small networks around a few layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradkern.ir.program import Shape


@dataclass(frozen=True)
class Case:
    """A network and the per-sample shapes of its inputs."""

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    bench: bool = False
    opaque: bool = False
    traceable: bool = True

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in eval mode, its weights and its batch-norm statistics drawn from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            for module in model.modules():
                randomise_norm(module)
        return model.to(dtype).eval()

    def inputs(self, n: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """``n`` seeded standard-normal samples: one tensor ``[n, *shape]`` per input."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(n, *s, generator=generator, dtype=torch.float64).to(dtype) for s in self.shapes)

    def __repr__(self) -> str:
        return f"Case({self.name})"


def randomise_norm(module: nn.Module) -> None:
    """Give a normalisation layer statistics and factors such as training leaves behind."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        module.running_mean.normal_(0.0, 0.5)
        module.running_var.uniform_(0.4, 2.0)
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
        with torch.no_grad():
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0.0, 0.3)


# ---------------------------------------------------------------------------------------------------------------
# Building blocks


class Fn(nn.Module):
    """A function as a module, so that it can stand in a `Sequential`."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(*args)


Recipe = tuple[Callable[[], nn.Module], Shape]


def seq1d(*middle: Callable[[], nn.Module], length: int = 16) -> Recipe:
    """Input ``[2, length]`` -> conv to 4 channels -> ``middle`` -> flatten -> linear to 3; it finds its own width."""
    shape = (2, length)
    return lambda: closed(nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), *[m() for m in middle]), shape), shape


def seq2d(*middle: Callable[[], nn.Module], size: Shape = (9, 8)) -> Recipe:
    """Input ``[2, *size]`` -> conv to 4 channels -> ``middle`` -> flatten -> linear to 3."""
    shape = (2, *size)
    return lambda: closed(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *[m() for m in middle]), shape), shape


def closed(body: nn.Sequential, shape: Shape, outputs: int = 3) -> nn.Module:
    """``body``, flattened, and a linear layer of the width that it gives for samples of ``shape``."""
    with torch.no_grad():
        width = body.eval()(torch.zeros(2, *shape)).flatten(1).shape[1]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(width, outputs))


def lazily(cls: Callable[..., nn.Module], *args: object, **kwargs: object) -> Callable[[], nn.Module]:
    return lambda: cls(*args, **kwargs)
