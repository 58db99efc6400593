"""Methods that finish one gradient elementwise: Saliency, input × gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from .. import api
from ..dispatch.arguments import checked_wrt
from ..dispatch.targets import Seeds, TopK
from ..util.options import Engine
from ..util.outputs import Output
from ..util.renamed import keyword_only, warn_of_old_name
from .attribute_all import Inputs, Options, RowMethod, Tensors, as_attribute_all
from .call import CallOptions
from .captum_compat import format_tensor_into_tuples, is_tuple, stock
from .plug import HooklessGradientFunc, plug_into
from .points import Points, with_arguments


class GradientMethod(RowMethod):
    """A method that computes a gradient and applies `finish_gradient` to it."""

    gradients = HooklessGradientFunc

    @keyword_only("engine", "output")
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        *,
        engine: Engine | None = None,
        output: Output = None,
    ) -> None:
        super().__init__(forward_func)
        plug_into(self, self.gradients(engine), output)

    def finish_gradient(self, gradient: Tensor, x: Tensor, options: Options) -> None:
        """Turn the gradient ``[N, …, *in]`` into the attribution, in place.  ``x``: the input, ``[N, 1…, *in]``."""
        raise NotImplementedError

    def row_maps(self, points: Points, seeds: Seeds, options: Options) -> Tensors:
        gradients = points.gradients(points.inputs, points.more, seeds)
        self.finish_gradients(gradients, points.inputs, options)
        return gradients

    def finish_gradients(self, gradients: Any, rows: Tensors, options: Options) -> None:
        """Turn the gradients ``[N, …, *in]``, one per input of ``rows``, into attributions, in place."""
        for gradient, x in zip(gradients, rows, strict=True):
            tensor = gradient if isinstance(gradient, Tensor) else torch.from_numpy(gradient)  # the same memory
            lead = (x.shape[0], *(1,) * (tensor.dim() - x.dim()))
            self.finish_gradient(tensor, x.detach().to(tensor.device).reshape(*lead, *x.shape[1:]), options)

    def attribute_by_jacobian(
        self, inputs: Inputs, targets: Any, extra: Any, out: Any, wrt: Any, finish: Options
    ) -> Any:
        """``attribute_all`` by `gradkern.jacobian`, with its ``out`` and ``wrt``."""
        options = {"engine": self.gradient_func.engine, "out": out, "wrt": wrt}
        jacobian = jacobians(self.forward_func, inputs, targets, extra, options)
        rows = format_tensor_into_tuples(inputs)
        maps = jacobian[0] if isinstance(targets, TopK) else jacobian
        each = maps if isinstance(maps, (tuple, list)) else [maps]
        self.finish_gradients(each, tuple(rows[w] for w in checked_wrt(wrt, len(rows))), finish)
        return jacobian

    def _jacobian(self, *args: Any) -> Any:
        warn_of_old_name("GradientMethod._jacobian", "GradientMethod.attribute_by_jacobian", 3)
        return self.attribute_by_jacobian(*args)


class Saliency(GradientMethod, stock.Saliency):
    """The gradient of an output with respect to the input (Simonyan et al., arXiv:1312.6034).

    A drop-in for `captum.attr.Saliency`: the same arguments, targets as Captum reads them, the same results and
    errors.  ``engine`` as in `gradkern.use`; None takes the one set at each call.  Attribute logits: the gradient of
    a probability vanishes where the model is sure.
    """

    @as_attribute_all
    def attribute_all(
        self,
        inputs: Inputs,
        *,
        targets: Any = None,
        abs: bool = True,
        additional_forward_args: Any = None,
        out: Any = None,
        wrt: Any = None,
        **shared: Unpack[CallOptions],
    ) -> Any:
        """Saliency of every output (or of ``targets``, as `gradkern.jacobian` reads them): ``[N, C, *in]``.

        ``abs=False`` keeps the sign.  A tuple of inputs gives a tuple; ``TopK(k)`` gives the pair of that and the
        indices.
        """
        return self.attribute_by_jacobian(inputs, targets, additional_forward_args, out, wrt, {"abs": abs})

    def finish_gradient(self, gradient: Tensor, x: Tensor, options: Options) -> None:
        if options.get("abs", True):
            gradient.abs_()


class InputXGradient(GradientMethod, stock.InputXGradient):
    """Input times gradient (Shrikumar et al., arXiv:1605.01713).

    A drop-in for `captum.attr.InputXGradient`.  Attribute logits: a probability's gradient vanishes where the model
    is sure, and one class's evidence is mixed with all others'.
    """

    @as_attribute_all
    def attribute_all(
        self,
        inputs: Inputs,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        out: Any = None,
        wrt: Any = None,
        **shared: Unpack[CallOptions],
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``."""
        return self.attribute_by_jacobian(inputs, targets, additional_forward_args, out, wrt, {})

    def finish_gradient(self, gradient: Tensor, x: Tensor, options: Options) -> None:
        gradient.mul_(x)


def jacobians(fn: Callable[..., Any], inputs: Any, targets: Any, extra: Any, options: Options) -> Any:
    """`gradkern.jacobian` with Captum's ``additional_forward_args`` after the inputs."""
    if extra is None:
        return api.jacobian(fn, inputs, targets, **options)
    rows = format_tensor_into_tuples(inputs)
    fn, more = with_arguments(fn, rows, extra)
    wrt = options["wrt"]
    options |= {"wrt": list(range(len(rows))) if wrt is None else wrt}
    jacobian = api.jacobian(fn, (*rows, *more), targets, **options)
    if is_tuple(inputs) or wrt is not None:
        return jacobian
    return (jacobian[0][0], jacobian[1]) if isinstance(targets, TopK) else jacobian[0]
