"""nn.Module -> Program: `torch.export` with a free batch size, then every ATen op lowered to its form.

The batch axis is followed through the graph by its symbol.  A value has it as axis 0 and nowhere else.  What has it
elsewhere (an LSTM's state, a sequence-first tensor) is no value of its own and stays an expression inside the call
that reads it; what has lost it, or has it twice, mixes samples, and the network is refused.
"""

from __future__ import annotations

import logging
import operator
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind

from .expression import calls_in, leaves, literal, operator_of, values_in
from .layers import LOWERINGS, SEVERAL, Builder, MixesSamples, NoForm
from .layers.nested import last_state, simplified
from .program import Batch, Call, Opaque, Param, Program, Value
from .recurrent import recognise
from .shell import shell_copy
from .verify import Untraceable, verify

__all__ = ["Untraceable", "trace", "verify"]

_EXPORT_LOCK = threading.RLock()  # torch.export is not thread-safe
_LARGEST_CALL = 200  # leaves in one Opaque expression; beyond it, recomputing costs more than autograd does
_NOISY = ("torch.fx.experimental.symbolic_shapes", "torch._export", "torch.export", "torch._dynamo")
_SAMPLES = 3  # in the traced batch; 0 and 1 are special to torch.export


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Program:
    """The Program of ``model`` for samples like ``inputs`` (each ``[N, *shape]``; only shape, dtype, device matter).

    It is a proposal: `verify` compares it with live autograd.  Raises `Untraceable` where torch.export refuses the
    model, where samples mix, and where the result is not one tensor with the batch as axis 0.
    """
    for x in inputs:
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise Untraceable("an input has no batch axis")
    exported, literals = _export(model, inputs)
    return _Lowering(model, exported, literals).program()


# ---------------------------------------------------------------------------------------------------------------
# Export


class _Entry(nn.Module):
    """Positional inputs for any signature of ``forward``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, set[str]]:
    """The functional ATen graph, and the names of the constants that ``forward`` writes down."""
    with _EXPORT_LOCK, _quiet(), torch.inference_mode(False), torch.no_grad():
        try:
            entry = _Entry(shell_copy(model))
            entry.training = model.training  # not `.train()`, which would reach the modules inside
            examples = tuple(torch.zeros(_SAMPLES, *x.shape[1:], dtype=x.dtype, device=x.device) for x in inputs)
            batch = torch.export.Dim("batch")
            shapes = (tuple({0: batch} for _ in examples),)
            exported = torch.export.export(entry, examples, dynamic_shapes=shapes, strict=False)
            literals = _literals(exported)
            if _works_in_place(exported):  # making it functional doubles the cost of tracing
                exported = exported.run_decompositions({})
            return exported, literals
        except Exception as error:  # export raises whatever the model's code meets
            raise Untraceable(f"torch.export refuses it ({_first_line(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Export logs and prints what it raises; the caller gets one line instead.  Only ever under the lock."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [logger.level for logger in loggers]
    stderr = sys.stderr
    sys.stderr = _Muted(stderr)  # type: ignore[assignment]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with _tolerant():
            yield
    finally:
        if isinstance(sys.stderr, _Muted):  # nobody has put another one there meanwhile
            sys.stderr = stderr
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _tolerant() -> Iterator[None]:
    """Where the caller turns warnings into errors, torch's own warnings would end the export."""
    if not any(action == "error" for action, *_ in warnings.filters):
        yield  # changing filters is not thread-safe, so it is done only where it matters
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Muted:
    """A stream that drops what this thread writes, and passes on what others do."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._owner = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._owner else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _works_in_place(exported: torch.export.ExportedProgram) -> bool:
    schemas = (getattr(node.target, "_schema", None) for node in exported.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _literals(exported: torch.export.ExportedProgram) -> set[str]:
    """Constants that the code of ``forward`` writes down (``torch.tensor(0.5)``): they are read by a fresh copy."""
    found = set()
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        spec = specs.get(node.name)
        constant = spec is not None and spec.kind == InputKind.CONSTANT_TENSOR
        if node.op == "placeholder" and constant and all("lift_fresh" in str(user.target) for user in node.users):
            found.add(spec.target)
    return found


def _first_line(error: BaseException) -> str:
    if "Constraints violated (batch)" in str(error):
        return "its code depends on the number of samples"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:240] if text else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------
# Lowering


class _Several:
    """A node with several results, until one of them is taken."""

    def __init__(self, node: torch.fx.Node) -> None:
        self.node = node


class _Lowering:
    """One pass over the exported graph.  Each node becomes a `Value`, a `Param`, a `Batch`, or a `Call` to inline."""

    def __init__(self, model: nn.Module, exported: torch.export.ExportedProgram, literals: set[str]) -> None:
        self.model = model
        self.exported = exported
        self.literals = literals
        self.known: dict[torch.fx.Node, Any] = {}
        self.symbol: Any = None
        self.builder = Builder(())

    def program(self) -> Program:
        self._check_signature()
        graph = self.exported.graph
        self._placeholders()
        wanted = _reaching(self._output_node())
        for node in graph.nodes:
            if node.op == "call_function" and node in wanted:
                self._place(node)
                self.known[node] = self._lower(node)
            elif node.op == "get_attr" and node in wanted:
                raise Untraceable("it contains a sub-graph of its own (control flow or a saved context)")
        result = self.known[self._output_node()]
        if not isinstance(result, Value):
            raise Untraceable("its output does not have the samples as axis 0", mixes=not _is_free(result))
        return self.builder.program(result)

    # -- the boundary of the graph

    def _check_signature(self) -> None:
        signature = self.exported.graph_signature
        for spec in signature.output_specs:
            if spec.kind == OutputKind.BUFFER_MUTATION:
                raise Untraceable(f"its forward pass changes the buffer {_own(spec.target)}")
        if not self.exported.call_spec.out_spec.is_leaf():
            raise Untraceable("its output is not one tensor")

    def _output_node(self) -> torch.fx.Node:
        results = next(n for n in self.exported.graph.nodes if n.op == "output").args[0]
        specs = self.exported.graph_signature.output_specs
        node = next(r for r, s in zip(results, specs, strict=True) if s.kind == OutputKind.USER_OUTPUT)
        if not isinstance(node, torch.fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            raise Untraceable("its output is not a tensor")
        if not node.meta["val"].dtype.is_floating_point:
            raise Untraceable(f"its output is of dtype {node.meta['val'].dtype}, which has no gradient")
        return node

    def _placeholders(self) -> None:
        nodes = [n for n in self.exported.graph.nodes if n.op == "placeholder"]
        specs = self.exported.graph_signature.input_specs
        users = [n for n, s in zip(nodes, specs, strict=True) if s.kind == InputKind.USER_INPUT]
        self.symbol = users[0].meta["val"].shape[0]
        if not isinstance(self.symbol, torch.SymInt):
            raise Untraceable("its code depends on the number of samples")
        bounds = self.exported.range_constraints.get(self.symbol.node.expr)
        if bounds is not None and (bounds.lower > 2 or bounds.upper < 2**31):
            raise Untraceable("its code depends on the number of samples")
        self.builder = Builder(tuple(tuple(int(d) for d in n.meta["val"].shape[1:]) for n in users))
        for i, node in enumerate(users):
            self.known[node] = Value(i)
            self.builder.dtypes[Value(i)] = node.meta["val"].dtype
        for node, spec in zip(nodes, specs, strict=True):
            if spec.kind != InputKind.USER_INPUT:
                self.known[node] = self._parameter(node, spec)

    def _parameter(self, node: torch.fx.Node, spec: Any) -> Param | None:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            if node.users:
                raise Untraceable(f"it reads {spec.target or node.name}, which is not a tensor")
            return None
        name = _own(spec.target)
        if spec.target in self.literals:
            value = self.exported.constants[spec.target]
            return self.builder.derive_call(literal(value), node.meta["val"])
        if node.users and not isinstance(_attribute(self.model, name), Tensor):
            raise Untraceable("it reads a tensor that is no parameter, buffer or attribute of a module")
        param = Param(name)
        self.builder.param_meta[param] = node.meta["val"]
        return param

    # -- nodes

    def _place(self, node: torch.fx.Node) -> None:
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        own = [path for path in stack if path == "net" or path.startswith("net.")]
        self.builder.module = _own(own[-1]) if own else ""
        self.builder.op = str(node.target)

    def _lower(self, node: torch.fx.Node) -> Any:
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt):
            return self._size(meta)
        if isinstance(meta, (tuple, list)):
            return _Several(node)
        if isinstance(meta, (torch.SymFloat, torch.SymBool)):
            raise self._refused(node, "computes with the number of samples")
        if not isinstance(meta, Tensor):
            raise self._refused(node, "has no tensor as its result")
        index = None
        if node.target is operator.getitem:
            node, index = self.known[node.args[0]].node, int(node.args[1])
            self.builder.op = str(node.target)
        if not isinstance(node.target, torch._ops.OpOverload):
            raise self._refused(node, "is no ATen op")
        return self._lower_call(node, index, meta)

    def _size(self, size: torch.SymInt) -> Batch | int:
        expression, symbol = size.node.expr, self.symbol.node.expr
        times = expression / symbol
        if not (times.is_Integer and times > 0):
            raise Untraceable(f"it computes with the number of samples ({expression})")
        return Batch(int(times))

    def _lower_call(self, node: torch.fx.Node, index: int | None, meta: Tensor) -> Any:
        call = Call(
            str(node.target),
            tuple(self._argument(x) for x in node.args),
            tuple(sorted((k, self._argument(v)) for k, v in node.kwargs.items())),
            index,
        )
        self._refuse_random(node)
        found = leaves(call)
        if len(found) > _LARGEST_CALL:
            raise self._refused(node, "keeps the batch away from axis 0 for too long")
        if all(not isinstance(x, (Value, Batch)) for x in found):
            return self.builder.derive_call(call, meta)
        if not self._has_batch_first(node, meta, call):
            return call
        return self._value(node, call, meta)

    def _has_batch_first(self, node: torch.fx.Node, meta: Tensor, call: Call) -> bool:
        """True where the batch is axis 0; False where the result is to be inlined; refused where samples mix."""
        symbolic = [i for i, d in enumerate(meta.shape) if isinstance(d, torch.SymInt)]
        reads = bool(values_in(call))
        if len(symbolic) != 1:
            if not reads and not symbolic:
                return False
            raise self._mixing(node, "leaves no batch axis" if not symbolic else "has samples against samples")
        size = meta.shape[symbolic[0]]
        exact = bool(size.node.expr == self.symbol.node.expr)
        return reads and exact and symbolic[0] == 0

    def _value(self, node: torch.fx.Node, call: Call, meta: Tensor) -> Value:
        b = self.builder
        shape = tuple(int(d) for d in meta.shape[1:])
        try:
            value = self._by_form(call, shape, meta)
        except NoForm as why:
            b.op = _ops_of(call)
            value = b.emit(Opaque(call, str(why)), values_in(call), shape)
        except MixesSamples as why:
            raise self._mixing(node, str(why)) from None
        assert b.shape(value) == shape, f"{b.op}: lowered to {b.shape(value)}, torch says {shape}"
        b.dtypes[value] = meta.dtype
        return value

    def _by_form(self, call: Call, shape: tuple[int, ...], meta: Tensor) -> Value:
        call = simplified(self.builder, call)
        state = last_state(self.builder, call)
        if state is not None:
            return state
        if recognise(call) is not None:
            raise NoForm("a recurrent net goes step by step")
        if len(calls_in(call)) > 1:
            raise NoForm("inside it the batch is not axis 0")
        lowering = LOWERINGS.get(call.op)
        if lowering is None:
            raise NoForm(f"{call.op} has no form")
        if call.index not in (None, 0) and call.op not in SEVERAL:
            raise NoForm(f"result {call.index} of {call.op} has no form")
        if not meta.dtype.is_floating_point:
            raise NoForm("its result is not floating point")
        values = values_in(call)
        if any(self.builder.dtypes.get(v, meta.dtype) != meta.dtype for v in values):
            raise NoForm("it changes the dtype")
        return lowering(self.builder, _named(call, shape, meta))

    def _argument(self, x: Any) -> Any:
        if isinstance(x, torch.fx.Node):
            return self.known[x]
        if isinstance(x, (list, tuple)):
            return tuple(self._argument(item) for item in x)
        if isinstance(x, (bool, int, float, str, type(None), torch.dtype, torch.device)):
            return x
        if isinstance(x, (torch.layout, torch.memory_format, complex)):
            return x
        raise Untraceable(f"{self.builder.op} takes an argument of type {type(x).__name__}")

    # -- refusals

    def _refuse_random(self, node: torch.fx.Node) -> None:
        if torch.Tag.nondeterministic_seeded not in node.target.tags:
            return
        named = _bound(node.target, node.args, node.kwargs)
        drops = [named[k] for k in ("dropout", "p", "dropout_p") if k in named]
        mode = [named[k] for k in ("train", "training") if k in named]
        if not any(m is False for m in mode) and not (drops and all(d == 0 for d in drops)):
            raise self._refused(node, "draws random numbers")

    def _refused(self, node: torch.fx.Node, what: str) -> Untraceable:
        return Untraceable(f"{self._where(node)} {what}", op=self.builder.op, module=self.builder.module)

    def _mixing(self, node: torch.fx.Node, what: str) -> Untraceable:
        reason = f"{self._where(node)} mixes samples: it {what}"
        return Untraceable(reason, op=self.builder.op, module=self.builder.module, mixes=True)

    def _where(self, node: torch.fx.Node) -> str:
        return f"{node.target} in {self.builder.module or type(self.model).__name__}"


# ---------------------------------------------------------------------------------------------------------------
# Helpers


def _reaching(output: torch.fx.Node) -> set[torch.fx.Node]:
    """The nodes that the output depends on."""
    found, stack = set(), [output]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _bound(op: torch._ops.OpOverload, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by their schema names, defaults filled in."""
    schema = op._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    named.update({a.name: x for a, x in zip(schema, args, strict=False)})
    named.update(kwargs)
    return named


def _named(call: Call, shape: tuple[int, ...], meta: Tensor) -> SimpleNamespace:
    named = _bound(operator_of(call.op), call.args, dict(call.kwargs))
    return SimpleNamespace(**named, result=shape, result_dtype=meta.dtype, piece=call.index)


def _ops_of(call: Call) -> str:
    """The ops of an expression that see samples, innermost first: ``aten.lstm.input + aten.select.int``."""
    ops = list(dict.fromkeys(c.op for c in calls_in(call) if values_in(c)))
    return " + ".join(ops if len(ops) <= 4 else [*ops[:2], "…", ops[-1]])


def _is_free(result: Any) -> bool:
    """The output does not depend on the samples at all."""
    return isinstance(result, Param) or not values_in(result)


def _own(name: str) -> str:
    """A name in the model from a name in the entry module around it."""
    return name.removeprefix("net").removeprefix(".")


def _attribute(model: nn.Module, name: str) -> Any:
    at: Any = model
    for part in name.split("."):
        at = getattr(at, part, None)
    return at
