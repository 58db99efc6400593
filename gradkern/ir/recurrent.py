"""Recurrent calls: which ATen calls are an LSTM, a GRU or a plain RNN whose samples are axis 0."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .calls import leaves
from .program import Call, Param, Value

#: Gates per layer and op; the weights are stacked ``[gates · hidden, …]``.
GATES = {"aten.lstm.input": 4, "aten.gru.input": 3, "aten.rnn_tanh.input": 1, "aten.rnn_relu.input": 1}


@dataclass(frozen=True)
class Recurrent:
    """A recurrent call whose samples are axis 0 and whose first state does not depend on them."""

    kind: str
    weights: tuple[tuple[Param, ...], ...]  # per layer and direction: W_ih, W_hh and, if it has them, the biases
    directions: int

    def macs(self, steps: int, inputs: int, outputs: int, seeds: int) -> tuple[int, int]:
        """Multiply-adds per sample from ``[T, inputs]`` to ``[T, outputs]`` (`runtime.recurrent`): those of the forward
        pass and of its parts that the backward pass repeats, and those of the walk back through time."""
        rows = GATES[f"aten.{self.kind}.input"] * outputs  # the rows of the weights of all directions
        hidden, layers = outputs // self.directions, len(self.weights) // self.directions
        values = walk = 0
        for layer in range(layers):
            into, along = rows * (outputs if layer else inputs), rows * hidden  # per step
            # The backward pass computes the gates again, and the inputs of all layers but the first.
            forwards = 1 + (self.kind in ("lstm", "gru")) + (layer < layers - 1)
            values += forwards * steps * (into + along)
            walk += seeds * (steps * into + (steps - 1) * along)
        return values, walk


def recognize(call: Call) -> Recurrent | None:
    """The call as a `Recurrent`, or None if it is not one."""
    if call.op not in GATES or call.index != 0:
        return None
    x, state, weights, biases, layers, dropout, train, bidirectional, batch_first = call.args
    states = state if isinstance(state, tuple) else (state,)
    zeros = all(isinstance(s, Call) and s.op == "aten.zeros.default" for s in states)
    directions, per = 1 + bool(bidirectional), 4 if biases else 2
    simple = isinstance(x, Value) and all(isinstance(w, Param) for w in leaves(weights))
    if not (simple and zeros and batch_first and len(weights) == layers * directions * per) or (train and dropout):
        return None
    grouped = tuple(tuple(weights[k : k + per]) for k in range(0, len(weights), per))
    return Recurrent(call.op.split(".")[1].removesuffix(".input"), grouped, directions)


def batch_first(call: Call, x: Value) -> Call:
    """A sequence-first call as a call that reads ``x [N, T, I]`` and transposes its output ``[N, T, H]`` back."""
    layer = replace(call, args=(x, *call.args[1:8], True))
    return Call("aten.transpose.int", (layer, 0, 1)) if call.index == 0 else layer


def layer_within(call: Call) -> Call:
    """The layer inside a call of `batch_first`."""
    transposed = call.op == "aten.transpose.int" and call.args[1:] == (0, 1) and isinstance(call.args[0], Call)
    return call.args[0] if transposed else call
