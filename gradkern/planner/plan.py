"""Plan: which way each step of a Program goes, as a pure function of the program, the machine and the seeds.

A plan cuts the DAG into groups.  A native group is one chain: forward pattern and all-seed backward of a block of
samples without leaving the cache.  The other steps run through the plain reference, the seeds folded into the
batch; `Opaque` ones are differentiated by torch.  ``str(plan)`` is the table that ``gradkern.explain`` prints.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..codegen.chain import Chain, Machine
from ..codegen.cuda.gemm import Layer, absorbable, find, heavy
from ..codegen.cuda.lowering import HALVES, Device, TooLarge, lower_device, lowering
from ..codegen.grouping import Builder
from ..codegen.support import why_not
from ..ir.cost import forward_macs, total_macs
from ..ir.graph import ancestors
from ..ir.program import Opaque, Program, View, describe
from ..ir.recurrent import recognise
from ..passes.bottleneck import SeedCut, choose
from ..runtime import ops

CPU = torch.device("cpu")
LAYER = "kernel cuda, by layer"
NATIVE_DTYPES = {torch.float32: 4, torch.float64: 8}


@dataclass(frozen=True)
class Group:
    """Steps that run together.  ``live_in`` and ``live_out`` are the values that cross its border."""

    native: bool
    steps: tuple[int, ...]
    live_in: tuple[int, ...]
    live_out: tuple[int, ...]


@dataclass(frozen=True)
class PlanStep:
    """One row of the table."""

    value: int
    form: str
    shape: tuple[int, ...]
    path: str  # what runs it
    why: str  # why not something faster; empty where there is nothing faster
    op: str
    module: str
    macs: int  # dense multiply-adds per sample, forward and all seeds
    group: int


@dataclass(frozen=True)
class Plan:
    """Groups in execution order, and a row per step."""

    program: Program
    machine: Machine | None
    itemsize: int
    seeds: int
    groups: tuple[Group, ...]
    steps: tuple[PlanStep, ...]
    cut: SeedCut | None = None  # where seeds start instead of at the outputs
    halves: torch.dtype | None = None  # the dtype that is cast to float32 on the way in, and back
    layers: tuple[Layer, ...] = ()  # contractions outside the native groups that have a kernel of their own

    @property
    def whole(self) -> bool:
        """One native group runs everything: nothing between the input and its gradient is written to memory."""
        return len(self.groups) == 1 and self.groups[0].native and self.groups[0].live_out == (self.program.output,)

    @cached_property
    def fused_share(self) -> float:
        """Share of the dense multiply-adds on kernels or on ATen calls with all seeds folded into the batch."""
        return self._share(lambda s: not s.path.startswith("autograd"))

    @cached_property
    def native_share(self) -> float:
        """Share of the dense multiply-adds on gradkern's own kernels."""
        return self._share(lambda s: s.path.startswith("kernel") or s.path in ("folded", "view"))

    def _share(self, counted) -> float:
        total = sum(s.macs for s in self.steps)
        return sum(s.macs for s in self.steps if counted(s)) / total if total else 1.0

    def __str__(self) -> str:
        rows = [("value", "form", "shape", "path", "MMAC", "from")]
        for s in self.steps:
            shape = "×".join(map(str, s.shape)) or "()"
            rows.append((f"v{s.value}", s.form, shape, s.path, f"{s.macs / 1e6:.3g}", s.module or s.op))
        widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        for s in self.steps:
            if s.why:
                lines.append(f"v{s.value} ({s.module or s.op}): {s.why}")
        if self.cut is not None:
            lines.append(str(self.cut))
        if self.halves is not None:
            name = str(self.halves).removeprefix("torch.")
            lines.append(f"{name} is cast to float32 on the way in, and back on the way out")
        lines.append(
            f"{self.seeds} seeds, {len(self.groups)} group{'s' * (len(self.groups) != 1)}, "
            f"fused {100 * self.fused_share:.1f} % of the operations, own kernels {100 * self.native_share:.1f} %"
        )
        return "\n".join(lines)


def plan(
    program: Program,
    seeds: int,
    dtype: torch.dtype = torch.float32,
    machine: Machine | None = None,
    opaque_macs: Mapping[int, int] | None = None,
    device: torch.device = CPU,
) -> Plan:
    """The plan of ``program`` for ``seeds`` seeds per sample.

    ``machine`` defaults to what there is for ``device`` (None where there is no compiled extension).
    ``opaque_macs`` gives the multiply-adds per sample of opaque steps, by step, where they were measured.
    """
    machine = machine or ops.machine(device)
    blocked = halves = None
    if isinstance(machine, Device) and dtype in HALVES and not any(isinstance(s.form, Opaque) for s in program.steps):
        # What torch runs by itself may name a dtype; everything else works in float32 as well.
        halves, machine, dtype = dtype, replace(machine, math=HALVES[dtype]), torch.float32
    if machine is None:
        blocked = f"the compiled extension {'is missing' if device.type == 'cpu' else f'has no {device.type} part'}"
    elif dtype not in NATIVE_DTYPES:
        blocked = f"the kernels take float32 and float64, not {str(dtype).removeprefix('torch.')}"
    reasons = [blocked or why_not(program, step) for step in program.steps]
    layers: tuple[Layer, ...] = ()
    if isinstance(machine, Device):
        groups, layers = on_device(program, reasons, machine, NATIVE_DTYPES.get(dtype, 0), seeds)
    else:
        groups = cut(program, [r is None for r in reasons])
    folded = {i for g in groups if g.native for u in units_of(program, g) for i in u.steps[1:]}
    folded |= {i for x in layers for i in (*x.norms, *x.behind)}
    by_layer = {x.contraction for x in layers}
    rows = []
    base = len(program.inputs)
    known = opaque_macs or {}
    narrow = choose(program, seeds, lambda i: known.get(i) or forward_macs(program, i))
    before = ancestors(program, [narrow.value]) if narrow else set()
    for i, step in enumerate(program.steps):
        path, why = (LAYER, reasons[i] or "") if i in by_layer else row(program, i, reasons[i], machine, folded)
        own = narrow.width if narrow and base + i in before else seeds
        macs = total_macs(program, i, own, known.get(i))
        if isinstance(step.form, Opaque) and recognise(step.form.call) is not None:
            macs = macs * (2 + own) // (1 + own)  # its backward walks forward once more
        group = next(k for k, g in enumerate(groups) if i in g.steps)
        rows.append(PlanStep(base + i, describe(step.form), step.shape, path, why, step.op, step.module, macs, group))
    return Plan(program, machine, NATIVE_DTYPES.get(dtype, 0), seeds, groups, tuple(rows), narrow, halves, layers)


def row(program: Program, i: int, reason: str | None, machine: Machine | None, folded: set[int]) -> tuple[str, str]:
    """The path that a step takes, and why not a faster one."""
    step = program.steps[i]
    if isinstance(step.form, Opaque) and recognise(step.form.call) is not None:
        return "aten, seeds folded", step.form.reason
    if isinstance(step.form, Opaque):
        return "autograd, per op", f"{step.op or step.form.call.op}: {step.form.reason}"
    if isinstance(step.form, View):
        return "view", ""
    if i in folded:
        return "folded", ""
    if reason is not None:
        return "aten, seeds folded", reason
    return f"kernel {machine.isa if machine else ''}".strip(), ""


def units_of(program: Program, group: Group):
    return Builder(program, list(group.steps), list(group.live_out)).build().units


def cut(program: Program, native: list[bool]) -> tuple[Group, ...]:
    """Groups of one kind, in execution order.

    A step's level is the number of changes of kind on the worst path to it, so steps of one level and kind can run
    together, and every edge leads to the same or a later group.
    """
    base = len(program.inputs)
    level: list[int] = []
    for i, step in enumerate(program.steps):
        producers = [v - base for v in step.inputs if v >= base]
        level.append(max((level[p] + (native[p] != native[i]) for p in producers), default=0))
    keys = sorted({(level[i], native[i]) for i in range(len(native))})
    chosen = [[i for i in range(len(native)) if (level[i], native[i]) == key] for key in keys]
    return tuple(group_of(program, steps, key[1]) for steps, key in zip(chosen, keys, strict=True))


def group_of(program: Program, steps: list[int], native: bool) -> Group:
    """The group of these steps, with the values that cross its border."""
    base = len(program.inputs)
    inside = {base + i for i in steps}
    live_in = sorted({v for i in steps for v in program.steps[i].inputs} - inside)
    leaves = {v for v in inside if any(base + j not in inside for j in program.consumers[v])}
    live_out = sorted(leaves | ({program.output} & inside))
    # torch views are free, and what nobody reads needs no kernel
    worthwhile = native and bool(live_out) and not all(isinstance(program.steps[i].form, View) for i in steps)
    return Group(worthwhile, tuple(steps), tuple(live_in), tuple(live_out))


# ---- a GPU's shared memory


def on_device(
    program: Program, reasons: list[str | None], machine: Device, itemsize: int, seeds: int
) -> tuple[tuple[Group, ...], tuple[Layer, ...]]:
    """Groups for a GPU: chains of what fits its shared memory and has small weights, and the layers among the rest.

    Elementwise steps beside a layer join it: a chain of their own would only read and write what the layer's kernel
    has at hand.  ``reasons`` are amended.
    """
    before = list(reasons)
    reasons[:] = [r or heavy(program, i) for i, r in enumerate(reasons)]
    groups = fit(program, reasons, machine, itemsize, seeds)
    large = {i for i, (old, new) in enumerate(zip(before, reasons, strict=True)) if old is None and new is not None}
    if not large:
        return groups, ()
    joined = list(reasons)
    base = len(program.inputs)
    for group in groups:
        beside = {v - base for v in group.live_in} | {j for v in group.live_out for j in program.consumers[v]}
        if group.native and beside & large and all(absorbable(program, i) for i in group.steps):
            for i in group.steps:
                joined[i] = "beside a layer with a kernel of its own"
    wider = fit(program, joined, machine, itemsize, seeds)
    layers = find(program, [(g.native, g.steps) for g in wider], large, seeds, machine)
    if not layers:
        return groups, ()
    reasons[:] = joined
    return wider, layers


def fit(program: Program, reasons: list[str | None], machine: Device, itemsize: int, seeds: int) -> tuple[Group, ...]:
    """Groups as `cut` makes them, native ones split where they need more shared memory than a block has.

    Steps that do not fit even alone get their reasons in ``reasons``, and the cut is made again.
    """
    while True:
        groups: list[Group] = []
        failed: dict[int, str] = {}
        for group in cut(program, [r is None for r in reasons]):
            pieces, large = split(program, group, machine, itemsize, seeds) if group.native else ([group], {})
            failed |= large
            groups += pieces
        if not failed:
            return tuple(groups)
        for i, why in failed.items():
            reasons[i] = why


def split(
    program: Program, group: Group, machine: Device, itemsize: int, seeds: int
) -> tuple[list[Group], dict[int, str]]:
    """The longest runs of a group's steps that fit, and the steps that do not, with why."""
    pieces: list[Group] = []
    failed: dict[int, str] = {}
    steps = list(group.steps)
    while steps:
        low, high, best = 1, len(steps), None
        size, why = len(steps), ""
        while low <= high:
            piece = group_of(program, steps[:size], True)
            try:
                if piece.native:
                    onehot = piece.live_out == (program.output,)
                    wrt = tuple(v for v in piece.live_in if v not in program.slopes)
                    args = (program, steps[:size], list(piece.live_out), machine, itemsize, seeds, wrt)
                    lower_device(*args, onehot=onehot, linear=bool(program.slopes))
                best, low = piece, size + 1
            except TooLarge as error:
                why, high = str(error), size - 1
            size = (low + high) // 2
        if best is None:
            failed[steps[0]] = why
        else:
            pieces.append(best)
        steps = steps[1 if best is None else len(best.steps) :]
    return pieces, failed


# ---- caches of pure results, by the program's key

_lock = threading.Lock()
_chains: dict[tuple, Chain] = {}
_plans: dict[tuple, Plan] = {}
_KEEP = 256


def cached_plan(program: Program, seeds: int, dtype: torch.dtype, device: torch.device = CPU) -> Plan:
    """`plan` on this machine and device, remembered."""
    machine = ops.machine(device)
    key = (program.key, seeds, dtype, machine)
    found = _plans.get(key)
    if found is None:
        found = _remember(_plans, key, plan(program, seeds, dtype, machine, device=device))
    return found


def chain_of(plan: Plan, group: int, seeds: int, wrt: tuple[int, ...], onehot: bool) -> Chain:
    """The lowered chain of a native group, remembered."""
    assert plan.machine is not None
    key = (plan.program.key, group, plan.machine, plan.itemsize, seeds, wrt, onehot)
    found = _chains.get(key)
    if found is None:
        g = plan.groups[group]
        program, make = plan.program, lowering(plan.machine)
        args = (program, list(g.steps), list(g.live_out), plan.machine, plan.itemsize, seeds, wrt)
        chain = make(*args, onehot=onehot, linear=bool(program.slopes))
        found = _remember(_chains, key, chain)
    return found


def _remember(store: dict, key: tuple, value):
    with _lock:
        if len(store) >= _KEEP:
            store.pop(next(iter(store)))
        return store.setdefault(key, value)
