"""Where the cotangents of a chain are read: some have a buffer, and some are another cotangent seen through a pattern.

The cotangent of a node with a single reader is often just another cotangent seen through bits (ReLU, max pool) or
the same one (a sum).  Such a node gets no buffer.  :class:`Cotangent` names the buffer and the pattern to read it
through, and the contraction that reads it skips the zeros that the bits show.  If the group ends in a linear layer and
the seeds are one-hot, the first cotangents are rows of its weight, and nothing is computed for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import units
from .units import Node, Unit, UnitGraph, rectifies_cotangent
from .weights import WindowLayout


@dataclass(frozen=True)
class Cotangent:
    """Where a node's cotangent is read: the buffer of ``node`` (or the seed rows), through ``pattern`` if any."""

    node: Node
    seed_rows: bool = False
    pattern: units.Pattern | None = None


class Cotangents:
    """Where the cotangents of a group are read, given the external inputs ``wrt``."""

    def __init__(self, graph: UnitGraph, wrt: tuple[int, ...], onehot: bool):
        self.graph = graph
        self.outputs = set(graph.outputs.values())
        self.needs = reachable(graph, wrt)
        self.seed_rows_unit = self.find_seed_rows_unit() if onehot else None
        self.by_node: dict[Node, Cotangent | None] = {}
        for unit in reversed(graph.units):  # from the end, as each decision depends on those of the readers
            self.by_node[unit.out] = self.decide(unit.out)

    def of(self, node: Node) -> Cotangent | None:
        """The cotangent of a node, whose ``.node`` is the node itself if it has a buffer; None if it is not wanted."""
        return self.by_node[node]

    def find_seed_rows_unit(self) -> units.Window | None:
        """The last linear layer if one-hot seeds start there: then the first cotangents are rows of its weight."""
        if len(self.graph.outputs) != 1:
            return None
        (out,) = self.outputs
        unit = out.producer
        if not (isinstance(unit, units.Window) and unit.dense) or out.readers or self.needs.isdisjoint(unit.reads):
            return None
        return unit if len(WindowLayout.of(unit, 1).runs) == 1 else None

    def read_once(self, node: Node) -> bool:
        """Whether the node's cotangent comes from a single unit, and not from the caller."""
        return len(self.readers(node)) == 1 and node not in self.outputs

    def readers(self, node: Node) -> list[Unit]:
        """The units that a node gets cotangents from."""
        return [u for u in node.readers if u.out in self.needs]

    def decide(self, node: Node) -> Cotangent | None:
        own_buffer = Cotangent(node)
        if node not in self.needs:
            return None
        readers = self.readers(node)
        if self.seed_rows_unit is not None and node is self.seed_rows_unit.out:
            return None
        if not self.read_once(node):
            return own_buffer
        reader, producer = readers[0], node.producer
        through_bits = isinstance(producer, units.Window | units.Add)
        if reader is self.seed_rows_unit:
            return Cotangent(node, seed_rows=True) if self.takes_seed_rows(node) else own_buffer
        upstream = self.of(reader.out)
        if upstream is None:
            return None
        in_full = upstream.node is reader.out and not upstream.seed_rows
        match reader:
            case units.Pattern(opened=True) if in_full or (upstream.pattern is not None and through_bits):
                return upstream
            case units.Pattern(opened=False) if upstream.pattern is None:
                if through_bits or self.can_defer_rectify(reader, upstream):
                    return Cotangent(upstream.node, upstream.seed_rows, reader)
            case units.Add() if rectifies_cotangent(producer):
                return own_buffer  # its negative part is removed, but the sum's other branches keep theirs
            case units.Add() if through_bits or not (upstream.seed_rows or upstream.pattern):
                return upstream
            case units.Elementwise() if upstream.node is reader.out:
                return upstream  # multiplied in place
        return own_buffer

    def can_defer_rectify(self, pool: units.Pattern, upstream: Cotangent) -> bool:
        """Whether an opened ReLU before a pool can rectify the pool's upstream cotangent instead of the result.

        Nothing may be added in between (disjoint windows, one reader each), and the unit before the ReLU has to read
        through the pool's bits.
        """
        relu = pool.reads[0].producer
        if not (isinstance(relu, units.Pattern) and relu.opened) or pool.pool is None:
            return False
        if upstream.seed_rows or upstream.node is not pool.out:
            return False
        source = relu.reads[0]
        through_bits = isinstance(source.producer, units.Window | units.Add)
        return self.read_once(source) and through_bits and not pool.pool.overlap

    def takes_seed_rows(self, node: Node) -> bool:
        """Whether all readers of this cotangent are contractions that read it directly or through one pattern."""
        producer = node.producer
        if isinstance(producer, units.Pattern):
            if producer.opened:
                return False
            source = producer.reads[0]
            return self.read_once(source) and isinstance(source.producer, units.Window)
        return isinstance(producer, units.Window)


def reachable(graph: UnitGraph, wrt: tuple[int, ...]) -> set[Node]:
    """Nodes whose cotangent matters: they depend on a wanted input."""
    nodes = {graph.inputs[v] for v in wrt}
    for unit in graph.units:
        if not nodes.isdisjoint(unit.reads):
            nodes.add(unit.out)
    return nodes
