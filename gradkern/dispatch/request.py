"""One call as data: the function and inputs to differentiate, the outputs, and the destination of the results.

Checks the inputs and the model's output.  If the model itself fails because of a dtype or device, the error says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ir.program import Shape
from ..util import memory
from ..util.callables import anchor, unwrap
from ..util.integers import as_int
from ..util.options import BadType, BadValue, Unused
from ..util.outputs import HINT, describe_result
from .targets import SeedChoice, Seeds, TopSeeds, resolve

MOST_IN_KEY = 64  # the most targets in a list that may be part of a key for calls

OutArgument = Tensor | np.ndarray | Sequence[Tensor | np.ndarray] | None


@dataclass(eq=False)  # nothing changes it, but checking that would take as long as the rest of a small call's request
class Request:
    """One call: ``fn`` at ``inputs``, differentiated with respect to the inputs with indices ``wrt``.

    ``resolve_seeds`` returns the seeds once the output's shape is known.  ``ahead``: samples that will follow in later
    calls, which count in the decision to capture.  ``keep_outputs``: the model's own outputs are part of the result.
    ``call_samples``: samples of the whole call, if this is a part of one.  ``owner``, ``access_path``: the object that
    has the state of ``fn``, and how to get from there to ``fn``; ``module``: that object, if it is one.
    """

    fn: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    wrt: tuple[int, ...]
    resolve_seeds: SeedChoice
    out: OutArgument = None
    ahead: int = 0
    keep_outputs: bool = False
    call_samples: int = 0
    owner: Any = field(init=False)
    access_path: Hashable = field(init=False)
    module: nn.Module | None = field(init=False)
    samples: int = field(init=False)

    def __post_init__(self) -> None:
        self.fn = unwrap(self.fn)
        self.owner, self.access_path = anchor(self.fn)
        self.module = self.owner if isinstance(self.owner, nn.Module) else None
        self.samples = self.inputs[0].shape[0]
        self.call_samples = self.call_samples or self.samples

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's inputs."""
        return sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in self.inputs)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one sample's gradients for one seed."""
        return sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in (self.inputs[w] for w in self.wrt))

    @property
    def seeds_key(self) -> Hashable:
        """A key that is equal for requests with the same seeds, given the same model; None if that is not known."""
        return self.resolve_seeds.key if isinstance(self.resolve_seeds, TargetChoice) else None

    def part(self, start: int, stop: int, seeds: Seeds | None) -> Request:
        """This call for the samples ``start:stop`` alone; ``seeds``: of all samples, None for the call's own choice."""
        return Request(
            self.fn,
            tuple(x[start:stop] for x in self.inputs),
            self.wrt,
            self.resolve_seeds if seeds is None else lambda samples, output_shape: seeds.part(start, stop),
            ahead=self.ahead + self.samples - stop,
            call_samples=self.call_samples,
        )

    def pick(self, most: int) -> tuple[Tensor, ...]:
        """Two to ``most`` of the caller's samples, spread over the batch; finite ones if there are enough.

        A lone sample is joined by its mirror image, which has the same range of values (of token ids, too).
        """
        with torch.inference_mode(False), torch.no_grad():
            look = torch.linspace(0, self.samples - 1, min(self.samples, 16 * most)).long().unique()
            looked = [x.detach()[look.to(x.device)] for x in self.inputs]
            rows = [x.clone() if x.is_inference() else x for x in looked]  # autograd accepts these; each [l, *in]
            if self.samples == 1:
                rows = [torch.cat([x, x.flip(tuple(range(1, x.dim())))]) for x in rows]
            finite = torch.ones(rows[0].shape[0], dtype=torch.bool)
            for x in rows:
                if x.is_floating_point() and x.numel():
                    finite &= x.isfinite().flatten(1).all(1).cpu() if x.dim() > 1 else x.isfinite().cpu()
            good = finite.nonzero()[:, 0]
            if len(good) < 2:
                rows = [torch.nan_to_num(x, nan=0.0, posinf=1.0, neginf=-1.0) for x in rows]
                good = torch.arange(rows[0].shape[0])
            spread = good[torch.linspace(0, len(good) - 1, min(most, len(good))).long()]
            return tuple(x[spread.to(x.device)] for x in rows)


@dataclass(eq=False)
class JacobianResult:
    """The results of a request, filled in by rows of samples.

    ``seeds``: the requested seeds; their indices are filled in by rows, too, if the outputs choose them
    (``filled_by_outputs``).  ``jacobians``: one tensor ``[N, S, *in]`` per differentiated input, in the caller's memory
    if ``out`` is given; ``shaped``: the same memory as ``[N, *axes, *in]``.  ``kept``: the model's outputs, piece by
    piece.
    """

    seeds: Seeds
    output_shape: Shape
    jacobians: tuple[Tensor, ...]
    shaped: tuple[Tensor, ...]
    filled_by_outputs: bool = False
    kept: list[Tensor] = field(default_factory=list)

    @property
    def outputs(self) -> Tensor:
        """The model's outputs ``[N, *out]``, if the request asked to keep them."""
        return torch.cat(self.kept)

    def fill_top_indices(self, start: int, stop: int, outputs: Tensor) -> None:
        """Fill in the indices of the samples ``start:stop`` if their ``outputs`` choose them."""
        if self.filled_by_outputs:
            assert isinstance(self.seeds, TopSeeds)
            assert self.seeds.indices is not None
            self.seeds.indices[start:stop] = self.seeds.highest(outputs)


def allocate(request: Request, output_shape: Shape, partial: JacobianResult | None = None) -> JacobianResult:
    """Resolve the targets against the output's shape and allocate the results.

    ``partial``: results of earlier samples, which are returned if their output has the same shape.
    """
    if partial is not None:
        if output_shape != partial.output_shape:
            raise BadValue(
                f"the model gave outputs [N, {_times(partial.output_shape)}] for some samples and "
                f"[N, {_times(output_shape)}] for others, expected one shape."
            )
        return partial
    seeds = request.resolve_seeds(request.samples, output_shape)
    awaits_outputs = seeds.awaits_outputs
    if awaits_outputs:
        seeds = replace(seeds, indices=torch.zeros(request.samples, seeds.count, dtype=torch.int64))
    inputs = [request.inputs[w] for w in request.wrt]
    shapes = [(request.samples, *seeds.axes, *x.shape[1:]) for x in inputs]
    flat = [(request.samples, seeds.count, *x.shape[1:]) for x in inputs]
    if request.out is None:
        check_fits_in_memory(request.gradient_bytes * request.samples * seeds.count)
        rows = [torch.empty(f, dtype=x.dtype, device=x.device) for f, x in zip(flat, inputs, strict=True)]
    else:
        outs = list(request.out) if isinstance(request.out, (tuple, list)) else [request.out]
        if len(outs) != len(shapes):
            raise BadValue(f"out: got {len(outs)} tensors, expected {len(shapes)}, one per differentiated input.")
        rows = [out_tensor(g, s, f) for g, s, f in zip(outs, shapes, flat, strict=True)]
    shaped = tuple(r.view(r.shape[0], *seeds.axes, *r.shape[2:]) for r in rows)
    return JacobianResult(seeds, output_shape, tuple(rows), shaped, awaits_outputs)


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


# ---------------------------------------------------------------------------------------------------------------
# Checks


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


def check_reached(request: Request, unused: Collection[int]) -> None:
    """Raise if, by autograd's graph, the output does not depend on an input that is to be differentiated."""
    for w in request.wrt:
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


def _times(shape: Shape) -> str:
    return ", ".join(map(str, shape))


class TargetChoice:
    """Reads ``targets`` as `gradkern.jacobian` does, once the output's shape is known.

    ``key`` is equal for choices that give the same seeds whatever the samples are; it is None if the seeds depend on
    the samples, or if that is not known.
    """

    def __init__(self, targets: Any) -> None:
        self.targets, self.key = targets, targets_key(targets)

    def __call__(self, samples: int, output_shape: Shape) -> Seeds:
        if self.targets is None:
            return Seeds(math.prod(output_shape), output_shape, None)
        return resolve(self.targets, samples, output_shape)


def targets_key(targets: Any) -> Hashable:
    """The ``key`` of a `TargetChoice`."""
    if targets is None or type(targets) is int:
        return ("all" if targets is None else targets,)
    if isinstance(targets, list) and len(targets) <= MOST_IN_KEY and all(type(t) is int for t in targets):
        return ("list", *targets)
    return None


def jacobian_choice(targets: Any) -> SeedChoice:
    """Reads ``targets`` as `gradkern.jacobian` does, once the output's shape is known."""
    return _ALL if targets is None else TargetChoice(targets)


_ALL = TargetChoice(None)
