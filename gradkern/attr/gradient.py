"""Saliency: Captum's, on gradkern's engine, and for all outputs at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from captum import attr as captum_attr
from torch import Tensor

from ..dispatch.targets import TopK
from .attribute_all import RowMethod
from .paths import jacobians
from .plug import GradientFunc
from .points import Points


class Saliency(RowMethod, captum_attr.Saliency):
    """The gradient of an output with respect to the input (Simonyan et al., arXiv:1312.6034).

    A drop-in for `captum.attr.Saliency`: the same arguments, targets as Captum reads them, the same results and
    errors.  ``engine`` as in `gradkern.use`; None takes what holds at each call.  Attribute logits: the gradient of
    a probability vanishes where the model is sure.
    """

    def __init__(self, forward_func: Callable[..., Tensor], engine: str | None = None) -> None:
        super().__init__(forward_func)
        self.gradient_func = GradientFunc(engine)

    def attribute_all(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Any = None,
        abs: bool = True,
        additional_forward_args: Any = None,
        **options: Any,
    ) -> Any:
        """Saliency of every output (or of ``targets``, as `gradkern.jacobian` reads them): ``[N, C, *in]``.

        ``abs=False`` keeps the sign.  ``options`` are those of `gradkern.jacobian` (``out=``, ``wrt=``).  A tuple of
        inputs gives a tuple; ``TopK(k)`` gives the pair of that and the indices.
        """
        options.setdefault("engine", self.gradient_func.engine)
        found = jacobians(self.forward_func, inputs, targets, additional_forward_args, options)
        if abs:
            first = found[0] if isinstance(targets, TopK) else found
            for jac in first if isinstance(first, (tuple, list)) else (first,):
                jac.abs_() if isinstance(jac, Tensor) else np.abs(jac, out=jac)
        return found

    def _rows(self, rows, more, index, seeds, given):
        points = Points(self.forward_func, rows, more, self.gradient_func.engine)
        found = points.gradients(rows, more, index, seeds)
        return tuple(g.abs_() for g in found) if given.get("abs", True) else found
