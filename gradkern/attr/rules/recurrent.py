"""LSTM, GRU and plain RNN layers on the tape, step by step (`tape.py`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .tape import InputAndReference, NoRule, Tape, handles, packet

Value = InputAndReference | Tensor


@handles("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    """All outputs and last states, as the operation gives them."""
    if kwargs or len(args) != 9 or isinstance(args[3], (list, tuple)):
        raise NoRule(str(op))
    x, state, weights, biases, layers, dropout, train, bidirectional, batch_first = args
    directions, per = 1 + bool(bidirectional), 4 if biases else 2
    if (train and dropout) or len(weights) != layers * directions * per:
        raise NoRule(str(op))
    states = state if isinstance(state, (list, tuple)) else [state]
    time = 1 if batch_first else 0
    last: list[list[Value]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for d in range(directions):
            k = layer * directions + d
            first = [tape("select.int", s, 0, k) for s in states]
            steps, ends = walk(tape, packet(op), x, weights[k * per : (k + 1) * per], first, time, bool(d))
            outputs.append(tape("stack.default", steps, time))
            for ended, end in zip(last, ends, strict=True):
                ended.append(end)
        x = outputs[0] if directions == 1 else tape("cat.default", outputs, -1)
    return (x, *(tape("stack.default", ended, 0) for ended in last))


def walk(
    tape: Tape, kind: str, x: Value, w: Any, state: list[Value], time: int, backward: bool
) -> tuple[list[Value], list[Value]]:
    """One layer in one direction: the outputs of its steps in the order of time, and its last states."""
    w_ih, w_hh, b_ih, b_hh = w if len(w) == 4 else (*w, None, None)
    inputs = tape("unbind.int", tape("linear.default", x, w_ih, b_ih), time)
    outputs = []
    for z in reversed(inputs) if backward else inputs:
        state = CELLS[kind](tape, z, tape("linear.default", state[0], w_hh, b_hh), state)
        outputs.append(state[0])
    return outputs[::-1] if backward else outputs, state


def plain(function: str) -> Any:
    def cell(tape: Tape, z: Value, recurrent: Value, state: list[Value]) -> list[Value]:
        return [tape(function, tape("add.Tensor", z, recurrent))]

    return cell


def lstm(tape: Tape, z: Value, recurrent: Value, state: list[Value]) -> list[Value]:
    i, f, g, o = tape("chunk.default", tape("add.Tensor", z, recurrent), 4, -1)
    i, f, o = (tape("sigmoid.default", gate) for gate in (i, f, o))
    kept, added = tape("mul.Tensor", f, state[1]), tape("mul.Tensor", i, tape("tanh.default", g))
    c = tape("add.Tensor", kept, added)
    return [tape("mul.Tensor", o, tape("tanh.default", c)), c]


def gru(tape: Tape, z: Value, recurrent: Value, state: list[Value]) -> list[Value]:
    (xr, xz, xn), (hr, hz, hn) = tape("chunk.default", z, 3, -1), tape("chunk.default", recurrent, 3, -1)
    r, u = (tape("sigmoid.default", tape("add.Tensor", a, b)) for a, b in ((xr, hr), (xz, hz)))
    n = tape("tanh.default", tape("add.Tensor", xn, tape("mul.Tensor", r, hn)))
    return [tape("add.Tensor", n, tape("mul.Tensor", u, tape("sub.Tensor", state[0], n)))]


CELLS: dict[str, Any] = {"lstm": lstm, "gru": gru, "rnn_tanh": plain("tanh.default"), "rnn_relu": plain("relu.default")}
