"""Captured graph -> functional ATen graph: `torch.export` with a free batch size, quietly and one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from ..ir.calls import Params
from ..util.torch_compat import recurrent_shapes_only
from .capture import LOCK, GuardedGraph, quiet
from .refusal import NoProgram, location, location_in

_SIZES = (*range(2, 65), 1000, 4099, 2**20)  # batch sizes for which a guard is tried
_SAMPLES = 3  # the number of samples in the traced batch; 0 and 1 are special to torch.export


class _Guards:
    """The guards over the batch size that an export has made, and the node of the captured graph that made each."""

    def __init__(self) -> None:
        self.symbol: Any = None
        self.all: list[Any] = []
        self.nodes: list[fx.Node | None] = []

    def begin(self, inputs: Sequence[Tensor]) -> None:
        size = inputs[0].shape[0]
        if isinstance(size, torch.SymInt):
            for x in inputs[1:]:
                torch._check(x.shape[0] == size)  # one symbol for all of them
            self.symbol, self.all = size.node.expr, size.node.shape_env.guards
            self.note(None)

    def note(self, node: fx.Node | None) -> None:
        self.nodes += [node] * (len(self.all) - len(self.nodes))

    def refuse_special_sizes(self) -> None:
        """Refuse a guard that does not hold for every number of samples; ``(3 * n - 1) // n == 2`` does hold."""
        for guard, node in zip(self.all, self.nodes, strict=False):
            if node is None:
                continue
            expression = guard.expr
            if expression.free_symbols != {self.symbol} or not all(expression.subs(self.symbol, n) for n in _SIZES):
                raise NoProgram(f"its code depends on the number of samples{location(node)}")
        if not self.nodes or len(self.nodes) != len(self.all):
            raise NoProgram("its code depends on the number of samples")


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, guards: _Guards) -> None:
        super().__init__(module)
        self.guards = guards

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.guards.note(n)
        return result


class _Entry(nn.Module):
    """The captured graph as a function of the tensors that it reads and of the inputs.

    It is interpreted node by node, so that every ATen op knows the module that it comes from.
    """

    def __init__(self, graph: GuardedGraph, guards: _Guards) -> None:
        super().__init__()
        self.graph = (graph,)  # hidden from export, which would treat a submodule as part of the state
        self.guards = guards

    def forward(self, tensors: list[Tensor], inputs: list[Tensor]) -> Any:
        graph, rest = self.graph[0], iter(tensors)
        assert graph.module is not None
        self.guards.begin(inputs)
        arguments: list[Any] = []
        for read in graph.reads:
            if isinstance(read, str):
                arguments.append(next(rest))
            else:
                arguments.append(inputs[0].shape[0] if read is None else inputs[read])
        with fx.traceback.preserve_node_meta():
            return _Interpreter(graph.module, self.guards).run(*arguments)[0]


@dataclass(frozen=True)
class Exported:
    """A functional ATen graph.  ``inputs``: the nodes of the inputs, in order; ``tensors``: the names of the tensors
    that it reads; ``literals``: the values of the constants in it."""

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    tensors: dict[fx.Node, str]
    literals: dict[fx.Node, Tensor]
    output: Any
    changed: tuple[str, ...]  # the names of tensors that a forward pass changes
    batch_bounds: Any  # on the batch size, if torch.export has any


def export(graph: GuardedGraph, tensors: Params, inputs: Sequence[Tensor]) -> Exported:
    """The functional ATen graph of a captured one.  ``inputs``: only shapes, dtypes and devices matter."""
    with LOCK, quiet(), recurrent_shapes_only(), torch.inference_mode(False), torch.no_grad():
        try:
            names = [read for read in graph.reads if isinstance(read, str)]
            examples = [torch.zeros(_SAMPLES, *x.shape[1:], dtype=x.dtype, device=x.device) for x in inputs]
            exported = _export(graph, [tensors[name] for name in names], examples)
            literals = _literals(exported)
            if _works_in_place(exported):  # making it functional doubles the cost of tracing
                exported = exported.run_decompositions({})
                _spell_copies(exported.graph)
        except NoProgram:
            raise
        except Exception as error:  # export raises whatever the model's code meets
            raise NoProgram(f"torch.export refuses it ({_first_line(error)}){location_in(str(error))}") from error
    return _read(exported, names, literals)


def _export(graph: GuardedGraph, tensors: list[Tensor], examples: list[Tensor]) -> torch.export.ExportedProgram:
    def attempt(batch: Any, guards: _Guards) -> torch.export.ExportedProgram:
        shapes = ([None] * len(tensors), [{0: batch} for _ in examples])
        return torch.export.export(_Entry(graph, guards), (tensors, examples), dynamic_shapes=shapes, strict=False)

    try:
        return attempt(torch.export.Dim("batch"), _Guards())
    except Exception as error:
        if "Constraints violated (batch)" not in str(error):
            raise
    guards = _Guards()
    exported = attempt(torch.export.Dim.AUTO, guards)  # with AUTO, torch.export leaves the guards to us
    guards.refuse_special_sizes()
    return exported


def _read(exported: torch.export.ExportedProgram, names: Sequence[str], literals: Mapping[str, Tensor]) -> Exported:
    graph = exported.graph
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    specs: list[Any] = exported.graph_signature.input_specs
    given = [node for node, spec in zip(nodes, specs, strict=True) if spec.kind == InputKind.USER_INPUT]
    read = dict(zip(given, names, strict=False))
    constants = {
        node: literals[spec.target]
        for node, spec in zip(nodes, specs, strict=True)
        if spec.kind != InputKind.USER_INPUT and spec.target in literals
    }
    by_name = {node.name: name for node, name in read.items()}
    changed = [
        by_name[spec.target]
        for spec in exported.graph_signature.output_specs
        if spec.kind == OutputKind.USER_INPUT_MUTATION and spec.target in by_name
    ]
    results = next(n for n in graph.nodes if n.op == "output").args[0]
    kinds = [spec.kind for spec in exported.graph_signature.output_specs]
    output = results[kinds.index(OutputKind.USER_OUTPUT)]
    inputs = tuple(given[len(names) :])
    size = inputs[0].meta["val"].shape[0]
    bounds = exported.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
    return Exported(graph, inputs, read, constants, output, tuple(changed), bounds)


def _spell_copies(graph: fx.Graph) -> None:
    """Replace ``aten.copy`` by its source in the shape and dtype of the destination.

    In a functional graph an assignment to a slice becomes ``aten.copy``, which has no derivative in torch.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        place, source = node.args[:2]
        dtype, value = node.meta["val"].dtype, source.meta["val"]
        if value.dtype != dtype:
            with graph.inserting_before(node):
                source = graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
            source.meta = {**node.meta, "val": value.to(dtype)}
        node.target, node.args, node.kwargs = torch.ops.aten.expand_as.default, (source, place), {}


def _works_in_place(exported: torch.export.ExportedProgram) -> bool:
    schemas = (getattr(node.target, "_schema", None) for node in exported.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _literals(exported: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """The tensor literals in the code of ``forward`` (``torch.tensor(0.5)``), by target."""
    held = {**exported.constants, **exported.state_dict}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:240] if text else type(error).__name__
