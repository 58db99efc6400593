"""The lowering of one exported graph: a registry of ATen ops and the builder that they write steps to.

A lowering is a function ``(builder, a) -> value`` registered for the full names of ATen overloads.  ``a`` holds
the call's arguments by their schema names, with defaults filled in: tensors as `Value` or `Param`, everything else as
plain Python.  It also holds the per-sample shape, dtype and device of the result: ``a.result``, ``a.result_dtype`` etc.
It emits steps and returns the `Value` that stands for the result, or raises `NoForm` with a reason, in which case the
op becomes one `Opaque` step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...ir.calls import form_params, params_in
from ...ir.graph import up_to
from ...ir.program import (
    MOST_AXES,
    Call,
    Channels,
    Contract,
    Dense,
    Derived,
    Form,
    LowRank,
    Param,
    Product,
    Program,
    Scale,
    Shape,
    Step,
    Sum,
    Value,
    View,
)

LoweringFunction = Callable[..., Value]
LOWERINGS: dict[str, LoweringFunction] = {}
MULTI_RESULT_OPS: set[str] = set()  # ops with several results, of which a lowering gives the one numbered ``a.piece``
ROWS: dict[str, LoweringFunction] = {}  # lowerings of ops on tensors whose axis 0 holds several rows of each sample
COMPLEX: dict[str, Callable[..., Any]] = {}  # lowerings of ops that read or make complex numbers
AXES: dict[str, tuple[str, ...]] = {}  # by op that may have the batch in any axis: the arguments that name axes
ALONG: dict[str, str] = {}  # by op: the argument that names the axes it works along, none of which may be the batch


@dataclass(frozen=True)
class Complex:
    """A complex tensor as two values of its shape."""

    real: Value
    imag: Value


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts of complex numbers."""
    return dtype.to_real() if dtype.is_complex else dtype


class NoForm(Exception):
    """A lowering does not cover these arguments; the message says why."""


#: Other names of ops with the same arguments.
ALIASES = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs",
    "concat": "cat", "concatenate": "cat", "clip": "clamp", "moveaxis": "movedim", "arctan": "atan", "arcsin": "asin",
    "arccos": "acos", "arcsinh": "asinh", "arctanh": "atanh", "special_expit": "sigmoid", "special_expm1": "expm1",
    "special_exp2": "exp2", "special_log1p": "log1p", "special_erf": "erf", "special_erfc": "erfc",
    "special_logsumexp": "logsumexp", "linalg_matmul": "matmul",
}  # fmt: skip


def op_name(target: Any) -> str:
    """The full name of an ATen overload, such as ``aten.mul.Tensor``.  Of an op with several names, the usual one."""
    name = str(target)
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "aten" and parts[1] in ALIASES:
        return f"aten.{ALIASES[parts[1]]}.{parts[2]}"
    return name


def lowers(
    *ops: str, axes: tuple[str, ...] | None = None, along: str | None = None, **fixed: Any
) -> Callable[[LoweringFunction], LoweringFunction]:
    """Register a lowering for ATen overloads by their full names, ``"aten.relu.default"``.

    ``axes`` or ``along`` says what to do with tensors whose batch is not axis 0 (`frontend/batch_axis.py`); without
    them the ops have no form there.  ``axes``: the op accepts them for any batch axis, and these arguments name axes;
    it is ``()`` for elementwise ops, and for ops along static axes at the end.  ``along``: the op works along the axes
    that this argument names.  ``fixed``: further arguments of the lowering for these ops.
    """
    if axes is not None:
        AXES.update(dict.fromkeys(ops, axes))
    if along is not None:
        ALONG.update(dict.fromkeys(ops, along))

    return _registered(LOWERINGS, ops, fixed)


def lowers_complex(
    *ops: str, axes: tuple[str, ...] | None = None, along: str | None = None, **fixed: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`lowers` for ops with a complex argument or result; such a lowering may take and return a `Complex`."""
    if axes is not None:
        AXES.update(dict.fromkeys(ops, axes))
    if along is not None:
        ALONG.update(dict.fromkeys(ops, along))
    return _registered(COMPLEX, ops, fixed)


def lowers_rows(*ops: str, **fixed: Any) -> Callable[[LoweringFunction], LoweringFunction]:
    """`lowers` for ops that treat the rows of axis 0 alike; these rows are the first axis of their values."""
    return _registered(ROWS, ops, fixed)


def _registered(
    table: dict[str, Callable[..., Any]], ops: tuple[str, ...], fixed: dict[str, Any]
) -> Callable[..., Any]:
    def register(lowering: Callable[..., Any]) -> Callable[..., Any]:
        table.update(dict.fromkeys(ops, partial(lowering, **fixed) if fixed else lowering))
        return lowering

    return register


class ProgramBuilder:
    """Collects the steps of a `Program`.  Shapes are per sample; the batch axis is axis 0 of every live tensor."""

    def __init__(self, inputs: tuple[Shape, ...]) -> None:
        self.inputs = inputs
        self.steps: list[Step] = []
        self.derived_by_call: dict[Call, Param] = {}
        self.param_meta: dict[Param, torch.Tensor] = {}  # fake tensors: shape, dtype and device of parameters
        self.repeated: dict[Call, Param | None] = {}  # by expression that holds the batch size: the row that it repeats
        self.dtypes: dict[Value, torch.dtype] = {}  # the dtypes of values that stand for a node of the graph
        self.op = ""  # the op and the module of the node being lowered
        self.module = ""

    # -- values

    def shape(self, value: Value) -> Shape:
        """The per-sample shape of a value."""
        n = len(self.inputs)
        return self.inputs[value.id] if value.id < n else self.steps[value.id - n].shape

    def step(self, value: Value) -> Step | None:
        """The step that defines a value; None for an input."""
        n = len(self.inputs)
        return self.steps[value.id - n] if value.id >= n else None

    def emit(self, form: Form, inputs: tuple[Value, ...], shape: Shape) -> Value:
        """Append a step and return its value.  Kernels know three axes, so if there are more, some are merged."""
        if any(len(s) > MOST_AXES for s in (shape, *map(self.shape, inputs))):
            merged = few_axes(self, form, inputs, tuple(shape))
            if merged is not None:
                form, fold = merged
                y = self.emit(form, tuple(as_shape(self, v, fold(self.shape(v))) for v in inputs), fold(tuple(shape)))
                return as_shape(self, y, shape)
        ids = tuple(v.id for v in inputs)
        self.steps.append(Step(form, ids, tuple(int(s) for s in shape), self.op, self.module))
        return Value(len(self.inputs) + len(self.steps) - 1)

    # -- parameters

    def param_shape(self, param: Param) -> Shape:
        return tuple(int(s) for s in self.param_meta[param].shape)

    def note_meta(self, param: Param, shape: Shape, dtype: torch.dtype) -> Param:
        """The derived tensor ``param``, after noting its shape and dtype."""
        self.param_meta[param] = torch.empty(shape, dtype=dtype, device="meta")
        return param

    def derive(self, op: str, *args: Any, index: int | None = None, **kwargs: Any) -> Param:
        """A tensor computed from parameters alone, evaluated at every bind; equal calls share one name."""
        return self.derive_call(Call(op, args, tuple(sorted(kwargs.items())), index))

    def derive_call(self, call: Call, meta: torch.Tensor | None = None) -> Param:
        """`derive` for a whole call; ``meta`` is its fake result, if the caller has it."""
        name = f"{self.module or 'model'}#{len(self.derived_by_call)}"  # no attribute's name contains '#'
        param = self.derived_by_call.setdefault(call, Param(name))
        if meta is not None:
            self.param_meta[param] = meta
        return param

    # -- the result

    def program(self, output: Value) -> Program:
        """The finished Program, without the steps and derived tensors that its output does not need."""
        everything = Program(self.inputs, tuple(self.steps), output.id)
        program = up_to(everything, output.id)
        return replace(program, derived=self._used_derived(program.steps))

    def _used_derived(self, steps: tuple[Step, ...]) -> tuple[Derived, ...]:
        by_name = {param: call for call, param in self.derived_by_call.items()}
        wanted: set[Param] = set()
        stack = [param for step in steps for param in form_params(step.form)]
        while stack:
            param = stack.pop()
            if param in by_name and param not in wanted:
                wanted.add(param)
                stack.extend(params_in(by_name[param]))
        return tuple(Derived(p.name, call) for call, p in self.derived_by_call.items() if p in wanted)


# ---------------------------------------------------------------------------------------------------------------
# Values of more axes than kernels take


def few_axes(
    b: ProgramBuilder, form: Form, inputs: tuple[Value, ...], shape: Shape
) -> tuple[Form, Callable[[Shape], Shape]] | None:
    """The form for values with some axes merged, and how to merge them; None if the step cannot be changed.

    An elementwise step whose inputs come from steps that stay as they are, such as three-dimensional convolutions,
    stays as well: kernels for it alone would be no faster than ATen.
    """
    last = len(shape) - 1
    beside = any(has_few_axes(b, v) for v in inputs)
    match form:
        case Product(function="matmul") | Contract(map=Dense()):
            return form, merge_leading_axes
        case LowRank(axis=axis):
            if axis >= last - 1:
                return replace(form, axis=axis - last + 2), merge_leading_axes
            return replace(form, axis=1), partial(merge_axes_around, axis=axis)
        case Scale() | Sum() | Product() if beside and all(b.shape(v) == shape for v in inputs):
            return form, merge_leading_axes
        case Contract(map=Channels(axis)) if beside and axis == last:
            return replace(form, map=Channels(2)), merge_leading_axes
        case Contract(map=Channels(0)) if beside:
            return form, lambda s: (s[0], math.prod(s[1:-1]), s[-1])
    return None


def has_few_axes(b: ProgramBuilder, value: Value) -> bool:
    """Whether a value of many axes is a view of a value of few axes."""
    step = b.step(value)
    return step is not None and isinstance(step.form, View) and len(b.shape(Value(step.inputs[0]))) <= MOST_AXES


def merge_leading_axes(shape: Shape) -> Shape:
    """The shape with all axes but the last two merged."""
    return (math.prod(shape[:-2]), *shape[-2:])


def merge_axes_around(shape: Shape, axis: int) -> Shape:
    """The shape with the axes before ``axis`` merged, and those after it."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


# ---------------------------------------------------------------------------------------------------------------
# Helpers that several families share


def need_value(x: Any, what: str = "its input") -> Value:
    if not isinstance(x, Value):
        raise NoForm(f"{what} does not depend on the samples alone")
    return x


def number_of(x: Any, what: str = "its argument") -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise NoForm(f"{what} is not a number")
    return float(x)


def tuple_of(x: Any, n: int) -> Shape:
    """``n`` ints from an int, or from a sequence of 1 or ``n`` ints."""
    items = (x,) if isinstance(x, int) else tuple(x)
    return items * n if len(items) == 1 else items


def sample_axis(dim: int, rank: int) -> int:
    """The per-sample axis of a live tensor's axis; ``rank`` counts per-sample axes.  The batch axis has none."""
    axis = dim % (rank + 1) - 1
    if axis < 0:
        raise MixesSamples("works along the batch axis")
    return axis


class MixesSamples(Exception):
    """The op works across samples."""


def number_as_shape(b: ProgramBuilder, x: Value | Complex, shape: Shape) -> Value | Complex:
    """`as_shape` of a value, or of both parts of a complex one."""
    if isinstance(x, Complex):
        return Complex(as_shape(b, x.real, shape), as_shape(b, x.imag, shape))
    return as_shape(b, x, shape)


def as_shape(b: ProgramBuilder, value: Value, shape: Shape) -> Value:
    """The value under another shape of equal size; nothing is emitted if it, or the value it views, has that shape."""
    if b.shape(value) == tuple(shape):
        return value
    step = b.step(value)
    if step is not None and isinstance(step.form, View):
        return as_shape(b, Value(step.inputs[0]), shape)
    assert math.prod(b.shape(value)) == math.prod(shape)
    return b.emit(View(), (value,), shape)
