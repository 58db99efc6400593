"""The methods that need nothing but gradients: input × gradient, integrated gradients, GradientShap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum import attr as captum_attr
from captum._utils.common import _format_tensor_into_tuples, _is_tuple
from captum.attr._core.gradient_shap import InputBaselineXGradient as StockInputBaselineXGradient
from captum.attr._utils.approximation_methods import approximation_parameters
from captum.attr._utils.common import _format_callable_baseline, _format_input_baseline, _validate_input
from torch import Tensor

from .. import api
from ..dispatch.targets import Seeds, TopK
from ..util.options import Complaint
from .attribute_all import RowMethod, points_for
from .noise_tunnel import NoiseTunnel
from .plug import GradientFunc, captum_seeds
from .points import Points, path_sum


class InputXGradient(RowMethod, captum_attr.InputXGradient):
    """Input times gradient (Shrikumar et al., arXiv:1605.01713).

    A drop-in for `captum.attr.InputXGradient`.  Attribute logits: a probability's gradient vanishes where the model
    is sure, and one class's evidence is mixed with all others'.
    """

    def __init__(self, forward_func: Callable[..., Tensor], engine: str | None = None) -> None:
        super().__init__(forward_func)
        self.gradient_func = GradientFunc(engine)

    def attribute_all(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Any = None,
        additional_forward_args: Any = None,
        **options: Any,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``."""
        options.setdefault("engine", self.gradient_func.engine)
        many, rows = _is_tuple(inputs), _format_tensor_into_tuples(inputs)
        found = jacobians(self.forward_func, inputs, targets, additional_forward_args, options)
        first = found[0] if isinstance(targets, TopK) else found
        wrt = options.get("wrt")
        numbers = range(len(rows)) if wrt is None else (wrt,) if isinstance(wrt, int) else wrt
        many = many if wrt is None else not isinstance(wrt, int)
        for w, jac in zip(numbers, first if many else (first,), strict=True):
            x = rows[w].detach()
            x = x.reshape(x.shape[0], *(1,) * (jac.ndim - x.dim()), *x.shape[1:])  # [N, 1…, *in]
            jac.mul_(x) if isinstance(jac, Tensor) else np.multiply(jac, x.cpu().numpy(), out=jac)
        return found

    def _rows(self, rows, more, index, seeds, given):
        points = Points(self.forward_func, rows, more, self.gradient_func.engine)
        found = points.gradients(rows, more, index, seeds)
        return tuple(g.mul_(x.detach().unsqueeze(1)) for g, x in zip(found, rows, strict=True))


def jacobians(fn: Callable[..., Any], inputs: Any, targets: Any, extra: Any, options: dict[str, Any]) -> Any:
    """`gradkern.jacobian` with Captum's ``additional_forward_args`` behind the inputs."""
    if extra is None:
        return api.jacobian(fn, inputs, targets, **options)
    more = extra if isinstance(extra, tuple) else (extra,)
    rows = _format_tensor_into_tuples(inputs)
    n = rows[0].shape[0]
    if all(isinstance(x, Tensor) and x.dim() and x.shape[0] == n for x in more):
        options = {"wrt": list(range(len(rows)))} | options
        found = api.jacobian(fn, (*rows, *more), targets, **options)
    else:  # something that the batch cannot be cut along
        found = api.jacobian(lambda *xs: fn(*xs, *more), rows, targets, **options)
    if _is_tuple(inputs) or isinstance(options.get("wrt"), int):
        return found
    return (found[0][0], found[1]) if isinstance(targets, TopK) else found[0]


class IntegratedGradients(RowMethod, captum_attr.IntegratedGradients):
    """The mean gradient on the straight path from a baseline, times input minus baseline (arXiv:1703.01365).

    A drop-in for `captum.attr.IntegratedGradients` whose steps are summed as they are computed: memory does not grow
    with ``n_steps``.  Logits and probabilities are both complete (attributions add up to the change of what is
    attributed); prefer logits, as the path saturates in probabilities.
    """

    def __init__(
        self, forward_func: Callable[..., Tensor], multiply_by_inputs: bool = True, engine: str | None = None
    ) -> None:
        super().__init__(forward_func, multiply_by_inputs)
        self.gradient_func = GradientFunc(engine)

    def _attribute(
        self,
        inputs: tuple[Tensor, ...],
        baselines: tuple[Any, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        step_sizes_and_alphas: tuple[list[float], list[float]] | None = None,
    ) -> tuple[Tensor, ...]:
        """Captum's own hook for one path, also called by its ``internal_batch_size``."""
        totals = None
        points = points_for(self, inputs, additional_forward_args) if _takes_over(self.gradient_func) else None
        if points is not None:
            weights, alphas = step_sizes_and_alphas or _steps(method, n_steps)
            try:
                seeds, _ = points.choose(lambda n, out: captum_seeds(target, n, out))
                totals = path_sum(
                    points, baselines, seeds, _floats(weights), torch.tensor(alphas, dtype=torch.float64), strict=True
                )
            except Exception as error:
                if not isinstance(error, Complaint):
                    super()._attribute(
                        inputs, baselines, target, additional_forward_args, n_steps, method, step_sizes_and_alphas
                    )
                    raise
        if totals is None:  # Captum's own, and Captum's own errors
            return super()._attribute(
                inputs, baselines, target, additional_forward_args, n_steps, method, step_sizes_and_alphas
            )
        found = tuple(t[:, 0] for t in totals)
        if not self.multiplies_by_inputs:
            return found
        return tuple(g * (x - base) for g, x, base in zip(found, inputs, baselines, strict=True))

    def attribute_all(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Any = None,
        baselines: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        return_convergence_delta: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        With ``return_convergence_delta`` also the delta per sample and output, ``[N, C]``.
        """
        rows, start = _format_input_baseline(inputs, baselines)
        _validate_input(rows, start, n_steps, method)
        given = {"baselines": baselines, "n_steps": n_steps, "method": method}
        return self._every(inputs, targets, additional_forward_args, given, return_convergence_delta)

    def _rows(self, rows, more, index, seeds, given):
        rows, baselines = _format_input_baseline(rows, given.get("baselines"))
        weights, alphas = _steps(given.get("method", "gausslegendre"), given.get("n_steps", 50))
        points = Points(self.forward_func, rows, more, self.gradient_func.engine)
        totals = path_sum(
            points,
            baselines,
            Seeds(seeds, (seeds,), index),
            _floats(weights),
            torch.tensor(alphas, dtype=torch.float64),
        )
        if self.multiplies_by_inputs:
            times_difference(totals, rows, baselines)
        return totals


def _takes_over(gradient_func: Any) -> bool:
    return isinstance(gradient_func, GradientFunc)


def _steps(method: str, n: int) -> tuple[list[float], list[float]]:
    sizes, alphas = approximation_parameters(method)
    return sizes(n), alphas(n)


def _floats(weights: list[float]) -> Tensor:
    """Captum rounds the step sizes to float32, for float64 inputs too; equal numbers need the same."""
    return torch.tensor(weights).float()


def times_difference(parts: Any, inputs: Any, baselines: Any) -> None:
    """``parts [N, S, *in]`` times input minus baseline, in place."""
    with torch.no_grad():
        for total, x, base in zip(parts, inputs, baselines, strict=True):
            total.mul_((x - base).unsqueeze(1))


class InputBaselineXGradient(RowMethod, StockInputBaselineXGradient):
    """The gradient at a random point between baseline and input, times their difference: one draw of GradientShap."""

    def _rows(self, rows, more, index, seeds, given):
        rows, baselines = _format_input_baseline(rows, given.get("baselines"))
        r = torch.tensor(np.random.uniform(0.0, 1.0, rows[0].shape[0]), device=rows[0].device, dtype=rows[0].dtype)
        points = Points(self.forward_func, rows, more, getattr(self.gradient_func, "engine", None))
        with torch.no_grad():
            at = []
            for x, base in zip(rows, baselines, strict=True):
                here = r.view(-1, *(1,) * (x.dim() - 1))
                at.append(here * x + (1.0 - here) * base)
            found = points.gradients(at, more, index, seeds)
        if self.multiplies_by_inputs:
            times_difference(found, rows, baselines)
        return found


class GradientShap(captum_attr.GradientShap):
    """Expected gradients over random baselines and random points on the way (SHAP's GradientExplainer).

    A drop-in for `captum.attr.GradientShap`, with equal numbers for equal seeds of torch and numpy.  Attribute
    logits: only they add up over features on the scale on which the classes compete.
    """

    def __init__(
        self, forward_func: Callable[..., Tensor], multiply_by_inputs: bool = True, engine: str | None = None
    ) -> None:
        super().__init__(forward_func, multiply_by_inputs)
        self.gradient_func = GradientFunc(engine)

    def attribute_all(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Any,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        All outputs share the random draws.  The delta is per draw, as Captum's: ``[N · n_samples, C]``.
        """
        start = _format_callable_baseline(baselines, inputs)
        assert isinstance(start[0], Tensor), (
            f"Baselines distribution has to be provided in a form of a torch.Tensor {start[0]}."
        )
        inner = InputBaselineXGradient(self.forward_func, self.multiplies_by_inputs)
        inner.gradient_func = self.gradient_func
        return NoiseTunnel(inner).attribute_all(
            inputs,
            targets,
            nt_samples=n_samples,
            stdevs=stdevs,
            draw_baseline_from_distrib=True,
            baselines=start,
            additional_forward_args=additional_forward_args,
            return_convergence_delta=return_convergence_delta,
        )
