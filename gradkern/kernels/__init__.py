"""The kernels on their own: the forward pass of a few layers and the backward pass of many seeds, fused in one call.

This is for people who measure or study kernels. `gradkern.jacobian` runs the same kernels on a whole network.

>>> layers = [kernels.conv2d(weight, bias, padding=1), kernels.relu(), kernels.max_pool2d(2)]
>>> chain = kernels.Chain(layers, (3, 32, 32))
>>> y, gradients = chain(x, cotangents)  # [N, *out], [N, S, 3, 32, 32]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..codegen.machine import TooLarge
from ..frontend.lowerings.builder import LOWERINGS, NoForm, ProgramBuilder
from ..frontend.to_program import named_arguments
from ..ir.calls import operator_of
from ..ir.macs import forward_macs
from ..ir.program import Call, Contract, Param, Positions, Program, Shape, Value
from ..runtime import ops
from ..runtime.call_plan import grouped_call_plan
from ..runtime.execution import run_chain
from ..runtime.parameters import KernelsUnavailable, Packed, PlanWeights, all_output_indices
from ..util.options import BadType, BadValue

__all__ = [
    "Chain", "Layer", "avg_pool1d", "avg_pool2d", "conv1d", "conv2d", "flatten", "linear", "max_pool1d", "max_pool2d",
    "relu",
]  # fmt: skip

Size = int | Sequence[int]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: an ATen op by its full name, its weights by argument, and its other arguments."""

    op: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    arguments: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, *in] -> [N, *out]`` by torch, in the dtype and on the device of ``x``."""
        given = {name: t.to(x) for name, t in self.tensors.items()}
        return operator_of(self.op)(x, **given, **dict(self.arguments))

    @property
    def name(self) -> str:
        return self.op.split(".")[1]


def _layer(op: str, weight: Tensor | None = None, bias: Tensor | None = None, **arguments: Any) -> Layer:
    tensors = {"weight": weight} if weight is not None else {}
    tensors |= {"bias": bias} if bias is not None else {}
    if wrong := next((t for t in tensors.values() if not isinstance(t, Tensor)), None):
        raise BadType(f"weight, bias: got {type(wrong).__name__}, expected tensors.")
    plain = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in arguments.items())
    return Layer(f"aten.{op}", {name: t.detach() for name, t in tensors.items()}, plain)


def linear(weight: Tensor, bias: Tensor | None = None) -> Layer:
    """``[N, *, I] -> [N, *, O]`` with weight ``[O, I]`` and bias ``[O]``, as `torch.nn.functional.linear`."""
    return _layer("linear.default", weight, bias)


def conv1d(
    weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Layer:  # fmt: skip
    """``[N, C, L] -> [N, O, L']`` with weight ``[O, C/groups, K]``, as `torch.nn.functional.conv1d`."""
    one = {"stride": (stride,), "padding": (padding,), "dilation": (dilation,)}
    return _layer("conv1d.default", weight, bias, **one, groups=groups)


def conv2d(
    weight: Tensor, bias: Tensor | None = None, *, stride: Size = 1, padding: Size = 0, dilation: Size = 1,
    groups: int = 1,
) -> Layer:  # fmt: skip
    """``[N, C, H, W] -> [N, O, H', W']`` with weight ``[O, C/groups, KH, KW]``, as `torch.nn.functional.conv2d`."""
    two = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation)}
    return _layer("conv2d.default", weight, bias, **two, groups=groups)


def relu() -> Layer:
    """``max(x, 0)``; its derivative at 0 is 0, as in torch."""
    return _layer("relu.default")


def max_pool1d(kernel_size: int, stride: int | None = None, padding: int = 0) -> Layer:
    """``[N, C, L] -> [N, C, L']``; the first of equal maxima gets the gradient, as in torch."""
    return _layer("max_pool1d.default", kernel_size=(kernel_size,), stride=(stride or kernel_size,), padding=(padding,))


def max_pool2d(kernel_size: Size, stride: Size | None = None, padding: Size = 0) -> Layer:
    """``[N, C, H, W] -> [N, C, H', W']``; the first of equal maxima gets the gradient, as in torch."""
    return _pool2d("max_pool2d.default", kernel_size, stride, padding)


def avg_pool1d(kernel_size: int, stride: int | None = None, padding: int = 0) -> Layer:
    """``[N, C, L] -> [N, C, L']``, counting the padding, as `torch.nn.functional.avg_pool1d`."""
    return _layer("avg_pool1d.default", kernel_size=(kernel_size,), stride=(stride or kernel_size,), padding=(padding,))


def avg_pool2d(kernel_size: Size, stride: Size | None = None, padding: Size = 0) -> Layer:
    """``[N, C, H, W] -> [N, C, H', W']``, counting the padding, as `torch.nn.functional.avg_pool2d`."""
    return _pool2d("avg_pool2d.default", kernel_size, stride, padding)


def flatten() -> Layer:
    """``[N, *in] -> [N, size]``; it costs nothing."""
    return _layer("flatten.using_ints", start_dim=1)


def _pool2d(op: str, kernel_size: Size, stride: Size | None, padding: Size) -> Layer:
    kernel = _pair(kernel_size)
    return _layer(op, kernel_size=kernel, stride=kernel if stride is None else _pair(stride), padding=_pair(padding))


def _pair(size: Size) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


@dataclass(frozen=True)
class _Prepared:
    packed: Packed
    targets: Tensor | None  # the targets of one-hot seeds
    rows: Tensor | None


class Chain:
    """Layers that run one after the other as one kernel call: forward, and backward for all seeds.

    ``layers``: what the functions of this module return.  ``shape``: that of one sample, without the batch.  Weights
    are packed at the first call with each number of seeds; later changes of them have no effect.

    ``output_shape``: of one sample.  ``operations``, ``bytes_moved``: what a sample needs.  `forward` runs the layers
    by torch, and can be differentiated.  ``program``: the layers as the engine sees them; ``str()`` lists it.

    Raises `BadValue` (a `ValueError`) for a layer that does not take what the one before it gives.
    """

    def __init__(self, layers: Sequence[Layer], shape: Shape, *, dtype: torch.dtype = torch.float32) -> None:
        if not layers:
            raise BadValue("layers: got none, expected at least one.")
        self.layers, self.input_shape, self.dtype = tuple(layers), tuple(shape), dtype
        self.params: dict[str, Tensor] = {}
        self.program = self._program()
        self.output_shape = self.program.output_shape
        self._prepared: dict[int | None, _Prepared] = {}

    def __str__(self) -> str:
        return str(self.program)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, *in] -> [N, *out]`` by torch, in the dtype of ``x``."""
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def operations(self) -> int:
        """Floating-point operations of a sample's forward pass, zeros included: two for every multiply-add of a linear
        layer or convolution.  The backward pass of each seed takes as many."""
        contractions = (
            i for i, s in enumerate(self.program.steps)
            if isinstance(s.form, Contract) and not isinstance(s.form.map, Positions)
        )  # fmt: skip
        return 2 * sum(forward_macs(self.program, i) for i in contractions)

    def bytes_moved(self, seeds: int) -> int:
        """Bytes of a sample that have to be read or written: input and output, cotangents and gradients."""
        sizes = [torch.Size(s).numel() for s in (self.input_shape, self.output_shape)]
        return (1 + seeds) * sum(sizes) * self.dtype.itemsize

    def __call__(
        self, x: Tensor, cotangents: Tensor | None = None, *, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs ``[N, *out]`` and gradients ``[N, S, *in]`` of samples ``x [N, *in]``.

        ``cotangents [N, S, *out]``: the seeds.  Without them, the seeds are one-hot at every output, which gives the
        Jacobian (S is the number of outputs).  ``out``: memory for the gradients.  Raises `ValueError` or `TypeError`
        for tensors of another shape or dtype, `RuntimeError` if there are no kernels for this machine.
        """
        self._check("x", x, self.input_shape, 1)
        n, seeds = x.shape[0], self.program.outputs
        if cotangents is not None:
            self._check("cotangents", cotangents, self.output_shape, 2)
            seeds = cotangents.shape[1]
            if cotangents.shape[0] != n or not seeds:
                raise BadValue(f"cotangents: got {list(cotangents.shape)}, expected a row for each of {n} samples.")
        if out is None:
            out = x.new_empty(n, seeds, *self.input_shape)
        self._check("out", out, self.input_shape, 2)
        if out.shape[:2] != (n, seeds) or not out.is_contiguous():
            raise BadValue(f"out: got {list(out.shape)}, expected contiguous {[n, seeds, *self.input_shape]}.")
        with torch.inference_mode(False), torch.no_grad():
            ready = self._ready(None if cotangents is None else seeds, seeds, x)
            given = [] if cotangents is None else [cotangents.detach().reshape(n, seeds, -1).contiguous()]
            (y,) = run_chain(ready.packed, [x.detach().contiguous()], ready.targets, ready.rows, given, [out])
        return y.view(n, *self.output_shape), out

    def _check(self, name: str, t: Tensor, shape: Shape, axes: int) -> None:
        if not isinstance(t, Tensor) or t.dtype != self.dtype or t.device.type != "cpu":
            got = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
            raise BadType(f"{name}: got {got}, expected a tensor of {self.dtype} on the CPU.")
        if t.dim() != axes + len(shape) or tuple(t.shape[axes:]) != shape:
            raise BadValue(f"{name}: got {list(t.shape)}, expected [{'N, S'[: 3 * axes - 2]}, {str(list(shape))[1:]}.")

    def _program(self) -> Program:
        """The layers as steps; shapes and arguments are checked by torch itself, on tensors without values."""
        builder, value = ProgramBuilder((self.input_shape,)), Value(0)
        meta = torch.empty(2, *self.input_shape, device="meta", dtype=self.dtype)
        for i, layer in enumerate(self.layers):
            names = {name: Param(f"{i}.{name}") for name in layer.tensors}
            for name, t in layer.tensors.items():
                self.params[f"{i}.{name}"] = t.detach().to(self.dtype)
                builder.param_meta[names[name]] = t.to("meta")
            before = list(meta.shape[1:])
            try:
                meta = layer(meta)
                call = Call(layer.op, (value,), (*names.items(), *layer.arguments))
                value = LOWERINGS[layer.op](builder, named_arguments(call, tuple(meta.shape[1:]), meta))
            except (RuntimeError, IndexError, NoForm) as error:
                reason = str(error).splitlines()[0]
                raise BadValue(f"layers: number {i}, {layer.name}, got samples of shape {before}: {reason}") from error
        return builder.program(value)

    def _ready(self, dense: int | None, seeds: int, like: Tensor) -> _Prepared:
        """The chain and its weights for ``dense`` seeds, or for one-hot ones."""
        ready = self._prepared.get(dense)
        if ready is None:
            ready = self._prepared[dense] = self._prepare(dense is None, seeds, like)
        return ready

    def _prepare(self, onehot: bool, seeds: int, like: Tensor) -> _Prepared:
        call_plan = grouped_call_plan(self.program, seeds, like, (0,))
        if not call_plan.plan.single_chain:
            raise RuntimeError(f"gradkern has no kernels for these layers:\n{ops.machine()}\n{call_plan.plan}")
        try:
            chain = call_plan.chain(call_plan.groups[0], backward=True, onehot=onehot)
            packed = PlanWeights(call_plan.plan, self.params, like).packed(chain)
        except (TooLarge, KernelsUnavailable) as error:
            raise RuntimeError(f"gradkern has no kernels for these layers: {error}") from error
        if not onehot:
            return _Prepared(packed, None, None)
        targets = all_output_indices(seeds, like.device)
        return _Prepared(packed, targets, packed.seed_rows(targets, seeds))
