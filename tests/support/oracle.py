"""The oracle: input Jacobians in float64, from the definition, one number of the output at a time.

``J[n, c] = ∂(Σ_m y[m, c]) / ∂x[n]``.  Slow and plain on purpose: it shares no code with gradkern and uses
nothing of torch but a forward pass and `torch.autograd.grad` of one scalar.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def jacobian(model: nn.Module, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs ``[N, *out]`` and, per input, the Jacobian ``[N, C, *in]`` with C the flattened outputs, in float64.

    The whole batch goes through one forward pass, so a network that mixes samples is treated by the definition.
    A model that is not float64 yet is copied first.
    """
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    exact = model if all(t.dtype == torch.float64 for t in tensors) else copy.deepcopy(model).to(torch.float64)
    xs = [x.detach().to(torch.float64).requires_grad_() for x in as_tuple(inputs)]  # each [N, *in]
    y = exact(*[x.clone() for x in xs])  # [N, *out]; copies, for a model that works in place
    flat = y.reshape(y.shape[0], -1)  # [N, C]
    columns: list[list[Tensor]] = [[] for _ in xs]
    for c in range(flat.shape[1]):
        grads = torch.autograd.grad(flat[:, c].sum(), xs, retain_graph=True, allow_unused=True)
        for column, grad, x in zip(columns, grads, xs, strict=True):
            column.append(torch.zeros_like(x) if grad is None else grad)
    return y.detach(), tuple(torch.stack(column, dim=1) for column in columns)


def per_sample(model: nn.Module, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same, every sample alone: what a network that does not mix samples must give."""
    rows = [jacobian(model, [x[n : n + 1] for x in as_tuple(inputs)]) for n in range(as_tuple(inputs)[0].shape[0])]
    outputs = torch.cat([y for y, _ in rows])
    return outputs, tuple(torch.cat(parts) for parts in zip(*[js for _, js in rows], strict=True))


def pick(jac: Tensor, targets: Tensor) -> Tensor:
    """``[N, C, *in]`` -> ``[N, S, *in]`` for flat output numbers ``[S]`` (all samples) or ``[N, S]`` (each its own)."""
    if targets.dim() == 1:
        return jac[:, targets]
    return torch.stack([jac[n, targets[n]] for n in range(jac.shape[0])])


def differences(got: Tensor, want: Tensor) -> Tensor:
    """``|got - want|``, number by number: 0 for two equal infinities or two NaN, infinite if only one is finite.

    A comparison with NaN is false.  So every bound is a bound of these, which are never NaN.
    """
    got = got.to(want.dtype)
    same = (got == want) | (got.isnan() & want.isnan())
    return (got - want).abs().masked_fill(same, 0.0).nan_to_num(torch.inf, torch.inf)


def largest(t: Tensor) -> Tensor:
    """The largest magnitude of the finite numbers of ``t``, 0 if there are none."""
    return t.abs().nan_to_num(0.0, 0.0, 0.0).amax() if t.numel() else torch.zeros(())


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest magnitude of what is right (0 where both are empty); never NaN."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(differences(got, want).max() / largest(want).clamp_min(1e-30)) if want.numel() else 0.0


def largest_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest `relative_error` of several results."""
    return max(relative_error(g, w) for g, w in zip(got, want, strict=True))


def sample_errors(got: Tensor, want: Tensor) -> Tensor:
    """``[N]``: the largest difference of each sample over the largest magnitude of what is right; never NaN."""
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = want.abs().nan_to_num(0.0, 0.0, 0.0).flatten(1).amax(1).clamp_min(1e-30)
    return differences(got, want).flatten(1).amax(1) / scale


def disagreeing(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> float:
    """The share of samples whose Jacobian is off by more than ``tolerance`` relative to that sample's largest entry.

    In float32 an activation within rounding of a kink flips the pattern of its sample, and that sample's gradient
    jumps; every other sample agrees to rounding.  So float32 tests bound this share instead of the largest error.
    """
    return float((sample_errors(got, want) > tolerance).double().mean()) if len(want) else 0.0


def as_tuple(inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
