"""Restores the buffers of a live model after a forward pass that may change them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def buffers_kept(module: nn.Module | None) -> Iterator[list[bool]]:
    """Restore the buffers afterwards; the yielded list gets True if a forward has changed one."""
    changed: list[bool] = []
    if module is None:
        yield changed
        return
    kept = [
        (owner, name, buffer, buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield changed
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in kept:
                if owner._buffers.get(name) is not buffer:
                    owner._buffers[name] = buffer
                    changed.append(True)
                if buffer.shape != value.shape or not torch.equal(buffer, value):
                    buffer.copy_(value)
                    changed.append(True)
