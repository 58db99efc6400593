"""One call as data: the function and inputs to differentiate, the outputs, and the destination of the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.program import Shape
from ..util.callables import anchor, unwrap
from ..util.options import BadValue
from .arguments import OutArgument, out_tensor
from .checks import check_fits_in_memory
from .targets import SeedChoice, Seeds, TargetChoice, TopSeeds


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


def _times(shape: Shape) -> str:
    return ", ".join(map(str, shape))
