"""What each kind of unit records: one method for its forward pass, and one for the cotangent of each of its reads."""

from __future__ import annotations

import math
import struct
from typing import Any

from ..ir.program import Channels, Index, LowRank, Scale
from .aliasing import Cotangent
from .recording import Recording
from .scratch import padded
from .support import NATIVE_FUNCTIONS
from .tables import moves, positions, stencil, transposed
from .units import POINT, Node, Unit, planar
from .weights import MixLayout, ScatterLayout

L1_BYTES = 24 << 10  # weights above this are walked tile by tile (half of a common 48 KiB L1)


class UnitRecords(Recording):
    """One pair of methods per unit kind."""

    def forward_load(self, unit: Unit, fields: dict[str, Any]) -> None:
        self.emit(self.forward, "Load", **fields)

    # ---- contractions

    def forward_window(self, unit: Unit, fields: dict[str, Any]) -> None:
        layout = self.window(unit)
        source = unit.reads[0]
        fields["src"] = (self.store(source), source.interior + layout.origin)
        self.emit(
            self.forward,
            "Window",
            unit.dense,
            **fields | {"C": layout.channels, "O": layout.O, "groups": layout.groups, "K": layout.R * layout.L},
            R=layout.R,
            L=layout.L,
            sh=layout.stride[0],
            sw=layout.stride[1],
            wf=layout.wf,
            bias=layout.bias,
            table=self.table(layout.runs),
        )

    def backward_window(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        layout = self.scatter(unit, behind.pattern)
        whole = unit.dense and len(layout.runs) == 1 and node.size == node.C * node.P
        assign = whole and node.id not in self.touched
        if assign:
            self.touched.add(node.id)
        else:
            self.first_touch(node)
        self.emit(
            self.backward,
            "WindowT",
            unit.dense,
            **self.skipping(behind, unit.out),
            dst=(self.grad(node), node.interior + layout.origin),
            dst_row=layout.step[0],
            dst_px=layout.step[1],
            C=layout.channels,
            O=layout.O,
            groups=layout.groups,
            slots=len(layout.slots) // 2,
            wb=layout.wb,
            ldw=layout.ldw,
            table2=self.table(layout.slots),
            assign=int(assign),
            outer=self.sweep(unit, layout),
            merged=int(layout.merged),
        )

    def skipping(self, behind: Cotangent, out: Node) -> dict[str, Any]:
        """Fields of a cotangent that a contraction with the result ``out`` reads by lists of what is not zero."""
        fields: dict[str, Any] = {"rows": int(behind.rows)}
        if behind.rows:
            fields |= {"src": 0, "src_row": behind.node.W * behind.node.C, "src_px": behind.node.C}
        else:
            fields |= self.at("src", behind.node, self.grad(behind.node))
        if behind.pattern is None:
            fields |= {"taps": 0, "H": out.H, "W": out.W}
            entries, segments = out.C, out.P
        else:
            pooled = behind.pattern.out
            fields |= self.pattern_fields(behind.pattern) | {"H": pooled.H, "W": pooled.W}
            segments = pooled.P * fields["taps"] + 1
            entries = segments * padded(pooled.C) + 64
        self.idx, self.segs = max(self.idx, entries), max(self.segs, segments)
        return fields

    def sweep(self, unit: Unit, layout: ScatterLayout) -> int:
        """Segments per sweep over the weights: few while the weights stay in L1, more where they come from L2."""
        if unit.dense:
            return 1 << 30
        weights = layout.ldw * layout.O * len(layout.taps) * self.itemsize
        return 8 if weights <= L1_BYTES else 64

    # ---- ReLU and max pool

    def forward_pattern(self, unit: Unit, fields: dict[str, Any]) -> None:
        self.emit(self.forward, "Pattern", **fields, **self.pattern_fields(unit), relu=int(unit.relu))

    def pattern_fields(self, unit: Unit) -> dict[str, Any]:
        source, out = unit.reads[0], unit.out
        kernel, stride, padding, dilation = planar(unit.windows or POINT)
        taps, nb = math.prod(kernel), (out.C + 15) // 16 * 2
        if id(unit) not in self.bits:
            self.bits[id(unit)] = self.bit_bytes
            self.bit_bytes += (out.P * taps * nb + 63) // 64 * 64
        return {
            "bits": self.bits[id(unit)],
            "nb": nb,
            "taps": taps,
            "Hi": source.H,
            "Wi": source.W,
            "kh": kernel[0],
            "kw": kernel[1],
            "sh": stride[0],
            "sw": stride[1],
            "ph": padding[0][0],
            "pw": padding[1][0],
            "dh": dilation[0],
            "dw": dilation[1],
        }

    def backward_pattern(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        expression = self.cotangents.of(node)
        if expression is not None and expression.pattern is unit:
            return
        if unit.opened:
            if expression is not behind:
                self.emit(self.backward, "Add", **self.plain(behind), **self.into(node), **self.extent(node))
            return
        self.emit(
            self.backward,
            "Expand",
            **self.plain(behind),
            **self.into(node),
            **self.extent(unit.out),
            **self.pattern_fields(unit),
        )

    # ---- sums

    def forward_sum(self, unit: Unit, fields: dict[str, Any]) -> None:
        other = self.at("aux", unit.reads[1], self.store(unit.reads[1]))
        other.pop("aux_px")
        self.emit(self.forward, "Sum", **fields, **other)

    def backward_sum(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        if self.cotangents.of(node) is behind:
            return
        if behind.pattern is not None:
            pattern = behind.pattern
            self.emit(
                self.backward,
                "Expand",
                **self.at("src", behind.node, self.grad(behind.node)),
                **self.into(node),
                **self.extent(pattern.out),
                **self.pattern_fields(pattern),
            )
            return
        self.emit(self.backward, "Add", **self.plain(behind), **self.into(node), **self.extent(node))

    # ---- copies

    def runs(self, unit: Unit, out: Node) -> list[list[int]]:
        """The runs of every source, to where ``out`` has its elements: the result or what holds its cotangent."""
        key = (id(unit), out.row)
        if key not in self.tables_of:
            form = unit.form if isinstance(unit.form, Index) else None
            self.tables_of[key] = moves(form, unit.reads, out, unit.sides)
        return self.tables_of[key]

    def forward_move(self, unit: Unit, fields: dict[str, Any]) -> None:
        for node, runs in zip(unit.reads, self.runs(unit, unit.out), strict=True):
            source = self.at("src", node, self.store(node))
            self.emit(self.forward, "Move", **fields | source, size=len(runs) // 5, table=self.table(runs))

    def backward_move(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        runs = self.runs(unit, behind.node)[self.turn(unit, node)]
        target = self.into(node)
        self.emit(self.backward, "MoveT", **self.plain(behind), **target, size=len(runs) // 5, table=self.table(runs))

    # ---- maps over positions, channel by channel

    def mix(self, unit: Unit) -> MixLayout:
        return self.layout("mix", unit, lambda: MixLayout.of(unit))

    def forward_mix(self, unit: Unit, fields: dict[str, Any]) -> None:
        layout = self.mix(unit)
        blocks, entries = stencil(layout.entries, positions(unit.out), keep_empty=True)
        self.emit(self.forward, "Stencil", **fields, **self.stencil_fields(layout, blocks, entries), bias=layout.bias)

    def stencil_fields(self, layout: MixLayout, blocks: list[int], entries: list[int]) -> dict[str, Any]:
        return {
            "wf": layout.wf,
            "ldw": layout.ldw,
            "size": len(blocks) // 7,
            "table": self.table(blocks),
            "table2": self.table(entries),
        }

    def backward_mix(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        layout = self.mix(unit)
        if isinstance(layout.form.map, Channels) and layout.form.weight is None:
            blocks, entries = stencil([[(q, 0)] for q in positions(behind.node)], positions(node), keep_empty=False)
        else:
            blocks, entries = stencil(transposed(layout.entries, behind.node, node), positions(node), keep_empty=False)
        self.emit(
            self.backward,
            "StencilT",
            **self.plain(behind),
            **self.into(node),
            C=node.C,
            **self.stencil_fields(layout, blocks, entries),
        )

    # ---- elementwise functions

    def forward_scale(self, unit: Unit, fields: dict[str, Any]) -> None:
        form = unit.form
        assert isinstance(form, Scale)
        p = [bits_of(x) for x in (*form.params, 0.0, 0.0, 0.0)[:3]]
        fn = list(NATIVE_FUNCTIONS).index(form.function)
        self.emit(self.forward, "Scale", **fields, **self.slope(unit), fn=fn, p0=p[0], p1=p[1], p2=p[2])

    def backward_scale(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        in_place = self.cotangents.of(node) is behind
        target = self.at("dst", behind.node, self.grad(behind.node)) if in_place else self.into(node)
        self.emit(
            self.backward,
            "MulD",
            **self.plain(behind),
            **target,
            **self.extent(unit.out),
            **self.slope(unit),
            assign=int(in_place),
        )

    # ---- products of two values

    @staticmethod
    def steps(prefix: str, node: Node, out: Node, channel: str) -> dict[str, int]:
        """Strides of a side: zero along the axes that are stretched."""
        return {
            f"{prefix}_row": node.row if node.H == out.H else 0,
            f"{prefix}_px": node.C if node.W == out.W else 0,
            channel: int(node.C == out.C),
        }

    def forward_product(self, unit: Unit, fields: dict[str, Any]) -> None:
        a, b = unit.reads
        fields |= self.steps("src", a, unit.out, "kh") | self.steps("aux", b, unit.out, "kw")
        self.emit(self.forward, "Product", **fields, aux=(self.store(b), b.interior))

    def backward_product(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        other = unit.reads[1 - self.turn(unit, node)]
        fields = self.plain(behind) | self.into(node) | self.extent(unit.out)
        fields |= self.steps("dst", node, unit.out, "kh") | self.steps("aux", other, unit.out, "kw")
        self.emit(self.backward, "ProductT", **fields, aux=(self.store(other), other.interior))

    # ---- products of two matrices of values, H of them, each as it lies row by row

    def forward_matmul(self, unit: Unit, fields: dict[str, Any]) -> None:
        a, b = unit.reads
        other = self.at("aux", b, self.store(b))
        self.emit(self.forward, "MatMul", **fields | {"C": a.C, "O": b.C}, **other, kh=a.C, kw=1)
        if a.id in self.cotangents.needs:
            self.turn_over(unit)

    def turn_over(self, unit: Unit) -> None:
        """The rows of the right side turned over: vectors read columns that lie side by side."""
        b = unit.reads[1]
        runs = [[h * b.row + w * b.C, h * b.C * b.W + w, b.C, 1, b.W] for h in range(b.H) for w in range(b.W)]
        sides = self.at("src", b, self.store(b)) | {"dst": self.turned_over(unit)}
        self.emit(self.forward, "Move", **sides, size=len(runs), table=self.table([x for run in runs for x in run]))

    def right_turned(self, unit: Unit) -> dict[str, Any]:
        """Where the left side's backward pass finds the right side, and the step from term to term."""
        b = unit.reads[1]
        return {"aux": self.turned_over(unit), "aux_row": b.C * b.W, "aux_px": b.W}

    def backward_matmul(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        a, out = unit.reads[0], unit.out
        assign = node.size == node.C * node.P and node.id not in self.touched  # the first to write it writes all of it
        if assign:
            self.touched.add(node.id)
        fields = self.plain(behind) | self.into(node) | self.extent(node) | {"O": node.C, "assign": int(assign)}
        if self.turn(unit, node) == 0:  # g [M, P] · b^T [P, K]
            other = self.right_turned(unit) | {"C": out.C}
            self.emit(self.backward, "MatMulT", **fields | other, kh=out.C, kw=1)
        else:  # a^T [K, M] · g [M, P]
            other = self.at("aux", a, self.store(a))
            self.emit(self.backward, "MatMulT", **fields | other | {"C": out.W}, kh=1, kw=a.C, fn=1)

    # ---- softmax and norms

    def lines(self, unit: Unit) -> dict[str, Any]:
        form, out = unit.form, unit.out
        assert isinstance(form, LowRank)
        fn = ("softmax", "log_softmax", "normalize").index(form.function)
        buffer = self.slope(unit, more=out.C * out.P)
        eps = bits_of(form.params[0] if form.params else 0.0)
        # Where a line's own number lies (its inverse deviation): behind the storage.
        return buffer | {"fn": fn, "taps": "CWH".index(unit.along), "p0": eps, "entries": out.size - out.interior}

    def forward_lowrank(self, unit: Unit, fields: dict[str, Any]) -> None:
        self.emit(self.forward, "Lines", **fields, **self.lines(unit))

    def backward_lowrank(self, unit: Unit, node: Node, behind: Cotangent) -> None:
        self.emit(
            self.backward,
            "LinesT",
            **self.plain(behind),
            **self.into(node),
            **self.extent(unit.out),
            **self.lines(unit),
        )


def bits_of(number: float) -> int:
    """A double as the integer that a record carries."""
    return struct.unpack("<q", struct.pack("<d", float(number)))[0]
