"""Records of the forms that are no window and no pattern: copies, stencils, functions, products, norms."""

from __future__ import annotations

import struct
from typing import Any

from .pack import MixLayout
from .program import Channels, Index, LowRank, Scale
from .tables import moves, positions, stencil, transposed
from .units import NATIVE_FUNCTIONS, Node, Unit


def bits_of(number: float) -> int:
    """A double as the integer that a record carries."""
    return struct.unpack("<q", struct.pack("<d", float(number)))[0]


class FormRecords:
    """A part of `gradkern.chain.Lowering`: one pair of methods per unit kind."""

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

    def backward_move(self, unit: Unit, node: Node, behind: Any) -> None:
        runs = self.runs(unit, behind.node)[self.turn(unit, node)]
        target = self.into(node)
        self.emit(self.backward, "MoveT", **self.plain(behind), **target, size=len(runs) // 5, table=self.table(runs))

    def turn(self, unit: Unit, node: Node) -> int:
        """Which read of the unit this is: a unit may read one node twice, and is asked once per read."""
        places = [k for k, n in enumerate(unit.reads) if n is node]
        asked = self.asked.get((id(unit), node.id), 0)
        self.asked[id(unit), node.id] = asked + 1
        return places[asked]

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

    def backward_mix(self, unit: Unit, node: Node, behind: Any) -> None:
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

    def backward_scale(self, unit: Unit, node: Node, behind: Any) -> None:
        in_place = self.express(node) is behind
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

    def backward_product(self, unit: Unit, node: Node, behind: Any) -> None:
        other = unit.reads[1 - self.turn(unit, node)]
        fields = self.plain(behind) | self.into(node) | self.extent(unit.out)
        fields |= self.steps("dst", node, unit.out, "kh") | self.steps("aux", other, unit.out, "kw")
        self.emit(self.backward, "ProductT", **fields, aux=(self.store(other), other.interior))

    # ---- products of two matrices of values, [H] of them, as they lie row by row

    def forward_matmul(self, unit: Unit, fields: dict[str, Any]) -> None:
        a, b = unit.reads
        other = self.at("aux", b, self.store(b))
        self.emit(self.forward, "MatMul", **fields | {"C": a.C, "O": b.C}, **other, kh=a.C, kw=1)
        if a.id in self.needs:
            runs = [[h * b.row + w * b.C, h * b.C * b.W + w, b.C, 1, b.W] for h in range(b.H) for w in range(b.W)]
            place = self.at("src", b, self.store(b)) | {"dst": self.turned_over(unit)}
            self.emit(self.forward, "Move", **place, size=len(runs), table=self.table([x for run in runs for x in run]))

    def backward_matmul(self, unit: Unit, node: Node, behind: Any) -> None:
        (a, b), out = unit.reads, unit.out
        fields = self.plain(behind) | self.into(node) | self.extent(node) | {"O": node.C}
        if self.turn(unit, node) == 0:  # g [M, P] · b^T [P, K]
            turned = {"aux": self.turned_over(unit), "aux_row": b.C * b.W, "aux_px": b.W}
            self.emit(self.backward, "MatMulT", **fields | turned | {"C": out.C}, kh=out.C, kw=1)
        else:  # a^T [K, M] · g [M, P]
            turned = self.at("aux", a, self.store(a))
            self.emit(self.backward, "MatMulT", **fields | turned | {"C": out.W}, kh=1, kw=a.C, fn=1)

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

    def backward_lowrank(self, unit: Unit, node: Node, behind: Any) -> None:
        self.emit(
            self.backward,
            "LinesT",
            **self.plain(behind),
            **self.into(node),
            **self.extent(unit.out),
            **self.lines(unit),
        )
