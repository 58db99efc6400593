"""The executor of plans: forward and all-seed backward, group by group.

The same contract as `reference.jacobian`, which is its oracle.  A network that is one native group
is a single call of the compiled op.  Otherwise the forward runs group by group, keeping what crosses the borders,
and the backward hands cotangents ``[N, S, *shape]`` from group to group; a native group recomputes its own forward
instead of saving it, which costs one forward in S backwards.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..codegen.chain import Chain
from ..codegen.encoding import WIDTH
from ..ir.program import Program
from ..passes.bottleneck import halves
from ..passes.prune_positions import narrowed
from ..planner import plan
from ..planner.plan import Plan
from ..util import options
from ..util.chunks import spans
from . import ops, reference

GPU_ROOM = 16  # times as many packs are kept on a GPU: networks in many pieces, with large weights
PRODUCT_BYTES = 64 << 20  # of the Jacobian at a bottleneck, for a part of the batch

Params = Mapping[str, Tensor]


def jacobian(
    program: Program,
    params: Params,
    inputs: Sequence[Tensor],
    targets: Tensor | None = None,
    wrt: Sequence[int] | None = None,
    *,
    out: Sequence[Tensor] | None = None,
    planned: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs ``[N, *out]`` and one Jacobian ``[N, S, *in]`` per input in ``wrt`` (default: all).

    ``targets``: flat output indices, int64 ``[S]`` shared by all samples or ``[N, S]``; None is every output.
    ``out``: tensors ``[N, S, *in]`` to fill, one per entry of ``wrt``.  ``planned``: the dtype that the plan is made
    for, where that is not the inputs'.
    """
    wrt = tuple(range(len(inputs))) if wrt is None else tuple(wrt)
    n, dtype = inputs[0].shape[0], dtype_of(inputs)
    if targets is None:
        targets = torch.arange(program.outputs, device=inputs[0].device)
    targets = targets.to(inputs[0].device)
    seeds = targets.shape[-1]
    if out is None:
        out = tuple(inputs[w].new_empty(n, seeds, *inputs[w].shape[1:]) for w in wrt)
    everything, program = program, narrowed(program)
    p = plan.cached_plan(program, seeds, planned or dtype, inputs[0].device)
    if p.halves == dtype:
        return in_float32(program, params, inputs, targets, wrt, out), tuple(out)
    if p.cut is not None and n:
        return through_bottleneck(p, params, inputs, targets, wrt, out), tuple(out)
    try:
        if n == 0 or seeds == 0 or not program.steps or not any(g.native for g in p.groups):
            raise NoKernel
        if p.whole:
            return whole(p, params, inputs, targets, wrt, out), tuple(out)
        return Pieces(p, params, inputs, targets, wrt).run(out), tuple(out)
    except NoKernel:  # with weights that are not finite, positions that are not needed send NaN back, as in torch
        return by_reference(everything, params, inputs, targets, wrt, out), tuple(out)


def in_float32(
    program: Program,
    params: Params,
    inputs: Sequence[Tensor],
    targets: Tensor,
    wrt: tuple[int, ...],
    out: Sequence[Tensor],
) -> Tensor:
    """The kernels work in float32; a copy on either side costs less than they do."""

    def cast(x: Tensor) -> Tensor:
        return x.float() if x.is_floating_point() else x

    dtype = dtype_of(inputs)
    wide = {name: cast(p) for name, p in params.items()}
    y, found = jacobian(program, wide, [cast(x) for x in inputs], targets, wrt, planned=dtype)
    for o, j in zip(out, found, strict=True):
        o.copy_(j)
    return y.to(dtype)


def through_bottleneck(
    p: Plan, params: Params, inputs: Sequence[Tensor], targets: Tensor, wrt: tuple[int, ...], out: Sequence[Tensor]
) -> Tensor:
    """``dy/dv · dv/dx``, a part of the batch at a time so that ``dv/dx`` stays small."""
    assert p.cut is not None
    before, after = halves(p.program, p.cut.value)
    n, width = inputs[0].shape[0], p.cut.width
    each = width * max(o[0, 0].numel() for o in out) * out[0].element_size()
    outputs = []
    for a, b in spans(0, n, max(1, PRODUCT_BYTES // max(each, 1))):
        few = [x[a:b] for x in inputs]
        values, inner = jacobian(before, params, few, None, wrt, planned=p.halves)  # [n, *v], [n, K, *in]
        own = targets[a:b] if targets.dim() == 2 else targets
        y, (outer,) = jacobian(after, params, [values], own, planned=p.halves)  # [n, S, *v]
        outer = outer.reshape(b - a, -1, width)
        for o, j in zip(out, inner, strict=True):
            o[a:b].copy_((outer @ j.reshape(b - a, width, -1)).view(o[a:b].shape))
        outputs.append(y)
    return torch.cat(outputs)


def by_reference(
    program: Program,
    params: Params,
    inputs: Sequence[Tensor],
    targets: Tensor,
    wrt: tuple[int, ...],
    out: Sequence[Tensor],
) -> Tensor:
    """The same without kernels, a part of the batch at a time: the caller counts on a kernel's need of memory."""
    n = inputs[0].shape[0]
    outputs = []
    chunk = max(1, options.memory_budget(inputs[0].device) // need(program, targets.shape[-1], dtype_of(inputs)))
    for a, b in list(spans(0, n, chunk)) or [(0, 0)]:
        own = targets[a:b] if targets.dim() == 2 else targets
        y, found = reference.jacobian(program, params, [x[a:b] for x in inputs], own, wrt)
        outputs.append(y)
        for o, j in zip(out, found, strict=True):
            o[a:b].copy_(j)
    return torch.cat(outputs)


def dtype_of(inputs: Sequence[Tensor]) -> torch.dtype:
    """What a call computes in: the dtype of the first input that is not of integers."""
    return next((x.dtype for x in inputs if x.is_floating_point()), inputs[0].dtype)


def need(program: Program, seeds: int, dtype: torch.dtype) -> int:
    """Bytes per sample beside the result where values and cotangents are whole tensors."""
    numels = [math.prod(program.shape(v)) for v in range(len(program.inputs) + len(program.steps))]
    return max(1, dtype.itemsize * (sum(numels) + 3 * seeds * max(numels)))


def casts(program: Program, seeds: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a call casts to float32 and back."""
    return plan.cached_plan(narrowed(program), seeds, dtype, device).halves is not None


def bounded(program: Program, seeds: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a call of any size needs no memory beyond its result and a fixed scratch per thread."""
    return plan.cached_plan(narrowed(program), seeds, dtype, device).whole


class NoKernel(Exception):
    """Skipping zeros is not exact here (0 · Inf is NaN), dtypes differ, or there is nothing for a kernel to do."""


# ---------------------------------------------------------------------------------------------------------------
# Packed weights


class Packs:
    """Packed weights of a few recent contents, by chain and content hash."""

    def __init__(self, keep: int = 16, most: int = 64 << 20):
        self.keep, self.most, self.lock = keep, most, threading.Lock()  # entries, bytes
        self.found: OrderedDict[tuple[int, int, torch.device], Packed] = OrderedDict()

    def get(self, chain: Chain, params: Params, like: Tensor, content: int | None = None) -> Packed:
        """The chain's packed weights, once per content: of these weights, or as given."""
        tensors = [params[name] for layout in chain.layouts for name in layout.names()]
        if any(t.dtype != like.dtype for t in tensors):
            raise NoKernel
        key = (id(chain), ops.content_hash(tensors) if content is None else content, like.device)
        with self.lock:
            known = self.found.get(key)
            if known is not None and known.chain is chain:
                self.found.move_to_end(key)
                return known
        packed = Packed(chain, params, like)
        with self.lock:
            self.found[key] = packed
            held = sum(p.weights.nbytes for p in self.found.values())
            room = 1 if like.device.type == "cpu" else GPU_ROOM
            while len(self.found) > room * self.keep or (held > room * self.most and len(self.found) > 1):
                held -= self.found.popitem(last=False)[1].weights.nbytes
        return packed


class Packed:
    """Folded weights in kernel order, and the chain's integers as tensors, dtype and device of ``like``."""

    def __init__(self, chain: Chain, params: Params, like: Tensor):
        self.chain = chain
        self.tables = torch.tensor(chain.tables or (0,), dtype=torch.int32, device=like.device)
        self.forward, self.backward = (
            torch.tensor(rows, dtype=torch.int64, device=like.device).reshape(-1, WIDTH)
            for rows in (chain.forward_rows, chain.backward_rows)
        )
        self.weights = torch.zeros(chain.packed_size + 64, dtype=like.dtype, device=like.device)
        for layout in chain.layouts:
            layout.fill(self.weights, params)
        # The last thing, because on a GPU it also waits: from here on any stream may read the pack.
        self.finite = bool(torch.isfinite(self.weights).all())

    def seed_rows(self, targets: Tensor, outputs: int) -> Tensor | None:
        """The last weight's rows of the targets, ``[S, row]`` or ``[N, S, row]``; None where seeds start elsewhere."""
        if self.chain.rows is None:
            return None
        start, row = self.chain.rows
        rows = self.weights[start : start + outputs * row].view(outputs, row)
        rows = rows[targets].contiguous()
        return rows.clamp_(min=0) if self.chain.rectify_rows else rows


_packs = Packs()


def packed_for(chain: Chain, params: Params, like: Tensor, content: int | None = None) -> Packed:
    """``content``: a hash of all parameters, where the caller has one."""
    packed = _packs.get(chain, params, like, content)
    if not packed.finite:
        raise NoKernel
    return packed


# ---------------------------------------------------------------------------------------------------------------
# One native group


def whole(
    p: Plan, params: Params, inputs: Sequence[Tensor], targets: Tensor, wrt: tuple[int, ...], out: Sequence[Tensor]
) -> Tensor:
    """A network that is one chain: one call, the Jacobian written once."""
    chain = plan.chain_of(p, 0, targets.shape[-1], wrt, True)
    ins = chain_inputs(chain, inputs, dtype_of(inputs))
    packed = packed_for(chain, params, ins[0])
    targets = targets.contiguous()
    rows = packed.seed_rows(targets, p.program.outputs)
    n, seeds = inputs[0].shape[0], targets.shape[-1]
    direct = [contiguous_like(out[wrt.index(v)], inputs[v], n, seeds) for v in chain.wrt]
    for w, o in zip(wrt, out, strict=True):
        if w not in chain.wrt:
            o.zero_()  # the output does not depend on this input
    y = call(packed, ins, targets, rows, [], direct)[0]
    for v, d in zip(chain.wrt, direct, strict=True):
        if d is not out[wrt.index(v)]:
            out[wrt.index(v)].copy_(d)
    return y.view(n, *p.program.output_shape)


def chain_inputs(chain: Chain, values: Sequence[Tensor] | Mapping[int, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What a chain reads, in one piece each.  A network that changes the dtype on its way has no kernels."""
    if any(values[v].dtype != dtype for v in chain.inputs):
        raise NoKernel
    return [values[v].contiguous() for v in chain.inputs]


def contiguous_like(out: Tensor, x: Tensor, n: int, seeds: int) -> Tensor:
    """``out`` itself where a kernel can write into it, else a temporary of its shape."""
    if out.is_contiguous() and out.dtype == x.dtype and out.device == x.device:
        return out
    return x.new_empty(n, seeds, *x.shape[1:])


def call(
    packed: Packed,
    inputs: list[Tensor],
    targets: Tensor | None,
    rows: Tensor | None,
    cotangents: list[Tensor],
    results: list[Tensor],
) -> list[Tensor]:
    c = packed.chain
    return ops.chain_vjp(
        inputs,
        packed.weights,
        packed.tables,
        packed.forward,
        packed.backward,
        c.sizes,
        c.output_sizes,
        targets,
        rows,
        cotangents,
        c.seed_tile,
        results,
    )


# ---------------------------------------------------------------------------------------------------------------
# Several groups


class Pieces:
    """Forward and backward over groups, for one chunk of samples."""

    def __init__(self, p: Plan, params: Params, inputs: Sequence[Tensor], targets: Tensor, wrt: tuple[int, ...]):
        self.plan, self.params, self.inputs, self.targets, self.wrt = p, params, inputs, targets, wrt
        self.program = p.program
        self.n, self.seeds, self.dtype = inputs[0].shape[0], targets.shape[-1], dtype_of(inputs)
        self.values: dict[int, Tensor] = dict(enumerate(inputs))
        self.cotangents: dict[int, Tensor] = {}
        self.needs = self.reachable()
        # One hash for all pieces: on a GPU each waits.
        self.content = ops.content_hash([t for t in params.values() if t.device == inputs[0].device])

    def reachable(self) -> set[int]:
        """Values that depend on a wanted input."""
        found, base = set(self.wrt), len(self.program.inputs)
        for i, step in enumerate(self.program.steps):
            if any(v in found for v in step.inputs):
                found.add(base + i)
        return found

    def run(self, out: Sequence[Tensor]) -> Tensor:
        for k, group in enumerate(self.plan.groups):
            self.forward_native(k) if group.native else self.forward_reference(group.steps)
        y = self.values[self.program.output]
        self.backward(out, None if self.starts_native() else reference.one_hot(self.program, y, self.targets))
        return y

    def backward(self, out: Sequence[Tensor], seeds: Tensor | None) -> None:
        """``seeds [N, S, *out]``: None where they enter as targets."""
        if seeds is not None:
            self.cotangents[self.program.output] = seeds
        for k in reversed(range(len(self.plan.groups))):
            self.backward_native(k) if self.plan.groups[k].native else self.backward_reference(k)
        for w, o in zip(self.wrt, out, strict=True):
            found = self.cotangents.get(w)
            o.zero_() if found is None else o.copy_(found)

    def add(self, value: int, cotangent: Tensor) -> None:
        """``cotangent``: [N, S, *shape]."""
        known = self.cotangents.get(value)
        self.cotangents[value] = cotangent if known is None else known + cotangent

    # ---- native groups

    def starts_native(self) -> bool:
        """Whether the seeds enter a native group as targets, so that no one-hot tensor is made."""
        group = self.plan.groups[-1]
        return group.native and group.live_out == (self.program.output,)

    def forward_native(self, k: int) -> None:
        group = self.plan.groups[k]
        chain = plan.chain_of(self.plan, k, 0, (), False)
        ins = chain_inputs(chain, self.values, self.dtype)
        packed = packed_for(chain, self.params, ins[0], self.content)
        found = ops.chain_forward(ins, packed.weights, packed.tables, packed.forward, chain.sizes, chain.output_sizes)
        for v, y in zip(group.live_out, found, strict=True):
            self.values[v] = y.view(self.n, *self.program.shape(v))

    def backward_native(self, k: int) -> None:
        group = self.plan.groups[k]
        wrt = tuple(v for v in group.live_in if v in self.needs)
        onehot = k == len(self.plan.groups) - 1 and self.starts_native() and self.program.output not in self.cotangents
        wanted = onehot or any(v in self.cotangents for v in group.live_out)
        if not wrt or not wanted:
            return
        chain = plan.chain_of(self.plan, k, self.seeds, wrt, onehot)
        ins = self.reads(chain)
        packed = packed_for(chain, self.params, ins[0], self.content)
        results = [ins[0].new_empty(self.n, self.seeds, math.prod(self.program.shape(v))) for v in chain.wrt]
        targets = rows = None
        cotangents: list[Tensor] = []
        if onehot:
            targets = self.targets.contiguous()
            rows = packed.seed_rows(targets, self.program.outputs)
        else:
            cotangents = [self.cotangent(v) for v in group.live_out]
        call(packed, ins, targets, rows, cotangents, results)
        for v, r in zip(chain.wrt, results, strict=True):
            self.add(v, r.view(self.n, self.seeds, *self.program.shape(v)))

    def reads(self, chain: Chain) -> list[Tensor]:
        return chain_inputs(chain, self.values, self.dtype)

    def cotangent(self, value: int) -> Tensor:
        shape = self.program.shape(value)
        found = self.cotangents.get(value)
        if found is None:
            found = self.inputs[0].new_zeros(self.n, self.seeds, *shape, dtype=self.dtype)
        return found.reshape(self.n, self.seeds, -1).contiguous()

    # ---- the others

    def forward_reference(self, steps: Sequence[int]) -> None:
        base = len(self.program.inputs)
        for i in steps:
            args = [self.values[v] for v in self.program.steps[i].inputs]
            self.values[base + i] = reference.forward_step(self.program, i, args, self.params)

    def backward_reference(self, k: int) -> None:
        base = len(self.program.inputs)
        for i in reversed(self.plan.groups[k].steps):
            step = self.program.steps[i]
            g = self.cotangents.pop(base + i, None)
            if g is None or not any(v in self.needs for v in step.inputs):
                continue
            found = reference.vjp_step(self.program, i, *self.looked_at(i, g), g, self.params)
            for v, cotangent in zip(step.inputs, found, strict=True):
                if v in self.needs:
                    self.add(v, cotangent)

    def looked_at(self, i: int, g: Tensor) -> tuple[list[Tensor], Tensor]:
        """The values that a step's VJP may read: its inputs and its result."""
        return [self.values[v] for v in self.program.steps[i].inputs], self.values[len(self.program.inputs) + i]
