"""The plain torch executor of every form, for all seeds at once.  The kernels are tested against it, and it runs the
steps that have no kernel.

Seeds are an axis after the batch: a cotangent is ``[N, S, *shape]``.  For torch calls without such an axis it is folded
into the batch, ``[N·S, *shape]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ir import graph, indexing
from ..ir import program as ir
from ..ir.calls import Params, evaluate, params_in
from ..ir.functions import FUNCTIONS, RECTIFYING
from ..ir.recurrent import recognize
from . import ops
from .recurrent import vjp as vjp_recurrent

# ---------------------------------------------------------------------------------------------------------------
# Forward


def forward_step(program: ir.Program, i: int, args: Sequence[Tensor], params: Params) -> Tensor:
    """The value that step ``i`` defines, ``[N, *shape]``.  ``args``: one ``[N, *shape]`` per entry of its inputs."""
    step = program.steps[i]
    form = step.form
    x = args[0]  # [N, *in]
    if isinstance(form, ir.Contract):
        return _contract(form, x, params)
    if isinstance(form, ir.Scale):
        return FUNCTIONS[form.function].f(x, *form.params)
    if isinstance(form, ir.Select):
        if form.ties == "split":
            return x.amax(tuple(range(2, x.dim())), keepdim=True)
        return max_pool(form.windows, x)[0]
    if isinstance(form, ir.LowRank):
        return _low_rank(form, x)
    if isinstance(form, ir.Product):
        return x @ args[1] if form.function == "matmul" else x * args[1]
    if isinstance(form, ir.Index):
        return indexing.apply(form, args, step.shape)
    if isinstance(form, ir.Given):
        return x * _given(form, args[1])
    if isinstance(form, ir.View):
        return x.reshape(x.shape[0], *step.shape)
    if isinstance(form, ir.Sum):
        return sum(args[1:], start=x)
    if isinstance(form, ir.Opaque):
        return _opaque(form.call, step.inputs, args, params)
    raise TypeError(f"step {i} has the form {type(form).__name__}, which the reference does not know")


Alter = Callable[[Tensor], Tensor]


def unaltered(x: Tensor) -> Tensor:
    return x


def forward(program: ir.Program, params: Params, inputs: Sequence[Tensor], alter: Alter = unaltered) -> list[Tensor]:
    """All values in order, each ``[N, *shape]``: the inputs, then one per step.  ``alter`` is applied to each."""
    values = [alter(x) for x in inputs]
    for i, step in enumerate(program.steps):
        values.append(alter(forward_step(program, i, [values[v] for v in step.inputs], params)))
    return values


def _contract(form: ir.Contract, x: Tensor, params: Params) -> Tensor:
    weight = params[form.weight.name] if form.weight else None
    bias = params[form.bias.name] if form.bias else None
    if isinstance(form.map, ir.Dense):
        assert weight is not None
        return F.linear(x, weight, bias)  # [N, *, I] -> [N, *, O]
    if isinstance(form.map, ir.Windows):
        assert weight is not None
        w = form.map
        weight = weight.reshape(*weight.shape[:2], *w.kernel)  # the axes may be exchanged (`passes.exchange_axes`)
        padding, padded = _padded(w, x)
        zeros = (0,) * len(padding)
        if channels_last(w, x):
            padded, weight = (t.contiguous(memory_format=torch.channels_last) for t in (padded, weight))
        return torch.convolution(padded, weight, bias, w.stride, padding, w.dilation, False, zeros, w.groups)
    if isinstance(form.map, ir.Positions):
        return _positions(form.map, x, x.shape[2:])
    shape = _per_channel(form.map, x)
    y = x if weight is None else x * weight.reshape(shape).to(x.dtype)
    return y if bias is None else y + bias.reshape(shape).to(x.dtype)


def channels_last(w: ir.Windows, x: Tensor) -> bool:
    """Whether convolutions should get their operands channels last, because tensor cores would transpose them."""
    if len(w.kernel) != 2 or w.groups != 1 or x.device.type != "cuda":
        return False
    return x.dtype in (torch.float16, torch.bfloat16) or (x.dtype == torch.float32 and ops.convolutions_in_tf32())


def _per_channel(channels: ir.Channels, x: Tensor) -> ir.Shape:
    """The shape in which one number per channel broadcasts against ``x [N, *]``."""
    return (-1,) + (1,) * (x.dim() - 2 - channels.axis)


def _padded(w: ir.Windows, x: Tensor) -> tuple[ir.Shape, Tensor]:
    """The padding for torch, which pads both sides equally, and the input with the rest of the padding applied."""
    if all(before == after for before, after in w.padding):
        return tuple(before for before, _ in w.padding), x
    flat = [n for before_after in reversed(w.padding) for n in before_after]
    return (0,) * len(w.padding), F.pad(x, flat)


def _positions(positions: ir.Positions, x: Tensor, spatial: Sequence[int], *, back: bool = False) -> Tensor:
    """``x [*, *spatial]`` times one small matrix per axis; with ``back``, ``[*, *outputs]`` times the transposes."""
    lead = x.dim() - len(spatial)
    for a, (rows, n) in enumerate(zip(positions.axes, spatial, strict=True)):
        matrix = _matrix(rows, int(n), x.dtype, x.device)  # [out, in], None for the identity
        if matrix is not None:
            x = torch.movedim(torch.movedim(x, lead + a, -1) @ (matrix if back else matrix.T), -1, lead + a)
    return x


@lru_cache(maxsize=128)
def _matrix(rows: tuple, n: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The dense ``[outputs, n]`` matrix of one axis's rows; ``None`` for the identity."""
    if len(rows) == n and all(row == (i, (1.0,)) for i, row in enumerate(rows)):
        return None
    with torch.inference_mode(False):
        matrix = torch.zeros(len(rows), n, dtype=torch.float64)
        for i, (first, coefficients) in enumerate(rows):
            matrix[i, first : first + len(coefficients)] = torch.tensor(coefficients, dtype=torch.float64)
        return matrix.to(device=device, dtype=dtype)


def max_pool(w: ir.Windows, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and flat spatial indices of the maxima, both ``[N, C, *out]``; -1 where a window reads nothing."""
    padding = tuple(before for before, _ in w.padding)
    ceil = any(before != after for before, after in w.padding)
    pools = (F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices)
    y, places = pools[len(w.kernel) - 1](x, w.kernel, w.stride, padding, w.dilation, ceil)
    # torch returns an index outside of the input there, and its own backward pass on a CPU writes to it.
    for axis, missing in outside(w, tuple(x.shape[2:])):
        places = places.index_fill(2 + axis, torch.tensor(missing, device=x.device), -1)
    return y, places


@lru_cache(maxsize=128)
def outside(w: ir.Windows, spatial: ir.Shape) -> list[tuple[int, list[int]]]:
    return w.outside(spatial)


def _opaque(call: ir.Call, ids: Sequence[int], args: Sequence[Tensor], params: Params) -> Tensor:
    values = dict(zip(ids, args, strict=True))
    n = args[0].shape[0]

    def leaf(x: Any) -> Any:
        if isinstance(x, ir.Param):
            return params[x.name]
        return values[x.id] if isinstance(x, ir.Value) else x.times * n

    return evaluate(call, leaf)


# ---------------------------------------------------------------------------------------------------------------
# Backward


def vjp_step(
    program: ir.Program, i: int, args: Sequence[Tensor], out: Tensor, cotangent: Tensor, params: Params
) -> tuple[Tensor, ...]:
    """The cotangents of a step's inputs, all seeds at once.

    ``args``: one ``[N, *in]`` per entry of ``step.inputs``; ``out``: the step's value ``[N, *shape]``; ``cotangent``:
    ``[N, S, *shape]``.  Returns one ``[N, S, *in]`` per entry of ``step.inputs``, with zeros where nothing flows.
    """
    form = program.steps[i].form
    x, g = args[0], cotangent
    if isinstance(form, ir.Contract):
        return (_contract_back(form, x, g, params),)
    if isinstance(form, ir.Scale):
        if form.function in RECTIFYING:
            g = g.clamp(min=0)
        if form.function == "relu":  # one call in place of three; like torch, it passes the cotangent of a NaN
            return (torch.ops.aten.threshold_backward(g, out.unsqueeze(1), 0),)
        return (_times_slope(g, FUNCTIONS[form.function].df(x, out, *form.params)),)
    if isinstance(form, ir.Select):
        return (_amax_back(x, out, g) if form.ties == "split" else _max_pool_back(form.windows, x, out, g),)
    if isinstance(form, ir.LowRank):
        return (_low_rank_back(form, x, out, g),)
    if isinstance(form, ir.Product):
        return _product_back(form, args, g)
    if isinstance(form, ir.Index):
        return indexing.transpose(form, [tuple(a.shape[1:]) for a in args], g)
    if isinstance(form, ir.Given):
        return _times_slope(g, _given(form, args[1])), g.new_zeros(()).expand_as(g)
    if isinstance(form, ir.View):
        return (g.reshape(*g.shape[:2], *x.shape[1:]),)
    if isinstance(form, ir.Sum):
        return (g,) * len(args)
    if isinstance(form, ir.Opaque):
        return _opaque_back(form.call, program.steps[i].inputs, args, out, g, params)
    raise TypeError(f"step {i} has the form {type(form).__name__}, which the reference does not know")


def _given(form: ir.Given, x: Tensor) -> Tensor:
    """The slopes, from the second input."""
    if form.of is None:
        return x
    function, params = FUNCTIONS[form.of.function], form.of.params
    return function.df(x, function.f(x, *params), *params)


def _times_slope(g: Tensor, slope: Tensor) -> Tensor:
    """``g [N, S, *shape]`` times ``slope [N, *shape]``, which may be a mask."""
    slope = slope.unsqueeze(1)
    if slope.dtype == torch.bool:
        return torch.where(slope, g, 0.0)
    return g * slope.to(g.dtype)


def _contract_back(form: ir.Contract, x: Tensor, g: Tensor, params: Params) -> Tensor:
    weight = params[form.weight.name] if form.weight else None
    if isinstance(form.map, ir.Dense):
        assert weight is not None
        return g @ weight  # [N, S, *, O] @ [O, I]
    if isinstance(form.map, ir.Positions):
        return _positions(form.map, g, x.shape[2:], back=True)
    if isinstance(form.map, ir.Channels):
        return g if weight is None else g * weight.reshape(_per_channel(form.map, x)).to(g.dtype)
    assert weight is not None
    return _convolution_back(form.map, weight.reshape(*weight.shape[:2], *form.map.kernel), x, g)


def _convolution_back(w: ir.Windows, weight: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """``g [N, S, O, *out] -> [N, S, C, *spatial]``; cotangents of padding are cut off."""
    n, s = g.shape[:2]
    if n * s == 0:
        return g.new_zeros(n, s, *x.shape[1:])
    padding, _ = _padded(w, x[:1])
    symmetric = all(before == after for before, after in w.padding)
    sizes = [d if symmetric else d + sum(p) for d, p in zip(x.shape[2:], w.padding, strict=True)]
    shape_only = g.new_empty(1).expand(n * s, x.shape[1], *sizes)
    zeros = (0,) * len(padding)
    g = g.reshape(n * s, *g.shape[2:])
    if channels_last(w, x):
        g, weight = (t.contiguous(memory_format=torch.channels_last) for t in (g, weight))
    back = torch.ops.aten.convolution_backward(
        g, shape_only, weight, None, w.stride, padding, w.dilation, False, zeros, w.groups,
        (True, False, False),
    )[0]  # [N·S, C, *sizes]  # fmt: skip
    if not symmetric:
        for axis, ((before, _), d) in enumerate(zip(w.padding, x.shape[2:], strict=True), start=2):
            back = back.narrow(axis, before, d)
    return back.reshape(n, s, *x.shape[1:])


def _max_pool_back(w: ir.Windows, x: Tensor, out: Tensor, g: Tensor) -> Tensor:
    """Each window's cotangent goes to its maximum: ``g [N, S, C, *out] -> [N, S, C, *spatial]``."""
    n, s, c = g.shape[:3]
    _, indices = max_pool(w, x)  # [N, C, *out]
    if outside(w, tuple(x.shape[2:])):
        g, indices = g * (indices >= 0).unsqueeze(1), indices.clamp(min=0)
    if len(w.kernel) == 2 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        places = indices.flatten(2).mT.unsqueeze(1).expand(n, s, -1, c)  # [N, S, *out, C]
        back = g.new_zeros(n, s, math.prod(x.shape[2:]), c)
        return back.scatter_add_(2, places, g.flatten(3).mT).mT.unflatten(3, x.shape[2:])
    places = indices.flatten(2).unsqueeze(1).expand(n, s, c, -1)
    back = g.new_zeros(n, s, c, math.prod(x.shape[2:]))
    return back.scatter_add_(3, places, g.flatten(3)).reshape(n, s, *x.shape[1:])


def _amax_back(x: Tensor, out: Tensor, g: Tensor) -> Tensor:
    """Equal maxima share the cotangent: ``g [N, S, C, 1…] -> [N, S, C, *spatial]``."""
    return shares(x, out).to(g.dtype).unsqueeze(1) * g


def shares(x: Tensor, out: Tensor) -> Tensor:
    """The share of each position of ``x [N, C, *spatial]`` in the cotangent of its maximum ``out [N, C, 1…]``."""
    maxima = (x == out).to(x.dtype)
    return maxima / maxima.sum(tuple(range(2, x.dim())), keepdim=True)


def _low_rank(form: ir.LowRank, x: Tensor) -> Tensor:
    dim = form.axis + 1
    if form.function == "normalize":
        return (x - x.mean(dim, keepdim=True)) * inverse_deviation(form, x)
    return getattr(torch, form.function)(x, dim=dim)


def inverse_deviation(form: ir.LowRank, x: Tensor) -> Tensor:
    return (x.var(form.axis + 1, unbiased=False, keepdim=True) + form.params[0]).rsqrt()


def _low_rank_back(form: ir.LowRank, x: Tensor, out: Tensor, g: Tensor) -> Tensor:
    y, dim = out.unsqueeze(1), form.axis + 2  # [N, 1, *shape]
    if form.function == "softmax":
        return y * (g - (g * y).sum(dim, keepdim=True))
    if form.function == "log_softmax":
        return g - y.exp() * g.sum(dim, keepdim=True)
    centred = g - g.mean(dim, keepdim=True) - y * (g * y).mean(dim, keepdim=True)
    return centred * inverse_deviation(form, x).unsqueeze(1)


def _product_back(form: ir.Product, args: Sequence[Tensor], g: Tensor) -> tuple[Tensor, Tensor]:
    """Each side's cotangent is the other side's value times ``g [N, S, *shape]``, summed over broadcast axes."""
    a, b = (x.unsqueeze(1) for x in args)  # [N, 1, *]
    if form.function == "matmul":
        return g @ b.transpose(-1, -2), a.transpose(-1, -2) @ g
    return tuple((g * other).sum_to_size(g.shape[0], g.shape[1], *side.shape[2:]) for side, other in ((a, b), (b, a)))  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------------
# Opaque steps: torch differentiates

MOST_FOLDED = 1 << 16  # numbers per sample and all seeds; above, repeating the forward costs more than separate calls


def _opaque_back(
    call: ir.Call, ids: Sequence[int], args: Sequence[Tensor], out: Tensor, g: Tensor, params: Params
) -> tuple[Tensor, ...]:
    recurrent = recognize(call)
    if recurrent is not None:
        return (vjp_recurrent(recurrent, args[0], out, g, lambda p: params[p.name]),)
    return _by_autograd(call, ids, args, out, g, params)


def _by_autograd(
    call: ir.Call, ids: Sequence[int], args: Sequence[Tensor], out: Tensor, g: Tensor, params: Params
) -> tuple[Tensor, ...]:
    """torch's own VJP of one call.

    A small call runs once more with all seeds folded into the batch, since each call of torch has an overhead.  A large
    one runs one backward per seed.  The size of one sample decides, so that a result does not depend on the batch.
    """
    n, s = g.shape[:2]
    smooth = [k for k, a in enumerate(args) if _is_smooth(a)] if _is_smooth(out) else []
    result = [g.new_zeros(n, s, *a.shape[1:], dtype=a.dtype if _is_smooth(a) else g.dtype) for a in args]
    if not smooth or n * s == 0:
        return tuple(result)
    folds = 1 < s <= MOST_FOLDED // (out[0].numel() + sum(a[0].numel() for a in args) + 1)
    with torch.inference_mode(False), torch.enable_grad():
        rows = [_usable(a.repeat_interleave(s, dim=0) if folds else a) for a in args]
        leaves = [rows[k].requires_grad_() for k in smooth]
        y = _opaque(call, ids, rows, {p.name: _usable(params[p.name]) for p in params_in(call)})
        if not y.requires_grad:
            return tuple(result)
        sent = (_usable(g).flatten(0, 1),) if folds else _usable(g).unbind(1)
        back = [
            torch.autograd.grad(y, leaves, part, retain_graph=True, allow_unused=True, materialize_grads=True)
            for part in sent
        ]
    for k, grads in zip(smooth, zip(*back, strict=True), strict=True):
        result[k] = grads[0].unflatten(0, (n, s)) if folds else torch.stack(grads, dim=1)  # [N, S, *in]
    return tuple(result)


def _is_smooth(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _usable(x: Tensor) -> Tensor:
    """The tensor, or a copy if it was made under inference mode, since autograd could not save it."""
    return x.clone() if x.is_inference() else x.detach()


# ---------------------------------------------------------------------------------------------------------------
# The Jacobian


def vjp(
    program: ir.Program,
    params: Params,
    values: Sequence[Tensor],
    cotangent: Tensor,
    wrt: Sequence[int] | None = None,
    alter: Alter = unaltered,
) -> tuple[Tensor, ...]:
    """Pull ``cotangent [N, S, *out]`` back to the inputs ``wrt`` (all by default): one ``[N, S, *in]`` each.

    ``values`` are those of `forward`.  ``alter`` is applied to the cotangents that each step sends back.
    """
    n = len(program.inputs)
    wanted = tuple(range(n)) if wrt is None else tuple(wrt)
    if cotangent.shape[0] * cotangent.shape[1] == 0:  # torch cannot infer a shape from an empty tensor
        return tuple(cotangent.new_zeros(*cotangent.shape[:2], *program.inputs[v]) for v in wanted)
    leads = graph.descendants(program, wanted)  # a cotangent reaches the wanted inputs through these
    cotangents: dict[int, Tensor] = {program.output: cotangent}
    for i in range(len(program.steps) - 1, -1, -1):
        step = program.steps[i]
        g = cotangents.pop(n + i, None)
        if g is None or n + i not in leads:
            continue
        back = vjp_step(program, i, [values[v] for v in step.inputs], values[n + i], g, params)
        for v, part in zip(step.inputs, back, strict=True):
            if v in leads:
                part = alter(part)
                cotangents[v] = cotangents[v] + part if v in cotangents else part
    seeds = cotangent.shape[:2]
    return tuple(cotangents[v] if v in cotangents else cotangent.new_zeros(*seeds, *program.inputs[v]) for v in wanted)


def one_hot(program: ir.Program, y: Tensor, targets: Tensor | None) -> Tensor:
    """Seeds ``[N, S, *out]`` for flat output indices ``targets``: ``None`` (all), ``[S]``, or ``[N, S]``."""
    n, c = y.shape[0], program.outputs
    if targets is None:
        targets = torch.arange(c, device=y.device)
    targets = targets.to(y.device).expand(n, -1) if targets.dim() == 1 else targets.to(y.device)  # [N, S]
    seeds = torch.zeros(n, targets.shape[1], c, dtype=y.dtype, device=y.device)
    return seeds.scatter_(2, targets.unsqueeze(2), 1.0).reshape(n, targets.shape[1], *program.output_shape)


def jacobian(
    program: ir.Program,
    params: Params,
    inputs: Sequence[Tensor],
    targets: Tensor | None = None,
    wrt: Sequence[int] | None = None,
    *,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs ``[N, *out]`` and, per input in ``wrt`` (all by default), the Jacobian ``[N, S, *in]``.

    ``targets`` are flat output indices: ``None`` for all C outputs, ``[S]`` for these outputs of every sample, or
    ``[N, S]`` for each sample's own.  ``out``: tensors to fill with the Jacobians.
    """
    with torch.no_grad():
        inputs = [x.clone() if x.is_inference() else x for x in inputs]  # autograd refuses inference tensors
        values = forward(program, params, inputs)
        y = values[program.output]
        jacobians = vjp(program, params, values, one_hot(program, y, targets), wrt)
        if out is None:
            return y, jacobians
        for o, jacobian in zip(out, jacobians, strict=True):
            o.copy_(jacobian)
        return y, tuple(out)
