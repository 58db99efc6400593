"""A Program cut at a layer: forward to the layer's value, and all-seed gradients from the outputs back to it.

The layer's value is found by its content: the live model runs a few samples with a hook on the layer, and the value of
the Program that equals the hooked tensor is chosen (module paths decide between equal values).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...dispatch import batching
from ...dispatch.targets import Seeds
from ...ir import graph
from ...ir.program import Program
from ...runtime import executor, reference
from ...util import options, rounding
from ...util.buffers import buffers_kept
from ...util.chunks import forward_samples, spans, stepwise_bytes
from ...util.memo import Memo, WeakMemo
from ..old_signatures import takes_seeds
from ..points import Points
from ..rules.linear import rule_values
from ..rules.rule import Values

SAMPLES = 3  # samples, plus as many noisy ones, on which the layer's value is compared with the Program's values
#: Layer values by the verified Program, then by the layer's path and whether its input is meant.
_values: WeakMemo[dict[tuple[str, bool], int]] = WeakMemo(dict)
_tails: Memo[Tail] = Memo(256)


@dataclass(frozen=True)
class Tail:
    """The part of a Program after a value.  Its inputs are that value, then the other values that cross the cut.

    In ``y = f(h) + x`` with ``h = g(x)``, the tail after ``h`` has the inputs ``h`` and ``x``.
    """

    program: Program
    value: int
    crossing: tuple[int, ...]


def layer_value(points: Points, program: Program, layer: nn.Module, path: str, to_input: bool) -> int | None:
    """The index of the layer's value (from its last call; its input with ``to_input``); None if there is none.

    It is remembered as long as the graph, but only if these weights and samples left no other choice.
    """
    remembered = _values.of(points.bound.verified)
    value = remembered.get((path, to_input))
    if value is not None:
        return value
    value, unique = _locate(points, program, layer, path, to_input)
    if value is not None and unique:
        remembered[path, to_input] = value
    return value


def _locate(points: Points, program: Program, layer: nn.Module, path: str, to_input: bool) -> tuple[int | None, bool]:
    """The number of the layer's value, and whether it is the only one that may be meant."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for x in points.base_request.pick(SAMPLES):
        noisy = x
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            noisy = x + ((x.std() if x.numel() > 1 else x.new_ones(())) + 0.1) * noise
        rows.append(torch.cat([x, noisy]))
    indices = not all(x.is_floating_point() for x in rows)
    with torch.inference_mode(False), buffers_kept(points.module), _watch(layer, to_input, indices) as seen:
        y = points.fn(*[x.clone() for x in rows])
    if not seen or seen[-1] is None:
        return None, False
    live, content = seen[-1]
    with torch.no_grad():
        values = reference.forward(program, points.bound.params(), rows)
        equal = [v for v, of in enumerate(values) if _equal(of, content)]
        value, unique = _best(program, path, to_input, equal)
    # The comparison of a new Program with autograd covers no gradient if all inputs are integers.
    unconfirmed = value is not None and indices and not _confirm(tail_of(program, value), points, values, y, live)
    return (None, False) if unconfirmed else (value, unique)


@contextmanager
def _watch(layer: nn.Module, to_input: bool, grad: bool) -> Iterator[list[tuple[Tensor, Tensor] | None]]:
    """The output (or input) of every call of the layer, and a copy.  ``grad``: gradients must reach it."""
    seen: list[tuple[Tensor, Tensor] | None] = []

    def look(_: Any, inputs: Any, output: Any = None) -> Tensor | None:
        got = inputs if to_input else output
        got = got[0] if isinstance(got, tuple) and len(got) == 1 else got
        if not isinstance(got, Tensor):
            seen.append(None)
            return None
        seen.append((got, got.detach().clone()))
        if not grad or not got.is_floating_point():
            return None
        return (got if got.requires_grad else got.requires_grad_()).clone()  # the model may change the clone in place

    handle = layer.register_forward_pre_hook(look) if to_input else layer.register_forward_hook(look)
    try:
        with torch.set_grad_enabled(grad):
            yield seen
    finally:
        handle.remove()


def _confirm(tail: Tail, points: Points, values: Sequence[Tensor], y: Tensor, live: Tensor) -> bool:
    """Whether the gradient from the outputs to the layer's value is that of live autograd."""
    if not live.requires_grad:
        return False
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y)
    (want,) = torch.autograd.grad(y, live, g, allow_unused=True)
    if want is None or tail.program.output < 0:
        return want is None and tail.program.output < 0
    with torch.no_grad():
        params, program = points.bound.params(), tail.program
        tail_values = reference.forward(program, params, [values[v] for v in (tail.value, *tail.crossing)])
        (got,) = reference.vjp(program, params, tail_values, g.unsqueeze(1), (0,))
    return _equal(got.squeeze(1), want)


def _equal(a: Tensor, b: Tensor) -> bool:
    return rounding.close_elements(a, b, rounding.for_layer(b.dtype))


def _best(program: Program, path: str, to_input: bool, candidates: list[int]) -> tuple[int | None, bool]:
    """The candidate that belongs to the module, and whether it is the only one; a single one is taken unchecked."""
    base = len(program.inputs)
    if to_input:
        inside = [v for v in candidates if any(_inside(program, path, i) for i in program.consumers[v])]
    else:
        inside = [v for v in candidates if v >= base and _inside(program, path, v - base)]
    if inside:
        return inside[0 if to_input else -1], len(inside) == 1
    return (candidates[0], True) if len(candidates) == 1 else (None, False)


def tail_of(program: Program, value: int) -> Tail:
    """The part of the Program between ``value`` and the output, remembered."""

    def make() -> Tail:
        needed = graph.ancestors(program, [program.output], without=[value])
        changing = (needed & graph.descendants(program, [value])) | {value}
        steps = [v - len(program.inputs) for v in sorted(changing - {value})]
        crossing = sorted({v for i in steps for v in program.steps[i].inputs} - changing)
        return Tail(graph.part(program, [value, *crossing], steps, program.output), value, tuple(crossing))

    return _tails.get_or_make((program.key, value), make)


class LayerView:
    """One model seen from one layer: activations there, and gradients of the outputs with respect to them."""

    def __init__(self, points: Points, program: Program, value: int, exclusive: bool) -> None:
        self.points, self.program, self.value = points, program, value
        self.exclusive = exclusive  # whether all readers of the value read it from the layer
        self.tail = tail_of(program, value)
        self.params = points.bound.params()

    def at(self, points: Points) -> LayerView:
        """This layer at other samples."""
        return LayerView(points, self.program, self.value, self.exclusive)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.program.shape(self.value)

    def forward(self, inputs: Sequence[Tensor], more: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The layer's value ``[R, *layer]``, and the other values that cross the cut."""
        rows = [x.detach().contiguous() for x in (*inputs, *more)]
        count, like = rows[0].shape[0], executor.leading(rows)
        chunk = forward_samples(like.device, stepwise_bytes(self.program.shapes, 0, like.element_size()))
        pieces = [self._forward([x[a:b] for x in rows]) for a, b in list(spans(0, count, chunk)) or [(0, 0)]]
        return pieces[0] if len(pieces) == 1 else tuple(map(torch.cat, zip(*pieces, strict=True)))

    def _forward(self, rows: list[Tensor]) -> tuple[Tensor, ...]:
        wanted = [self.value, *self.tail.crossing]
        with torch.inference_mode(False), torch.no_grad():
            if self.points.plain_torch:
                values = Values(self.program, self.params, dict(enumerate(rows)))
            else:
                values = rule_values(self.program, self.params, rows, wanted)
            return tuple(values[v] for v in wanted)

    @takes_seeds(1)
    def at_inputs(self, seeds: Seeds) -> tuple[Tensor, Tensor]:
        """The layer's value ``[N, *layer]`` at the inputs themselves, and the gradients there, ``[N, S, *layer]``."""
        values = self.forward(self.points.inputs, self.points.more)
        return values[0], self.gradients(values, seeds)

    def zeros(self, seed_count: int) -> Tensor:
        """An empty tensor for attributions, ``[N, S, *layer]``."""
        x = self.points.inputs[0]
        return torch.zeros(x.shape[0], seed_count, *self.shape, dtype=x.dtype, device=x.device)

    @takes_seeds(2)
    def gradients(self, values: Sequence[Tensor], seeds: Seeds) -> Tensor:
        """``[R, S, *layer]`` at the values that `forward` gives."""
        tail, at = self.tail.program, values[0]
        if not tail.steps:  # the layer is the output
            with torch.inference_mode(False), torch.no_grad():
                return reference.one_hot(tail, at, seeds.targets(tail.outputs, at.device))
        return batching.jacobians(tail, self.params, values, seeds, (0,), self.points.route.engine)[0]


def view_of(points: Points, layer: Any, to_input: bool, *, now: bool) -> LayerView | None:
    """The model seen from ``layer``; None if it has no Program (or none yet, without ``now``) or no such value."""
    name = options.engine(points.engine)
    now = now or name in ("kernel", "reference") or points.route.entry.work.capture_pays()
    program = points.captured() if now else points.program()
    if program is None:
        return None
    modules = points.module.named_modules() if points.module is not None else ()
    path = next((path for path, m in modules if m is layer), None)
    value = None if path is None else layer_value(points, program, layer, path, to_input)
    if path is None or value is None:
        if points.module is not None:
            points.route.warn(
                f"{type(points.module).__name__}: the layer {type(layer).__name__} is not one value of the captured "
                "network, so Captum's own hooks run it."
            )
        return None
    view = LayerView(points, program, value, _only_there(program, path, value, to_input))
    return view if view.tail.program.output >= 0 else None  # the output need not depend on the layer


def _only_there(program: Program, path: str, value: int, to_input: bool) -> bool:
    """Whether replacing the layer's tensor changes this value for every reader."""
    base, readers = len(program.inputs), program.consumers[value]
    if to_input:
        return all(_inside(program, path, i) for i in readers)
    return len(readers) <= 1 or (value >= base and _inside(program, path, value - base))


def _inside(program: Program, path: str, i: int) -> bool:
    module = program.steps[i].module
    return not path or module == path or module.startswith(path + ".")
