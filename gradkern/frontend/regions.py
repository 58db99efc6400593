"""Parts of a captured graph that export would lose: no_grad regions, custom backwards, hooks, side effects.

Export would drop each of them silently.  The results of a ``no_grad`` region get an explicit `detach`, which means the
same.  A forward pass may keep a tensor from call to call if the tensor does not depend on the inputs.  Everything else
is refused.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx
from torch.autograd import grad_mode

from ..util.torch_compat import keeper_of
from .nodes import called, reaching, works_in_place
from .parameter_writes import make_functional
from .refusal import NoProgram, location

_SET_GRAD = torch._C._set_grad_enabled
_ENTER = getattr(grad_mode, "_enter_inference_mode", None)
_EXIT = getattr(grad_mode, "_exit_inference_mode", None)
_DATA = getattr(torch._C._autograd, "_get_data_attr", None)
_CUSTOM = {
    "autograd_function_apply": "it has a custom autograd.Function, whose backward autograd alone knows",
    "register_hook": "it registers a hook on a tensor, which changes gradients",
}


def make_explicit(module: fx.GraphModule, inputs: Collection[fx.Node]) -> fx.GraphModule | None:
    """Make gradient-free regions explicit, in place.  Raises `NoProgram` for other changes of gradients, and if the
    forward keeps a value that depends on ``inputs`` from call to call.

    Returns a graph, with the same placeholders, of the other values that the forward keeps, such as the weight that
    `nn.utils.weight_norm` computes.
    """
    for node in module.graph.nodes:
        if reason := _refusal(node):
            raise NoProgram(f"{reason}{location(node)}")
    results = next(n for n in module.graph.nodes if n.op == "output").args[0]
    if not results or results[0].target != "clone":
        raise NoProgram("its output is not one tensor")
    if len(results) == 1:  # what else is kept is computed at every call, which may cost more than the kernels save
        make_functional(module.graph, inputs)
    kept = _kept(module, results[1:], inputs) if len(results) > 1 else None
    _detach_regions(module)
    module.graph.lint()
    module.recompile()
    return kept


def _kept(module: fx.GraphModule, results: Sequence[Any], inputs: Collection[fx.Node]) -> fx.GraphModule:
    for result in results:
        if isinstance(result, fx.Node) and not reaching(result).isdisjoint(inputs):
            raise NoProgram(f"its forward keeps a tensor in {_keeper(result)}{location(result)}")
    kept = fx.GraphModule(module, copy.deepcopy(module.graph))
    output = next(n for n in kept.graph.nodes if n.op == "output")
    output.args = (output.args[0][1:],)
    kept.graph.eliminate_dead_code()
    kept.recompile()
    return kept


def _keeper(result: fx.Node) -> str:
    """Where the forward keeps a tensor: the attribute, if Dynamo names one."""
    keeper = keeper_of(result.name)
    return "a Python object" if keeper is None else f"the attribute {keeper[0]} of {keeper[1]}"


def _refusal(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        name = node.target.name()
        return _CUSTOM.get(name, f"it uses {name}, which defines its own backward")
    where = getattr(node.target, "__module__", None) or ""
    if node.op == "call_function" and "functorch" in where:
        return "it differentiates or maps a function inside of its forward (torch.func)"
    if node.op == "call_method" and node.target in ("requires_grad_", "retain_grad", "backward"):
        return f"its forward calls {node.target}"
    if node.op == "call_function" and called(node) in ("grad", "backward", "_autograd_grad"):
        return "it differentiates inside of its forward"
    return ""


def _detach_regions(module: fx.GraphModule) -> None:
    """Put a `detach` on values that were computed with gradients off, and are read where gradients are on."""
    graph = module.graph
    enabled = [True]
    free: set[fx.Node] = set()
    modes: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _SET_GRAD:
            enabled[-1] = bool(node.args[0])
            modes.append(node)
        elif node.op == "call_function" and _ENTER is not None and node.target is _ENTER:
            enabled.append(not node.args[0] and enabled[-1])
            modes.append(node)
        elif node.op == "call_function" and _EXIT is not None and node.target is _EXIT:
            enabled.pop()
            modes.append(node)
        elif node.op in ("call_function", "call_method"):
            if not enabled[-1]:
                _refuse_in_place(node)
                free.add(node)
            elif _DATA is not None and node.target is _DATA:
                node.op, node.target = "call_method", "detach"
    for node in free:
        outside = [user for user in node.users if user not in free and user not in modes]
        if outside and isinstance(node.meta.get("example_value"), torch.Tensor):
            with graph.inserting_after(node):
                detached = graph.call_method("detach", (node,))
            detached.meta = dict(node.meta)
            for user in outside:
                user.replace_input_with(node, detached)
    for node in reversed(modes):
        graph.erase_node(node)


def _refuse_in_place(node: fx.Node) -> None:
    if node.target is operator.setitem or "out" in node.kwargs or works_in_place(called(node)):
        raise NoProgram(f"it changes a tensor in place where gradients are off{location(node)}")
