"""Parameters that a forward writes before it reads them, such as a weight whose norm it limits.

Networks for EEG often do that: ``self.weight.data = torch.renorm(self.weight.data, ...)``, or ``clamp_`` under
``no_grad``.  If what is written does not depend on the inputs, every later read in the captured graph takes
the new value instead, and nothing is written: calls of kernels leave the tensors of the caller's model as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from .nodes import called, reaching, works_in_place

_DATA = getattr(torch._C._autograd, "_get_data_attr", None)
_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def make_functional(graph: fx.Graph, inputs: Collection[fx.Node]) -> None:
    """Replace such writes by values, in place.  Writes of what depends on ``inputs``, to part of a tensor, or to a
    tensor that is read later by another name are left as they are."""
    parameters = [n for n in graph.nodes if n.op == "placeholder" and isinstance(_value(n), nn.Parameter)]
    parameter_of = {n: n for n in parameters}  # aliases are added
    written: dict[fx.Node, fx.Node] = {}  # the present value of a tensor that has been written
    replaced: set[fx.Node] = set()  # tensors that have another storage now
    for node in list(graph.nodes):
        target = parameter_of.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        for argument in node.all_input_nodes:
            state = parameter_of.get(argument)
            if state in written:
                node.replace_input_with(argument, written[state])
        if target is None:
            continue
        name = called(node)
        if node.target is _DATA or name == "detach":
            parameter_of[node] = target
        elif target not in replaced and reaching(node).isdisjoint(inputs):
            value = _new_value(graph, node, name)
            if value is None or _read_by_another_name(graph, node, target, parameter_of, new_storage=name == "set_"):
                continue
            written[target] = value
            if name == "set_":
                replaced.add(target)
            else:  # what the call returns is the tensor that it has written
                parameter_of[value] = target
            _erase(graph, node, value)


def _new_value(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node | None:
    """What a node leaves in the tensor that it writes; None if it writes none, or nothing that is known."""
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    present, *rest = node.args
    functional: Any = _OPERATORS.get(node.target)  # type: ignore[arg-type]
    if name in ("set_", "copy_"):
        source = rest[0] if rest else None
        if len(rest) != 1 or node.kwargs or not isinstance(source, fx.Node) or not _alike(present, source):
            return None
        if name == "set_":
            return source
        method, arguments, keywords = "clone", (source,), {}
    elif functional is None and not (works_in_place(name) and hasattr(Tensor, name[:-1])):
        return None
    else:
        method, arguments, keywords = name[:-1], node.args, node.kwargs
    with graph.inserting_before(node):
        if functional is None:
            value = graph.call_method(method, arguments, keywords)
        else:
            value = graph.call_function(functional, node.args)
    value.meta = dict(node.meta)
    return value


def _alike(present: Any, source: fx.Node) -> bool:
    a, b = _value(present), _value(source)
    return a is not None and b is not None and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _value(node: fx.Node) -> Tensor | None:
    """The tensor without memory that stands for a node's value."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def _read_by_another_name(
    graph: fx.Graph, node: fx.Node, target: fx.Node, parameter_of: dict[fx.Node, fx.Node], *, new_storage: bool
) -> bool:
    """Whether ``target`` is read after ``node`` by a name whose value `make_functional` would get wrong.

    A write is seen by all views, of which only aliases of the whole parameter are replaced.  With ``new_storage`` it is
    seen by none of them, not even by those aliases.
    """
    position = {n: place for place, n in enumerate(graph.nodes)}
    storage = _storage(target)
    for other in graph.nodes:
        alias = parameter_of.get(other) is target
        wrong = alias and other is not target if new_storage else not alias and _storage(other) == storage
        if not wrong or position[other] >= position[node]:
            continue
        if any(position[user] > position[node] for user in other.users):
            return True
    return storage is None


def _storage(node: fx.Node) -> int | None:
    value = _value(node)
    return None if value is None else value.untyped_storage()._cdata


def _erase(graph: fx.Graph, node: fx.Node, value: fx.Node) -> None:
    for user in list(node.users):
        if called(user) == "_lower_version_count_by_1" and not user.users:
            graph.erase_node(user)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
