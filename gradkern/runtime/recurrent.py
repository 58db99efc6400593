"""The backward pass of LSTM, GRU and plain RNN layers for all seeds at once.

torch differentiates a recurrent op as one node, whose backward takes one cotangent.  `vmap` cannot batch it, so every
seed would walk through time again.  Here one walk back through time carries all seeds as rows of the same matrix
products.  The layer's output is known, and it holds the state before every step.  So the gates of all steps come from
one matrix product each, and their slopes from a few elementwise operations; only what passes from step to step is
computed step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..ir.program import Param
from ..ir.recurrent import Recurrent


def vjp(r: Recurrent, x: Tensor, y: Tensor, g: Tensor, tensor: Callable[[Param], Tensor]) -> Tensor:
    """``x [N, T, I]``, the output ``y [N, T, directions · H]``, ``g [N, S, T, directions · H]`` -> ``[N, S, T, I]``."""
    weights = [[tensor(p).detach() for p in group] for group in r.weights]  # per layer and direction
    layers = [weights[k : k + r.directions] for k in range(0, len(weights), r.directions)]
    values = [x]
    for layer in layers[:-1]:
        values.append(_layer(r, values[-1], [w for group in layer for w in group]))
    values.append(y)
    for layer, before, after in reversed(list(zip(layers, values, values[1:], strict=False))):
        parts = zip(layer, after.chunk(r.directions, dim=2), g.chunk(r.directions, dim=3), strict=True)
        backs = []
        for d, (group, out, cotangent) in enumerate(parts):
            if d:
                backs.append(_walk(r.kind, before.flip(1), out.flip(1), cotangent.flip(2), group).flip(2))
            else:
                backs.append(_walk(r.kind, before, out, cotangent, group))
        g = backs[0] if len(backs) == 1 else backs[0] + backs[1]
    return g


def _layer(r: Recurrent, x: Tensor, weights: list[Tensor]) -> Tensor:
    """One layer's output ``[N, T, directions · H]``, by torch."""
    hidden, biases = weights[1].shape[1], len(weights) == 4 * r.directions
    zeros = x.new_zeros(r.directions, x.shape[0], hidden)
    state = (zeros, zeros) if r.kind == "lstm" else zeros
    y: Tensor = getattr(torch, r.kind)(x, state, weights, biases, 1, 0.0, False, r.directions == 2, True)[0]
    return y


def _walk(kind: str, x: Tensor, y: Tensor, g: Tensor, w: Sequence[Tensor]) -> Tensor:
    """One layer in one direction: ``g [N, S, T, H] -> [N, S, T, I]``.  ``w``: W_ih, W_hh and, if any, the biases."""
    n, s, t, _ = g.shape
    # [T, N, S, H], a copy: the walk turns it into the cotangent of every state.
    times = g.permute(2, 0, 1, 3).clone(memory_format=torch.contiguous_format)
    gates = BACKWARDS[kind](x.transpose(0, 1), _before(y.transpose(0, 1)), y.transpose(0, 1), times, w)
    return (gates.view(t, n * s, -1) @ w[0]).view(t, n, s, -1).permute(1, 2, 0, 3)


def _before(states: Tensor) -> Tensor:
    """The states ``[T, N, H]`` one step earlier; the first is zero."""
    return torch.cat([torch.zeros_like(states[:1]), states[:-1]])


def _per_gate(parts: list[Tensor]) -> Tensor:
    """Slopes ``[T, N, H]`` of some gates as ``[T, N, 1, gates, H]``: factors of a cotangent ``[N, S, 1, H]``."""
    return torch.stack(parts, dim=2).unsqueeze(2)


# Each returns the cotangents of all gates before their activation, [T, N, S, gates · H].  The views of all steps are
# made at once, since making a view takes about as long as a small product.


def _plain(slope: Tensor, times: Tensor, w: Sequence[Tensor]) -> Tensor:
    states, slopes, rows = times.unbind(), slope.unsqueeze(2).unbind(), times.flatten(1, 2).unbind()
    for k in reversed(range(len(states))):
        states[k].mul_(slopes[k])
        if k:
            torch.addmm(rows[k - 1], rows[k], w[1], out=rows[k - 1])
    return times


def _rnn_tanh(x: Tensor, before: Tensor, y: Tensor, times: Tensor, w: Sequence[Tensor]) -> Tensor:
    return _plain(1 - y * y, times, w)


def _rnn_relu(x: Tensor, before: Tensor, y: Tensor, times: Tensor, w: Sequence[Tensor]) -> Tensor:
    return _plain((y > 0).to(y.dtype), times, w)


def _lstm(x: Tensor, before: Tensor, y: Tensor, times: Tensor, w: Sequence[Tensor]) -> Tensor:
    biases: Sequence[Tensor | None] = w[2:] or (None, None)
    z = linear(x, w[0], biases[0]) + linear(before, w[1], biases[1])  # [T, N, 4 H]
    i, f, g, o = z.chunk(4, dim=2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = i * g  # [T, N, H]
    for cell, previous, kept in zip(cells[1:].unbind(), cells.unbind(), f[1:].unbind(), strict=False):
        cell.addcmul_(kept, previous)
    tanh = cells.tanh()
    # The slopes of the first three gates are with respect to the cell's cotangent, that of the last to the state's.
    slopes = _per_gate([g * i * (1 - i), _before(cells) * f * (1 - f), i * (1 - g * g)]).unbind()
    last, through, forget = (a.unsqueeze(2).unbind() for a in (tanh * o * (1 - o), o * (1 - tanh * tanh), f))
    gates = times.new_empty(*times.shape[:3], 4, times.shape[3])
    of_cell, of_state = gates[:, :, :, :3].unbind(), gates[:, :, :, 3].unbind()
    states, rows, sent = times.unbind(), times.flatten(1, 2).unbind(), gates.flatten(3).flatten(1, 2).unbind()
    cotangent = torch.zeros_like(states[0])  # of the cell, [N, S, H]
    wide = cotangent.unsqueeze(2)
    for k in reversed(range(len(states))):
        cotangent.addcmul_(states[k], through[k])
        torch.mul(wide, slopes[k], out=of_cell[k])
        torch.mul(states[k], last[k], out=of_state[k])
        if k:
            torch.addmm(rows[k - 1], sent[k], w[1], out=rows[k - 1])
            cotangent.mul_(forget[k])
    return gates.flatten(3)


def _gru(x: Tensor, before: Tensor, y: Tensor, times: Tensor, w: Sequence[Tensor]) -> Tensor:
    biases: Sequence[Tensor | None] = w[2:] or (None, None)
    (xr, xz, xn), (hr, hz, hn) = (
        linear(a, weight, bias).chunk(3, dim=2) for a, weight, bias in zip((x, before), w[:2], biases, strict=True)
    )
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    slope = (1 - z) * (1 - n * n)
    reset, update = slope * hn * r * (1 - r), (before - n) * z * (1 - z)
    slopes, keep = _per_gate([reset, update, slope * r]).unbind(), z.unsqueeze(2).unbind()
    states, wide, rows = times.unbind(), times.unsqueeze(3).unbind(), times.flatten(1, 2).unbind()
    for k in reversed(range(1, len(states))):
        states[k - 1].addcmul_(states[k], keep[k])
        torch.addmm(rows[k - 1], (wide[k] * slopes[k]).view(len(rows[k]), -1), w[1], out=rows[k - 1])
    return (times.unsqueeze(3) * _per_gate([reset, update, slope])).flatten(3)


BACKWARDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]], Tensor]] = {
    "lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu,
}  # fmt: skip
