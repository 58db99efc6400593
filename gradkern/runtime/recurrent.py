"""LSTM, GRU and plain RNN layers for all seeds at once.

torch differentiates a recurrent op as one node, whose backward takes one cotangent.  `vmap` cannot batch it, so every
seed would walk through time again.  Here the gates are computed once per sample, and one walk back through time
carries all seeds as rows of the same matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.program import Param
from ..ir.recurrent import Recurrent

State = tuple[Tensor, ...]  # h [N, H], and whatever else passes from step to step; in the walk back, their cotangents


def vjp(r: Recurrent, x: Tensor, g: Tensor, tensor: Callable[[Param], Tensor]) -> Tensor:
    """``x [N, T, I]`` and ``g [N, S, T, directions · H]`` -> ``[N, S, T, I]``."""
    layers = []  # per layer: the weights and the walks of its directions
    for first in range(0, len(r.weights), r.directions):
        walks, outputs = [], []
        for d in range(r.directions):
            w = [tensor(p).detach() for p in r.weights[first + d]]
            walk = WALKS[r.kind](x.flip(1) if d else x, w, r.kind)
            walks.append(walk)
            outputs.append(walk.y.flip(1) if d else walk.y)
        layers.append(walks)
        x = torch.cat(outputs, dim=2)
    for walks in reversed(layers):
        parts = []
        for d, part in enumerate(g.chunk(len(walks), dim=3)):
            back = walks[d].back(part.flip(2) if d else part)  # [N, S, T, I]
            parts.append(back.flip(2) if d else back)
        g = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return g


class Walk:
    """One layer in one direction: the forward walk keeps everything that the backward walk needs.  ``y [N, T, H]``."""

    def __init__(self, x: Tensor, w: Sequence[Tensor], kind: str) -> None:
        self.w_ih, self.w_hh = w[0], w[1]
        bias = w[2] if len(w) > 2 else None
        self.bias_hh = w[3] if len(w) > 2 else None
        self.kind, self.hidden = kind, self.w_hh.shape[1]
        n, t, _ = x.shape
        inputs = torch.nn.functional.linear(x, self.w_ih, bias)  # [N, T, gates·H]
        self.kept: list[State] = []
        state = self.start(x.new_zeros(n, self.hidden))
        outputs = []
        for k in range(t):
            state = self.step(inputs[:, k], state)
            outputs.append(state[0])
        self.y = torch.stack(outputs, dim=1)

    def recurrent(self, h: Tensor) -> Tensor:
        return torch.nn.functional.linear(h, self.w_hh, self.bias_hh)

    def start(self, zeros: Tensor) -> State:
        return (zeros,)

    def step(self, inputs: Tensor, state: State) -> State:
        z = inputs + self.recurrent(state[0])
        h = torch.tanh(z) if self.kind == "rnn_tanh" else torch.relu(z)
        self.kept.append(((1 - h * h) if self.kind == "rnn_tanh" else (h > 0).to(h.dtype),))
        return (h,)

    def back(self, g: Tensor) -> Tensor:
        """``g [N, S, T, H] -> [N, S, T, I]``."""
        n, s, t, _ = g.shape
        state: State = self.start(g.new_zeros(n, s, self.hidden))
        gates = g.new_empty(n, s, t, self.w_ih.shape[0])
        for k in reversed(range(t)):
            kept = tuple(part.unsqueeze(1) for part in self.kept[k])  # [N, 1, H]
            gates[:, :, k], state = self.step_back(state[0] + g[:, :, k], state, kept)
        return gates @ self.w_ih

    def step_back(self, dh: Tensor, state: State, kept: State) -> tuple[Tensor, State]:
        """The cotangent of the step's result -> that of its gates, and of the state before it."""
        dz = dh * kept[0]
        return dz, (dz @ self.w_hh,)


class Lstm(Walk):
    def start(self, zeros: Tensor) -> State:
        return zeros, zeros

    def step(self, inputs: Tensor, state: State) -> State:
        h, c = state
        z = inputs + self.recurrent(h)
        i, f, g, o = z.chunk(4, dim=1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        new = f * c + i * g
        t = torch.tanh(new)
        # The slopes of the gates: with respect to dc for the first three, to dh for the last; then dc from dh and dc.
        self.kept.append((g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), t * o * (1 - o), o * (1 - t * t), f))
        return o * t, new

    def step_back(self, dh: Tensor, state: State, kept: State) -> tuple[Tensor, State]:
        di, df, dg, do, through, forget = kept
        dc = state[1] + dh * through
        gates = torch.cat([dc * di, dc * df, dc * dg, dh * do], dim=2)
        return gates, (gates @ self.w_hh, dc * forget)


class Gru(Walk):
    def step(self, inputs: Tensor, state: State) -> State:
        h = state[0]
        recurrent = self.recurrent(h)
        (xr, xz, xn), (hr, hz, hn) = inputs.chunk(3, dim=1), recurrent.chunk(3, dim=1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        slope = (1 - z) * (1 - n * n)
        self.kept.append((slope * hn * r * (1 - r), (h - n) * z * (1 - z), slope, r, z))
        return ((1 - z) * n + z * h,)

    def step_back(self, dh: Tensor, state: State, kept: State) -> tuple[Tensor, State]:
        dr, dz, dn, r, z = kept
        reset, update, new = dh * dr, dh * dz, dh * dn
        before = torch.cat([reset, update, new * r], dim=2) @ self.w_hh + dh * z
        return torch.cat([reset, update, new], dim=2), (before,)


WALKS: dict[str, Any] = {"lstm": Lstm, "gru": Gru, "rnn_tanh": Walk, "rnn_relu": Walk}
