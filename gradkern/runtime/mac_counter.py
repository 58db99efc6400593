"""Multiply-adds of steps that torch runs by itself, counted while they run, for the table of `explain`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..ir.calls import Params
from ..ir.program import Opaque, Program
from . import reference


class MacCounter(TorchDispatchMode):
    """Counts multiply-adds by torch's table of flops.

    `FlopCounterMode` registers global module hooks, which other threads would see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.macs += flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
        elif packet is ops.aten.mkldnn_rnn_layer:  # not in the table: [T, N, I], [G, I], [G, H]
            self.macs += math.prod(args[0].shape[:2]) * (args[1].numel() + args[2].numel())
        return out


def opaque_macs(program: Program, params: Params, samples: Sequence[Tensor]) -> dict[int, int]:
    """Multiply-adds of the forward pass per sample of each `Opaque` step, by step, measured on ``samples``.

    A step that torch's table does not know is left out; the plan then counts its elements.
    """
    values = list(samples)
    macs: dict[int, int] = {}
    for i, step in enumerate(program.steps):
        with MacCounter() as counter:
            values.append(reference.forward_step(program, i, [values[v] for v in step.inputs], params))
        if isinstance(step.form, Opaque) and counter.macs:
            macs[i] = max(1, counter.macs // samples[0].shape[0])
    return macs
