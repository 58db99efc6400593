"""The plug into Captum: a ``gradient_func`` that runs on gradkern, and `accelerate`, which puts it in place.

Captum calls it as ``(forward_fn, inputs, target_ind, additional_forward_args)``.  Targets are read by Captum's own
code, and whatever gradkern cannot take over goes to Captum's own `compute_gradients`, so results and errors are
Captum's.  Captum itself is never patched.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import api
from ..dispatch import guards, state
from ..dispatch.request import Job, model_of
from ..dispatch.targets import Seeds, Shape
from ..util import options
from ..util.options import BadType, BadValue, Complaint
from .captum_compat import (
    compute_gradients,
    format_additional_forward_args,
    format_tensor_into_tuples,
    select_targets,
    stock,
)


class GradientFunc:
    """A drop-in for Captum's `compute_gradients`.  ``engine`` as in `gradkern.use`; None: what holds at the call."""

    def __init__(self, engine: str | None = None) -> None:
        self.engine = engine if engine is None else options.engine(engine)

    def __call__(
        self,
        forward_fn: Callable[..., Any],
        inputs: Tensor | tuple[Tensor, ...],
        target_ind: Any = None,
        additional_forward_args: Any = None,
    ) -> tuple[Tensor, ...]:
        """Gradients of the selected output with respect to each input, shaped as the inputs."""
        job = self._job(forward_fn, inputs, target_ind, additional_forward_args)
        if job is not None:
            try:
                api.solve(job, self.engine, strict=True)
                return tuple(j[:, 0] for j in job.results)
            except Complaint:
                pass  # Captum has its own error for it, or knows better
            except Exception:
                compute_gradients(forward_fn, inputs, target_ind, additional_forward_args)  # Captum's own error
                raise
        return compute_gradients(forward_fn, inputs, target_ind, additional_forward_args)

    def __repr__(self) -> str:
        return f"gradkern.GradientFunc(engine={self.engine!r})"

    def _job(self, fn: Callable[..., Any], inputs: Any, target: Any, extra: Any) -> Job | None:
        """The call as a job, or None where it is Captum's: one warning says why."""
        given = format_tensor_into_tuples(inputs)
        why = not_ours(fn, given, extra, options.engine(self.engine))
        if why is None:
            return None
        if why:
            say(fn, why)
            return None
        more = format_additional_forward_args(extra) or ()
        return Job(fn, (*given, *more), tuple(range(len(given))), lambda n, out: captum_seeds(target, n, out))


def not_ours(fn: Callable[..., Any], given: tuple[Any, ...], extra: Any, engine: str | None) -> str | None:
    """Why a call stays with Captum: words to warn with, None for without a word, and "" where it is ours."""
    if engine == "autograd":
        return None
    if not given or not all(isinstance(x, Tensor) and x.is_floating_point() and x.dim() for x in given):
        return None  # Captum's own error, or nothing to gain
    samples = given[0].shape[0]
    if samples == 0 or any(x.shape[0] != samples for x in given):
        return None
    if model_of(fn) is None:
        if not inspect.signature(fn).parameters:
            return "this method hands over a closed computation instead of a model (as DeepLift does)"
        return f"{getattr(fn, '__qualname__', type(fn).__name__)} is neither a module nor a module's own forward"
    refused = guards.at_once(fn, given)
    if refused is not None:
        return refused.reason
    for x in format_additional_forward_args(extra) or ():
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != samples:
            return "an additional_forward_args entry is not a tensor with one row per sample"
    return ""


def say(fn: Callable[..., Any], reason: str) -> None:
    module = model_of(fn)
    message = f"{{}} stays with Captum's own gradients: {reason}."
    if module is None:
        state.warn_once(message.format("This call"))
    else:
        state.entry(module).warn(message.format(type(module).__name__))


def captum_seeds(target: Any, samples: int, out_shape: Shape) -> Seeds:
    """Captum's reading of ``target``, by Captum's own code: applied to a tensor of output numbers.

    Raises `BadValue` for a target that does not fit; `compute_gradients` then raises Captum's own error.
    """
    numbers = torch.arange(math.prod(out_shape)).view(1, *out_shape)  # [1, *out]
    try:
        chosen = select_targets(
            numbers.expand(samples, *out_shape),  # [N, *out], no memory
            target.cpu() if isinstance(target, Tensor) else target,
        )
        flat = chosen.reshape(samples)  # [N]
    except Exception as error:
        raise BadValue(f"target: got {target!r}, which Captum refuses for outputs [N, {out_shape}]: {error}") from error
    if bool((flat == flat[0]).all()):
        return Seeds(1, (1,), flat[:1].clone())
    return Seeds(1, (1,), flat[:, None])


def accelerate(attribution: Any, engine: str | None = None) -> Any:
    """Put gradkern under a stock Captum attribution object, and return that very object.

    ``accelerate(IntegratedGradients(model)).attribute(x, target=1)``: arguments and results stay Captum's.  An object
    of a class that `gradkern.attr` has becomes one of that class, so that it also has ``attribute_all``; one of
    another gradient class (a subclass of the user's) gets gradkern's gradients.  A `NoiseTunnel` passes it on to the
    method inside.
    """
    from . import TWINS

    inner = getattr(attribution, "attribution_method", None)
    if inner is not None:
        accelerate(inner, engine)
        attribution.__class__ = TWINS.get(type(attribution), type(attribution))
        return attribution
    if not hasattr(attribution, "gradient_func"):
        raise BadType(
            f"accelerate: got {type(attribution).__name__}, expected a Captum gradient attribution (an object with "
            "a gradient_func), such as captum.attr.IntegratedGradients(model)."
        )
    kind = TWINS.get(type(attribution), type(attribution))
    if kind in TWINS.values():
        attribution.__class__ = kind
        for part in ("grad_cam", "guided_backprop"):
            if hasattr(attribution, part):
                accelerate(getattr(attribution, part), engine)
    elif isinstance(attribution, (stock.LayerAttribution, stock.NeuronAttribution)):
        state.warn_once(f"accelerate: {type(attribution).__name__} brings its own gradient and keeps it.")
    attribution.gradient_func = GradientFunc(engine)
    return attribution


__all__ = ["GradientFunc", "accelerate", "captum_seeds"]
