"""The parameters of a Program: live tensors, tensors derived from them at every call, and weights packed for kernels.

Parameters change under a plan (training, attribution rules), and nothing reports every change: version counters miss
fused optimizer steps, ``.data`` edits and numpy views.  So derived tensors are computed at every call, and packed
weights are kept by a hash of the bytes that they were made from.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..codegen.chain import Chain
from ..codegen.encoding import WIDTH
from ..ir.calls import LITERAL, Params, evaluate, operator_of, params_in
from ..ir.program import Call, Derived, Opaque, Param, Program
from ..planner.plan import Plan
from ..util.memo import Memo, on_reset
from . import ops

# ---------------------------------------------------------------------------------------------------------------
# Derived tensors


class Bound(dict[str, Tensor]):
    """The tensors of a Program in one call.  They do not change during the call, so all its chunks share one hash."""

    def __init__(self, tensors: Params) -> None:
        super().__init__(tensors)
        self.derived_here = False  # whether `bind` computed the derived tensors from the live ones
        self._contents: dict[tuple[str, ...], int] = {}

    def content(self, names: tuple[str, ...]) -> int:
        """`content_of` the tensors of these names."""
        if names not in self._contents:
            self._contents[names] = content_of([self[name] for name in names])
        return self._contents[names]


class _Computed:
    """One derived tensor.  Its op and the kinds of its arguments are looked up once."""

    def __init__(self, derived: Derived) -> None:
        call = self.call = derived.call
        self.name = derived.name
        simple = all(isinstance(x, Param) or not isinstance(x, (tuple, Call)) for x in call.args)
        direct = simple and not call.kwargs and call.index is None and call.op != LITERAL
        self.op = operator_of(call.op) if direct else None
        self.arguments = [(isinstance(x, Param), x.name if isinstance(x, Param) else x) for x in call.args]

    def __call__(self, tensors: Params) -> Tensor:
        if self.op is not None:
            return self.op(*[tensors[x] if is_param else x for is_param, x in self.arguments])
        return evaluate(self.call, lambda leaf: tensors[leaf.name])


class _Binder:
    """Binds the tensors of one Program; everything that does not change is looked up once."""

    def __init__(self, program: Program) -> None:
        self.derived = tuple(map(_Computed, program.derived))
        self.constant = _constants(program)  # derived tensors that are computed only once
        self.constants: dict[str, Tensor] = {}
        # Autograd runs inside opaque steps, and would otherwise record the parameters as well.
        self.detaches = any(isinstance(step.form, Opaque) for step in program.steps)

    def __call__(self, tensors: Params) -> Bound:
        params = Bound({name: x.detach() for name, x in tensors.items()} if self.detaches else tensors)
        if self.derived:
            with torch.no_grad():
                for derived in self.derived:
                    if derived.name in self.constants:
                        params[derived.name] = self.constants[derived.name]
                        continue
                    params[derived.name] = derived(params)
                    if derived.name in self.constant:
                        self.constants[derived.name] = params[derived.name]
        params.derived_here = True
        return params


def _constants(program: Program) -> frozenset[str]:
    """The names of the derived tensors that depend on no live tensor."""
    names: set[str] = set()
    for derived in program.derived:
        if all(p.name in names for p in params_in(derived.call)):
            names.add(derived.name)
    return frozenset(names)


_binders: Memo[_Binder] = Memo(256)


def bind(program: Program, tensors: Params) -> Bound:
    """The live tensors that ``program`` names, and its derived tensors, computed now."""
    return _binders.get_or_make(program.key, lambda: _Binder(program))(tensors)


def leading(inputs: Sequence[Tensor]) -> Tensor:
    """The first floating input: a call computes in its dtype and on its device."""
    return next((t for t in inputs if t.is_floating_point()), inputs[0])


class LazyParams(Mapping[str, Tensor]):
    """``params``, and the derived tensors of ``program``, each computed on first access, which is rare while packed
    weights are cached."""

    def __init__(self, program: Program, params: Params) -> None:
        self.params, self.derived, self.made = params, {d.name: d.call for d in program.derived}, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        call = self.derived.get(name)
        if call is None:
            return self.params[name]
        if name not in self.made:
            with torch.no_grad():
                self.made[name] = evaluate(call, lambda leaf: self[leaf.name])
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.params, *self.derived))

    def __len__(self) -> int:
        return len(self.params) + len(self.derived)


def all_finite(params: Params) -> bool:
    """Whether no parameter has NaN or Inf (a sum that overflows counts as Inf)."""
    return all(bool(torch.isfinite(p.sum())) for p in params.values() if p.is_floating_point())


@lru_cache(maxsize=64)
def all_output_indices(outputs: int, device: torch.device) -> Tensor:
    """The indices of all outputs; never written to."""
    with torch.inference_mode(False):
        return torch.arange(outputs, device=device)


# ---------------------------------------------------------------------------------------------------------------
# Packing

Key = tuple[int, int | None, torch.dtype, torch.device]  # a plan (its id), and the content of its parameters

MOST_CONTENTS = 8  # packs per plan, one for each model of its structure, such as the folds of an ensemble
MOST_ENTRIES = 256  # packed plans
MOST_TARGETS = 4  # choices of outputs per pack whose rows of the last weight are kept
MOST_BYTES = {"cpu": 64 << 20}
MOST_GPU_BYTES = 1 << 30  # more than on a CPU, for networks in many chains with large weights


class KernelsUnavailable(Exception):
    """No kernel may run for these tensors although the plan has some; the message says why."""


class Packed:
    """Folded weights in kernel order, and the chain's integers as tensors, dtype and device of ``like``."""

    def __init__(self, chain: Chain, params: Params, like: Tensor):
        self.chain = chain
        self.tables = torch.tensor(chain.tables or (0,), dtype=torch.int32, device=like.device)
        self.forward, self.backward = (
            torch.tensor(rows, dtype=torch.int64, device=like.device).reshape(-1, WIDTH)
            for rows in (chain.encoded_forward, chain.encoded_backward)
        )
        self.weights = torch.zeros(chain.packed_size + 64, dtype=like.dtype, device=like.device)
        for layout in chain.layouts:
            layout.fill(self.weights, params)
        # On a GPU, reading the result waits until everything above is done, so afterwards any stream may use the pack.
        low, high = torch.aminmax(self.weights)  # NaN if any weight is; one pass without a large temporary
        self.finite = bool(torch.isfinite(low) & torch.isfinite(high))
        self.records = [self.weights, self.tables, self.forward, self.backward]
        self._seed_rows: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()  # by targets (their id)

    @property
    def nbytes(self) -> int:
        gathered = [rows for _, rows in list(self._seed_rows.values())]
        return sum(t.nbytes for t in (self.tables, self.forward, self.backward, self.weights, *gathered))

    def seed_rows(self, targets: Tensor, outputs: int, *, constant: bool = False) -> Tensor | None:
        """The last weight's rows of the targets, ``[S, row]`` or ``[N, S, row]``; None if seeds start elsewhere.

        ``constant``: nobody writes to ``targets``.
        """
        if self.chain.seed_rows is None:
            return None
        constant = constant or targets is all_output_indices(outputs, targets.device)
        if not constant or self.weights.is_cuda:  # on a GPU, streams would have to wait
            return self._rows(targets, outputs)
        known = self._seed_rows.get(id(targets))
        if known is None or known[0] is not targets:
            known = self._seed_rows[id(targets)] = targets, self._rows(targets, outputs)
            if len(self._seed_rows) > MOST_TARGETS:
                self._seed_rows.popitem(last=False)
        return known[1]

    def _rows(self, targets: Tensor, outputs: int) -> Tensor:
        assert self.chain.seed_rows is not None
        start, row = self.chain.seed_rows
        rows = self.weights[start : start + outputs * row].view(outputs, row)
        rows = rows[targets].contiguous()
        return rows.clamp_(min=0) if self.chain.rectify_seed_rows else rows


class PackedPlan:
    """The packed weights of one plan for one content of its parameters, by chain."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device  # kept so that no other plan gets its id while the entry lives
        self.packs: dict[int, Packed] = {}  # by the chain's id

    @property
    def nbytes(self) -> int:
        return sum(pack.nbytes for pack in list(self.packs.values()))


class WeightCache:
    """The packed weights of recent plans.

    If they are too large together, the least recently used plan is dropped, with all its chains.  The plan in use
    stays, however large it is.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.entries: OrderedDict[Key, PackedPlan] = OrderedDict()

    def entry(self, plan: Plan, content: int | None, like: Tensor) -> PackedPlan:
        key = (id(plan), content, like.dtype, like.device)
        with self.lock:
            entry = self.entries.get(key)
            if entry is None:
                entry = self.entries[key] = PackedPlan(plan, like.device)
                contents = [other for other in self.entries if other[0] == key[0]]
                for other in contents[:-MOST_CONTENTS]:
                    del self.entries[other]
            self.entries.move_to_end(key)
            return entry

    def packed(self, entry: PackedPlan, chain: Chain, params: Params, like: Tensor) -> Packed:
        packed = entry.packs.get(id(chain))
        if packed is None:
            packed = Packed(chain, params, like)
            with self.lock:
                packed = entry.packs.setdefault(id(chain), packed)
                self._trim(entry)
        return packed

    def _trim(self, latest: PackedPlan) -> None:
        room = MOST_BYTES.get(latest.device.type, MOST_GPU_BYTES)
        nbytes = sum(e.nbytes for e in self.entries.values() if e.device.type == latest.device.type)
        for key, entry in list(self.entries.items()):
            if nbytes <= room and len(self.entries) <= MOST_ENTRIES:
                return
            if entry is not latest and entry.device.type == latest.device.type:
                nbytes -= self.entries.pop(key).nbytes

    def clear(self) -> None:
        with self.lock:
            self.entries.clear()


weight_cache = WeightCache()
on_reset(weight_cache.clear)


def content_of(tensors: Sequence[Tensor]) -> int:
    """A hash of the tensors' bytes; those of each device are hashed where they are, such as a scalar on the CPU beside
    weights on a GPU."""
    if all([t.is_cpu for t in tensors]):  # noqa: C419  (a list is faster)
        return ops.content_hash(tensors)
    devices = dict.fromkeys(t.device for t in tensors)
    hashes = [ops.content_hash([t for t in tensors if t.device == device]) for device in devices]
    return hashes[0] if len(hashes) == 1 else hash(tuple(hashes))


class PlanWeights:
    """The packed weights of a plan for one call.  Its parameters are hashed once for all chains."""

    def __init__(self, plan: Plan, params: Params, like: Tensor):
        self.plan, self.params, self.like = plan, params, like
        dtypes = [params[name].dtype for name in plan.packed_names]
        self.mixed = next((dtype for dtype in dtypes if dtype != like.dtype), None)
        self.bound = params if isinstance(params, Bound) else Bound(params)
        self.names = tuple(dict.fromkeys((*plan.packed_names, *plan.live_names)))
        # The key of the packed weights.  If `bind` computed the derived tensors, the live tensors determine them, and
        # the key is that of `WholeChain`, so that both share packs.  Derived tensors that the caller brought may be
        # older than the live ones, so their bytes are part of the key.
        hashed = plan.live_names if self.bound.derived_here else self.names
        self.content = None if self.mixed else self.bound.content(hashed)
        self.entry: PackedPlan | None = None  # until something is packed

    def of_plan(self, plan: Plan, params: Params) -> PlanWeights:
        """The packed weights of another plan, whose ``params`` are the same or derived from them."""
        other = copy.copy(self)
        # Several plans may share ``plan`` (such as that of a forward pass) and have equal bytes under different names,
        # so the names are part of its key.  So are the derived tensors: ``params`` are computed from them, and two
        # programs may differ in nothing else.
        other.content = None if self.content is None else hash((self.names, self.bound.content(self.names)))
        other.plan, other.params, other.entry = plan, params, None
        return other

    def packed(self, chain: Chain) -> Packed:
        if self.mixed is not None:
            raise KernelsUnavailable(f"some weights are {self.mixed}, and the inputs are {self.like.dtype}")
        if self.entry is None:
            self.entry = weight_cache.entry(self.plan, self.content, self.like)
        packed = weight_cache.packed(self.entry, chain, self.params, self.like)
        if not packed.finite:
            raise KernelsUnavailable("some weights are NaN or infinite, and then skipping zeros is not exact")
        return packed
