# ruff: noqa: F401  (names are imported here for the other files)
"""torch's private names that gradkern needs, each imported here and nowhere else.

torch's public API can capture a function under guards (`torch.compile` with a backend).  It cannot check the guards
without running anything, apply settings to one capture only, or tell which code was read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Versions of torch that capturing has been tested with.  With 2.11, Dynamo does not guard mutable default arguments.
TRIED = ("2.11.0", "2.13.0", "2.15.0")

try:
    import torch._dynamo as dynamo
    from torch._dynamo import eval_frame
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as cache_entries
    from torch._guards import TracingContext as tracing_context
    from torch.fx.experimental import _config as shapes_config
    from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
except ImportError as missing:
    raise ImportError(
        f"gradkern captures networks by way of private names of torch, and torch {torch.__version__} lacks one: "
        f"{missing}. Versions that work: {', '.join(TRIED)}."
    ) from missing


@contextmanager
def without_fallback_warning() -> Iterator[None]:
    """Mute torch's warning that vmap loops inside one op, which is intended here."""
    switch = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", lambda enabled: None)
    switch(False)
    try:
        yield
    finally:
        switch(True)


class _Recurrent(threading.local):
    shapes_only = False


_recurrent = _Recurrent()


@contextmanager
def recurrent_shapes_only() -> Iterator[None]:
    """Inside, in this thread, one time step of fake tensors stands for all time steps of a recurrent layer.

    To find shapes alone, torch would walk through every step: 0.1 s each, twice per capture.
    """
    _patch_recurrent()
    before, _recurrent.shapes_only = _recurrent.shapes_only, True
    try:
        yield
    finally:
        _recurrent.shapes_only = before


def _patch_recurrent() -> None:
    """Patch torch once per process; it has no effect in other threads and outside `recurrent_shapes_only`."""
    try:
        from torch._decomp import decompositions
        from torch._subclasses.fake_tensor import FakeTensor

        walk: Any = decompositions._rnn_helper
    except (ImportError, AttributeError):
        return  # it takes longer
    if getattr(walk, "of_gradkern", False):
        return

    def helper(
        x: Tensor, hidden: Any, params: Any, has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool, layer_fn: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        rest = has_biases, num_layers, dropout, train, bidirectional
        if not (_recurrent.shapes_only and isinstance(x, FakeTensor) and x.dim() == 3):
            return walk(x, hidden, params, *rest, batch_first, layer_fn)
        x = x.transpose(0, 1) if batch_first else x  # [T, N, F]
        one, final = walk(x[:1], hidden, params, *rest, False, layer_fn)
        all_steps = one.expand(x.shape[0], *one.shape[1:]).contiguous()
        return all_steps.transpose(0, 1) if batch_first else all_steps, final

    helper.of_gradkern = True  # type: ignore[attr-defined]
    decompositions._rnn_helper = helper


def keeper_of(node_name: str) -> tuple[str, str] | None:
    """The attribute, and the type of its owner, in which the code that is being captured keeps the tensor of a node.

    None if it is not an attribute, or if Dynamo does not say.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        changed = InstructionTranslator.current_tx().output.side_effects.store_attr_mutations
        for owner, attributes in changed.items():
            for name, value in attributes.items():
                if value.is_tensor() and value.proxy.node.name == node_name:  # type: ignore[attr-defined]
                    return name, type(owner.value).__name__  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        pass
    return None
