"""The plug into Captum: a ``gradient_func`` that runs on gradkern, and `accelerate`, which installs it.

Captum calls it as ``(forward_fn, inputs, target_ind, additional_forward_args)``.  Captum's own code reads the targets,
and calls that gradkern cannot take over go to Captum's own `compute_gradients`, so results and errors are Captum's.
Captum itself is never patched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ..dispatch import state
from ..dispatch.request import Request
from ..dispatch.route import Route, decide, shared_route
from ..dispatch.solve import solve
from ..util import options
from ..util.buffers import buffers_kept
from ..util.callables import modules_behind, name_of, unwrap, with_output
from ..util.options import BadArgument, BadType, Engine, Unused, debugging
from ..util.outputs import OneOutput, Output, check_output_choice
from ..util.renamed import keyword_only
from .call import keep_buffers, parts_of
from .captum_compat import compute_gradients, format_tensor_into_tuples, stock
from .captum_targets import captum_seeds
from .points import with_arguments


class GradientFunc:
    """A drop-in for Captum's `compute_gradients`.  ``engine`` as in `gradkern.use`; None: the one set at the call."""

    _route = staticmethod(decide)

    def __init__(self, engine: Engine | None = None) -> None:
        self.engine = engine if engine is None else options.engine(engine)

    def __call__(
        self,
        forward_fn: Callable[..., Any],
        inputs: Tensor | tuple[Tensor, ...],
        target_ind: Any = None,
        additional_forward_args: Any = None,
    ) -> tuple[Tensor, ...]:
        """Gradients of the selected output with respect to each input, in the shapes of the inputs."""
        tensors = format_tensor_into_tuples(inputs)
        if can_handle_call(forward_fn, tensors, self.engine):
            fn, more = with_arguments(forward_fn, tensors, additional_forward_args)
            wrt = tuple(range(len(tensors)))
            request = Request(fn, (*tensors, *more), wrt, lambda n, out: captum_seeds(target_ind, n, out))
            try:
                route = self._route(request, self.engine)
                if route_is_supported(route):
                    return tuple(j[:, 0] for j in solve(request, route).jacobians)
            except BadArgument:
                pass  # Captum raises its own error, or accepts it
            except Unused:
                raise
            except Exception:
                if debugging():
                    raise
                compute_gradients(forward_fn, inputs, target_ind, additional_forward_args)  # Captum's own error
                raise
        with buffers_kept(nn.ModuleList(modules_behind(forward_fn))):
            return compute_gradients(forward_fn, inputs, target_ind, additional_forward_args)

    def __repr__(self) -> str:
        return f"gradkern.GradientFunc(engine={self.engine!r})"


class HooklessGradientFunc(GradientFunc):
    """The gradients of methods that register no hooks: calls within one public call (noisy copies) share a route."""

    _route = staticmethod(shared_route)


def can_handle_call(
    fn: Callable[..., Any], tensors: tuple[Any, ...], engine: Engine | None, *, integers: bool = False
) -> bool:
    """Whether gradkern may take over a call with these arguments.  If not, a warning gives the reason, if there is one.

    ``integers``: inputs need not be floating, because their own gradients are not requested.
    """
    ours = _suits(fn, tensors, engine, integers)
    if not ours:
        keep_buffers(fn)
    return ours


def _suits(fn: Callable[..., Any], tensors: tuple[Any, ...], engine: Engine | None, integers: bool) -> bool:
    if options.engine(engine) == "autograd":
        return False
    if not tensors or not all(isinstance(x, Tensor) and x.dim() for x in tensors):
        return False  # Captum's own error
    if not all(x.is_floating_point() or (integers and not x.is_complex()) for x in tensors):
        return False
    samples = tensors[0].shape[0]
    if samples == 0 or any(x.shape[0] != samples for x in tensors):
        return False
    closed = isinstance(fn, FunctionType) and not inspect.signature(fn).parameters
    if closed:
        _say(fn, "this method passes a closed computation instead of a model (as DeepLift does)")
    return not closed


def route_is_supported(route: Route) -> bool:
    """Whether gradkern takes this route.  If autograd has to, Captum's own gradients run, and a warning says why."""
    if route.eager_reason is not None:
        keep_buffers(route.fn)
        _say(route.fn, route.eager_reason.text)
    return route.eager_reason is None


def _say(fn: Callable[..., Any], reason: str) -> None:
    state.warn(fn, f"{name_of(fn)} stays with Captum's own gradients: {reason}.")


def plug_into(attribution: Any, gradients: GradientFunc, output: Output = None) -> None:
    """Give an attribution object these gradients, and unwrap a compiled or parallel model.

    Captum looks for hooks and layers in the module inside.  ``output``: the part of the model's result that is
    explained, as in `gradkern.jacobian`.
    """
    attribution.gradient_func = gradients
    for name in ("forward_func", "model"):
        if hasattr(attribution, name):
            setattr(attribution, name, unwrap(getattr(attribution, name)))
    if check_output_choice(output) is not None:
        model = attribution.forward_func
        is_module = isinstance(attribution, stock.NeuronAttribution) and isinstance(model, nn.Module)
        attribution.forward_func = OneOutput(model, output) if is_module else with_output(model, output)
        if hasattr(attribution, "model"):
            attribution.model = OneOutput(attribution.model, output)


@keyword_only("engine")
def accelerate(attribution: Any, *, engine: Engine | None = None) -> Any:
    """Put gradkern under a stock Captum attribution object, and return the same object.

    ``accelerate(IntegratedGradients(model)).attribute(x, target=1)``: arguments and results stay Captum's.  An object
    whose class is in `gradkern.attr` becomes an object of that class, so that it also has ``attribute_all``.  An object
    of another gradient class (such as a user's subclass) gets gradkern's gradients.  A `NoiseTunnel` passes them on to
    the method inside.
    """
    from . import REPLACEMENTS

    inner = getattr(attribution, "attribution_method", None)
    if inner is not None:
        accelerate(inner, engine=engine)
        attribution.__class__ = REPLACEMENTS.get(type(attribution), type(attribution))
        return attribution
    if not hasattr(attribution, "gradient_func"):
        raise BadType(
            f"accelerate: got {type(attribution).__name__}, expected a Captum gradient attribution (an object with "
            "a gradient_func), such as captum.attr.IntegratedGradients(model)."
        )
    kind = REPLACEMENTS.get(type(attribution), type(attribution))
    if kind in REPLACEMENTS.values():
        attribution.__class__ = kind
        for part in parts_of(attribution).values():
            accelerate(part, engine=engine)
    elif isinstance(attribution, (stock.LayerAttribution, stock.NeuronAttribution)):
        state.warn(None, f"accelerate: {type(attribution).__name__} brings its own gradient and keeps it.")
    plug_into(attribution, getattr(kind, "gradients", GradientFunc)(engine))
    return attribution


__all__ = ["GradientFunc", "accelerate"]
