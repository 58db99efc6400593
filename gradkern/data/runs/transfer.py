"""Copies to the model's device and back, and memory for maps.

On CUDA, copies use pinned memory and their own stream, to overlap with work.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Ready = Callable[[], tuple[Tensor, ...]]


class Transfer:
    """Copies that are started in one thread and waited for in another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.up, self.down = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))

    def upload(self, inputs: Sequence[Tensor]) -> Ready:
        """Start moving inputs to the device.  The computing thread calls the result, which returns them there."""
        if self.up is None:
            there = tuple(x.to(self.device) for x in inputs)
            return lambda: there
        with torch.cuda.stream(self.up):
            there = tuple(x.contiguous().pin_memory().to(self.device, non_blocking=True) for x in inputs)
            event = torch.cuda.Event()
            event.record(self.up)

        def ready() -> tuple[Tensor, ...]:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for x in there:
                x.record_stream(current)
            return there

        return ready

    def download(self, tensors: Sequence[Tensor]) -> Ready:
        """Start moving tensors to the CPU.  The writing thread calls the result, which returns them there."""
        if self.down is None:
            kept = tuple(t.cpu() for t in tensors)
            return lambda: kept
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            kept = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
            )
            event = torch.cuda.Event()
            event.record(self.down)
        for t in tensors:
            t.record_stream(self.down)

        def ready() -> tuple[Tensor, ...]:
            event.synchronize()
            return kept

        return ready


class MapBuffers:
    """Page-aligned memory for maps, which is reused: fresh memory costs a page fault for every 4 KiB of it."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
        self.shapes, self.dtypes = shapes, dtypes
        self.free: list[tuple[Tensor, ...]] = []

    def take(self) -> tuple[Tensor, ...]:
        try:
            return self.free.pop()
        except IndexError:
            pairs = zip(self.shapes, self.dtypes, strict=True)
            return tuple(torch.frombuffer(mmap.mmap(-1, math.prod(s) * d.itemsize), dtype=d).view(s) for s, d in pairs)

    def give(self, memory: tuple[Tensor, ...]) -> None:
        self.free.append(memory)
