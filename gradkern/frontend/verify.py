"""Comparison of a Program with live autograd, before it is trusted.

torch.export drops the backward of a custom `autograd.Function` and of ``torch.no_grad`` regions, and freezes
``if x.shape[0] == 1``, all without an error.  So outputs and one random vector-Jacobian product are compared with
those of the live module, on several of the caller's samples together and on one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ir.calls import Params
from ..ir.program import Program
from ..runtime import ops
from ..util import rounding
from ..util.buffers import buffers_kept
from ..util.callables import model_of
from ..util.samples import perturbed, spread_of, spread_rows
from .refusal import NoProgram
from .terms import Terms, pull_back, terms_of

_TOGETHER = 3  # samples that are compared
_TRIES = 4  # comparisons: one of the samples themselves, the others of slightly perturbed ones
_MOVE = 1e-3  # the perturbation, as a share of the inputs' spread
_CLEAR = 0.05  # if rounding may change an output by a larger share, it excuses no difference of gradients


def verify(program: Program, fn: Callable[..., Any], params: Params, inputs: Sequence[Tensor]) -> frozenset[int]:
    """Raise `NoProgram` if ``program`` differs from live autograd on samples like ``inputs``.

    ``params``: the tensors that it names.  ``inputs``: one ``[N, *shape]`` each, of which a few samples are used.  The
    model's buffers and the random state are restored, and no ``.grad`` is touched.  A float32 activation within
    rounding of a kink may flip a gradient.  So if gradients differ, the samples are perturbed a little and compared
    again: a flip goes away, a different backward does not.  Returns the floating inputs that no gradient reaches.
    """
    generator = torch.Generator().manual_seed(0)
    samples = _few(inputs, generator)
    cotangent = torch.randn(_TOGETHER, *program.output_shape, generator=generator, dtype=torch.float64)
    model = model_of(fn)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"} if model else ())
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices), buffers_kept(model):
        outcome = _compare(program, fn, params, samples, cotangent)
        for _ in range(_TRIES - 1):
            if not isinstance(outcome, NoProgram) or outcome.final:
                break
            moved = tuple(_moved(x, _MOVE, generator) for x in samples)
            outcome = _compare(program, fn, params, moved, cotangent)
    if isinstance(outcome, NoProgram):
        raise outcome
    return outcome


def _few(inputs: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Some of the caller's samples, with perturbed copies if there are too few."""
    pick = spread_rows(inputs[0].shape[0], _TOGETHER)
    samples = []
    for x in inputs:
        rows = x.detach()[pick.to(x.device)].clone()
        if rows.is_floating_point():
            rows.masked_fill_(~torch.isfinite(rows), 0.0)  # results at NaN would not tell two functions apart
        if rows.shape[0] == 0:
            rows = torch.zeros(1, *x.shape[1:], dtype=x.dtype, device=x.device)
        if missing := _TOGETHER - rows.shape[0]:
            rows = torch.cat([rows, _moved(rows[-1:].expand(missing, *rows.shape[1:]), 0.3, generator)])
        samples.append(rows)
    return tuple(samples)


def _moved(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    return perturbed(x, share * spread_of(x), generator)


# ---------------------------------------------------------------------------------------------------------------
# One comparison

#: Output [N, *out], and per floating input the pulled-back cotangent [N, *in], None if nothing reaches the input.
OutputAndGradients = tuple[Tensor, Mapping[int, Tensor | None]]


class _Rounding:
    """How far two correct computations of a Program's outputs and gradients may be apart."""

    def __init__(self, dtype: torch.dtype, tolerance: float, measure: Callable[[], Terms | None]) -> None:
        self.dtype, self.tolerance, self._measure = dtype, tolerance, measure

    @cached_property
    def _terms(self) -> Terms | None:
        """The sizes of terms, measured only if gradients differ by more than the tolerance."""
        return self._measure()

    def differing_part(self, got: OutputAndGradients, want: OutputAndGradients) -> str | None:
        """The part that differs by more than rounding: ``"output"`` or ``"gradient"``; None if neither does."""
        if not rounding.close_samples(got[0], want[0], self.tolerance):
            return "output"
        if not all(self._same_gradient(i, got[1][i], g, want[0]) for i, g in want[1].items()):
            return "gradient"
        return None

    def _same_gradient(self, i: int, got: Tensor | None, want: Tensor | None, y: Tensor) -> bool:
        if got is None or want is None:
            return not any(g is not None and bool(g.any()) for g in (got, want))
        if rounding.close_samples(got, want, self.tolerance):
            return True
        terms, n = self._terms, got.shape[0]
        if terms is None:
            return False
        slack = rounding.of_terms(self.dtype, self.tolerance) * terms.gradients[i][:n]
        # Where rounding may change even the output, gradients may differ in any way, so that nothing excuses them.
        size = y.double().reshape(n, -1).nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
        clear = rounding.unit(self.dtype, self.tolerance) * terms.output[:n] <= max(_CLEAR, self.tolerance) * size
        return rounding.close_samples(got, want, self.tolerance, slack.where(clear, 0.0))


def _compare(
    program: Program, fn: Callable[..., Any], params: Params, samples: Sequence[Tensor], cotangent: Tensor
) -> NoProgram | frozenset[int]:
    """The fault of ``program`` or, if it has none, the inputs that the cotangent does not reach."""
    together_live = _live(fn, samples, cotangent)
    together, values = pull_back(program, params, samples, cotangent)
    allowed = _rounding(program, params, samples, cotangent, values)
    alone, weights = [x[:1] for x in samples], cotangent[:1]
    alone_live = _live(fn, alone, weights)
    apart = allowed.differing_part(_first_sample(together_live), alone_live)
    if apart == "gradient":  # torch's gradient of one sample may be wrong (docs/reliability.md), but not of it twice
        alone, weights = [torch.cat([x, x]) for x in alone], torch.cat([weights, weights])
        alone_live = _first_sample(_live(fn, alone, weights))
        apart = allowed.differing_part(_first_sample(together_live), alone_live)
    if apart is not None:
        return NoProgram("its result for a sample depends on the other samples of the batch", mixes=True)
    ours_alone = _first_sample(pull_back(program, params, alone, weights)[0])
    for ours, live in ((together, together_live), (ours_alone, alone_live)):
        what = allowed.differing_part(ours, live)
        if what is not None:
            custom = custom_backward(fn, samples)
            cause = f" ({custom} defines its own backward)" if custom and what == "gradient" else ""
            return NoProgram(f"its {what} is not what torch.export makes of it{cause}", final=what == "output")
    return frozenset(i for i, g in together_live[1].items() if g is None)


def _first_sample(pair: OutputAndGradients) -> OutputAndGradients:
    """The first sample's part."""
    return pair[0][:1], {i: None if g is None else g[:1] for i, g in pair[1].items()}


def _rounding(
    program: Program, params: Params, samples: Sequence[Tensor], cotangent: Tensor, values: Sequence[Tensor]
) -> _Rounding:
    """The rounding to expect.  ``values``: those of a forward pass, of which the least precise counts."""
    least = max(values, key=lambda v: _tolerance(v.dtype, v.device))
    tolerance = _tolerance(least.dtype, least.device)
    return _Rounding(least.dtype, tolerance, lambda: terms_of(program, params, samples, cotangent))


def _live(fn: Callable[..., Any], samples: Sequence[Tensor], cotangent: Tensor) -> OutputAndGradients:
    """Output and pulled-back cotangents by autograd on the model itself."""
    with torch.enable_grad():
        xs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in samples]
        # The model gets copies: it may work in place, which is forbidden on a leaf.
        y = fn(*[x.clone() for x in xs])
        if not isinstance(y, Tensor):
            raise NoProgram("its output is not one tensor")
        if tuple(y.shape) != tuple(cotangent.shape):
            raise NoProgram("the shape of its output depends on the number of samples")
        leaves = [x for x in xs if x.requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if y.requires_grad and leaves:
            g = cotangent.to(dtype=y.dtype, device=y.device)
            grads = torch.autograd.grad(y, leaves, g, allow_unused=True)
    indices = [i for i, x in enumerate(xs) if x.requires_grad]
    return y.detach(), dict(zip(indices, grads, strict=True))


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The tolerance of a dtype on a device.  On a GPU one sample and several may take different kernels, and torch
    computes convolutions in TF32 by default."""
    gpu = device.type == "cuda" and dtype == torch.float32
    if gpu and (ops.precision() != "highest" or ops.convolutions_in_tf32()):
        return rounding.TF32
    return rounding.for_program(dtype)


def same_outputs(got: Tensor, live: Tensor) -> bool:
    """Whether a Program's outputs are the live model's, up to rounding."""
    return rounding.close_samples(got, live, _tolerance(live.dtype, live.device))


def custom_backward(fn: Callable[..., Any], samples: Sequence[Tensor]) -> str:
    """The name of a custom `autograd.Function` in the graph of a live forward pass, if there is one."""
    with torch.enable_grad():
        y = fn(*[x.detach().clone().requires_grad_(x.is_floating_point()).clone() for x in samples])
    seen, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return type(node).__name__.removesuffix("Backward")
        stack.extend(child for child, _ in node.next_functions)
    return ""
