"""A call like an earlier one, of a network that kernels compute as a whole: it goes from the guards to the kernels.

Apart from the kernel itself, a call with few samples is dominated by Python code that the kernel has evicted from the
processor's caches, so as little of it as possible runs here.  The guards of the captured graph and the bytes of the
weights are still checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..frontend.capture import GuardedGraph
from ..runtime.parameters import Params
from ..runtime.whole_chain import Whole
from ..util.memo import Memo, WeakMemo
from ..util.options import Engine
from . import guards
from .first_use import clock
from .request import Request
from .state import CacheEntry
from .targets import targets_key
from .watch import Watch
from .ways import pinned_way

SHORT = 0.1  # seconds; a longer call gains nothing, and may have to show its progress
CALLS_PER_MODEL = 32


@dataclass(eq=False, slots=True)
class EarlierCall:
    """What a call has in common with an earlier one: the graph, its kernels, stand-ins for the input."""

    entry: CacheEntry
    graph: GuardedGraph
    whole: Whole[Any]
    stand_ins: tuple[Tensor, ...]

    def again(self, fn: Callable[..., Any], x: Tensor) -> Tensor | None:
        """The Jacobian ``[N, *axes, *in]`` at ``x``; None if the call needs more than the kernel."""
        entry, whole = self.entry, self.whole
        if entry.watch.seconds > entry.watch.due_after or self.graph not in entry.programs:
            return None
        match = guards.matching(entry.graphs, {"fn": fn, "given": {}, "inputs": self.stand_ins, "output": None})
        if match is None or match.graph is not self.graph:
            return None
        entry.misses = 0
        jacobians = run(whole, entry.watch, match.tensors, (x,))
        return None if jacobians is None else whole.shaped(jacobians)[0]


_earlier: WeakMemo[Memo[EarlierCall]] = WeakMemo(lambda: Memo(CALLS_PER_MODEL))


def again(model: Any, x: Any, targets: Any, engine: Engine) -> Tensor | None:
    """The Jacobian of a call that differs from an earlier one only in its numbers; None if there is no such call."""
    earlier = _earlier.get(model)
    if earlier is None or type(x) is not Tensor or x.layout is not torch.strided or x.is_neg():
        return None
    if any(guards.GLOBAL_HOOKS) or guards.in_modes() or pinned_way.get() is not None:
        return None
    call = earlier.get((x.shape, x.dtype, x.device, targets_key(targets), engine))
    return None if call is None else call.again(model, x)


def note(request: Request, engine: Engine, entry: CacheEntry, graph: GuardedGraph, whole: Whole[Any]) -> None:
    """Remember a call that the kernel alone has computed, for `again`."""
    key = request.seeds_key
    if request.owner is not request.fn or len(request.inputs) != 1 or key is None or pinned_way.get() is not None:
        return
    (x,) = request.inputs
    calls, place = _earlier.of(request.owner), (x.shape, x.dtype, x.device, key, engine)
    known = calls.get(place)
    if known is None or known.graph is not graph or known.whole is not whole:
        calls.put(place, EarlierCall(entry, graph, whole, guards.stand_ins(request.inputs, for_guards=True)))


def run(
    whole: Whole[Any], watch: Watch, tensors: Params, inputs: Sequence[Tensor], out: Sequence[Tensor] | None = None
) -> list[Tensor] | None:
    """The gradients by the kernels, in the memory ``out`` if it is given; None, with nothing written, if none may run
    with the weights as they are."""
    begin, inputs = clock(), [x.detach() if x.requires_grad else x for x in inputs]
    jacobians = whole.repeat(tensors, inputs, out)
    if jacobians is None:
        packed = whole.packed(tensors)
        if packed is None:
            return None
        begin = clock()
        jacobians = whole(packed, inputs, out)
    watch.seconds += clock() - begin  # `Watch.add`, without a call
    return jacobians
