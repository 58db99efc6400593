"""DeepLift of a model that has no Program: the operations of its live forward pass, with the same rules.

torch traces the forward pass as it runs on the caller's samples (`make_fx`), so Python code that looks at numbers is
followed as it went for these samples.  Its operations then run on the tape (`tape.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode

from ...dispatch.targets import Seeds
from ...frontend.verify import custom_backward
from ...ir.program import Shape
from ...util import rounding
from ...util.buffers import buffers_kept
from ...util.callables import model_of
from ...util.options import debugging
from ...util.random_state import RandomState
from .tape import InputAndReference, NoRule, Tape, run_graph

#: The largest relative difference between the traced output, the model's own, and that of a sample alone; in half
#: precision a few units of rounding.
SAME = 1e-4


def multipliers(
    fn: Callable[..., Any],
    inputs: Sequence[Tensor],
    reference: Sequence[Tensor],
    more: Sequence[Any],
    seeds: Callable[[int, Shape], Seeds],
    eps: float,
) -> tuple[tuple[Tensor, ...], bool]:
    """DeepLift's multipliers, ``[N, S, *in]`` per input, and whether it took anything that is detached as constant.

    ``reference``: ``[N, *in]`` per input.  ``more``: what the model takes after the inputs.  ``seeds``: the outputs,
    for the number of samples and the output's shape per sample.  Raises `NoRule`, whose message says which, if an
    operation has no rule, if torch cannot trace the model, or if samples depend on each other.
    """
    xs = [x.detach() for x in inputs]
    with torch.inference_mode(False), buffers_kept(model_of(fn)):
        state = RandomState()
        graph, live, alone = _trace(fn, xs, more)
        state.restore()
        tape = Tape(xs[0].dtype, eps)
        pairs = [tape.pair(x, r.detach().to(x.dtype).expand_as(x)) for x, r in zip(xs, reference, strict=True)]
        with torch.no_grad():
            y = run_graph(tape, graph, pairs)
            if not isinstance(y, InputAndReference):
                raise NoRule("its output, which does not depend on the inputs")
            if not _close(y.x, live) or not _close(y.x[:1], alone):
                raise NoRule("a model whose samples depend on each other, or that draws random numbers")
            g = one_hot(y.x, seeds(y.x.shape[0], tuple(y.x.shape[1:])))
        return tuple(tape.pull_back(pairs, y, g)), tape.took_detached_as_constant


def one_hot(y: Tensor, seeds: Seeds) -> Tensor:
    """Cotangents ``[N, S, *out]`` for outputs ``[N, *out]``."""
    n, width = y.shape[0], math.prod(y.shape[1:])
    targets = seeds.targets(width, y.device).expand(n, seeds.count)
    return y.new_zeros(n, seeds.count, width).scatter_(2, targets.unsqueeze(2), 1.0).view(n, seeds.count, *y.shape[1:])


class _NumbersAsTheyAre(TorchFunctionMode):
    """While torch traces, Python code that asks for the numbers of a tensor gets them."""

    ASKED = frozenset(getattr(Tensor, f) for f in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.ASKED:
            return func(*args, **(kwargs or {}))
        with disable_proxy_modes_tracing():
            return func(*args, **(kwargs or {}))


def _trace(fn: Callable[..., Any], xs: Sequence[Tensor], more: Sequence[Any]) -> tuple[Any, Tensor, Tensor]:
    """The graph of the forward pass, its output, and that of the first sample alone."""

    def forward(*inputs: Tensor) -> Tensor:
        with _NumbersAsTheyAre():
            result: Tensor = fn(*inputs, *more)
        return result

    n = xs[0].shape[0]
    first = [m[:1] if isinstance(m, Tensor) and m.dim() and m.shape[0] == n else m for m in more]
    try:
        with torch.enable_grad():
            graph = make_fx(forward, pre_dispatch=True)(*(x.clone() for x in xs))
        own = custom_backward(forward, xs)
        if own:
            raise NoRule(f"{own}, which defines its own backward")
        with torch.no_grad():
            return graph, forward(*(x.clone() for x in xs)), fn(*(x[:1].clone() for x in xs), *first)
    except NoRule:
        raise
    except Exception as error:  # tracing may raise anything, and Captum's own method still runs
        if debugging():
            raise
        line = next(iter(str(error).splitlines()), "")[:200]
        raise NoRule(f"a forward pass that torch cannot trace ({type(error).__name__}: {line})") from error


def _close(got: Tensor, want: Tensor) -> bool:
    return rounding.close_elements(
        got, want, max(SAME, 4 * torch.finfo(want.dtype).eps if want.is_floating_point() else 0.0)
    )
