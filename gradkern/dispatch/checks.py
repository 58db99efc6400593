"""Checks of a model and its output, and of the memory that a result takes.

If the model itself fails because of a dtype or a device, the error says so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from ..util import memory
from ..util.options import BadType, BadValue, Unused
from ..util.outputs import HINT, describe_result


def check_output(y: Any, samples: int) -> Tensor:
    """The model's output, checked to be a floating tensor ``[N, ...]``."""
    if not isinstance(y, Tensor):
        raise BadType(f"the model returned {describe_result(y)}, expected one tensor [N, ...]. {HINT}")
    if not y.is_floating_point():
        raise BadType(f"the model returned {y.dtype}, expected a floating dtype: there is no gradient of it.")
    if y.dim() == 0 or y.shape[0] != samples:
        raise BadValue(
            f"the model returned shape {list(y.shape)} for {samples} samples, expected [N, ...] with N = {samples} "
            "first: one row of outputs per sample. A single sample needs its batch axis: x.unsqueeze(0)."
        )
    return y


def check_reached(wrt: Sequence[int], unused: Collection[int]) -> None:
    """Raise `Unused` if, by autograd's graph, the output does not depend on an input that is to be differentiated."""
    for w in wrt:
        if w in unused:
            raise Unused(
                f"the model's output is cut off from its input: input {w} appears to not have been used in the graph "
                "that autograd follows. Look for torch.no_grad(), .detach(), .data or .numpy() in the model's forward, "
                "or leave that input out of wrt=."
            )


def explain_failure(error: Exception, module: nn.Module | None, inputs: Sequence[Tensor]) -> Exception:
    """The error to raise for a model that failed: it names the dtypes or devices if these are the cause.  Otherwise it
    is the model's own, with a note on what the model was given."""
    if not hasattr(error, "__notes__"):
        given = ", ".join(str(list(x.shape)) for x in inputs)
        error.add_note(
            f"gradkern called the model with {given}, some of your samples. Samples are axis 0 of every input: one "
            "alone needs x.unsqueeze(0). Several inputs are one tuple: jacobian(model, (a, b))."
        )
    if module is None:
        return error
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_inference() for t in tensors):
        return BadValue(
            "model: its parameters were made under torch.inference_mode, expected ordinary ones, which autograd can "
            f"follow. Build or load the model outside of inference_mode. The model failed with: {error}"
        )
    devices = {str(t.device) for t in tensors}
    for i, x in enumerate(inputs):
        if devices and str(x.device) not in devices:
            return BadValue(
                f"inputs: number {i} is on {x.device}, the model on {', '.join(sorted(devices))}. Move one of them "
                f"with .to(...). The model failed with: {error}"
            )
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    for i, x in enumerate(inputs):
        if x.is_floating_point() and dtypes and x.dtype not in dtypes:
            names = ", ".join(sorted(map(str, dtypes)))
            return BadType(
                f"inputs: number {i} has {x.dtype}, the model {names}. Convert one of them with .to(dtype). "
                f"The model failed with: {error}"
            )
    return error


def check_devices(module: nn.Module | None, inputs: Sequence[Tensor]) -> None:
    """Refuse tensors on the meta device: they have shapes but no values, so nothing can be computed."""
    if module is not None and any(t.is_meta for t in module.parameters()):
        raise BadValue(
            "model: its parameters are on the meta device (shapes without values), expected real ones. Load the "
            "weights first, for example with model.to_empty(device='cpu') and load_state_dict."
        )
    for i, x in enumerate(inputs):
        if x.is_meta:
            raise BadValue(
                f"inputs: number {i} is on the meta device (shapes without values), expected a tensor with values."
            )


def check_fits_in_memory(size: int) -> None:
    """Refuse a result that cannot fit in memory, so that the process is not killed."""
    if size >= 1 << 30 and size > memory.allowed():
        raise too_large(size)


def too_large(size: int, work: str = "") -> MemoryError:
    """The error for a result of ``size`` bytes; ``work`` says what else was asked for."""
    return MemoryError(
        f"the result needs {size / 2**30:.2f} GiB{work}, and this process may have {memory.allowed() / 2**30:.2f} GiB. "
        "Pass out= (a np.memmap), take chunks from gradkern.iter_jacobian, or ask for fewer outputs (targets=TopK(k))."
    )
