"""DeepLift of any ATen call: its operations on a value and its reference, each with a complete rule.

A pair, `InputAndReference`, is a value at the input and at the reference.  A `Tape` runs operations on pairs, and
remembers for each the map that carries small changes through it, as a function of tensors; torch transposes that map.
There are few kinds:

* at most quadratic (linear, or a product of two values): the derivative half way, which is exact;
* elementwise: the secant; with several arguments that change, the mean over the orders in which they change (Shapley),
  which is the product rule for a product;
* a maximum: the change goes to the places of the input's and of the reference's maximum;
* a composition of these (`compositions.py`), or what torch decomposes the operation into.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ...ir.calls import operator_of
from ...util.options import debugging

Map = Callable[..., Any]  # changes of the arguments that change -> the change of the result


class NoRule(Exception):
    """An operation has no complete rule; the message is its name."""


@dataclass(frozen=True, eq=False)
class InputAndReference:
    """A tensor at the input and at the reference, of equal shapes, and its place on the tape."""

    x: Tensor
    r: Tensor
    slot: int

    @property
    def shape(self) -> torch.Size:
        return self.x.shape


class Tape:
    """Runs operations on pairs, and records for each the map from the changes of its arguments to those of its results.

    ``dtype``: that of the changes (values may be integers or booleans).  ``eps``: a smaller change counts as none.
    """

    def __init__(self, dtype: torch.dtype, eps: float) -> None:
        self.dtype, self.eps, self.slots = dtype, eps, 0
        self.took_detached_as_constant = False
        self.maps: list[tuple[Map, tuple[int, ...], tuple[int, ...]]] = []
        self._inside: list[str] = []  # the operations that are being decomposed

    def pair(self, x: Tensor, r: Tensor) -> InputAndReference:
        self.slots += 1
        return InputAndReference(x, r, self.slots - 1)

    def numbers(self, x: Tensor) -> Tensor:
        """A value as floating numbers."""
        return x if x.is_floating_point() or x.is_complex() else x.to(self.dtype)

    def record(self, function: Map, moving: Sequence[InputAndReference], x: Any, r: Any) -> Any:
        """The pairs of an operation's results, with the map from the changes of ``moving`` to theirs."""
        results = pytree.tree_map(self.pair, x, r)
        slots = tuple(p.slot for p in pytree.tree_leaves(results, is_leaf=lambda p: isinstance(p, InputAndReference)))
        self.maps.append((function, tuple(p.slot for p in moving), slots))
        return results

    def pull_back(self, first: Sequence[InputAndReference], last: InputAndReference, g: Tensor) -> list[Tensor]:
        """Pull the cotangent ``g [N, S, *out]`` of ``last`` back to ``first``: one ``[N, S, *in]`` each."""
        with torch.inference_mode(False), torch.enable_grad():
            changes = [torch.zeros_like(p.x, dtype=self.dtype, requires_grad=True) for p in first]
            change_of = {p.slot: t for p, t in zip(first, changes, strict=True)}
            for function, sources, slots in self.maps:
                results = function(*(change_of[s] for s in sources))
                change_of.update(zip(slots, pytree.tree_leaves(results), strict=True))
            change = change_of[last.slot]
            if not change.requires_grad:
                return [g.new_zeros(*g.shape[:2], *t.shape[1:]) for t in changes]
            seeds = g.clone().to(change.dtype).unbind(1)
            back = [torch.autograd.grad(change, changes, s, retain_graph=True, materialize_grads=True) for s in seeds]
        return (
            [torch.stack(parts, 1) for parts in zip(*back, strict=True)]
            if back
            else [g.new_zeros(*g.shape[:2], *t.shape[1:]) for t in changes]
        )

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an ATen operation (an overload, or its name without ``aten.``) on pairs, tensors and plain values."""
        if isinstance(op, str):
            return self(operator_of(f"aten.{op}"), *args, **kwargs)
        moving = pairs_in((args, kwargs))
        if not moving:
            return op(*args, **kwargs)
        name = packet(op)
        rule = RULES.get(name)
        if rule is not None:
            return rule(self, op, args, kwargs)
        if op._schema.is_mutable:
            raise NoRule(f"{op}, which works in place")
        if torch.Tag.pointwise in op.tags:
            return elementwise(self, op, args, kwargs)
        return run_decomposition(self, op, args, kwargs)


OperationRule = Callable[[Tape, Any, tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[str, OperationRule] = {}  # by the operation's name without overload


def handles(*names: str) -> Callable[[OperationRule], OperationRule]:
    """Register a rule for operations by their names, such as ``"softmax"``."""

    def register(rule: OperationRule) -> OperationRule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def packet(op: Any) -> str:
    """The name of an operation without its overload: ``"relu"`` for ``aten.relu.default`` and for its in-place form."""
    return str(op._schema.name).partition("::")[2]


def is_pair(x: Any) -> bool:
    return isinstance(x, InputAndReference)


def pairs_in(tree: Any) -> list[InputAndReference]:
    return [x for x in pytree.tree_leaves(tree, is_leaf=is_pair) if is_pair(x)]


def replace_pairs(tree: Any, values: Sequence[Any]) -> Any:
    """The arguments with ``values`` in the places of the pairs, in order."""
    rest = iter(values)
    return pytree.tree_map(lambda x: next(rest) if is_pair(x) else x, tree, is_leaf=is_pair)


def as_function(op: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
    """The operation as a function of its arguments that change."""

    def function(*values: Any) -> Any:
        full_args, full_kwargs = replace_pairs((args, kwargs), values)
        return op(*full_args, **full_kwargs)

    return function


# ---------------------------------------------------------------------------------------------------------------
# At most quadratic


LINEAR = (
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t"),
    *("movedim", "expand", "expand_as", "clone", "alias", "contiguous", "lift_fresh_copy", "view_as", "numpy_T"),
    *(
        "slice",
        "select",
        "narrow",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "cat",
        "stack",
        "unfold",
        "diagonal",
    ),
    *("flip", "roll", "rot90", "repeat", "repeat_interleave", "tile", "tril", "triu", "index_select", "index", "take"),
    *(
        "gather",
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
        "as_strided",
        "as_strided_copy",
        "pixel_shuffle",
    ),
    *("pixel_unshuffle", "channel_shuffle", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "masked_select"),
    *("reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "pad", "im2col", "col2im"),
    *("sum", "mean", "cumsum", "trace", "neg", "add", "sub", "rsub", "avg_pool1d", "avg_pool2d", "avg_pool3d", "trapz"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "dropout", "diff"),
    *("_adaptive_avg_pool3d", "feature_dropout", "alpha_dropout", "upsample_nearest1d", "upsample_nearest2d"),
    *("upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa"),
    *("scatter_add", "index_add", "embedding", "diag_embed", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"),
    *("to", "_to_copy", "type_as", "detach_copy", "squeeze_copy", "view_copy", "fold", "scatter"),
    *("_fft_r2c", "_fft_c2r", "_fft_c2c", "view_as_real", "view_as_complex", "real", "imag", "sum_to_size"),
)
BILINEAR = (
    *("mm", "bmm", "mv", "dot", "matmul", "linear", "addmm", "addmv", "baddbmm", "addbmm", "outer", "ger", "vdot"),
    *("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "inner"),
    *("_convolution", "kron", "mul", "multiply", "lerp", "square", "addcmul"),
)
CASTS = ("to", "_to_copy", "type_as")
#: By linear operation: the arguments in which it is not linear.
FIXED = {
    **dict.fromkeys(("index", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "masked_select", "take"), (1,)),
    **dict.fromkeys(("index_select", "gather", "scatter", "scatter_add", "index_add"), (2,)),
    "embedding": (1,),
}


@handles(*LINEAR, *BILINEAR)
def quadratic(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    """Linear, or bilinear: the derivative half way between input and reference is exact."""
    name = packet(op)
    if any(pairs_in(a) for k, a in enumerate(args) if k in FIXED.get(name, ())):
        raise NoRule(str(op))
    moving, function = pairs_in((args, kwargs)), as_function(op, args, kwargs)
    x, r = function(*(p.x for p in moving)), function(*(p.r for p in moving))
    if name in CASTS and not x.is_floating_point():
        return elementwise(tape, op, args, kwargs)
    middle = [(tape.numbers(p.x) + tape.numbers(p.r)) / 2 for p in moving]
    finite = all(bool(y.isfinite().all()) for y in pytree.tree_leaves((x, r)))

    def from_zero(y: Tensor) -> Tensor:  # only the derivative is needed
        return y - y.detach() if finite else torch.where(y.isfinite(), y - y.detach(), 0.0)

    def change(*changes: Tensor) -> Any:
        return pytree.tree_map(from_zero, function(*(m + t for m, t in zip(middle, changes, strict=True))))

    return tape.record(change, moving, x, r)


@handles("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
def constant(tape: Tape, op: Any, args: Any, kwargs: Any) -> Tensor:
    """A tensor that depends on the shape alone."""
    moving = pairs_in((args, kwargs))
    result: Tensor = as_function(op, args, kwargs)(*(p.x for p in moving))
    return result


# ---------------------------------------------------------------------------------------------------------------
# Elementwise


def secant_by_formula(name: str, y: Tensor, y_ref: Tensor) -> Tensor | None:
    """The secant without a difference of nearly equal numbers, for functions that have such a formula."""
    if name == "reciprocal":
        return -y * y_ref
    if name == "sqrt":
        return 1 / (y + y_ref)
    return -((y * y_ref) ** 2) / (y + y_ref) if name == "rsqrt" else None


MOST_CHANGING = 3  # arguments of an operation; the work is exponential in their number


def elementwise(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    """The secant.  If several arguments change, it is the mean over the orders in which they may change."""
    moving, function = pairs_in((args, kwargs)), as_function(op, args, kwargs)
    if len(moving) > MOST_CHANGING:
        raise NoRule(str(op))
    x, r = function(*(p.x for p in moving)), function(*(p.r for p in moving))
    if not isinstance(x, Tensor) or any(z.is_complex() for z in (x, *(p.x for p in moving))):
        raise NoRule(str(op))
    slopes = [shapley_slope(tape, packet(op), function, moving, k) for k in range(len(moving))]

    def change(*changes: Tensor) -> Tensor:
        parts = [s * t for s, t in zip(slopes, changes, strict=True)]
        return sum(parts[1:], start=parts[0])

    return tape.record(change, moving, x, r)


def shapley_slope(
    tape: Tape, name: str, function: Callable[..., Tensor], moving: Sequence[InputAndReference], k: int
) -> Tensor:
    """The k-th argument's share of the result's change, divided by its own change.

    It is a mean over the cases in which each other argument is at the input or at the reference.
    """
    others = [j for j in range(len(moving)) if j != k]
    total: Tensor | None = None
    for size in range(len(others) + 1):
        weight = math.factorial(size) * math.factorial(len(others) - size) / math.factorial(len(moving))
        for at_input in itertools.combinations(others, size):
            context = [p.x if j in at_input else p.r for j, p in enumerate(moving)]
            part = weight * context_slope(tape, name, function, moving[k], context, k)
            total = part if total is None else total + part
    assert total is not None
    return total


def context_slope(
    tape: Tape, name: str, function: Callable[..., Tensor], p: InputAndReference, context: list[Tensor], k: int
) -> Tensor:
    """The secant in one argument, or the derivative at the input where the argument does not change."""

    def at(value: Tensor) -> Tensor:
        return function(*context[:k], value, *context[k + 1 :])

    y, y_ref = tape.numbers(at(p.x)), tape.numbers(at(p.r))
    if len(context) == 1 and (formula := secant_by_formula(name, y, y_ref)) is not None:
        return formula
    moved = (tape.numbers(p.x) - tape.numbers(p.r)).expand_as(y)
    still = (moved.abs() < tape.eps) | (p.x == p.r)  # also equal infinities
    secant = torch.where(y == y_ref, 0.0, y - y_ref) / moved
    return torch.where(still, derivative_of(at, p.x, y), secant) if bool(still.any()) else secant


def derivative_of(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The derivative of an elementwise function, in the shape of its value; 0 if it has none."""
    if not x.is_floating_point():
        return torch.zeros_like(y)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().expand_as(y).clone().requires_grad_()
        value = function(leaf)
        if not value.requires_grad:
            return torch.zeros_like(y)
        return torch.autograd.grad(value.sum(), leaf)[0]


# ---------------------------------------------------------------------------------------------------------------
# What torch decomposes


def run_decomposition(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    """The operations that torch decomposes one into, if any."""
    name = str(op)
    if name in tape._inside or len(tape._inside) > 8:
        raise NoRule(tape._inside[0] if tape._inside else name)
    moving = pairs_in((args, kwargs))
    with torch.inference_mode(False), torch.no_grad():
        graph = _trace(as_function(op, args, kwargs), [p.x for p in moving])
    if graph is None:
        raise NoRule(name)
    tape._inside.append(name)
    try:
        return run_graph(tape, graph, moving)
    finally:
        tape._inside.pop()


def _trace(function: Callable[..., Any], values: Sequence[Tensor]) -> Any:
    table = {op: f for op, f in core_aten_decompositions().items() if packet(op) not in RULES}
    try:
        return make_fx(torch.func.functionalize(function), decomposition_table=table)(*values)
    except Exception:  # torch may raise anything where it cannot trace
        if debugging():
            raise
        return None


def _out_of_place(node: torch.fx.Node) -> Any:
    """The operation of a node; for an in-place one, that which returns the result, if no other name sees it."""
    op: Any = node.target
    if not op._schema.is_mutable:
        return op
    first = node.args[0]
    assert isinstance(first, torch.fx.Node)
    views = [n for n in (first, *first.users) if n.op == "call_function" and _is_view(n.target)]
    plain = getattr(getattr(torch.ops.aten, packet(op).removesuffix("_"), None), op._overloadname, None)
    if plain is None or plain is op or views or first.op != "call_function":
        raise NoRule(f"{op}, which works in place")
    return plain


def _is_view(op: Any) -> bool:
    schema = getattr(op, "_schema", None)
    return schema is None or any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)


def run_graph(tape: Tape, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """The operations of a traced graph, run on the tape."""
    results: dict[Any, Any] = {}
    rest, gradients = iter(inputs), True

    def value(tree: Any) -> Any:
        return torch.fx.node.map_arg(tree, lambda n: results[n])

    for node in module.graph.nodes:
        if node.op == "placeholder":
            results[node] = next(rest)
        elif node.op == "get_attr":
            results[node] = getattr(module, node.target)
        elif node.op == "output":
            return value(node.args[0])
        elif node.target is torch._C._set_grad_enabled:
            gradients = bool(node.args[0])
        elif isinstance(node.target, torch._ops.OpOverload):
            arguments = value((node.args, node.kwargs))
            if not gradients and pairs_in(arguments):  # the results are constants with their values at the input
                tape.took_detached_as_constant = True
                arguments = replace_pairs(arguments, [p.x for p in pairs_in(arguments)])
            results[node] = tape(_out_of_place(node), *arguments[0], **arguments[1])
            if node.target._schema.is_mutable:
                results[node.args[0]] = results[node]
        elif getattr(node.target, "__name__", "") == "getitem":
            results[node] = value(node.args[0])[node.args[1]]
        else:
            raise NoRule(str(node.target))
    raise NoRule("a graph without output")
