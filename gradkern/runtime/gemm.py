"""Running the layers of :mod:`gradkern.codegen.cuda.gemm`: weights folded and laid out, calls of the step kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..codegen.cuda.gemm import Layer, Matrix, pool_extent
from ..codegen.units import Fold
from ..codegen.weights import Contraction
from ..ir.program import Contract, Program, Select, Windows
from ..util.chunks import spans
from . import ops
from .reference import max_pool

MOST_ROWS = (1 << 31) - (1 << 10)  # rows of a matrix: 32-bit numbers in the kernel
NO_POOL = (0, 0, 0, 0)
NOBODY = 255  # csrc/cuda/step.h: kNobody


@dataclass
class LayerWeights:
    """What the step kernel reads of a layer, in its order."""

    forward: Tensor  # [groups][taps][K][ldw]
    bias: Tensor  # [groups · O]
    backward: Tensor  # [groups][taps][O][ldw]
    forward_tables: Tensor
    backward_tables: Tensor


@lru_cache(maxsize=64)
def contractions(program: Program, layers: tuple[Layer, ...]) -> tuple[Contraction, ...]:
    """The layers' weights as matrices, with the norms that are folded in."""
    return tuple(contraction(program, layer) for layer in layers)


def contraction(program: Program, layer: Layer) -> Contraction:
    form = program.steps[layer.contraction].form
    assert isinstance(form, Contract)
    folds = [Fold(program.steps[j].form) for j in layer.norms]  # type: ignore[arg-type]
    return Contraction(form, folds, 1, (0, 0, 0), True)  # turned: the input's own order


class LayerPack:
    """The weights of all layers of a plan, dtype and device of ``like``."""

    def __init__(self, program: Program, layers: tuple[Layer, ...], params: Mapping[str, Tensor], like: Tensor):
        sizes = [(x.forward.weights, x.forward.groups * x.forward.O, x.backward.weights) for x in layers]
        rounded = [[(n + 3) // 4 * 4 for n in s] for s in sizes]  # 16-byte loads
        self.weights = torch.zeros(sum(map(sum, rounded)), dtype=like.dtype, device=like.device)
        self.of: dict[int, LayerWeights] = {}
        cursor = 0
        for layer, own, exact in zip(layers, contractions(program, layers), sizes, strict=True):
            parts = []
            for n in exact:
                parts.append(self.weights[cursor : cursor + n])
                cursor += (n + 3) // 4 * 4
            w, b = own.folded(params)
            f, t = layer.forward, layer.backward
            w = w.reshape(f.groups, f.O, f.all_taps, f.K)  # [groups, out, taps, in]
            wide = parts[0].view(f.groups, f.all_taps, f.K, f.ldw)
            wide[..., : f.O] = w.permute(0, 2, 3, 1)
            parts[1][:] = b
            back = parts[2].view(t.groups, t.all_taps, t.K, t.ldw)
            back[..., : t.O] = w.permute(0, 2, 1, 3)
            tables = [torch.tensor(m.tables, dtype=torch.int32, device=like.device) for m in (f, t)]
            self.of[layer.contraction] = LayerWeights(*parts, *tables)
        self.finite = bool(torch.isfinite(self.weights).all())  # the last thing: on a GPU it also waits


def run_forward(
    program: Program, layer: Layer, weights: LayerWeights, math_: int, x: Tensor, add: Tensor | None
) -> Tensor:
    """``x [N, *in]`` and the sum's other value ``[N, *out]`` → the layer's value ``[N, *out]``."""
    out = x.new_empty(x.shape[0], *program.shape(layer.value))
    step(layer.forward, weights.forward, weights.forward_tables, math_, x, out, 1, weights.bias, add, layer.relu)
    return out


def run_backward(
    program: Program,
    layer: Layer,
    weights: LayerWeights,
    math_: int,
    g: Tensor,
    add: Tensor | None,
    values: Mapping[int, Tensor],
) -> Tensor:
    """``g [N, S, *out]`` and what other readers sent ``[N, S, *in]`` → the cotangent ``[N, S, *target]``."""
    n, seeds = g.shape[:2]
    mask = choice = None
    pool, fresh = NO_POOL, g.new_empty
    if layer.pool is not None:
        pool = pool_extent(program, layer.pool)
        choice = chosen(program, layer, values)
        kh, kw, height, width = pool
        if layer.backward.extent != (height / kh, width / kw):
            fresh = g.new_zeros  # places that no window reads
    elif layer.mask is not None:
        mask = values[layer.mask]
    out = fresh(n, seeds, *program.shape(layer.target))
    step(
        layer.backward, weights.backward, weights.backward_tables, math_, g, out, seeds, None, add, False,
        mask, choice, pool,
    )  # fmt: skip
    return out


def step(
    m: Matrix,
    weight: Tensor,
    tables: Tensor,
    math_: int,
    x: Tensor,
    out: Tensor,
    seeds: int,
    bias: Tensor | None,
    add: Tensor | None,
    relu: bool,
    mask: Tensor | None = None,
    choice: Tensor | None = None,
    pool: tuple[int, int, int, int] = NO_POOL,
) -> None:
    """One call of the kernel, or a few where the rows are too many for it."""
    x = x.contiguous()
    most = max(1, MOST_ROWS // (seeds * m.inner * m.places))
    for a, b in spans(0, x.shape[0], most):
        part = [None if t is None else t[a:b].contiguous() for t in (add, mask, choice)]
        sizes = m.sizes((b - a) * seeds * m.inner, seeds, relu, pool)
        ops.step(x[a:b], weight, bias, *part, tables, sizes, math_, m.narrow, out[a:b])


def chosen(program: Program, layer: Layer, values: Mapping[int, Tensor]) -> Tensor:
    """Which tap of its window each maximum of the pool came from, bytes ``[N, C, *out]``; `NOBODY` where a ReLU before
    or behind the pool is off."""
    assert layer.pool is not None
    select = program.steps[layer.pool]
    assert isinstance(select.form, Select)
    source = values[select.inputs[0]]
    top, flat = max_pool(select.form.windows, source, select.shape)
    taps = tap_numbers(select.form.windows, tuple(source.shape[2:]), source.device)
    choice = taps[flat]
    return choice if layer.mask is None else choice.masked_fill_(top <= 0, NOBODY)


def tap_numbers(w: Windows, source: tuple[int, ...], device: torch.device) -> Tensor:
    """For each flat place of what a pool reads, which tap of its window it is: windows lie side by side."""
    number = torch.zeros(math.prod(source), dtype=torch.int64, device=device).view(source)
    for axis, k in enumerate(w.kernel):
        own = torch.arange(source[axis], device=device) % k
        number = number * k + own.view(-1, *[1] * (len(source) - axis - 1))
    return number.flatten().to(torch.uint8)
