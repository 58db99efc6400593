"""The records and layouts of weights that a GPU has in place of a CPU's."""

from __future__ import annotations

from .. import units
from ..emitters import Emitter
from ..layouts import Layouts
from ..records import ContractionT, DenseT, Place, ScatterAlgorithm, ScatterT, Zero
from ..spec import ChainSpec
from ..tables import Runs
from ..units import Node, Unit
from ..weights import ContractionLayout, ScatterLayout, mergeable
from . import clock_model
from .weights import DeviceScatter, DeviceWindow, NarrowScatter, QuadScatter


class DeviceLayouts(Layouts):
    """Weights as the GPU's kernels read them."""

    def new_window(self, unit: units.Window) -> DeviceWindow:
        return DeviceWindow.of(unit, self.spec.lanes)

    def new_scatter(self, unit: units.Window, pattern: units.Pattern | None) -> DeviceScatter:
        """One window per position, or one for all taps of the pool after it, for the algorithm that is expected to be
        fastest if all warps are busy."""
        if unit.dense:
            return DeviceScatter.of(unit, 1)
        types: tuple[type[DeviceScatter], ...] = (DeviceScatter, QuadScatter, NarrowScatter)
        layouts = [t.of(unit, 1) for t in types]
        pool = None if pattern is None else pattern.pool
        if pattern is not None and pool is not None and mergeable(unit, pattern):
            layouts += [t.merge(unit, 1, pool, 1) for t in types]
        upstream = self.spec.cotangents.of(unit.out)
        if upstream is None or upstream.seed_rows:  # seed rows lie in global memory, where only the walk reads them
            fitting = [s for s in layouts if s.algorithm == ScatterAlgorithm.Walk]
        else:
            fitting = [s for s in layouts if s.fits(unit.reads[0], upstream.node)]
        taps = 1 if pool is None else pool.taps
        return min(fitting, key=lambda s: scatter_clocks(self.spec, s, taps, pattern is not None))


def scatter_clocks(spec: ChainSpec, layout: DeviceScatter, taps: int, pattern: bool) -> float:
    """Clocks of a transposed convolution per pool output for all seeds."""
    shape = clock_model.ScatterShape(
        layout.algorithm, elements=len(layout.window), channels=layout.O, taps=taps, merged=layout.merged,
        pattern=pattern,
    )  # fmt: skip
    return min(way.clocks for way in clock_model.scatter_ways(shape, spec.seeds, spec.itemsize))


class DeviceEmitter(Emitter):
    """The records of a GPU's chain."""

    def zero_border(self, unit: Unit) -> None:
        """Zero borders, and places that copies leave out, for every tile of samples, because buffers share memory."""
        node = unit.out
        filled = node.C * node.P
        if isinstance(unit, units.Move):
            filled = sum(sum(runs[2::5]) for runs in self.runs(unit, node))
        shared = node.memory in self.buffers.values  # a unit that works in place: the border is zero already
        if not shared and node.size != filled:
            self.forward.append(Zero(dst=Place(self.buffers.value(node), 0), elements=node.size))

    def takes_block(self, unit: units.Window, layout: ContractionLayout) -> bool:
        return unit.dense

    def contraction_t(
        self, unit: units.Window, layout: ScatterLayout, read: Node, common: ContractionT, assign: bool
    ) -> ContractionT:
        assert isinstance(layout, DeviceScatter)
        elements = len(layout.window)
        if unit.dense:
            if read.P != 1 or (common.pattern and common.pattern.taps > 1):
                raise AssertionError("a linear layer gives one position")
            joined = len(layout.runs) == 1  # the window is one run
            return DenseT(**vars(common), window_elements=elements, joined=joined, assign=assign)
        return ScatterT(
            **vars(common), H=read.H, W=read.W, C=layout.channels, groups=layout.groups, merged=layout.merged,
            window_elements=elements, algorithm=layout.algorithm,
            tap_table=self.tables.add(layout.offsets()) if isinstance(layout, QuadScatter) else 0,
        )  # fmt: skip

    def distinct(self, runs: Runs) -> bool:
        """Whether no element is read twice, so that every run can have its own warp."""
        read = [r + i * step for r, n, step in zip(runs[::5], runs[2::5], runs[3::5], strict=True) for i in range(n)]
        return len(set(read)) == len(read)

    def transpose_right(self, unit: units.MatMul) -> None:
        """No copy: the kernel reads the right side of a matrix product with any strides, and memory is scarce."""

    def right_transposed(self, unit: units.MatMul) -> tuple[Place, int]:
        b = unit.reads[1]
        return Place(self.buffers.value(b), b.interior, row=b.row, position=1), b.C
