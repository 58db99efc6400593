"""The dtypes, functions and limits of the compiled kernels, and the reason why a step has no kernel.

A value has channels and at most two spatial axes, so there are no 3-D kernels: steps on values with more axes run on
ATen, with all seeds at once.  `gradkern.explain` shows them.  3-D kernels would start at `geometry` and `Windows2d` in
:mod:`gradkern.codegen.units`.
"""

from __future__ import annotations

import math

import torch

from ..ir import program as ir
from ..ir.functions import RECTIFYING
from .limits import MAX_TAPS
from .units import geometry

NATIVE_DTYPES = (torch.float32, torch.float64)
CAST_DTYPES = (torch.float16, torch.bfloat16)  # on a GPU: cast to float32 on the way in, and back on the way out
#: Elementwise functions that csrc/elementwise.h knows, with the number of parameters each takes there.
NATIVE_FUNCTIONS = {
    "relu": 0, "leaky_relu": 1, "elu": 3, "tanh": 0, "sigmoid": 0, "affine": 2, "gelu": 0, "gelu_tanh": 0, "silu": 0,
    "mish": 0, "softplus": 2, "hardtanh": 2, "clamp": 2, "hardswish": 0, "hardsigmoid": 0, "square": 0, "power": 1,
    "negative_part": 0, "exp": 0, "expm1": 0, "log": 0, "log1p": 0, "sqrt": 0, "rsqrt": 0, "reciprocal": 0, "abs": 0,
    "erf": 0, "sin": 0, "cos": 0,
}  # fmt: skip
#: The ReLU and the two ReLUs of attribution rules, which are patterns of bits.
RELUS = frozenset({"relu"}) | RECTIFYING


def unsupported_reason(program: ir.Program, step: ir.Step) -> str | None:
    """Why no kernel can run this step; None if one can."""
    shapes = [program.shape(v) for v in step.inputs] + [step.shape]
    extents = [geometry(s) for s in shapes]
    if None in extents:
        return f"values of more than {ir.MOST_AXES} axes per sample have no kernel yet"
    if any(math.prod(s) == 0 for s in shapes):
        return "empty values have no kernel"
    if any(extent and extent[0] > ir.MAX_CHANNELS for extent in extents):
        return f"more than {ir.MAX_CHANNELS} channels"
    match step.form.of if isinstance(step.form, ir.Given) and step.form.of else step.form:
        case ir.Contract(map=ir.Windows() as w) if len(w.kernel) != len(shapes[0]) - 1:
            return "convolution over other than the trailing axes"
        case ir.Contract(map=ir.Positions(axes)) if len(axes) != len(shapes[0]) - 1:
            return "pooling over other than the trailing axes"
        case ir.Contract(map=ir.Channels(axis)) if axis not in (0, len(shapes[0]) - 1):
            return "factors along a middle axis have no kernel"
        case ir.Contract() | ir.Sum() | ir.View() | ir.Index() | ir.Given() | ir.Product() | ir.LowRank():
            return None
        case ir.Select(ties="split"):
            return "a maximum whose ties share has no kernel yet"
        case ir.Select(windows=w):
            if len(w.kernel) != len(shapes[0]) - 1:
                return "pooling over other than the trailing axes"
            return None if w.taps <= MAX_TAPS else f"max pool windows of more than {MAX_TAPS} taps"
        case ir.Scale(function=f) if f in RELUS:
            return None
        case ir.Scale(function=f, params=p):
            if f not in NATIVE_FUNCTIONS:
                return f"the function {f} has no kernel yet"
            return None if len(p) == NATIVE_FUNCTIONS[f] else f"{f} with {len(p)} parameters has no kernel"
    return "no kernel knows this form"
