"""A network that is captured, verified and packed, so that calls of its kernels look only at their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.program import Program, Shape
from ..runtime.whole_network import whole_network
from ..util.options import BadType, BadValue, Engine
from . import batching
from .request import Request
from .route import decide
from .solve import solve, timing
from .targets import Seeds


class Prepared:
    """The callable that `gradkern.prepare` returns: ``jac(x)`` is `gradkern.jacobian` for one choice of targets.

    The weights are packed at the first call.  Later changes of the model (weights, mode, code) are not noticed: call
    `update` after one.  ``program`` is the captured network, and ``str()`` of this object lists it; it is None for a
    model that stays on autograd.  For such a model, and where autograd turned out to be faster, a call is a call of
    `jacobian`.
    """

    def __init__(self, request: Request, program: Program | None, engine: Engine, as_tuple: bool) -> None:
        self.program = program
        self._request, self._engine, self._as_tuple = request, engine, as_tuple
        if program is not None:
            shared_seeds(request, program.output_shape)  # raises if they differ by sample
        self._like = [(x.shape[1:], x.dtype, x.device) for x in request.inputs]
        self._run: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None

    def __str__(self) -> str:
        return str(self.program) if self.program else "autograd, the whole model"

    def update(self) -> Prepared:
        """Take the model as it is now; returns this object.

        The next call packs the weights again, and captures the network again if more than its weights has changed.
        """
        self._run = None
        return self

    def __call__(self, inputs: Tensor | Sequence[Tensor]) -> Any:
        """``[N, *axes, *in]`` for samples like those it was prepared with (a tuple of them for a tuple of inputs).

        Raises `ValueError` or `TypeError` for inputs of another shape, dtype or device.
        """
        given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        self._check(given)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._call(given)
        return self._call(given)

    def _call(self, given: tuple[Tensor, ...]) -> Any:
        if self._run is None:
            self._run = self._frozen(given)
        results = self._run(tuple([x.detach() if x.requires_grad else x for x in given]))
        return results if self._as_tuple else results[0]

    def _check(self, given: tuple[Tensor, ...]) -> None:
        if len(given) != len(self._like):
            raise BadValue(f"inputs: got {len(given)} tensors, expected {len(self._like)}, as prepared.")
        for i, (x, (shape, dtype, device)) in enumerate(zip(given, self._like, strict=True)):
            if not isinstance(x, Tensor):
                raise BadType(f"inputs: number {i} is {type(x).__name__}, expected a tensor [N, ...].")
            if x.dim() == 0 or x.shape[1:] != shape or x.shape[0] != given[0].shape[0]:
                expected = ", ".join(map(str, ("N", *shape)))
                raise BadValue(
                    f"inputs: number {i} has shape {list(x.shape)}, expected [{expected}], as prepared, with one N for "
                    "all inputs. Call gradkern.prepare for the new shape."
                )
            if x.dtype != dtype or x.device != device:
                raise BadType(
                    f"inputs: number {i} is {x.dtype} on {x.device}, expected {dtype} on {device}, as prepared. "
                    "Convert it, or call gradkern.prepare for inputs like it."
                )

    def _frozen(self, given: tuple[Tensor, ...]) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """The rest of a call, with the network as it is now."""
        fn, wrt, resolve_seeds = self._request.fn, self._request.wrt, self._request.resolve_seeds
        request = Request(fn, given, wrt, resolve_seeds)
        if self.program is None or self._engine in ("autograd", "reference"):
            return self._live
        route = decide(request, self._engine)
        bound = None if route.eager_reason is not None else route.bound_program(self._request)
        if bound is None:
            raise BadValue("model: it has changed since it was prepared, and now runs on autograd. Call jacobian.")
        route.check_reached(request)
        program = self.program = bound.program
        seeds = shared_seeds(request, program.output_shape)
        whole, packed = whole_network(program, bound.params(), given, seeds.indices, seeds.axes, wrt), None
        tensors = {name: x.detach().clone() for name, x in bound.tensors.items()}
        if whole is not None:
            packed = whole.packed(tensors)
        if whole is None or packed is None:
            measured = timing(request, route)  # None unless the engine is "auto"
            if measured is not None and measured.way != "kernels":
                return self._live
            return lambda inputs: (
                batching.run(Request(fn, inputs, wrt, resolve_seeds), program, tensors, self._engine).shaped
            )
        return lambda inputs: whole.shaped(whole(packed, inputs))

    def _live(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A call of `jacobian`, which looks at the model again."""
        request = Request(self._request.fn, inputs, self._request.wrt, self._request.resolve_seeds)
        results = solve(request, decide(request, self._engine))
        require_shared_seeds(results.seeds)
        return tuple(results.shaped)


def shared_seeds(request: Request, shape: Shape) -> Seeds:
    """The seeds of a request, which must be the same for all samples; ``shape``: of the output, per sample."""
    return require_shared_seeds(request.resolve_seeds(request.samples, shape))


def require_shared_seeds(seeds: Seeds) -> Seeds:
    """Refuse seeds that are not the same for all samples."""
    if seeds.per_sample or seeds.awaits_outputs:
        raise BadValue(
            "targets: got targets of each sample (or TopK), expected None or the same outputs for all samples, as an "
            "int, a list or a tuple. Call gradkern.jacobian for targets of each sample."
        )
    return seeds
