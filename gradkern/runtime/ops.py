"""The compiled extension (loading, layout checks, fakes).  No other file names it.

The extension is a library that registers ops in ``torch.ops.gradkern``: for tensor work, and for what was built and
what the machine can do.  It knows torch by its stable ABI alone, and no Python, so one build serves every later torch.
Without it the package works through the reference path, with one warning.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codegen import cuda
from ..codegen.encoding import Sizes, layout_fingerprint
from ..codegen.machine import Device, Machine, NoKernels
from ..codegen.support import NATIVE_DTYPES, NATIVE_FUNCTIONS
from . import validation

PACKAGE = Path(__file__).parents[1]
HOW_TO_BUILD = "To build it: install a C++ compiler, then `pip install --no-build-isolation .` in a checkout."


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over samples that Jacobians ``[n, S, *in]`` are added to, sample after sample, instead of being kept.

    ``sum``, ``square``, ``abs``: float64 ``[S, *in]``; ``max`` (of absolute values): float32; ``group``: sums of
    absolute values, float64 ``[G, S, *in]``, of which sample i goes to row ``groups[i]``.  Those that are None are not
    taken.  ``finite``, bool ``[n]``, is cleared where a Jacobian is not finite or an output is NaN; with ``skip``,
    samples for which it is False do not count.  ``magnitude``: ``sum`` also takes absolute values.
    """

    finite: Tensor
    groups: Tensor
    sum: Tensor | None = None
    square: Tensor | None = None
    abs: Tensor | None = None
    max: Tensor | None = None
    group: Tensor | None = None
    skip: bool = False
    magnitude: bool = False

    @classmethod
    def none(cls, samples: int) -> Statistics:
        return cls(torch.ones(samples, dtype=torch.bool), torch.zeros(samples, dtype=torch.int64))


#: The ops that return nothing and only write to their arguments.
WRITE_ALONE = ("chain_vjp", "write_transposed", "chain_statistics", "accumulate", "recurrent", "recurrent_vjp")
LIBRARY = "_C.so"  # beside gradkern/__init__.py


@functools.cache
def extension() -> Any:
    """The compiled ops, or None (with one warning) if they are missing or of another version."""
    compiled: Any = torch.ops.gradkern
    try:
        torch.ops.load_library(str(PACKAGE / LIBRARY))
    except OSError as error:
        what = f"is not available ({error}); results are the same, only slower"
        warnings.warn(f"gradkern's compiled extension {what}. {_way_out()}", RuntimeWarning, stacklevel=3)
        return None
    known = all(hasattr(compiled, name) for name in ("tile_vectors", "write_transposed"))  # the newest ops
    if not known or compiled.record_layout() != layout_fingerprint() or compiled.functions() != list(NATIVE_FUNCTIONS):
        what = "was built from another version and is not used"
        warnings.warn(f"gradkern's compiled extension {what}. {HOW_TO_BUILD}", RuntimeWarning, stacklevel=3)
        return None
    register_fakes()
    return compiled


def _way_out() -> str:
    """What to do without an extension: an installed package that has one may be hidden by the checkout's folder."""
    here = PACKAGE.resolve()
    for folder in map(Path, sys.path):
        installed = (folder / "gradkern").resolve()
        if installed != here and (installed / LIBRARY).exists():
            return f"The one in {installed} is hidden by {here}: start Python in another folder."
    return HOW_TO_BUILD


def machine(device: torch.device | None = None) -> Machine | NoKernels:
    """The machine that kernels on ``device`` (default: the CPU) are laid out for.

    On a GPU there are no kernels unless they have been validated on its architecture, or are asked for.
    """
    described = _machine(None if device is None or device.type == "cpu" else device)
    return validation.permitted(described, cuda_fingerprint()) if isinstance(described, Device) else described


@functools.cache
def cuda_fingerprint() -> str:
    """A hash of the CUDA kernels in use, and of the code that lays out their work."""
    here = Path(cuda.__file__).parent
    layout = hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()[:16]
    return f"{extension().cuda_fingerprint()}-{layout}"


def precision() -> str:
    """`torch.get_float32_matmul_precision`, which raises if torch's newer switches have been used as well."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def convolutions_in_tf32() -> bool:
    """Whether torch computes float32 convolutions of a GPU in TF32, as it does by default."""
    convolutions: Any = torch.backends.cudnn
    return convolutions.conv.fp32_precision == "tf32"


@functools.cache
def _machine(device: torch.device | None) -> Machine | NoKernels:
    c = extension()
    if c is None:
        return NoKernels()
    if device is None:
        return Machine(c.isa(), c.vector_bytes(), c.tile_vectors())
    if device.type == "cuda" and c.has_cuda():
        number = torch.cuda.current_device() if device.index is None else device.index
        try:
            shared_bytes, processors, kilohertz, capability = c.describe_device(number)
        except RuntimeError as error:  # the extension has no machine code for this GPU
            return NoKernels(str(error).splitlines()[0])
        facts = {"processors": processors, "kilohertz": kilohertz, "capability": capability}
        return Device("cuda", 16, shared_bytes=shared_bytes, **facts)
    return NoKernels()


def isa_is_chosen() -> bool:
    """Whether this process has settled on an instruction set: weights are packed for one, so it never changes."""
    return _machine.cache_info().currsize > 0


def _keep_for_stream(*cached: Tensor) -> None:
    """Cached tensors may be freed by another thread while this stream still reads them: torch's allocator must know."""
    if cached[0].is_cuda and not torch.cuda.is_current_stream_capturing():  # a CUDA graph may not be told
        stream = torch.cuda.current_stream(cached[0].device)
        for tensor in cached:
            tensor.record_stream(stream)


def chain_forward(
    inputs: Sequence[Tensor], packed: Tensor, tables: Tensor, forward: Tensor, sizes: Sizes, outputs: Sequence[int]
) -> list[Tensor]:
    """Forward of a chain; one ``[N, size]`` per output."""
    _keep_for_stream(packed, tables, forward)
    return torch.ops.gradkern.chain_forward(list(inputs), packed, tables, forward, sizes.integers, list(outputs))


def chain_vjp(
    inputs: Sequence[Tensor],
    packed: Tensor,
    tables: Tensor,
    forward: Tensor,
    backward: Tensor,
    sizes: Sizes,
    outputs: Sequence[int],
    targets: Tensor | None,
    seed_rows: Tensor | None,
    cotangents: Sequence[Tensor],
    seed_tile: int,
    results: Sequence[Tensor],
) -> list[Tensor]:
    """Forward and backward of a chain for all seeds; fills ``results`` ``[N, S, size]``, returns the outputs."""
    _keep_for_stream(packed, tables, forward, backward)
    values = [inputs[0].new_empty(inputs[0].shape[0], size) for size in outputs]
    chain = (list(inputs), packed, tables, forward, backward, sizes.integers, values)
    torch.ops.gradkern.chain_vjp(*chain, targets, seed_rows, list(cotangents), seed_tile, list(results))
    return values


def chain_vjp_if(
    live: Sequence[Tensor],
    content: int,
    inputs: Sequence[Tensor],
    chain: Sequence[Tensor],
    sizes: Sizes,
    outputs: Sequence[int],
    targets: Tensor,
    seed_rows: Tensor | None,
    seed_tile: int,
    results: Sequence[Tensor],
) -> bool:
    """Run `chain_vjp` on a CPU if `content_hash` of ``live`` is ``content``; return whether it did.

    ``chain``: packed weights, tables, forward and backward records.
    """
    values = [inputs[0].new_empty(inputs[0].shape[0], size) for size in outputs]
    found = torch.ops.gradkern.chain_vjp_if(
        live, content, inputs, chain, sizes.integers, values, targets, seed_rows, seed_tile, results
    )
    return found == content


def write_transposed(rows: Tensor, targets: Tensor | None, out: Sequence[Tensor]) -> Tensor | None:
    """The last step of forward mode (csrc/cpu/transpose.cpp): fills ``out``, returns ``finite [N]``; None, with nothing
    written, if it does not serve these tensors."""
    if not _native(rows, *out) or not all(t.is_contiguous() for t in (rows, *out)):
        return None
    finite = rows.new_empty(rows.shape[0], dtype=torch.bool)
    torch.ops.gradkern.write_transposed(rows, None if targets is None else targets.contiguous(), out, finite)
    return finite


def rescale(z: Tensor, reference: Tensor, pool: Sequence[int], relu: bool, eps: float) -> Tensor:
    """DeepLift's multipliers of a ReLU, of a max pool (``pool``: pairs of kernel, stride, padding before, dilation and
    output), or of a ReLU and the pool after it: ``[taps, N, C, oh, ow]`` for ``z [N, C, H, W]``."""
    return torch.ops.gradkern.rescale(z, reference, list(pool), relu, eps)


RecurrentWeights = Sequence[Tensor]  # of a recurrent layer: W_ih, W_hh and, if any, the biases


def recurrent(cell: int, x: Tensor, layer: Sequence[RecurrentWeights]) -> Tensor | None:
    """A recurrent layer in its directions, ``x [N, T, I] -> [N, T, directions · H]``.  ``cell``: the code of its kind
    (csrc/cpu/context.h).  None if there is no kernel for these tensors."""
    if not _native(x, *(w for weights in layer for w in weights)):
        return None
    x, hidden = _contiguous_rows(x), layer[0][1].shape[1]
    y = x.new_empty(*x.shape[:2], len(layer) * hidden)
    for d, weights in enumerate(layer):
        part = y.narrow(2, d * hidden, hidden)
        torch.ops.gradkern.recurrent(x, [w.contiguous() for w in weights], cell, d == 1, part)
    return y


def recurrent_vjp(cell: int, x: Tensor, directions: Sequence[tuple[RecurrentWeights, Tensor, Tensor]]) -> Tensor | None:
    """A recurrent layer back through time for all seeds: ``[N, S, T, I]``.  ``directions``: of each its weights, its
    output ``[N, T, H]`` and its cotangents ``[N, S, T, H]``.  None if there is no kernel for these tensors."""
    if not _native(x, *(t for weights, y, g in directions for t in (*weights, y, g))):
        return None
    x, g = _contiguous_rows(x), directions[0][2]
    result = x.new_empty(*g.shape[:3], x.shape[2])
    for d, (weights, y, g) in enumerate(directions):
        whole = [w.contiguous() for w in weights]
        torch.ops.gradkern.recurrent_vjp(
            _contiguous_rows(g), x, _contiguous_rows(y), whole, cell, d == 1, d > 0, result
        )
    return result


def _contiguous_rows(x: Tensor) -> Tensor:
    """With a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _native(first: Tensor, *others: Tensor) -> bool:
    native = first.device.type == "cpu" and first.dtype in NATIVE_DTYPES and extension() is not None
    return native and all(t.dtype == first.dtype and t.device == first.device for t in others)


def content_hash(tensors: Sequence[Tensor]) -> int:
    """An order-sensitive 64-bit hash of the tensors' bytes."""
    return torch.ops.gradkern.content_hash(list(tensors)) if tensors else 0


def accumulate(maps: Tensor, groups: Tensor, sums: Sequence[Tensor | None]) -> bool:
    """Add maps ``[n, ...]`` to ``sums``, in the order of the fields of `Statistics`.

    Does nothing and returns False if there is no kernel for these tensors.
    """
    native = _native(maps)
    if native:
        torch.ops.gradkern.accumulate(maps.contiguous(), groups, _or_empty(sums))
    return native


def _or_empty(sums: Sequence[Tensor | None]) -> list[Tensor]:
    return [torch.empty(0) if t is None else t for t in sums]


def chain_statistics(
    inputs: Sequence[Tensor],
    chain: Sequence[Tensor],
    sizes: Sizes,
    outputs: Sequence[Tensor],
    targets: Tensor,
    seed_rows: Tensor | None,
    seed_tile: int,
    room: Tensor,
    sums: Statistics,
) -> None:
    """`chain_vjp` on a CPU, of as many samples at a time as ``room [n, S, size]`` has room for.  Fills ``outputs``; the
    Jacobians are not kept, but added to ``sums``.  ``chain``: packed weights, tables, forward and backward records."""
    taken = _or_empty((sums.sum, sums.square, sums.abs, sums.max, sums.group))
    torch.ops.gradkern.chain_statistics(
        list(inputs), list(chain), sizes.integers, list(outputs), targets, seed_rows, seed_tile, room, taken,
        sums.groups, sums.finite, sums.skip, sums.magnitude,
    )  # fmt: skip


HUGE = 8 << 20  # new results of at least this many bytes get huge pages


def on_huge_pages(fresh: Tensor) -> None:
    """Ask for huge pages for a large tensor that nothing has been written to, if the system has them."""
    if fresh.device.type == "cpu" and fresh.nbytes >= HUGE and (c := extension()) is not None:
        c.advise_huge(fresh.data_ptr(), fresh.nbytes)


def register_fakes() -> None:
    """Shapes of the ops' results, for `torch.compile` and `torch.library.opcheck`."""

    @torch.library.register_fake("gradkern::chain_forward")
    def _(
        inputs: list[Tensor], packed: Any, tables: Any, forward: Any, sizes: Any, output_sizes: list[int]
    ) -> list[Tensor]:
        return [inputs[0].new_empty(inputs[0].shape[0], s) for s in output_sizes]

    @torch.library.register_fake("gradkern::rescale")
    def _(z: Tensor, reference: Any, pool: list[int], relu: Any, eps: Any) -> Tensor:
        if not pool:
            return z.new_empty(1, *z.shape)
        return z.new_empty(pool[0] * pool[1], *z.shape[:2], pool[8], pool[9])

    for writes_alone in WRITE_ALONE:

        @torch.library.register_fake(f"gradkern::{writes_alone}")
        def _(*arguments: Any) -> None:
            return None
