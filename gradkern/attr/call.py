"""The behaviour that all public calls of attribution objects share, whatever the method.

`PublicMethod` adds it to ``attribute`` and ``attribute_all`` of each class:

* results carry no autograd graph (except where ``grad_kwargs`` asks for one with ``create_graph``);
* the buffers of the model and the object's own ``gradient_func`` are left as they were;
* a batch without samples gives results without samples;
* ``attribute_all`` takes the keywords of `SharedOptions`, and everything after the inputs and the baselines by name.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from ..dispatch.arguments import checked_wrt, is_one_index, out_tensor
from ..dispatch.route import one_call
from ..dispatch.targets import TopK
from ..util.buffers import buffers_kept
from ..util.callables import modules_behind
from ..util.options import BadType, BadValue, Engine, use
from ..util.progress import showing_progress
from ..util.random_state import RandomState
from ..util.renamed import adopt_old_methods
from .old_signatures import adopt_indices

if TYPE_CHECKING:
    from .plug import GradientFunc

STAND_INS = 2  # samples that stand in for an empty batch, to learn the shapes of results
POSITIONAL = ("self", "inputs", "neuron_selector", "baselines")
PARTS = ("attribution_method", "grad_cam", "guided_backprop", "deconv")
SHARED = ("out", "wrt", "engine")  # those of `SharedOptions` that a method may also handle itself
UNPACKED = ("Unpack[CallOptions]", "Unpack[SharedOptions]")  # in a signature: annotations are text
#: Methods that user-defined subclasses override: the names of the previous release and the present ones.
OLD_NAMES = {
    "_rows": "row_maps",
    "_layer": "layer_maps",
    "_finish": "finish_gradient",
    "_on_inputs": "method_on_inputs",
}
Function = Callable[..., Any]


class CallOptions(TypedDict, total=False):
    """The keywords of every ``attribute_all``, which the method itself need not handle.

    ``engine`` as in `gradkern.use`, for this call alone.  ``progress``: True or False; None shows a bar in a terminal,
    for calls of several seconds.
    """

    engine: Engine | None
    progress: bool | None


class SharedOptions(CallOptions, total=False):
    """`CallOptions`, and those that a method by `gradkern.jacobian` hands to it.

    ``out``: memory for the attributions, ``[N, C, *in]``; a tuple for several inputs.  ``wrt``: the indices of the
    inputs to attribute to; an int gives one tensor, a sequence a tuple, None all of them.
    """

    out: Any
    wrt: int | Sequence[int] | None


class PublicMethod:
    """Base of the attribution classes, which adds to every subclass what this module's docstring lists."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adopt_old_methods(cls, OLD_NAMES)
        adopt_indices(cls, ("row_maps", "layer_maps"))
        for name, wrap in (("attribute", _attribute), ("attribute_all", _attribute_all)):
            function = getattr(cls, name, None)
            if function is not None and not hasattr(function, "_is_public"):
                setattr(cls, name, wrap(function))


def _attribute(function: Function) -> Function:
    """``attribute`` with the shared behaviour."""

    @functools.wraps(function)
    def attribute(self: Any, *args: Any, **kwargs: Any) -> Any:
        with public_call(self):
            if _is_empty(args[0] if args else kwargs.get("inputs")):
                return _call_on_no_samples(function, self, args, kwargs)
            result = function(self, *args, **kwargs)
            graph = (kwargs.get("grad_kwargs") or {}).get("create_graph")
            return result if graph else map_tensors(_plain, result)

    return _mark(attribute, function)


def _attribute_all(function: Function) -> Function:
    """``attribute_all`` with the shared behaviour."""
    signature = inspect.signature(function)
    places = [name for name in signature.parameters if name in POSITIONAL]
    native = [name for name in SHARED if name in signature.parameters]
    signature = _with_shared_options(signature, native)
    named = None if _open_ended(signature) else signature.parameters.keys()

    @functools.wraps(function)
    def attribute_all(self: Any, *args: Any, progress: bool | None = None, **kwargs: Any) -> Any:
        _check_arguments(self, places, args, kwargs)
        if named is not None and (unknown := kwargs.keys() - named):
            raise TypeError(
                f"{type(self).__name__}.attribute_all() got an unexpected keyword argument {min(unknown)!r}"
            )
        none = _is_empty(args[0] if args else kwargs.get("inputs"))
        shared = {name: kwargs.pop(name, None) for name in SHARED if (none and name == "out") or name not in native}
        method = self if shared["engine"] is None else with_engine(self, shared["engine"])
        with public_call(method), showing_progress(progress):
            result = _call_on_no_samples(function, method, args, kwargs) if none else function(method, *args, **kwargs)
            result = map_tensors(_plain, result)
        extras = kwargs.get("return_convergence_delta") or isinstance(kwargs.get("targets"), TopK)
        maps, *rest = result if extras else (result,)
        maps = _written(_of_inputs(maps, shared.get("wrt")), shared.get("out"))
        return (maps, *rest) if extras else maps

    attribute_all.__signature__ = signature  # type: ignore[attr-defined]
    return _mark(attribute_all, function)


def _with_shared_options(signature: inspect.Signature, native: Sequence[str]) -> inspect.Signature:
    """The signature with each of `SharedOptions` by its name, in place of ``**shared``."""
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [*(name for name in SHARED if name not in native), "progress"]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
    rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return signature.replace(parameters=parameters + [p for p in rest if p.annotation not in UNPACKED])


def _open_ended(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _mark(wrapper: Function, function: Function) -> Function:
    wrapper._is_public = True  # type: ignore[attr-defined]
    wrapper.__wrapped__ = getattr(function, "__wrapped__", function)  # type: ignore[attr-defined]  # as Captum's own
    return wrapper


def _plain(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """The tree of tuples, lists and dicts with ``change`` made to every tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)(map_tensors(change, part) for part in tree)
    if type(tree) is dict:
        return {name: map_tensors(change, part) for name, part in tree.items()}
    return tree


# ---------------------------------------------------------------------------------------------------------------
# The model as it was


class _Call(ExitStack):
    """The current public call, and the models whose buffers are restored at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []


_current: ContextVar[_Call | None] = ContextVar("gradkern_attribution", default=None)


@contextmanager
def public_call(method: Any) -> Iterator[None]:
    """Treat everything inside as one public call of ``method``; afterwards, restore the method and the model."""
    # Captum sets the gradient of some of its objects at every call
    gradients = [(part, part.gradient_func) for part in _with_parts(method) if hasattr(part, "gradient_func")]
    try:
        if _current.get() is not None:
            yield
            return
        ours = _our_gradients(method)
        with use(ours.engine if ours else None), one_call(), _Call() as call:
            token = _current.set(call)
            try:
                if ours is None:
                    keep_buffers(getattr(method, "forward_func", None))
                yield
            finally:
                _current.reset(token)
    finally:
        for part, gradient in gradients:
            part.gradient_func = gradient


def _our_gradients(method: Any) -> GradientFunc | None:
    """The gradient function of a method, or of the innermost one inside it; None if it is not gradkern's."""
    from .plug import GradientFunc

    while hasattr(method, "attribution_method"):
        method = method.attribution_method
    gradients = getattr(method, "gradient_func", None)
    return gradients if isinstance(gradients, GradientFunc) else None


def keep_buffers(fn: Any) -> None:
    """Restore the buffers of ``fn``, whose live model will run, when the public call ends."""
    call = _current.get()
    if call is not None and not any(fn is other for other in call.kept):
        call.kept.append(fn)
        call.enter_context(buffers_kept(nn.ModuleList(modules_behind(fn))))


def parts_of(method: Any) -> dict[str, Any]:
    """The methods that a composed one is made of, by the attributes in which Captum keeps them."""
    named = ((name, getattr(method, name, None)) for name in PARTS)
    return {name: part for name, part in named if part is not None}


def _with_parts(method: Any) -> list[Any]:
    return [method, *(inner for part in parts_of(method).values() for inner in _with_parts(part))]


def as_instance_of(kind: Any, method: Any) -> Any:
    """``method`` as an object of another class, with what its constructor has set: the model, engine and factors."""
    other = kind.__new__(kind)
    other.__dict__.update(vars(method))
    return other


def with_engine(method: Any, engine: Any) -> Any:
    """``method`` on another engine."""
    from .plug import GradientFunc

    twin = copy.copy(method)
    if isinstance(getattr(twin, "gradient_func", None), GradientFunc):
        twin.gradient_func = type(twin.gradient_func)(engine)
    for name, part in parts_of(twin).items():
        setattr(twin, name, with_engine(part, engine))
    return twin


# ---------------------------------------------------------------------------------------------------------------
# Arguments


def _check_arguments(method: Any, places: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise the errors that all methods share."""
    from .plug import GradientFunc

    name = f"{type(method).__name__}.attribute_all"
    if len(args) >= len(places):
        raise BadType(
            f"{name}: got {len(args)} arguments by position, expected only {', '.join(places[1:])}. Pass the others by "
            "name: attribute_all(inputs, targets=...)."
        )
    if "target" in kwargs:
        raise BadType(
            f"{name}: got target=, expected targets=: the outputs to attribute, as gradkern.jacobian reads them (None: "
            "all). For one target per sample as in Captum use attribute(inputs, target=...)."
        )
    if "baselines" in places:
        at = places.index("baselines") - 1
        baselines = args[at] if len(args) > at else kwargs.get("baselines")
        if isinstance(baselines, (TopK, list, range, set)):
            raise BadType(
                f"{name}: got {baselines!r} as baselines, expected a number, a tensor or a tuple of them. Pass outputs "
                "by name: targets=..."
            )
    for part in _with_parts(method):
        gradients = getattr(part, "gradient_func", None)
        if isinstance(part, PublicMethod) and gradients is not None and not isinstance(gradients, GradientFunc):
            raise BadType(
                f"{name}: got a custom gradient_func ({gradients!r}), which gives one target at a time, expected "
                f"gradkern's. Call attribute(inputs, target=...) per target, or make a new {type(part).__name__}."
            )


def _of_inputs(maps: Any, wrt: int | Sequence[int] | None) -> Any:
    """The maps of the inputs ``wrt``: one for an int, else a tuple."""
    if wrt is None:
        return maps
    parts = maps if isinstance(maps, tuple) else (maps,)
    chosen = tuple(parts[w] for w in checked_wrt(wrt, len(parts)))
    return chosen[0] if is_one_index(wrt) else chosen


def _written(maps: Any, out: Any) -> Any:
    """The maps in the caller's memory, if ``out`` is given."""
    if out is None:
        return maps
    parts, outs = (x if isinstance(x, (tuple, list)) else [x] for x in (maps, out))
    if len(parts) != len(outs):
        raise BadValue(f"out: got {len(outs)} tensors, expected {len(parts)}, one per attribution.")
    for part, place in zip(parts, outs, strict=True):
        out_tensor(place, tuple(part.shape), tuple(part.shape)).copy_(part)
    return out


# ---------------------------------------------------------------------------------------------------------------
# No samples


def _is_empty(inputs: Any) -> bool:
    first = inputs[0] if isinstance(inputs, (tuple, list)) and inputs else inputs
    return isinstance(first, Tensor) and first.dim() > 0 and first.shape[0] == 0


def _call_on_no_samples(function: Function, method: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Results for an empty batch: the method runs on a few zero samples, and zero rows of its results are kept."""
    state, numpy_state = RandomState(), np.random.get_state()
    kwargs = {name: _with_stand_ins(value) for name, value in kwargs.items()}
    try:
        result = function(
            method,
            *map_tensors(_fill_if_empty, tuple(map(_with_stand_ins, args))),
            **map_tensors(_fill_if_empty, kwargs),
        )
    finally:
        state.restore()
        np.random.set_state(numpy_state)
    return map_tensors(lambda x: x[:0].clone(), result)


def _with_stand_ins(value: Any) -> Any:
    """Replace an empty list by `STAND_INS` zeros, and a numeric array by a tensor."""
    if isinstance(value, list) and not value:
        return [0] * STAND_INS
    return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" else value


def _fill_if_empty(x: Tensor) -> Tensor:
    return x if x.dim() == 0 or x.shape[0] else torch.zeros(STAND_INS, *x.shape[1:], dtype=x.dtype, device=x.device)
