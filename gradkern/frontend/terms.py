"""The size of the terms whose sum an output or a gradient is.  Its rounding errors are relative to that size.

Where terms cancel, a gradient may be nothing but rounding (a softmax after equal weights), and two correct computations
of it have nothing in common.  The size of the terms is measured by a rounding error made on purpose: every intermediate
result is changed by a small random share ``h`` of itself, in float64, and the change of the result is divided by ``h``
(stochastic arithmetic: Parker, Monte Carlo Arithmetic, 1997).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.calls import Params
from ..ir.program import Program
from ..runtime import reference

_SHARE = 2.0**-30  # of a perturbation: small enough for a linear response, large enough to be seen in float64
_LESS = 16.0  # a second perturbation is smaller by this factor; at a kink the response does not shrink with it


@dataclass(frozen=True)
class Terms:
    """2-norms, per sample ``[N]``: of the output's terms, and of those of each input's pulled-back cotangent."""

    output: Tensor
    gradients: dict[int, Tensor]


Pulled = tuple[Tensor, dict[int, Tensor]]  # the output [N, *out], and [N, *in] by input


def pull_back(
    program: Program,
    params: Params,
    samples: Sequence[Tensor],
    cotangent: Tensor,
    forward: reference.Alter = reference.unaltered,
    backward: reference.Alter = reference.unaltered,
) -> tuple[Pulled, list[Tensor]]:
    """The output, ``cotangent [N, *out]`` pulled back to each floating input, and all values of the forward pass.

    ``forward`` and ``backward`` alter every value and every cotangent as soon as it is computed.
    """
    with torch.no_grad():
        values = reference.forward(program, params, samples, forward)
        y = values[program.output]
        g = cotangent.to(dtype=y.dtype, device=y.device).unsqueeze(1)  # [N, 1, *out]
        floating = [i for i, x in enumerate(samples) if x.is_floating_point()]
        grads = reference.vjp(program, params, values, g, floating, backward)
    return (y, {i: part.squeeze(1) for i, part in zip(floating, grads, strict=True)}), values


def terms_of(program: Program, params: Params, samples: Sequence[Tensor], cotangent: Tensor) -> Terms | None:
    """The sizes of the terms of ``program``; None if it does not run in float64.

    Where the forward pass is at a kink or a tie, which changes would leave, only the backward pass is changed.
    """
    wide, exact = {name: _widen(p) for name, p in params.items()}, [_widen(x) for x in samples]

    def run(forward: float, backward: float) -> Pulled:
        return pull_back(program, wide, exact, cotangent, _altering(forward, 0), _altering(backward, 1))[0]

    try:
        base = run(0.0, 0.0)
        whole, less = (_sizes(run(h, h), base, h) for h in (_SHARE, _SHARE / _LESS))
        back = _sizes(run(0.0, _SHARE), base, _SHARE)
    except RuntimeError:  # a step that insists on another dtype
        return None
    smooth = {i: torch.where(less.gradients[i] <= 2 * g, g, back.gradients[i]) for i, g in whole.gradients.items()}
    return Terms(whole.output, smooth)


def _sizes(got: Pulled, base: Pulled, share: float) -> Terms:
    def size(a: Tensor, b: Tensor) -> Tensor:
        change = (a - b).double().reshape(a.shape[0], -1).nan_to_num(0.0, 0.0, 0.0)
        return change.norm(dim=1) / share

    return Terms(size(got[0], base[0]), {i: size(g, base[1][i]) for i, g in got[1].items()})


def _widen(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x.detach()


def _altering(share: float, seed: int) -> Callable[[Tensor], Tensor]:
    if not share:
        return reference.unaltered
    generator = torch.Generator().manual_seed(seed)

    def alter(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        return x * (1 + share * noise)

    return alter
