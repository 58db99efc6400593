"""Running the model itself, outside the modes that the caller has set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.program import Shape
from ..util.buffers import buffers_kept
from ..util.callables import model_of
from ..util.options import InputError
from .checks import check_output, explain_failure
from .request import Request


@contextmanager
def outside_modes() -> Iterator[None]:
    """Grad mode on and inference mode off, whatever modes the caller has set."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def leaves_of(inputs: Sequence[Tensor], wrt: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh leaves for the differentiated inputs, and copies as the model's arguments, as it may work in place."""
    leaves, arguments = [], []
    for i, x in enumerate(inputs):
        x = x.clone() if x.is_inference() else x.detach()
        if i in wrt:
            x = x.requires_grad_()
        arguments.append(x.clone())
        leaves.append(x)
    return [leaves[w] for w in wrt], arguments


def forward(fn: Callable[..., Any], module: nn.Module | None, arguments: Sequence[Tensor]) -> Tensor:
    """Run the model; if it fails because of a dtype or a device, the error explains that."""
    try:
        y = fn(*arguments)
    except InputError:
        raise
    except Exception as error:
        clearer = explain_failure(error, module, arguments)
        if clearer is error:
            raise
        raise clearer from error
    return check_output(y, arguments[0].shape[0])


def measured_output_shape(request: Request) -> Shape:
    """Per-sample shape of the model's output, from a run of one or two samples."""
    probe = tuple(
        x[:2] if request.samples else torch.zeros(2, *x.shape[1:], dtype=x.dtype, device=x.device)
        for x in request.inputs
    )
    with torch.inference_mode(False), torch.no_grad(), buffers_kept(request.module), torch.random.fork_rng([]):
        return tuple(forward(request.fn, request.module, [x.detach().clone() for x in probe]).shape[1:])


def check_runs(fn: Callable[..., Any], samples: Sequence[Tensor]) -> None:
    """Raise at once if the model fails, or does not return a tensor."""
    with outside_modes(), torch.random.fork_rng([]):
        wrt = [i for i, x in enumerate(samples) if x.is_floating_point()]
        forward(fn, model_of(fn), leaves_of(samples, wrt)[1])
