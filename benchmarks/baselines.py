"""The peers: every way that torch and Captum give to get all-class input gradients.

A peer is used as its own users would use it, at its best: the result of a single chunk may be a view, several
chunks are written straight into one preallocated ``[N, C, *in]``, and no parameter asks for a gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

Transform = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]
Chunk = Callable[[Tensor, Tensor | None], Tensor]
"""``chunk(x, out)``: the Jacobian ``[B, C, *in]`` of ``x`` ``[B, *in]``, written into ``out`` where it is given."""


@dataclass(frozen=True)
class Peer:
    """One way of doing it. ``make(model, outputs)`` gives the function that handles one chunk."""

    name: str
    title: str
    make: Callable[[nn.Module, int], Chunk]
    fixed_size: bool = False  # compiled for one batch size: a ragged last chunk is padded
    batches: tuple[int, ...] = ()  # the only batch sizes that make sense; empty: any


def run(peer: Peer, chunk: Chunk, x: Tensor, batch: int, outputs: int, out: Tensor | None = None) -> Tensor:
    """The whole ``[N, C, *in]`` of ``x`` ``[N, *in]``, in chunks of ``batch`` samples, written to ``out`` if given."""
    n = x.shape[0]
    if n == batch:
        return chunk(x, None)  # the result as it falls: a copy would only cost
    out = x.new_empty(n, outputs, *x.shape[1:]) if out is None else out
    for start in range(0, n, batch):
        part = x[start : start + batch]
        if peer.fixed_size and part.shape[0] < batch:
            padded = torch.cat([part, part.new_zeros(batch - part.shape[0], *part.shape[1:])])
            out[start:] = chunk(padded, None)[: part.shape[0]]
        else:
            chunk(part, out[start : start + batch])
    return out


def deliver(result: Tensor, out: Tensor | None) -> Tensor:
    """``result`` as it is, or copied to where the caller wants it."""
    return result if out is None else out.copy_(result)


def loop_samples(model: nn.Module, outputs: int) -> Chunk:
    """`torch.autograd.functional.jacobian`, one sample after the other."""

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            out = x.new_empty(x.shape[0], outputs, *x.shape[1:])
        for i in range(x.shape[0]):
            out[i] = torch.autograd.functional.jacobian(model, x[i : i + 1])[0, :, 0]  # [1, C, 1, *in]
        return out

    return chunk


def loop_classes(model: nn.Module, outputs: int) -> Chunk:
    """One forward pass, one backward pass per class (``retain_graph``)."""

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            out = x.new_empty(x.shape[0], outputs, *x.shape[1:])
        x = x.detach().requires_grad_()
        y = model(x)  # [B, C]
        for c in range(outputs):
            (out[:, c],) = torch.autograd.grad(y[:, c].sum(), x, retain_graph=c + 1 < outputs)
        return out

    return chunk


def captum_saliency(model: nn.Module, outputs: int) -> Chunk:
    """Stock `captum.attr.Saliency`, once per class."""
    from captum.attr import Saliency  # not every machine that measures kernels has Captum

    saliency = Saliency(model)

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            out = x.new_empty(x.shape[0], outputs, *x.shape[1:])
        x = x.detach().requires_grad_()
        for c in range(outputs):
            out[:, c] = saliency.attribute(x, target=c, abs=False)
        return out

    return chunk


def grads_batched(model: nn.Module, outputs: int) -> Chunk:
    """`torch.autograd.grad` with ``is_grads_batched``: all classes in one call."""
    eye = torch.eye(outputs)

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        x = x.detach().requires_grad_()
        y = model(x)  # [B, C]
        seeds = eye.to(y.dtype)[:, None].expand(outputs, *y.shape)  # [C, B, C]
        (grads,) = torch.autograd.grad(y, x, grad_outputs=seeds, is_grads_batched=True)  # [C, B, *in]
        return deliver(grads.transpose(0, 1), out)

    return chunk


def vmap_jacrev(model: nn.Module, outputs: int, transform: Transform = jacrev) -> Chunk:
    """`torch.func.vmap` of `torch.func.jacrev` (or of `torch.func.jacfwd`)."""
    jacobian = vmap(transform(lambda x: model(x[None])[0]))

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        return deliver(jacobian(x), out)

    return chunk


def compiled_vmap_jacrev(model: nn.Module, outputs: int) -> Chunk:
    """The same through `torch.compile`, compiled for the batch size at hand."""
    torch._dynamo.reset()  # every batch size is compiled anew, and none counts as a recompilation of another
    jacobian = torch.compile(vmap(jacrev(lambda x: model(x[None])[0])), dynamic=False)

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return deliver(jacobian(x), out)

    return chunk


def replicated(model: nn.Module, outputs: int) -> Chunk:
    """The input repeated once per class, one forward and one backward pass over ``B × C`` samples."""

    def chunk(x: Tensor, out: Tensor | None) -> Tensor:
        copies = x.detach().repeat_interleave(outputs, dim=0).requires_grad_()  # [B·C, *in]
        y = model(copies).view(x.shape[0], outputs, outputs)  # [B, C of the copy, C]
        (grads,) = torch.autograd.grad(y.diagonal(dim1=1, dim2=2).sum(), copies)  # [B·C, *in]
        return deliver(grads.view(x.shape[0], outputs, *x.shape[1:]), out)

    return chunk


PEERS: dict[str, Peer] = {
    p.name: p
    for p in (
        # The likely best first: whatever comes later is given up early where it is far behind.
        Peer("loop_classes", "class loop", loop_classes),
        Peer("grads_batched", "is_grads_batched", grads_batched),
        Peer("vmap_jacrev", "vmap(jacrev)", vmap_jacrev),
        Peer("compiled", "compiled vmap(jacrev)", compiled_vmap_jacrev, fixed_size=True),
        Peer("captum", "Captum Saliency per class", captum_saliency),
        Peer("replicated", "input replicated C times", replicated),
        Peer("loop_samples", "functional.jacobian per sample", loop_samples, batches=(1,)),
    )
}
