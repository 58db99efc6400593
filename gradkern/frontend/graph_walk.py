"""What a node of a captured graph depends on."""

from __future__ import annotations

from torch import fx


def reaching(output: fx.Node) -> set[fx.Node]:
    """The nodes that ``output`` depends on."""
    reached, stack = set(), [output]
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack.extend(node.all_input_nodes)
    return reached
