"""Captured graph -> Program: `torch.export` with a free batch size, then every ATen op lowered to its form.

The batch axis is followed through the graph by its symbol.  The batch axis of a value is always axis 0.  A tensor whose
batch axis is another (a sequence-first tensor, samples by heads) is lowered per sample if it has a form that way
(`batch_axis.py`).  Otherwise (an LSTM's state) it does not become a value, but stays an expression inside the call that
reads it.  An op whose result has no batch axis, or two, mixes samples, and the network is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..ir.calls import bind_arguments, calls_in, leaves, literal, operator_of, values_in
from ..ir.program import Batch, Call, Opaque, Param, Program, Value
from ..ir.recurrent import GATES, batch_first, layer_within, recognize
from .batch_axis import BatchAxis, NonLeadingBatch, inner_extent, make_per_sample
from .capture import GraphMatch, plain_name
from .export import Exported, export
from .lowerings import LOWERINGS, MULTI_RESULT_OPS, MixesSamples, NoForm, ProgramBuilder
from .lowerings.builder import COMPLEX, ROWS, Complex, as_shape, number_as_shape, op_name, real_dtype
from .lowerings.fourier import complex_from_last_axis
from .lowerings.nested import last_state, simplify
from .lowerings.repeated import as_fill, is_fill, row_of
from .nodes import reaching
from .refusal import NoProgram, location

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_LARGEST_CALL = 200  # leaves in one Opaque expression; beyond it, recomputing costs more than autograd does


def to_program(captured: GraphMatch, inputs: Sequence[Tensor], name: str = "the model") -> Program:
    """The Program of a captured graph for samples like ``inputs`` (each ``[N, *shape]``).

    It is only a proposal: `verify` compares it with live autograd.  Raises `NoProgram` if torch.export refuses the
    graph, if samples mix, or if the batch is not axis 0 of the result.
    """
    return _GraphLowering(export(captured.graph, captured.tensors, inputs), name).program()


# ---------------------------------------------------------------------------------------------------------------
# Lowering


class _SeveralResults:
    """A node with several results, until one of them is taken."""

    def __init__(self, node: torch.fx.Node) -> None:
        self.node = node


class _GraphLowering:
    """One pass over the exported graph.  Each node becomes a `Value`, a `Param`, a `Batch`, or a `Call` to inline."""

    def __init__(self, exported: Exported, name: str) -> None:
        self.exported = exported
        self.name = name
        self.known: dict[torch.fx.Node, Any] = {}
        self.symbol: Any = None
        self.builder = ProgramBuilder(())

    def program(self) -> Program:
        for changed in self.exported.changed:
            raise NoProgram(f"its forward pass changes the buffer {changed}")
        self._placeholders()
        output = self._output_node()
        wanted = reaching(output)
        for node in self.exported.graph.nodes:
            if node.op == "call_function" and node in wanted:
                self._place(node)
                self.known[node] = self._lower(node)
            elif node.op == "get_attr" and node in wanted:
                raise NoProgram("it contains a nested graph (control flow or a saved context)")
        result = self._argument(output)
        if not isinstance(result, Value):
            raise NoProgram("its output does not have the samples as axis 0", mixes=bool(values_in(result)))
        return self.builder.program(result)

    # -- the boundary of the graph

    def _output_node(self) -> torch.fx.Node:
        node = self.exported.output
        if not isinstance(node, torch.fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            raise NoProgram("its output is not a tensor")
        if not node.meta["val"].dtype.is_floating_point:
            raise NoProgram(f"its output is of dtype {node.meta['val'].dtype}, which has no gradient")
        return node

    def _placeholders(self) -> None:
        exported = self.exported
        self.symbol = exported.inputs[0].meta["val"].shape[0]
        bounds = exported.batch_bounds
        if not isinstance(self.symbol, torch.SymInt) or (
            bounds is not None and (bounds.lower > 2 or bounds.upper < 2**31)
        ):
            raise NoProgram("its code depends on the number of samples")
        self.builder = ProgramBuilder(tuple(tuple(int(d) for d in n.meta["val"].shape[1:]) for n in exported.inputs))
        for i, node in enumerate(exported.inputs):
            self.known[node] = Value(i)
            self.builder.dtypes[Value(i)] = node.meta["val"].dtype
        for node, name in exported.tensors.items():
            param = self.known[node] = Param(name)
            self.builder.param_meta[param] = node.meta["val"]
        for node, value in exported.literals.items():
            self.known[node] = self.builder.derive_call(literal(value), node.meta["val"])

    # -- nodes

    def _place(self, node: torch.fx.Node) -> None:
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        inside = [path for path in stack if path.startswith("L['fn']")]
        self.builder.module = plain_name(inside[-1]) if inside else ""
        self.builder.op = str(node.target)

    def _lower(self, node: torch.fx.Node) -> Any:
        meta = node.meta.get("val")
        if node.target is torch.ops.aten.item.default:
            raise self._refusal(node, "makes a tensor a Python number, which the graph cannot follow")
        if isinstance(meta, torch.SymInt):
            return self._size(meta)
        if isinstance(meta, (tuple, list)):
            return _SeveralResults(node)
        if isinstance(meta, (torch.SymFloat, torch.SymBool)):
            raise self._refusal(node, "computes with the number of samples")
        if not isinstance(meta, Tensor):
            raise self._refusal(node, "has no tensor as its result")
        index = None
        if node.target is operator.getitem:
            of, piece = node.args
            assert isinstance(of, torch.fx.Node) and isinstance(piece, int)
            node, index = self.known[of].node, piece
            self.builder.op = str(node.target)
        if not isinstance(node.target, torch._ops.OpOverload):
            raise self._refusal(node, "is not an ATen op")
        return self._lower_call(node, index, meta)

    def _size(self, size: Any) -> Batch:
        expression, symbol = size.node.expr, self.symbol.node.expr
        times = expression / symbol
        if not (times.is_Integer and times != 0):  # negative ones are the ends of slices, ``x[:-n]``
            raise NoProgram(f"it computes with the number of samples ({expression})")
        return Batch(int(times))

    def _lower_call(self, node: torch.fx.Node, index: int | None, meta: Tensor) -> Any:
        call = Call(
            op_name(node.target),
            tuple(self._argument(x) for x in node.args),
            tuple(sorted((k, self._argument(v)) for k, v in node.kwargs.items())),
            index,
        )
        if call.op in GATES:
            states = [call.args[1]] if isinstance(call.args[1], (Call, Param, Value)) else call.args[1]
            if not all(isinstance(x, Value) or any(isinstance(y, (Value, Batch)) for y in leaves(x)) for x in states):
                # torch's float32 kernels do not check its size, and would write out of bounds.
                raise self._refusal(node, "starts from a state for a fixed number of samples")
            if not call.args[-1]:
                call = self._batch_first_layer(call, node)
        self._refuse_random(node)
        if is_fill(call):
            sizes = tuple(self._size(d) if isinstance(d, torch.SymInt) else int(d) for d in meta.shape)
            call = as_fill(self.builder, call, sizes, meta)
        if all(not isinstance(x, (Value, Batch)) for x in leaves(call)):
            return self.builder.derive_call(call, meta)
        if self._has_batch_first(node, meta, call):
            return self._value(node, call, meta)
        try:
            return self._lower_per_sample(node, meta, call)
        except (NoForm, MixesSamples):
            return self._inline(node, meta, call)

    def _inline(self, node: torch.fx.Node, meta: Tensor, call: Call) -> Any:
        """A tensor whose batch is not axis 0, as an expression.  A long expression is cut by an `Opaque` step, whose
        value has the batch in front."""
        size = len(leaves(call))
        place = _batch_axis(meta.shape)
        if size <= _LARGEST_CALL // 8 or not values_in(call):
            return call
        recurrent = any(inner.op in GATES for inner in calls_in(call))  # its last state has a form (`last_state`)
        movable = meta.dtype.is_floating_point and place >= 0 and self._size(meta.shape[place]) == Batch(1)
        if movable and not recurrent:
            b, rest = self.builder, [int(d) for k, d in enumerate(meta.shape) if k != place]
            front = Call("aten.movedim.int", (call, place, 0))
            x = b.emit(Opaque(front, "inside it the batch is not axis 0"), values_in(call), tuple(rest))
            lifted = as_shape(b, x, (*rest[:place], 1, *rest[place:]))
            b.dtypes[x] = b.dtypes[lifted] = meta.dtype
            return NonLeadingBatch(lifted, self._express(lifted, meta, call, 1))
        if size > _LARGEST_CALL:
            raise self._refusal(node, "keeps the batch away from axis 0 for too long")
        return call

    def _has_batch_first(self, node: torch.fx.Node, meta: Tensor, call: Call) -> bool:
        """True if the batch is axis 0; False if the result is to be inlined.  Refuses an op that mixes samples."""
        symbolic = [i for i, d in enumerate(meta.shape) if isinstance(d, torch.SymInt)]
        reads = bool(values_in(call))
        if len(symbolic) != 1:
            if not reads and not symbolic:
                return False
            raise self._mixing(node, "leaves no batch axis" if not symbolic else "has samples against samples")
        size: Any = meta.shape[symbolic[0]]
        exact = bool(size.node.expr == self.symbol.node.expr)
        return reads and exact and symbolic[0] == 0

    def _batch_first_layer(self, call: Call, layer: torch.fx.Node) -> Call:
        """A recurrent layer over ``[T, N, I]`` as one over ``[N, T, I]``, if its input is known per sample."""
        source = layer.args[0]
        assert isinstance(source, torch.fx.Node)
        x, shape = self.known[source], source.meta["val"].shape
        time_first = isinstance(x, NonLeadingBatch) and len(shape) == 3 and _batch_axis(shape) == 1
        if not time_first or self._size(shape[1]) != Batch(1):
            return call
        return batch_first(call, as_shape(self.builder, x.value, (shape[0], shape[2])))

    def _lower_per_sample(self, node: torch.fx.Node, meta: Tensor, call: Call) -> NonLeadingBatch:
        """A tensor whose batch is not axis 0, per sample; raises `NoForm` if its op has no form that way."""
        b, layer = self.builder, layer_within(call)
        if recognize(layer) is not None:
            steps, width = int(meta.shape[0]), int(meta.shape[2])
            y = b.emit(Opaque(layer, "a recurrent layer goes step by step"), values_in(layer), (steps, width))
            return NonLeadingBatch(as_shape(b, y, (steps, 1, width)), call)
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if not tensors or not values_in(call):
            raise NoForm("it reads no value")
        kwargs = tuple((k, self._lift(v)) for k, v in node.kwargs.items())
        lifted = Call(op_name(node.target), tuple(self._lift(x) for x in node.args), kwargs, call.index)
        named = named_arguments(lifted, (), meta)
        axes = {n: _batch_axis(n.meta["val"].shape) for n in tensors if values_in(self._argument(n))}
        batch = [
            BatchAxis(a, getattr(self.known[n], "inner_extent", 1), self._size(n.meta["val"].shape[a]).times)
            for n, a in axes.items()
        ]
        make_per_sample(lifted.op, named, tensors[0].meta["val"].dim(), batch)
        named.result = tuple(self._size(d).times if isinstance(d, torch.SymInt) else int(d) for d in meta.shape)
        place = _batch_axis(meta.shape)
        sources = [
            (axis.inner, math.prod(n.meta["val"].shape[axis.place + 1 :])) for n, axis in zip(axes, batch, strict=True)
        ]
        inner = inner_extent(lifted.op, sources, named.result[place], meta.shape[place + 1 :])
        if self._is_complex(node, meta):
            lowered = self._complex_form(lifted, named)
        else:
            self._check(lifted, meta)
            lowered = (ROWS if lifted.op in ROWS else LOWERINGS)[lifted.op](b, named)
        value = number_as_shape(b, lowered, named.result)  # a constant with more axes adds some in front
        self._note_dtype(value, meta.dtype)
        return NonLeadingBatch(value, self._express(value, meta, call, inner), inner)

    def _lift(self, x: Any) -> Any:
        """An argument per sample: a value gets an axis of length one in front."""
        b = self.builder
        argument = self.known[x] if isinstance(x, torch.fx.Node) else x
        if isinstance(argument, (Value, Complex)):
            one = argument.real if isinstance(argument, Complex) else argument
            lifted = number_as_shape(b, argument, (1, *b.shape(one)))
            self._note_dtype(lifted, x.meta["val"].dtype)
            return lifted
        if isinstance(argument, NonLeadingBatch):
            return argument.value
        row = row_of(b, argument) if isinstance(argument, Call) and not values_in(argument) else None
        if row is not None:
            return row
        if isinstance(argument, (Call, _SeveralResults)):
            raise NoForm("inside it the batch is not axis 0")
        return tuple(self._lift(item) for item in x) if isinstance(x, (list, tuple)) else argument

    def _value(self, node: torch.fx.Node, call: Call, meta: Tensor) -> Value | Complex:
        b = self.builder
        shape = tuple(int(d) for d in meta.shape[1:])
        try:
            value = self._by_form(node, call, shape, meta)
        except NoForm as reason:
            if len(leaves(call)) > _LARGEST_CALL:
                raise self._refusal(node, "keeps the batch away from axis 0 for too long") from None
            b.op = _ops_of(call)
            value = self._opaque(call, str(reason), shape, meta)
        except MixesSamples as reason:
            raise self._mixing(node, str(reason)) from None
        for part in (value.real, value.imag) if isinstance(value, Complex) else (value,):
            assert b.shape(part) == shape, f"{b.op}: lowered to {b.shape(part)}, torch says {shape}"
        self._note_dtype(value, meta.dtype)
        return value

    def _opaque(self, call: Call, reason: str, shape: tuple[int, ...], meta: Tensor) -> Value | Complex:
        """An `Opaque` step; it returns complex numbers as pairs of real ones."""
        b, values = self.builder, values_in(call)
        if not meta.dtype.is_complex:
            return b.emit(Opaque(call, reason), values, shape)
        pair = b.emit(Opaque(Call("aten.view_as_real.default", (call,)), reason), values, (*shape, 2))
        return complex_from_last_axis(b, pair)

    def _note_dtype(self, value: Value | Complex, dtype: torch.dtype) -> None:
        if isinstance(value, Complex):
            self.builder.dtypes[value.real] = self.builder.dtypes[value.imag] = real_dtype(dtype)
        else:
            self.builder.dtypes[value] = dtype

    def _is_complex(self, node: torch.fx.Node, meta: Tensor) -> bool:
        """Whether an op reads or makes complex numbers."""
        read = (n.meta.get("val") for n in node.all_input_nodes)
        return meta.dtype.is_complex or any(isinstance(v, Tensor) and v.dtype.is_complex for v in read)

    def _complex_form(self, call: Call, named: SimpleNamespace) -> Value | Complex:
        if call.op not in COMPLEX:
            raise NoForm(f"{call.op} of complex numbers has no form")
        lowered: Value | Complex = COMPLEX[call.op](self.builder, named)
        return lowered

    def _formal(self, x: Any) -> Any:
        """An argument of an `Opaque` step, in which complex tensors are pairs of values."""
        if isinstance(x, torch.fx.Node) and isinstance(self.known[x], Complex):
            return self.known[x]
        return tuple(self._formal(item) for item in x) if isinstance(x, (list, tuple)) else self._argument(x)

    def _by_form(self, node: torch.fx.Node, call: Call, shape: tuple[int, ...], meta: Tensor) -> Value | Complex:
        if self._is_complex(node, meta):
            kwargs = tuple((k, self._formal(v)) for k, v in node.kwargs.items())
            formal = Call(op_name(node.target), tuple(self._formal(x) for x in node.args), kwargs, call.index)
            formal = simplify(self.builder, formal)
            if len(calls_in(formal)) > 1:
                raise NoForm("inside it the batch is not axis 0")
            return self._complex_form(formal, named_arguments(formal, shape, meta))
        call = simplify(self.builder, call)
        state = last_state(self.builder, call)
        if state is not None:
            return state
        if recognize(call) is not None:
            raise NoForm("a recurrent layer goes step by step")
        if len(calls_in(call)) > 1:
            if any(isinstance(self.known[n], NonLeadingBatch) for n in node.all_input_nodes):
                return number_as_shape(self.builder, self._lower_per_sample(node, meta, call).value, shape)
            raise NoForm("inside it the batch is not axis 0")
        self._check(call, meta)
        return LOWERINGS[call.op](self.builder, named_arguments(call, shape, meta))

    def _check(self, call: Call, meta: Tensor) -> None:
        """Raise `NoForm` if no lowering takes the call."""
        if call.op not in LOWERINGS:
            raise NoForm(f"{call.op} has no form")
        if call.index not in (None, 0) and call.op not in MULTI_RESULT_OPS:
            raise NoForm(f"result {call.index} of {call.op} has no form")
        if not meta.dtype.is_floating_point:
            raise NoForm("its result is not floating point")
        if any(self.builder.dtypes.get(v, meta.dtype) != meta.dtype for v in values_in(call)):
            raise NoForm("it changes the dtype")

    def _express(self, value: Value | Complex, meta: Tensor, call: Call, inner: int) -> Call:
        """A tensor with a non-leading batch, for ops that have no form: the call that made it if that is short,
        otherwise a reshape of its value."""
        if len(leaves(call)) <= _LARGEST_CALL // 8:
            return call
        place = _batch_axis(meta.shape)
        size, before, after = self._size(meta.shape[place]), meta.shape[:place], meta.shape[place + 1 :]
        apart = Call(
            "aten.reshape.default",
            (as_argument(value), (Batch(1), *before, size.times // inner, inner, *after)),
        )
        return Call("aten.reshape.default", (Call("aten.movedim.int", (apart, 0, place + 1)), (*before, size, *after)))

    def _argument(self, x: Any) -> Any:
        if isinstance(x, torch.fx.Node):
            argument = self.known[x]
            return argument.call if isinstance(argument, NonLeadingBatch) else as_argument(argument)
        if isinstance(x, (list, tuple)):
            return tuple(self._argument(item) for item in x)
        if isinstance(x, _PLAIN):
            return x
        raise NoProgram(f"{self.builder.op} takes an argument of type {type(x).__name__}")

    # -- refusals

    def _refuse_random(self, node: torch.fx.Node) -> None:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            return
        named = bind_arguments(node.target, node.args, dict(node.kwargs))
        drops = [named[k] for k in ("dropout", "p", "dropout_p") if k in named]
        mode = [named[k] for k in ("train", "training") if k in named]
        if not any(m is False for m in mode) and not (drops and all(d == 0 for d in drops)):
            raise self._refusal(node, "draws random numbers")

    def _refusal(self, node: torch.fx.Node, what: str) -> NoProgram:
        reason = f"{self._where(node)} {what}{location(node)}"
        return NoProgram(reason, op=self.builder.op, module=self.builder.module)

    def _mixing(self, node: torch.fx.Node, what: str) -> NoProgram:
        reason = f"{self._where(node)} mixes samples: it {what}{location(node)}"
        return NoProgram(reason, op=self.builder.op, module=self.builder.module, mixes=True)

    def _where(self, node: torch.fx.Node) -> str:
        return f"{node.target} in {self.builder.module or self.name}"


# ---------------------------------------------------------------------------------------------------------------
# Helpers


def as_argument(x: Any) -> Any:
    """A pair of values as the complex tensor that torch's ops read."""
    return Call("aten.complex.default", (x.real, x.imag)) if isinstance(x, Complex) else x


def _batch_axis(shape: Sequence[Any]) -> int:
    """The axis that holds the samples; -1 if there is none."""
    return next((axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)), -1)


def named_arguments(call: Call, shape: tuple[int, ...], meta: Tensor) -> SimpleNamespace:
    """A call's arguments as lowerings take them; ``shape`` of a sample's result, ``meta`` with its dtype and device."""
    named = bind_arguments(operator_of(call.op), call.args, dict(call.kwargs))
    result = {"result": shape, "result_dtype": meta.dtype, "result_device": meta.device, "piece": call.index}
    return SimpleNamespace(**named, **result)


def _ops_of(call: Call) -> str:
    """The ops of an expression that see samples, innermost first: ``aten.lstm.input + aten.select.int``."""
    ops = list(dict.fromkeys(c.op for c in calls_in(call) if values_in(c)))
    return " + ".join(ops if len(ops) <= 4 else [*ops[:2], "…", ops[-1]])
