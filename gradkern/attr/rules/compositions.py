"""Operations composed of others that have their own rule on the tape (`tape.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ir.calls import bind_arguments
from .tape import InputAndReference, NoRule, Tape, elementwise, handles, is_pair, packet, quadratic


def axes(dim: Any, rank: int) -> list[int]:
    """The axes that an argument names, not negative; all if it names none."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return sorted(d % max(rank, 1) for d in dims)


# ---------------------------------------------------------------------------------------------------------------
# Sums of exponentials


def movement(p: InputAndReference) -> Tensor:
    """The change of a value, 0 between equal infinities."""
    return torch.where(p.x == p.r, 0.0, p.x - p.r)


def log_sum(p: InputAndReference, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``logsumexp`` at input and reference (axes kept), its change, and its multipliers.

    The multipliers compose the exponentials' secants, a sum and the logarithm's secant.  The secants are those of
    ``exp(z - s)``, with one shift ``s`` for input and reference, which cancels out.
    """
    ends = [torch.logsumexp(z, dims, keepdim=True) for z in (p.x, p.r)]
    shift = torch.maximum(p.x, p.r).amax(dims, keepdim=True)
    shift = torch.where(shift.isfinite(), shift, 0.0)
    exps = [(z - shift).exp() for z in (p.x, p.r)]
    moved = movement(p)
    secants = torch.where(moved.abs() < eps, exps[0], (exps[0] - exps[1]) / moved)
    grown = (exps[0] - exps[1]).sum(dims, keepdim=True)
    total, total_ref = (e.sum(dims, keepdim=True) for e in exps)
    near = grown.abs() < total_ref / 2  # where the difference of the two logarithms would lose digits
    change = torch.where(near, torch.log1p(grown / total_ref), ends[0] - ends[1])
    outer = torch.where(grown.abs() < eps, 1 / total, change / grown)
    return ends[0], ends[1], change, secants * outer


def drop_axes(y: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return y if keepdim else y.squeeze(tuple(dims))


@handles("logsumexp")
def logsumexp(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    a = bind_arguments(op, args, kwargs)
    p, dims = a["self"], axes(a["dim"], a["self"].x.dim())
    y, y_ref, _, m = log_sum(p, dims, tape.eps)

    def change(t: Tensor) -> Tensor:
        return (m * t).sum(dims, keepdim=a["keepdim"])

    return tape.record(change, [p], drop_axes(y, dims, a["keepdim"]), drop_axes(y_ref, dims, a["keepdim"]))


@handles("log_softmax", "_log_softmax")
def log_softmax(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    """``z - logsumexp(z)``."""
    a = bind_arguments(op, args, kwargs)
    return log_softmax_along(tape, cast(tape, a["self"], a.get("dtype")), a["dim"])


def log_softmax_along(tape: Tape, p: InputAndReference, dim: int) -> InputAndReference:
    wide, without_mean = without_means(p, dim)
    m = log_sum(wide, [dim], tape.eps)[3]

    def change(t: Tensor) -> Tensor:
        z = without_mean(t.double())
        return (z - (m * z).sum(dim, keepdim=True)).to(t.dtype)

    return tape.record(change, [p], torch.log_softmax(p.x, dim), torch.log_softmax(p.r, dim))


def without_means(p: InputAndReference, dim: int) -> tuple[InputAndReference, Callable[[Tensor], Tensor]]:
    """Logits in float64 less their mean, and the map that takes the mean off a change (DeepLIFT, section 3.6).

    A softmax does not change if all its logits move together.  Where they are large, such a movement would otherwise
    become large contributions that cancel.  The mean is that of the logits whose exponentials do not vanish: with a
    mask of -1e30 in it, it would round the others away.
    """
    x, r = p.x.double(), p.r.double()
    alive = [(z - z.amax(dim, keepdim=True)).exp() > 0 for z in (x, r)]
    kept = alive[0] & alive[1]
    count = kept.sum(dim, keepdim=True).clamp(min=1)

    def without(z: Tensor) -> Tensor:
        return z - torch.where(kept, z, 0.0).sum(dim, keepdim=True) / count

    return InputAndReference(without(x), without(r), p.slot), without


@handles("softmax", "_softmax", "_safe_softmax")
def softmax(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    """``exp(z - logsumexp(z))``."""
    a = bind_arguments(op, args, kwargs)
    return softmax_along(tape, cast(tape, a["self"], a.get("dtype")), a["dim"])


def softmax_along(tape: Tape, p: InputAndReference, dim: int) -> InputAndReference:
    wide, without_mean = without_means(p, dim)
    y, y_ref = torch.softmax(wide.x, dim), torch.softmax(wide.r, dim)
    _, _, grown, m = log_sum(wide, [dim], tape.eps)
    moved = movement(wide) - grown
    secant = torch.where(moved.abs() < 1, y_ref * torch.expm1(moved) / moved, (y - y_ref) / moved)
    secant = torch.where(moved.abs() < tape.eps, y, secant)

    def change(t: Tensor) -> Tensor:
        z = without_mean(t.double())
        return (secant * (z - (m * z).sum(dim, keepdim=True))).to(t.dtype)

    return tape.record(change, [p], y.to(p.x.dtype), y_ref.to(p.r.dtype))


def cast(tape: Tape, p: InputAndReference, dtype: torch.dtype | None) -> InputAndReference:
    return p if dtype in (None, p.x.dtype) else tape("_to_copy.default", p, dtype=dtype)


@handles("logcumsumexp")
def logcumsumexp(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    p, dim = args
    shift = torch.maximum(p.x, p.r).amax(dim, keepdim=True)
    total = tape("cumsum.default", tape("exp.default", tape("sub.Tensor", p, shift)), dim)
    return tape("add.Tensor", tape("log.default", total), shift)


# ---------------------------------------------------------------------------------------------------------------
# Means, variances, norms


def subtract_mean(tape: Tape, p: InputAndReference, dims: list[int]) -> tuple[InputAndReference, InputAndReference]:
    """The mean, with its axes kept, and the deviations from it."""
    mean = tape("mean.dim", p, dims, True)
    return mean, tape("sub.Tensor", p, mean)


def variance(tape: Tape, deviations: InputAndReference, dims: list[int], correction: float) -> InputAndReference:
    count = math.prod(deviations.shape[d] for d in dims)
    total = tape("sum.dim_IntList", tape("square.default", deviations), dims, True)
    return tape("div.Scalar", total, max(count - correction, 0.0))


@handles("var", "std", "var_mean", "std_mean")
def moments(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    a, name = bind_arguments(op, args, kwargs), packet(op)
    p = a["self"]
    dims, keep = axes(a.get("dim"), p.x.dim()), bool(a.get("keepdim", False))
    given = a.get("correction", 1.0 if a.get("unbiased", True) else 0.0)
    mean, deviations = subtract_mean(tape, p, dims)
    y = variance(tape, deviations, dims, 1.0 if given is None else given)
    if name.startswith("std"):
        y = tape("sqrt.default", y)
    if not keep:
        y, mean = (tape("squeeze.dims", z, dims) for z in (y, mean))
    return (y, mean) if name.endswith("mean") else y


def normalize(
    tape: Tape, p: InputAndReference, dims: list[int], eps: float
) -> tuple[InputAndReference, InputAndReference, InputAndReference]:
    """Deviations divided by the root of their mean square, that mean square, and the inverse of the root."""
    mean, deviations = subtract_mean(tape, p, dims)
    inverse = tape("rsqrt.default", tape("add.Scalar", variance(tape, deviations, dims, 0.0), eps))
    return tape("mul.Tensor", deviations, inverse), mean, inverse


@handles("layer_norm", "native_layer_norm")
def layer_norm(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    a = bind_arguments(op, args, kwargs)
    p = a["input"]
    dims = list(range(p.x.dim() - len(a["normalized_shape"]), p.x.dim()))
    y, mean, inverse = normalize(tape, p, dims, a["eps"])
    if a["weight"] is not None:
        y = tape("mul.Tensor", y, a["weight"])
    if a["bias"] is not None:
        y = tape("add.Tensor", y, a["bias"])
    return (y, mean, inverse) if packet(op).startswith("native") else y


@handles("rms_norm", "_fused_rms_norm")
def rms_norm(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    """Numbers divided by the root of their mean square."""
    a = bind_arguments(op, args, kwargs)
    p = a["input"]
    dims = list(range(p.x.dim() - len(a["normalized_shape"]), p.x.dim()))
    eps = torch.finfo(p.x.dtype).eps if a["eps"] is None else a["eps"]
    inverse = tape("rsqrt.default", tape("add.Scalar", variance(tape, p, dims, 0.0), eps))
    y = tape("mul.Tensor", p, inverse)
    if a["weight"] is not None:
        y = tape("mul.Tensor", y, a["weight"])
    return (y, inverse) if packet(op).startswith("_fused") else y


@handles("group_norm", "native_group_norm", "instance_norm")
def group_norm(tape: Tape, op: Any, args: Any, kwargs: Any) -> Any:
    a, name = bind_arguments(op, args, kwargs), packet(op)
    p, shape = a["input"], list(a["input"].shape)
    if name == "instance_norm" and not a["use_input_stats"]:
        raise NoRule(str(op))
    groups = shape[1] if name == "instance_norm" else a["num_groups"] if name == "group_norm" else a["group"]
    rows = tape("view.default", tape("clone.default", p), [shape[0], groups, -1])
    y, mean, inverse = normalize(tape, rows, [2], a["eps"])
    y = tape("view.default", y, shape)
    per_channel = [1, -1, *(1,) * (len(shape) - 2)]
    for key, join in (("weight", "mul.Tensor"), ("bias", "add.Tensor")):
        if a[key] is not None:
            y = tape(join, y, a[key].reshape(per_channel))
    return (y, mean, inverse) if name.startswith("native") else y


@handles("linalg_vector_norm", "norm")
def vector_norm(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    """``(Σ |x|^p)^(1/p)``, or the largest ``|x|``."""
    a = bind_arguments(op, args, kwargs)
    x, order = a["self"], a.get("ord", a.get("p", 2))
    order = 2.0 if order is None else float(order)
    dims, keep = axes(a.get("dim"), x.x.dim()), bool(a.get("keepdim", False))
    x = cast(tape, x, a.get("dtype"))
    if order in (0.0, -math.inf):
        raise NoRule(str(op))
    if order == 2.0:
        return tape("sqrt.default", tape("sum.dim_IntList", tape("square.default", x), dims, keep))
    size = tape("abs.default", x)
    if order == math.inf:
        return tape("amax.default", size, dims, keep)
    if order == 1.0:
        return tape("sum.dim_IntList", size, dims, keep)
    total = tape("sum.dim_IntList", tape("pow.Tensor_Scalar", size, order), dims, keep)
    return tape("pow.Tensor_Scalar", total, 1 / order)


@handles("_cdist_forward", "cdist", "_euclidean_dist")
def cdist(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    a = bind_arguments(op, args, kwargs)
    one, two = tape("unsqueeze.default", a["x1"], -2), tape("unsqueeze.default", a["x2"], -3)
    return tape("linalg_vector_norm.default", tape("sub.Tensor", one, two), a.get("p", 2.0), [-1])


# ---------------------------------------------------------------------------------------------------------------
# Products and powers


@handles("div", "divide", "true_divide")
def div(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    """``a · (1 / b)``."""
    if kwargs.get("rounding_mode") is not None:
        return elementwise(tape, op, args, kwargs)
    if not is_pair(args[1]):
        return quadratic(tape, op, args, kwargs)
    inverse = tape("reciprocal.default", args[1])
    return (
        tape("mul.Tensor", inverse, args[0])
        if isinstance(args[0], (InputAndReference, Tensor))
        else tape("mul.Scalar", inverse, args[0])
    )


@handles("addcdiv")
def addcdiv(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    ratio = tape("div.Tensor", args[1], args[2])
    return tape("add.Tensor", args[0], ratio, alpha=kwargs.get("value", 1))


@handles("pow")
def power(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    if isinstance(args[1], (int, float)) and args[1] == 2:
        return tape("square.default", args[0])
    return elementwise(tape, op, args, kwargs)


@handles("prod")
def prod(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    a = bind_arguments(op, args, kwargs)
    p = a["self"]
    if a.get("dim") is None:
        p, dim, keep = tape("reshape.default", p, [-1]), 0, False
    else:
        dim, keep = a["dim"], a["keepdim"]
    y = running_products(tape, p, dim)[-1]
    return tape("unsqueeze.default", y, dim) if keep else y


@handles("cumprod")
def cumprod(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    return tape("stack.default", running_products(tape, args[0], args[1]), args[1])


def running_products(tape: Tape, p: InputAndReference, dim: int) -> list[InputAndReference]:
    first, *rest = tape("unbind.int", p, dim)
    products = [first]
    for factor in rest:
        products.append(tape("mul.Tensor", products[-1], factor))
    return products


@handles("bilinear")
def bilinear(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    """``y_o = Σ_ij w_oij a_i b_j + bias_o``."""
    a = bind_arguments(op, args, kwargs)
    weight, bias = a["weight"], a["bias"]
    if is_pair(weight):
        raise NoRule(f"{op} with a weight that changes")
    outputs, rows, columns = weight.shape
    flat = weight.transpose(1, 2).reshape(outputs * columns, rows)
    once = tape("unflatten.int", tape("linear.default", a["input1"], flat), -1, [outputs, columns])
    y = tape("sum.dim_IntList", tape("mul.Tensor", once, tape("unsqueeze.default", a["input2"], -2)), [-1])
    return y if bias is None else tape("add.Tensor", y, bias)


@handles("scaled_dot_product_attention")
def attention(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    """``softmax(q kᵀ scale + mask) v``."""
    a = bind_arguments(op, args, kwargs)
    if a["dropout_p"] or (a["enable_gqa"] and a["query"].shape[-3] != a["key"].shape[-3]):
        raise NoRule(str(op))
    q, k = a["query"], a["key"]
    scale = 1 / math.sqrt(q.shape[-1]) if a["scale"] is None else a["scale"]
    scores = tape("mul.Scalar", tape("matmul.default", q, tape("transpose.int", k, -2, -1)), scale)
    mask = a["attn_mask"]
    if a["is_causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.x.device).tril()
    if mask is not None:
        values = mask.x if is_pair(mask) else mask
        if values.dtype != torch.bool:
            scores = tape("add.Tensor", scores, mask)
        elif is_pair(mask) and not torch.equal(mask.x, mask.r):
            raise NoRule(f"{op} with a mask that changes")
        else:
            scores = tape("masked_fill.Scalar", scores, ~values, -math.inf)
    return tape("matmul.default", softmax_along(tape, scores, -1), a["value"])


@handles("rrelu", "rrelu_with_noise", "rrelu_with_noise_functional")
def rrelu(tape: Tape, op: Any, args: Any, kwargs: Any) -> InputAndReference:
    a = bind_arguments(op, args, kwargs)
    if a["training"]:
        raise NoRule(f"{op} in training mode")
    return tape("leaky_relu.default", a["self"], (a["lower"] + a["upper"]) / 2)


@handles("detach")
def detach(tape: Tape, op: Any, args: Any, kwargs: Any) -> Tensor:
    """A constant, which has its value at the input also at the reference."""
    tape.took_detached_as_constant = True
    p: InputAndReference = args[0]
    return p.x.detach()
