"""LSTM, GRU and plain RNN layers: forward, and the backward pass for all seeds at once.

torch differentiates a recurrent op as one node, whose backward takes one cotangent.  `vmap` cannot batch it, so every
seed would walk through time again.  Here one walk back through time carries all seeds as rows of the same matrix
products.  The layer's output is known, and it holds the state before every step.  So the gates of all steps come from
one matrix product, and their slopes from a few elementwise operations; only what passes from step to step is computed
step by step.  Compiled code does that (csrc/cpu/recurrent.cpp), or torch where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..ir.program import Param
from ..ir.recurrent import Recurrent
from . import ops

KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # in the order of csrc/cpu/context.h


def forward(r: Recurrent, x: Tensor, tensor: Callable[[Param], Tensor]) -> Tensor:
    """``x [N, T, I]`` -> ``[N, T, directions · H]``."""
    for layer in _layers(r, tensor):
        x = _layer(r, x, layer)
    return x


def vjp(r: Recurrent, x: Tensor, y: Tensor, g: Tensor, tensor: Callable[[Param], Tensor]) -> Tensor:
    """``x [N, T, I]``, the output ``y [N, T, directions · H]``, ``g [N, S, T, directions · H]`` -> ``[N, S, T, I]``."""
    layers = _layers(r, tensor)
    values = [x]
    for layer in layers[:-1]:
        values.append(_layer(r, values[-1], layer))
    values.append(y)
    for layer, before, after in reversed(list(zip(layers, values, values[1:], strict=False))):
        parts = list(zip(layer, after.chunk(r.directions, dim=2), g.chunk(r.directions, dim=3), strict=True))
        back = ops.recurrent_vjp(KINDS.index(r.kind), before, parts)
        if back is None:
            backs = [_walk(r.kind, *part, before, reverse=bool(d)) for d, part in enumerate(parts)]
            back = backs[0] if len(backs) == 1 else backs[0] + backs[1]
        g = back
    return g


def _layers(r: Recurrent, tensor: Callable[[Param], Tensor]) -> list[list[list[Tensor]]]:
    """Per layer and direction: W_ih, W_hh and, if any, the biases."""
    weights = [[tensor(p).detach() for p in group] for group in r.weights]
    return [weights[k : k + r.directions] for k in range(0, len(weights), r.directions)]


def _layer(r: Recurrent, x: Tensor, layer: list[list[Tensor]]) -> Tensor:
    """One layer's output ``[N, T, directions · H]``."""
    native = ops.recurrent(KINDS.index(r.kind), x, layer)
    if native is not None:
        return native
    hidden, biases = layer[0][1].shape[1], len(layer[0]) == 4
    zeros = x.new_zeros(r.directions, x.shape[0], hidden)
    state = (zeros, zeros) if r.kind == "lstm" else zeros
    weights = [w for group in layer for w in group]
    y: Tensor = getattr(torch, r.kind)(x, state, weights, biases, 1, 0.0, False, r.directions == 2, True)[0]
    return y


@dataclass(frozen=True)
class Slopes:
    """The factors of a walk, ``[N, T, …, H]``: the slopes of the gates, the share of the previous cell (LSTM) or state
    (GRU) that is kept, and the slope from an LSTM's cell to its state."""

    gates: Tensor  # [N, T, G, H]; a GRU's last gate counts twice, on the side of the state and on that of the input
    keep: Tensor | None = None
    through: Tensor | None = None


def _walk(kind: str, w: Sequence[Tensor], y: Tensor, g: Tensor, x: Tensor, *, reverse: bool) -> Tensor:
    """One layer in one direction, by torch's operations: ``g [N, S, T, H] -> [N, S, T, I]``.  ``w``: its weights."""
    slopes, weight = SLOPES[kind](x, y, w, reverse), _weight(kind, w)
    n, s, steps, hidden = g.shape
    result = g.new_empty(n, s, steps, x.shape[2])
    later, carry = g.new_zeros(n, s, hidden), g.new_zeros(n, s, hidden)
    for t in range(steps) if reverse else reversed(range(steps)):
        state, factors = g[:, :, t] + later, slopes.gates[:, t, None]  # [N, S, H], [N, 1, G, H]
        if slopes.keep is None:
            gates = state[:, :, None] * factors
        elif slopes.through is None:  # a GRU
            state = state + carry
            gates, carry = state[:, :, None] * factors, state * slopes.keep[:, t, None]
        else:
            cell = torch.addcmul(carry, state, slopes.through[:, t, None])
            gates = torch.cat([cell[:, :, None] * factors[:, :, :3], state[:, :, None] * factors[:, :, 3:]], dim=2)
            carry = cell * slopes.keep[:, t, None]
        sent = gates.flatten(2) @ weight
        later, result[:, :, t] = sent[..., :hidden], sent[..., hidden:]
    return result


def _weight(kind: str, w: Sequence[Tensor]) -> Tensor:
    """The weight ``[G · H, H + I]`` from the gates to the state one step earlier and to the input."""
    into, along = w[:2]
    if kind == "gru":
        last, none = into[-into.shape[0] // 3 :], torch.zeros_like(along[: along.shape[1]])
        into = torch.cat([into[: -len(last)], torch.zeros_like(last), last])
        along = torch.cat([along, none])
    return torch.cat([along, into], dim=1)


def _before(y: Tensor, reverse: bool) -> Tensor:
    """The states ``[N, T, H]`` one step earlier; the first is zero."""
    return pad(y[:, 1:], (0, 0, 0, 1)) if reverse else pad(y[:, :-1], (0, 0, 1, 0))


def _rnn_tanh(x: Tensor, y: Tensor, w: Sequence[Tensor], reverse: bool) -> Slopes:
    return Slopes((1 - y * y).unsqueeze(2))


def _rnn_relu(x: Tensor, y: Tensor, w: Sequence[Tensor], reverse: bool) -> Slopes:
    return Slopes((y > 0).to(y.dtype).unsqueeze(2))


def _lstm(x: Tensor, y: Tensor, w: Sequence[Tensor], reverse: bool) -> Slopes:
    biases: Sequence[Tensor | None] = w[2:] or (None, None)
    z = linear(x, w[0], biases[0]) + linear(_before(y, reverse), w[1], biases[1])  # [N, T, 4 H]
    i, f, g, o = z.chunk(4, dim=2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = i * g
    order = range(cells.shape[1])[::-1] if reverse else range(cells.shape[1])
    for t, previous in zip(order[1:], order[:-1], strict=True):
        cells[:, t].addcmul_(f[:, t], cells[:, previous])
    tanh = cells.tanh()
    # The slopes of the first three gates are with respect to the cell's cotangent, that of the last to the state's.
    slopes = [g * i * (1 - i), _before(cells, reverse) * f * (1 - f), i * (1 - g * g), tanh * o * (1 - o)]
    return Slopes(torch.stack(slopes, dim=2), f, o * (1 - tanh * tanh))


def _gru(x: Tensor, y: Tensor, w: Sequence[Tensor], reverse: bool) -> Slopes:
    biases: Sequence[Tensor | None] = w[2:] or (None, None)
    before = _before(y, reverse)
    (xr, xz, xn), (hr, hz, hn) = (
        linear(a, weight, bias).chunk(3, dim=2) for a, weight, bias in zip((x, before), w[:2], biases, strict=True)
    )
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    slope = (1 - z) * (1 - n * n)
    slopes = [slope * hn * r * (1 - r), (before - n) * z * (1 - z), slope * r, slope]
    return Slopes(torch.stack(slopes, dim=2), z)


SLOPES: dict[str, Callable[[Tensor, Tensor, Sequence[Tensor], bool], Slopes]] = {
    "lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu,
}  # fmt: skip
