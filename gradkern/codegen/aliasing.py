"""Where the cotangents of a chain are read: some have a buffer, and some are another cotangent seen through a pattern.

The cotangent of a node with a single reader is often just another cotangent seen through bits (ReLU, max pool) or
the same one (a sum).  Such a node gets no buffer.  :class:`Cotangent` names the buffer and the pattern to read it
through, and the contraction that reads it skips the zeros that the bits show.  If the group ends in a linear layer and
the seeds are one-hot, the first cotangents are rows of its weight, and nothing is computed for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .units import Node, Unit, UnitGraph, overlaps
from .weights import WindowLayout


@dataclass(frozen=True)
class Cotangent:
    """Where a node's cotangent is read: the buffer of ``node`` (or the seed rows), through ``pattern`` if any."""

    node: Node
    rows: bool = False
    pattern: Unit | None = None


class Cotangents:
    """The cotangents of a group, for the external inputs ``wrt``."""

    def __init__(self, graph: UnitGraph, wrt: tuple[int, ...], onehot: bool):
        self.graph = graph
        self.outputs = list(graph.outputs.values())
        self.needs = reachable(graph, wrt)
        self.known: dict[int, Cotangent | None] = {}
        self.rows_unit = self.find_rows_unit() if onehot else None

    def find_rows_unit(self) -> Unit | None:
        """The last linear layer if one-hot seeds start there: then the first cotangents are rows of its weight."""
        if len(self.outputs) != 1:
            return None
        out = self.outputs[0]
        unit = out.producer
        if not unit.dense or out.readers or not any(n.id in self.needs for n in unit.reads):
            return None
        return unit if len(WindowLayout.of(unit, 1).runs) == 1 else None

    def read_once(self, node: Node) -> bool:
        """Whether the node's cotangent comes from one unit alone, none from the caller."""
        return len(self.readers(node)) == 1 and not any(node is n for n in self.outputs)

    def readers(self, node: Node) -> list[Unit]:
        """The units that a node gets cotangents from."""
        return [u for u in node.readers if u.out.id in self.needs]

    def of(self, node: Node) -> Cotangent | None:
        """The cotangent of a node as an expression; ``.node is node`` if it has its own buffer; None: not wanted."""
        if node.id not in self.known:
            self.known[node.id] = self.decide(node)
        return self.known[node.id]

    def decide(self, node: Node) -> Cotangent | None:
        own_buffer = Cotangent(node)
        if node.id not in self.needs:
            return None
        readers = self.readers(node)
        if self.rows_unit is not None and node is self.rows_unit.out:
            return None
        if not self.read_once(node):
            return own_buffer
        reader, producer = readers[0], node.producer
        through_bits = producer.kind in ("window", "add")
        if reader is self.rows_unit:
            return Cotangent(node, rows=True) if self.takes_rows(node) else own_buffer
        upstream = self.of(reader.out)
        if upstream is None:
            return None
        if reader.opened:
            in_full = upstream.node is reader.out and not upstream.rows
            return upstream if in_full or (upstream.pattern is not None and through_bits) else own_buffer
        if (
            reader.kind == "pattern"
            and upstream.pattern is None
            and (through_bits or self.can_defer_rectify(reader, upstream))
        ):
            return Cotangent(upstream.node, upstream.rows, reader)
        if reader.kind == "add" and producer.rectify:
            return own_buffer  # its negative part is removed, but the sum's other branches keep theirs
        if reader.kind == "add" and (through_bits or not (upstream.rows or upstream.pattern)):
            return upstream
        if reader.kind == "elementwise" and upstream.node is reader.out:
            return upstream  # multiplied in place
        return own_buffer

    def can_defer_rectify(self, pool: Unit, upstream: Cotangent) -> bool:
        """Whether an opened ReLU before a pool can rectify the pool's upstream cotangent instead of the result.

        Nothing may be added in between (disjoint windows, one reader each), and the unit before the ReLU has to read
        through the pool's bits.
        """
        relu = pool.reads[0].producer
        if not (relu and relu.opened and pool.windows) or upstream.rows or upstream.node is not pool.out:
            return False
        source = relu.reads[0]
        return self.read_once(source) and source.producer.kind in ("window", "add") and not overlaps(pool.windows)

    def takes_rows(self, node: Node) -> bool:
        """Whether all readers of this cotangent are contractions that read it directly or through one pattern."""
        producer = node.producer
        if producer.kind == "pattern":
            if producer.opened:
                return False
            source = producer.reads[0]
            return self.read_once(source) and source.producer.kind == "window"
        return producer.kind == "window"


def reachable(graph: UnitGraph, wrt: tuple[int, ...]) -> set[int]:
    """Nodes whose cotangent matters: they depend on a wanted input."""
    ids = {graph.inputs[v].id for v in wrt}
    for unit in graph.units:
        if any(n.id in ids for n in unit.reads):
            ids.add(unit.out.id)
    return ids
