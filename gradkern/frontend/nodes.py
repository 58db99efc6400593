"""Queries on the nodes of a captured graph."""

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


def called(node: fx.Node) -> str:
    """The name of the method or function that a node calls; empty if it has none."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def works_in_place(name: str) -> bool:
    """Whether torch's operation of this name changes its first argument."""
    return name.endswith("_") and not name.endswith("__")
