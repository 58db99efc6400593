"""The slopes of a network's forward mode, from the values of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.calls import Params
from ..ir.functions import FUNCTIONS
from ..ir.program import LowRank, Program, Scale, Select
from ..passes.forward_mode import Slope
from . import ops, reference


def slope_tensors(program: Program, params: Params, values: dict[int, Tensor], slopes: Sequence[Slope]) -> list[Tensor]:
    """One contiguous ``[N, *shape]`` per slope, from the `values_read`."""
    made: dict[int, Any] = {}  # by step: a result that its slopes share

    def once(i: int) -> Any:
        if i not in made:
            form, x = program.steps[i].form, values[program.steps[i].inputs[0]]
            if isinstance(form, Select) and form.ties == "first":
                made[i] = reference.max_pool(form.windows, x)[1]
            else:
                y = values.get(len(program.inputs) + i)
                made[i] = reference.forward_step(program, i, [x], params) if y is None else y
        return made[i]

    return [_slope(s, program, values, once).contiguous() for s in slopes]


def write_transposed(rows: Tensor, targets: Tensor | None, out: Sequence[Tensor]) -> Tensor:
    """Fill ``out``, one ``[N, S, *in]`` per input, from the tangents of the output ``rows [N, D, C]``, whose D are the
    inputs' elements.

    ``targets``: outputs ``[S]`` or ``[N, S]``; None is every output.  Returns whether all tangents of a sample are
    finite, ``[N]``.
    """
    finite = ops.write_transposed(rows, targets, out)
    if finite is not None:
        return finite
    columns = rows.transpose(1, 2)  # [N, C, D]
    if targets is not None and targets.dim() == 2:
        columns = columns.gather(1, targets.unsqueeze(2).expand(-1, -1, columns.shape[2]))
    elif targets is not None:
        columns = columns[:, targets]
    for o, part in zip(out, columns.split([o[0, 0].numel() for o in out], dim=2), strict=True):
        o.copy_(part.reshape(o.shape))
    return rows.flatten(1).sum(1).isfinite()


def _slope(s: Slope, program: Program, values: dict[int, Tensor], once: Any) -> Tensor:
    if s.kind == "value":
        return values[s.of].expand(-1, *s.shape)
    if s.kind == "swapped":
        return values[s.of].transpose(-1, -2)
    form, x = program.steps[s.of].form, values[program.steps[s.of].inputs[0]]
    if s.kind == "derivative":
        assert isinstance(form, Scale)
        return FUNCTIONS[form.function].df(x, once(s.of), *form.params).to(x.dtype)
    if s.kind in ("tap", "winner"):
        assert isinstance(form, Select)
        return _chosen(s, form, x, once(s.of))
    y = once(s.of)
    if s.kind == "share":
        return reference.shares(x, y)
    if s.kind == "1/deviation":
        assert isinstance(form, LowRank)
        return reference.inverse_deviation(form, x).expand_as(x)
    return {"output": y, "-output": -y, "-exp(output)": -y.exp()}[s.kind]


def _chosen(s: Slope, form: Select, x: Tensor, places: Tensor) -> Tensor:
    """Ones where a pool's window chose a position, or chose its place ``s.place``; ``places [N, C, *out]`` are the
    flat positions that it chose."""
    if s.kind == "winner":
        chosen, flat = torch.zeros_like(x).flatten(2), places.flatten(2)
        return chosen.scatter_reduce_(2, flat.clamp(min=0), (flat >= 0).to(x.dtype), "amax").reshape(x.shape)
    w, rest, stride = form.windows, s.place, 1
    position = torch.zeros(places.shape[2:], dtype=torch.int64, device=x.device)
    for a in reversed(range(len(w.kernel))):
        rest, at = divmod(rest, w.kernel[a])
        starts = torch.arange(places.shape[2 + a], device=x.device) * w.stride[a] - w.padding[a][0]
        read = (starts + at * w.dilation[a]).reshape(-1, *(1,) * (len(w.kernel) - 1 - a))
        # A place in the padding is never chosen, but its flat position may equal that of another place.
        inside = (read >= 0) & (read < x.shape[2 + a])
        position = torch.where(inside & (position >= 0), position + read * stride, -2)
        stride *= x.shape[2 + a]
    return (places == position).to(x.dtype)
