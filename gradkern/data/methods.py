"""Attribution methods of dataset runs: a registry of functions from a batch to maps.

A method is a short function that takes a `Batch` and returns an `Outcome`.  Methods that need more than one gradient
come from `gradkern.attr`: any class there with ``attribute_all`` can be named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from captum.attr import LayerAttribution, NeuronAttribution, NoiseTunnel
from torch import Tensor, nn

from .. import attr
from ..attr.gradient import GradientMethod
from ..dispatch import solve as solving
from ..dispatch.arguments import read_inputs
from ..dispatch.request import Request
from ..dispatch.route import decide
from ..dispatch.solve import solve
from ..dispatch.targets import TopK, jacobian_choice
from ..runtime.ops import Statistics
from ..util import renamed
from ..util.options import BadType, BadValue, Engine, use
from .references import draws, with_references


@dataclass(frozen=True)
class Batch:
    """Some consecutive samples: ``inputs`` ``[n, *in]`` each, ``targets`` as `gradkern.jacobian` reads them."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    targets: Any
    engine: Engine
    arguments: Mapping[str, Any]
    first: int = 0  # the index of the first sample in the source, which seeds random draws
    out: tuple[Tensor, ...] | None = None  # memory that a method may use for the maps


@dataclass(frozen=True)
class Outcome:
    """``maps`` ``[n, S, *in]`` per floating input, ``outputs`` ``[n, *out]``, ``targets`` ``[n, S]`` (or None: the
    same for all samples), ``deltas`` ``[n, S]`` if the method has them."""

    maps: tuple[Tensor, ...]
    outputs: Tensor
    targets: Tensor | None = None
    deltas: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """The old name of ``targets``."""
        renamed.warn_of_old_name("Outcome.rows", "Outcome.targets", 3)
        return self.targets


Outcome.__init__ = renamed.renamed_argument("rows", "targets")(Outcome.__init__)  # type: ignore[method-assign]

#: Arguments of ``attribute_all`` that the run sets itself.
OF_THE_RUN = ("self", "inputs", "targets", "out", "wrt", "engine")

Method = Callable[[Batch], Outcome]
METHODS: dict[str, Method] = {}


def register_method(name: str) -> Callable[[Method], Method]:
    """Register a function under ``name``."""

    def enter(function: Method) -> Method:
        METHODS[name] = function
        return function

    return enter


def find(name: str, arguments: Mapping[str, Any]) -> Method:
    """The method of that name, once its arguments have been checked as far as possible."""
    if name in METHODS:
        if arguments:
            raise BadValue(f"arguments: got {dict(arguments)} for method={name!r}, which takes none.")
        return METHODS[name]
    kind = next((c for n, c in _classes().items() if n.lower() == name.replace("_", "").lower()), None)
    if kind is None:
        raise BadValue(f"method: got {name!r}, expected one of {', '.join(method_names())}.")
    parameters = inspect.signature(kind.attribute_all).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = [p for p in parameters if p not in OF_THE_RUN]
    unknown = [a for a in arguments if a in OF_THE_RUN or (a not in parameters and not open_ended)]
    if unknown:
        raise BadValue(f"arguments: got {unknown[0]!r}, but {kind.__name__}.attribute_all takes {taken} here.")
    if "n_references" not in parameters and (draws(arguments) is not None or callable(arguments.get("baselines"))):
        raise BadValue(f"arguments: got a function as baselines, but {kind.__name__} takes no references per sample.")
    return FromCaptum(kind)


def method_names() -> list[str]:
    """Names of all methods."""
    lower = {m.replace("_", "") for m in METHODS}
    return [*METHODS, *(name for name in _classes() if name.lower() not in lower)]


def _classes() -> dict[str, Any]:
    """The classes of `gradkern.attr` that can be named, by name."""
    named = {name: getattr(attr, name) for name in dir(attr) if not name.startswith("_")}
    return {name: kind for name, kind in named.items() if _of_model_alone(kind)}


def _of_model_alone(kind: Any) -> bool:
    """Whether a class has ``attribute_all`` and is made from a model only (no layer, no other method)."""
    if not isinstance(kind, type) or not hasattr(kind, "attribute_all"):
        return False
    if issubclass(kind, (LayerAttribution, NeuronAttribution, NoiseTunnel)):
        return False  # their maps belong to a layer, or they wrap another method
    parameters = list(inspect.signature(kind).parameters.values())[1:]  # without the model
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


# ---------------------------------------------------------------------------------------------------------------
# Arguments with a row per sample


def check_arguments(method: Method, arguments: Mapping[str, Any], inputs: Sequence[Tensor], samples: int) -> None:
    """Raise `BadValue` that names a tensor among the arguments which has neither one row nor a row per sample."""
    if arguments.get("additional_forward_args") is not None:
        raise BadValue(
            "arguments: 'additional_forward_args' has no meaning in a run, where every sample needs its own. Give such "
            "arguments as further inputs, with source=(x, more), and put what all samples share into the model."
        )
    for name, value in arguments.items():
        values = value if isinstance(value, tuple) else (value,)
        for v in values:
            if hasattr(v, "__array__") and not isinstance(v, (Tensor, np.ndarray, np.generic)):
                raise BadValue(
                    f"arguments: {name!r} is {type(v).__name__}, expected a tensor: torch.tensor(x.to_numpy())?"
                )
        if name in distributions(method, arguments, inputs):
            for x, v in zip(inputs, values, strict=False):
                if isinstance(v, list) or (_has_rows(v) and v.shape[1:] != x.shape[1:]):
                    raise BadValue(
                        f"arguments: {name!r} is {'a list' if isinstance(v, list) else list(v.shape)}, expected a "
                        f"tensor of references to draw from, each {list(x.shape[1:])} as the samples."
                    )
            continue
        if isinstance(value, list) and len(value) == samples > 1 and len(value) != len(inputs):
            raise BadValue(f"arguments: {name!r} is a list with a value per sample. Pass a tensor [{samples}, ...].")
        for k, v in enumerate(values):
            if not _has_rows(v):
                continue
            at = f"{name!r}" if not isinstance(value, tuple) else f"number {k} of {name!r}"
            if len(v) not in (1, samples):
                raise BadValue(
                    f"arguments: {at} has {len(v)} rows for {samples} samples, expected one for each, or one for all. "
                    "(A tensor with other axes that all samples share can be a buffer of the model.)"
                )
            own = 1 if _has_own_references(v, k, inputs) else 0
            if name == "baselines" and k < len(inputs) and v.shape[1 + own :] != inputs[k].shape[1:]:
                raise BadValue(
                    f"arguments: {at} has rows of shape {list(v.shape[1:])}, expected {list(inputs[k].shape[1:])} as "
                    "the samples have."
                )


def check_common(method: Method, arguments: Mapping[str, Any]) -> None:
    """Raise `BadValue` that names an argument with several rows, if batches do not say which samples they hold."""
    for name, value in arguments.items():
        for v in value if isinstance(value, tuple) else (value,):
            if name not in distributions(method, arguments, ()) and _has_rows(v) and len(v) > 1:
                raise BadValue(f"arguments: {name!r} has {len(v)} rows, expected one, for all samples.")


def arguments_of(
    method: Method,
    arguments: Mapping[str, Any],
    which: slice | Sequence[int],
    samples: int,
    inputs: Sequence[Tensor],
) -> dict[str, Any]:
    """The arguments for some of the samples, ``inputs``.

    Of an argument with a row per sample, these samples' rows are taken.  Floating numbers get the dtype of the inputs.
    """
    device = inputs[0].device

    def rows(value: Any, cut: bool, k: int = 0) -> Any:
        if isinstance(value, tuple):
            return tuple(rows(v, cut, k) for k, v in enumerate(value))
        if not _has_rows(value):
            return value
        value = torch.as_tensor(value)
        floating = value.is_floating_point() and k < len(inputs) and inputs[k].is_floating_point()
        value = value[which] if cut and len(value) == samples else value
        return value.to(device, inputs[k].dtype if floating else None)

    given = distributions(method, arguments, inputs)
    return {name: rows(value, name not in given) for name, value in arguments.items()}


def distributions(method: Method, arguments: Mapping[str, Any], inputs: Sequence[Tensor]) -> tuple[str, ...]:
    """The arguments that are distributions, from which every sample draws; references per sample are none."""
    kinds = (attr.GradientShap, attr.DeepLiftShap)
    if not isinstance(method, FromCaptum) or not issubclass(method.kind, kinds):
        return ()
    value = arguments.get("baselines")
    first = value[0] if isinstance(value, tuple) and value else value
    return () if _has_own_references(first, 0, inputs) else ("baselines",)


def _has_own_references(value: Any, k: int, inputs: Sequence[Tensor]) -> bool:
    """Whether these are references ``[N, R, *in]`` of input ``k``."""
    return _has_rows(value) and k < len(inputs) and value.ndim == inputs[k].ndim + 1


def _has_rows(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


# ---------------------------------------------------------------------------------------------------------------
# One gradient


@register_method("jacobian")
def gradients(batch: Batch) -> Outcome:
    """∂y/∂x of the targets, with its sign, and the model's outputs from the same forward pass."""
    floating = [i for i, x in enumerate(batch.inputs) if x.is_floating_point()]
    tensors, indices = read_inputs(batch.inputs, floating)
    request = Request(batch.model, tensors, indices, jacobian_choice(batch.targets), batch.out, keep_outputs=True)
    results = solve(request, decide(request, batch.engine))
    seeds = results.seeds
    return Outcome(results.jacobians, results.outputs, seeds.indices if seeds.per_sample else None)


@register_method("saliency")
def saliency(batch: Batch) -> Outcome:
    """|∂y/∂x|."""
    return _apply_gradient_method(batch, attr.Saliency)


@register_method("input_x_gradient")
def input_x_gradient(batch: Batch) -> Outcome:
    """x · ∂y/∂x."""
    return _apply_gradient_method(batch, attr.InputXGradient)


#: The methods whose maps are gradients, and whether they are absolute values.
_OF_GRADIENTS: dict[Method, bool] = {gradients: False, saliency: True}


def add_to_sums(method: Method, batch: Batch, sums: Statistics) -> Tensor | None:
    """The model's outputs, and the maps of ``method`` added to ``sums``, without any being kept.

    None, with nothing added, if the maps are not gradients, or no kernel can do that for this model.
    """
    floating = [i for i, x in enumerate(batch.inputs) if x.is_floating_point()]
    if method not in _OF_GRADIENTS or len(floating) != 1 or batch.engine != "kernel":
        return None
    tensors, indices = read_inputs(batch.inputs, floating)
    sums = replace(sums, magnitude=_OF_GRADIENTS[method])
    request = Request(batch.model, tensors, indices, jacobian_choice(batch.targets))
    return solving.add_to_sums(request, decide(request, batch.engine), sums)


def _apply_gradient_method(batch: Batch, kind: type[GradientMethod]) -> Outcome:
    """The gradients, finished by the class of `gradkern.attr`, and the outputs from the same forward pass."""
    outcome = gradients(batch)
    kind(batch.model).finish_gradients(outcome.maps, tuple(x for x in batch.inputs if x.is_floating_point()), {})
    return outcome


# ---------------------------------------------------------------------------------------------------------------
# Those of gradkern.attr


@contextmanager
def _seeded(first: int) -> Iterator[None]:
    """Seed torch and numpy by the sample's index, so that a resumed run draws the same numbers as the first one."""
    state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(first)
        np.random.seed(first % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)


def flat_indices(indices: Tensor, out: tuple[int, ...]) -> Tensor:
    """Indices of outputs of shape ``out``, ``[N, S]`` or (of several axes) ``[N, S, axes]``, as flat ``[N, S]``."""
    if len(out) < 2:
        return indices
    return torch.from_numpy(np.ravel_multi_index(tuple(indices.movedim(-1, 0).cpu().numpy()), out))


class FromCaptum:
    """A class with ``attribute_all(inputs, targets, ...)``; it has deltas if it takes ``return_convergence_delta``."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.deltas = "return_convergence_delta" in inspect.signature(kind.attribute_all).parameters

    def __call__(self, batch: Batch) -> Outcome:
        if not all(x.is_floating_point() for x in batch.inputs):
            raise BadType(f"source: {self.kind.__name__} needs floating inputs, got {[x.dtype for x in batch.inputs]}.")
        options = with_references(batch.arguments, batch.inputs, batch.first)
        options |= {"return_convergence_delta": True} if self.deltas else {}
        inputs = batch.inputs[0] if len(batch.inputs) == 1 else batch.inputs
        with use(batch.engine), _seeded(batch.first):
            result = self.kind(batch.model).attribute_all(inputs, targets=batch.targets, **options)
        top = isinstance(batch.targets, TopK)
        maps, *more = result if self.deltas or top else (result,)
        deltas = more[0] if self.deltas else None
        maps = maps if isinstance(maps, tuple) else (maps,)
        with torch.no_grad():
            outputs = batch.model(*batch.inputs)
        out = tuple(outputs.shape[1:])
        n, axes = outputs.shape[0], maps[0].dim() - batch.inputs[0].dim()
        seeds = jacobian_choice(batch.targets)(n, out)
        rows = seeds.indices if seeds.per_sample else None
        if top:  # the outputs that were explained; another forward pass might order them differently
            rows = flat_indices(more[-1], out)
        maps = tuple(m.detach().reshape(n, seeds.count, *m.shape[1 + axes :]) for m in maps)
        if deltas is not None:  # Captum may give one for each baseline or draw
            deltas = deltas.reshape(n, -1, seeds.count).mean(1)
        return Outcome(maps, outputs.detach(), rows, deltas)
