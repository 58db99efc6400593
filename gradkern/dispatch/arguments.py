"""Reading ``inputs``, ``wrt`` and ``out``: what they may be, and errors that say what to pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ir.program import Shape
from ..util.integers import as_int
from ..util.options import BadType, BadValue

OutArgument = Tensor | np.ndarray | Sequence[Tensor | np.ndarray] | None


def read_inputs(inputs: Any, wrt: int | Sequence[int] | None) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Check the inputs; return them as a tuple, and the indices of those to differentiate."""
    tensors = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not tensors:
        raise BadValue("inputs: got an empty tuple, expected at least one tensor [N, ...].")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise _no_tensor(i, x)
        if x.layout != torch.strided:
            raise BadType(f"inputs: number {i} has layout {x.layout}, expected a dense tensor. Use x.to_dense().")
        if x.dim() == 0:
            raise BadValue(f"inputs: number {i} has no axes, expected [N, ...]. Use x.unsqueeze(0) for one sample.")
        if i and x.shape[0] != tensors[0].shape[0]:
            raise BadValue(
                f"inputs: number {i} has {x.shape[0]} samples and number 0 has {tensors[0].shape[0]}, expected the "
                "same batch axis (axis 0) in all."
            )
    indices = checked_wrt(wrt, len(tensors))
    for w in indices:
        x = tensors[w]
        if not x.is_floating_point():
            raise BadType(
                f"inputs: number {w} has {x.dtype}, expected a floating dtype: there is no gradient with respect to "
                f"it. {_floating_hint(x, len(tensors))}"
            )
    return tensors, indices


def _no_tensor(i: int, x: object) -> BadType:
    if isinstance(x, np.ndarray):
        return BadType(f"inputs: number {i} is a numpy array, expected a tensor. Use torch.from_numpy(x).")
    way_out = (
        " Pass a function of the tensors as the model: jacobian(lambda *xs: model(dict(zip(names, xs))), "
        "tuple(inputs.values()))" if isinstance(x, dict) else ""
    )  # fmt: skip
    return BadType(f"inputs: number {i} is {type(x).__name__}, expected a tensor [N, ...].{way_out}")


def checked_wrt(wrt: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """``wrt`` as the indices of the inputs to differentiate, out of ``count``."""
    if wrt is None:
        return tuple(range(count))
    indices = []
    for w in [wrt] if is_one_index(wrt) or not isinstance(wrt, Iterable) else wrt:
        index = as_int(w)
        if index is None or not -count <= index < count:
            raise BadValue(f"wrt: got {w!r}, expected indices of inputs, 0 … {count - 1}.")
        indices.append(index % count)
    if not indices:
        raise BadValue("wrt: got nothing, expected at least one input to differentiate.")
    if len(set(indices)) < len(indices):
        raise BadValue(f"wrt: got {wrt}, which names an input twice, expected each input once.")
    return tuple(indices)


def is_one_index(wrt: Any) -> bool:
    """Whether ``wrt`` names one input by its index, so that the results are not in a tuple."""
    return as_int(wrt) is not None


def _floating_hint(x: Tensor, inputs: int) -> str:
    """What to do with an input that has no gradient."""
    if x.is_complex():
        return "Pass real and imaginary parts."
    other = ", or leave it out of wrt=" if inputs > 1 else ""
    return (
        "For token ids, or other indices into an embedding, differentiate the embedded tensor: pass a function of it "
        f"as the model (docs/jacobians.md){other}. For measured whole numbers use x.float()."
    )


def out_tensor(out: Any, shape: Shape, flat: Shape) -> Tensor:
    """The caller's memory for a result of this shape, as a view of the shape ``flat``."""
    if isinstance(out, np.ndarray):  # np.memmap is one
        if not out.flags.writeable:
            raise BadValue("out: got a read-only array, expected a writable one (np.memmap: mode 'r+' or 'w+').")
        try:
            out = torch.from_numpy(out)
        except TypeError as error:
            raise BadType(f"out: got an array of {out.dtype}, expected a floating dtype that torch has.") from error
    if not isinstance(out, Tensor):
        raise BadType(f"out: got {type(out).__name__}, expected a tensor or a numpy array (np.memmap).")
    if tuple(out.shape) != shape:
        raise BadValue(f"out: got shape {list(out.shape)}, expected {list(shape)}.")
    if not out.is_floating_point():
        raise BadType(f"out: got {out.dtype}, expected a floating dtype.")
    if out.requires_grad:
        raise BadValue("out: got a tensor that requires grad, expected a plain one. Use out.detach().")
    if out.is_inference():  # the tensor may not be written to outside inference mode, but its memory may
        alias = torch.empty(0, dtype=out.dtype, device=out.device)
        out = alias.set_(out.untyped_storage(), out.storage_offset(), out.shape, out.stride())
    try:
        return out.view(flat)
    except RuntimeError as error:
        raise BadValue(
            "out: the axes of the outputs must be laid out in one piece. Use a contiguous tensor."
        ) from error
