"""The layouts of a chain's packed weights, one after another in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from . import units
from .spec import ChainSpec
from .units import Node, Unit, Windows2d
from .weights import Layout, ScatterLayout, StencilLayout, WindowLayout, mergeable, scatter_cost, windows_of

L = TypeVar("L", bound=Layout)


class Layouts:
    """The layouts of one chain, each made and placed at its first use."""

    def __init__(self, spec: ChainSpec) -> None:
        self.spec = spec
        self.made: dict[tuple[type[Layout], Unit], Layout] = {}
        self.size = 0  # elements

    def window(self, unit: units.Window) -> WindowLayout:
        return self._layout(WindowLayout, unit, lambda: self.new_window(unit))

    def stencil(self, unit: units.Stencil) -> StencilLayout:
        return self._layout(StencilLayout, unit, lambda: StencilLayout.of(unit))

    def scatter(self, unit: units.Window, pattern: units.Pattern | None) -> ScatterLayout:
        return self._layout(ScatterLayout, unit, lambda: self.new_scatter(unit, pattern))

    def _layout(self, kind: type[L], unit: Unit, make: Callable[[], L]) -> L:
        layout = self.made.get((kind, unit))
        if layout is None:
            layout = self.made[kind, unit] = make()
            layout.weights, self.size = self.size, self.size + layout.size
        assert isinstance(layout, kind)
        return layout

    def interleaved_rows(self, node: Node) -> int:
        """How many rows are interleaved in the cotangent of a node; 1 if none are."""
        layouts = (self.made.get((ScatterLayout, unit)) for unit in node.readers)
        return max((x.fold for x in layouts if isinstance(x, ScatterLayout)), default=1)

    # ---- what depends on the processor

    def new_window(self, unit: units.Window) -> WindowLayout:
        return WindowLayout.of(unit, self.spec.lanes, self.spec.machine.tile_vectors)

    def new_scatter(self, unit: units.Window, pattern: units.Pattern | None) -> ScatterLayout:
        """The cheaper of one window per position and one merged window per pool output.

        ``pattern``: the ReLU or pool through which the cotangent is read.  Rows are interleaved if that is free.
        """
        one_tap = ScatterLayout.of(unit, self.spec.lanes)
        pool = None if pattern is None else pattern.pool
        if unit.dense or pattern is None or pool is None or not mergeable(unit, pattern):
            return one_tap
        node, w = unit.reads[0], windows_of(unit.form)
        top, step = node.halo[0] - w.before.h, Windows2d.of(pool).stride.h * w.stride.h
        private = node.H > 1 and self._stored_by_rows(node)
        folds = [f for f in (1, 2, 4) if f == 1 or (private and step % f == 0 and top % f == 0)]
        merged = [ScatterLayout.merge(unit, self.spec.lanes, pool, f) for f in folds]
        taps, seeds = pool.taps, min(self.spec.seeds, 5)
        return min([one_tap, *merged], key=lambda s: scatter_cost(s, seeds, taps))

    def _stored_by_rows(self, node: Node) -> bool:
        """Whether a cotangent is only written by one unit, and stored in a tensor whose channels come first."""
        graph = self.spec.graph
        value = node.producer.value if isinstance(node.producer, units.Load) else None
        return value is not None and value not in graph.row_major and self.spec.cotangents.read_once(node)
