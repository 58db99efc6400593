"""Groups: a Program is cut into runs of steps that are one chain each, and steps between them that run one by one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..codegen.chain import Chain
from ..codegen.cuda.lowering import backend_for
from ..codegen.lowering import lower_units
from ..codegen.machine import Device, Machine, NoKernels, TooLarge
from ..codegen.unit_graph import GraphBuilder
from ..codegen.units import UnitGraph
from ..ir.program import Program, View


@dataclass(frozen=True)
class Group:
    """Steps that run together.  ``live_in`` and ``live_out`` are the values that cross its border."""

    native: bool
    steps: tuple[int, ...]
    live_in: tuple[int, ...]
    live_out: tuple[int, ...]


class Chains:
    """The chains of one Program on one machine.  Each is lowered once, which also shows whether it fits."""

    def __init__(self, program: Program, machine: Machine | NoKernels, itemsize: int) -> None:
        self.program, self.machine, self.itemsize = program, machine, itemsize
        self.chains: dict[tuple[object, ...], Chain | TooLarge] = {}
        self.graphs: dict[tuple[object, ...], UnitGraph] = {}

    def get(self, group: Group, seeds: int, wrt: tuple[int, ...], onehot: bool) -> Chain:
        """The group's chain for ``seeds`` seeds, which computes the cotangents of the values ``wrt``.

        ``onehot``: seeds start at the outputs of the network in this group.  Raises `TooLarge` if it does not fit a
        block of a GPU.
        """
        key = (group.steps, group.live_out, seeds, wrt, onehot)
        chain = self.chains.get(key)
        if chain is None:
            chain = self.chains.setdefault(key, self._lower(group, seeds, wrt, onehot))
        if isinstance(chain, TooLarge):
            raise chain.with_traceback(None)  # the same exception is raised many times
        return chain

    def _lower(self, group: Group, seeds: int, wrt: tuple[int, ...], onehot: bool) -> Chain | TooLarge:
        assert self.machine
        backend, linear = backend_for(self.machine), bool(self.program.slopes)
        args = (self.program, self._graph(group), self.machine, self.itemsize, seeds, wrt)
        try:
            return lower_units(*args, onehot=onehot, linear=linear, backend=backend)
        except TooLarge as error:
            return error

    def _graph(self, group: Group) -> UnitGraph:
        """The units of a native group."""
        key = (group.steps, group.live_out)
        graph = self.graphs.get(key)
        if graph is None:
            built = GraphBuilder(self.program, list(group.steps), list(group.live_out)).build()
            graph = self.graphs.setdefault(key, built)
        return graph

    def folded_steps(self, group: Group) -> set[int]:
        """The steps of a native group that a neighbour's kernel does."""
        return {i for unit in self._graph(group).units for i in unit.steps[1:]}

    def retain(self, groups: Sequence[Group]) -> None:
        """Forget the chains of all groups except these."""
        kept = {(g.steps, g.live_out) for g in groups}
        self.chains = {key: chain for key, chain in self.chains.items() if key[:2] in kept}
        self.graphs = {key: graph for key, graph in self.graphs.items() if key in kept}


class Partition:
    """Cuts the steps ``steps`` of a Program, which have to compute the values ``wanted``, into groups.

    ``chained``: per step, whether it may be in a chain.  ``too_large``, once the groups are known: the steps that do
    not fit a GPU even alone, and why.
    """

    def __init__(self, chains: Chains, seeds: int, steps: list[int], wanted: Collection[int], chained: Sequence[bool]):
        self.chains, self.program, self.base = chains, chains.program, len(chains.program.inputs)
        self.seeds, self.steps, self.wanted, self.chained = seeds, steps, frozenset(wanted), chained
        self.planned = frozenset(steps)
        self.too_large: dict[int, str] = {}

    def groups(self) -> tuple[Group, ...]:
        if not isinstance(self.chains.machine, Device):
            return self.cut()
        while True:
            pieces = [piece for g in self.cut() for piece in (self.split(g) if g.native else [g])]
            groups = tuple(piece for piece in pieces if piece is not None)
            if len(groups) == len(pieces):
                self.chains.retain(groups)
                return groups

    def cut(self) -> tuple[Group, ...]:
        """Groups of one kind, in execution order.

        A step's level is the number of changes of kind on the worst path to it, so steps of one level and kind can
        run together, and every edge leads to the same or a later group.
        """
        key: dict[int, tuple[int, bool]] = {}
        for i in self.steps:
            native = self.chained[i] and i not in self.too_large
            before = [key[v - self.base] for v in self.program.steps[i].inputs if v >= self.base]
            key[i] = (max((level + (kind != native) for level, kind in before), default=0), native)
        return tuple(
            self.group([i for i in self.steps if key[i] == (level, native)], native=native)
            for level, native in sorted(set(key.values()))
        )

    def group(self, steps: list[int], native: bool) -> Group:
        """The group of these steps, with the values that cross its border."""
        program, base = self.program, self.base
        inside = {base + i for i in steps}
        live_in = sorted({v for i in steps for v in program.steps[i].inputs} - inside)
        read = {v for v in inside if any(j in self.planned and base + j not in inside for j in program.consumers[v])}
        live_out = sorted(read | (self.wanted & inside))
        # torch's views are free, and a value that nothing reads needs no kernel
        worthwhile = native and bool(live_out) and not all(isinstance(program.steps[i].form, View) for i in steps)
        return Group(worthwhile, tuple(steps), tuple(live_in), tuple(live_out))

    def split(self, group: Group) -> list[Group | None]:
        """The longest runs of a group's steps that fit a block of a GPU; None for each step that does not fit."""
        pieces: list[Group | None] = []
        steps = list(group.steps)
        while steps:
            low, high, best = 1, len(steps), None
            size, reason = len(steps), ""
            while low <= high:
                piece = self.group(steps[:size], native=True)
                try:
                    if piece.native:
                        self.chain_of(piece)
                    best, low = piece, size + 1
                except TooLarge as error:
                    reason, high = str(error), size - 1
                size = (low + high) // 2
            if best is None:
                self.too_large[steps[0]] = reason
            pieces.append(best)
            steps = steps[1 if best is None else len(best.steps) :]
        return pieces

    def chain_of(self, group: Group) -> Chain:
        """The chain of a call that requests the cotangents of all inputs."""
        wrt = tuple(v for v in group.live_in if v not in self.program.slopes) if self.seeds else ()
        return self.chains.get(group, self.seeds, wrt, bool(self.seeds) and group.live_out == (self.program.output,))
