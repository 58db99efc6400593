"""Gradients along paths: integrated gradients and GradientShap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..dispatch.targets import Seeds, TopK
from ..util.options import BadArgument, Engine, Unused, debugging
from ..util.outputs import Output
from ..util.renamed import keyword_only
from . import captum_compat as compat
from .attribute_all import Inputs, Options, RowMethod, Tensors, as_attribute_all, check_distribution, points_for
from .call import PublicMethod, SharedOptions, as_instance_of
from .captum_compat import stock
from .captum_targets import captum_seeds
from .noise_tunnel import NoiseTunnel
from .plug import GradientFunc, plug_into
from .points import Points, path_sum
from .references import check_hypothetical, hypothetical, of_bases, per_sample


class IntegratedGradients(RowMethod, stock.IntegratedGradients):
    """The mean gradient on the straight path from a baseline, times input minus baseline (arXiv:1703.01365).

    A drop-in for `captum.attr.IntegratedGradients` whose steps are summed as they are computed: memory does not grow
    with ``n_steps``.  Logits and probabilities are both complete (attributions add up to the change of the output);
    prefer logits, as the path saturates in probabilities.
    """

    @keyword_only("engine", "output")
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        multiply_by_inputs: bool = True,
        *,
        engine: Engine | None = None,
        output: Output = None,
    ) -> None:
        super().__init__(forward_func, multiply_by_inputs)
        plug_into(self, GradientFunc(engine), output)

    def _attribute(
        self,
        inputs: Tensors,
        baselines: tuple[Any, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        step_sizes_and_alphas: tuple[list[float], list[float]] | None = None,
    ) -> Tensors:
        """Captum calls this for all steps, or, given ``internal_batch_size``, for a part of them at a time."""
        arguments = (inputs, baselines, target, additional_forward_args, n_steps, method, step_sizes_and_alphas)
        ours = isinstance(self.gradient_func, GradientFunc)
        points = points_for(self, inputs, additional_forward_args) if ours else None
        if points is None:
            return super()._attribute(*arguments)
        weights, alphas = path_steps(method, n_steps, step_sizes_and_alphas)
        try:
            seeds, _ = points.choose(lambda n, out: captum_seeds(target, n, out))
            totals = path_sum(points, baselines, seeds, weights.float(), alphas)  # float, as in Captum
        except BadArgument:
            return super()._attribute(*arguments)
        except Unused:
            raise
        except Exception:
            if debugging():
                raise
            super()._attribute(*arguments)  # Captum's own error, if it has one
            raise
        mean = tuple(t[:, 0] for t in totals)
        if not self.multiplies_by_inputs:
            return mean
        return tuple(g * (x - base) for g, x, base in zip(mean, inputs, baselines, strict=True))

    @as_attribute_all
    def attribute_all(
        self,
        inputs: Inputs,
        baselines: Any = None,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        ``internal_batch_size``: the most points at a time; by default as many as fit in the memory budget.
        With ``return_convergence_delta`` also the delta per sample and output, ``[N, C]``.
        """
        compat.validate_input(*compat.format_input_baseline(inputs, baselines), n_steps, method)
        options = {"baselines": baselines, "n_steps": n_steps, "method": method}
        options |= {"internal_batch_size": internal_batch_size}
        return self._all(inputs, targets, additional_forward_args, options, return_convergence_delta)

    def row_maps(self, points: Points, seeds: Seeds, options: Options) -> Tensors:
        rows, baselines = compat.format_input_baseline(points.inputs, options.get("baselines"))
        weights, alphas = path_steps(options.get("method", "gausslegendre"), options.get("n_steps", 50))
        points.most = options.get("internal_batch_size")
        totals = path_sum(points, baselines, seeds, weights.float(), alphas)
        if self.multiplies_by_inputs:
            times_difference(totals, rows, baselines)
        return totals


def path_steps(
    method: str, n: int, sizes_and_alphas: tuple[Sequence[float], Sequence[float]] | None = None
) -> tuple[Tensor, Tensor]:
    """The weights and positions of Captum's ``n`` steps, ``[steps]`` each."""
    sizes, places = sizes_and_alphas or [make(n) for make in compat.approximation_parameters(method)]
    return torch.tensor(sizes), torch.tensor(places, dtype=torch.float64)


def times_difference(parts: Sequence[Tensor], inputs: Sequence[Tensor], baselines: Sequence[Any]) -> None:
    """Multiply ``parts [N, S, *in]`` by input minus baseline, in place."""
    with torch.no_grad():
        for part, x, base in zip(parts, inputs, baselines, strict=True):
            part.mul_((x - base).unsqueeze(1))


def random_points(rows: Tensors, baselines: Sequence[Any]) -> list[Tensor]:
    """A point between baseline and input for every sample, drawn as Captum draws it."""
    r = torch.tensor(np.random.uniform(0.0, 1.0, rows[0].shape[0]), device=rows[0].device, dtype=rows[0].dtype)
    with torch.no_grad():
        shares = [r.view(-1, *(1,) * (x.dim() - 1)) for x in rows]
        return [a * x + (1.0 - a) * base for a, x, base in zip(shares, rows, baselines, strict=True)]


def check_tensors(baselines: Any) -> Any:
    """Raise Captum's error for a distribution of baselines that is not a tensor."""
    if not isinstance(baselines[0], Tensor):
        raise AssertionError(f"Baselines distribution has to be provided in a form of a torch.Tensor {baselines[0]}.")
    return baselines


class RandomPoint(RowMethod, compat.InputBaselineXGradient):
    """The gradient at a random point between baseline and input, times their difference: one draw of GradientShap.

    ``hypothetical``: the contributions of every base instead (`gradkern.attr.references.hypothetical`).
    """

    hypothetical = False

    def row_maps(self, points: Points, seeds: Seeds, options: Options) -> Tensors:
        rows, baselines = compat.format_input_baseline(points.inputs, options.get("baselines"))
        with torch.no_grad():
            gradients = points.gradients(random_points(rows, baselines), points.more, seeds)
            if self.hypothetical:
                return tuple(of_bases(g, b.unsqueeze(1), 2) for g, b in zip(gradients, baselines, strict=True))
        if self.multiplies_by_inputs:
            times_difference(gradients, rows, baselines)
        return gradients

    def _row_delta(self, parts: Tensors, points: Points, seeds: Seeds, options: Options) -> Tensor:
        if self.hypothetical:  # the delta counts only the bases in the sequence
            parts = tuple(p * x.unsqueeze(1) for p, x in zip(parts, points.inputs, strict=True))
        return super()._row_delta(parts, points, seeds, options)

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """One draw by Captum's own code."""
        captums = compat.unlogged(compat.InputBaselineXGradient)
        fixed = (target, additional_forward_args)
        if not self.hypothetical:
            return captums(self, inputs, baselines, *fixed, return_convergence_delta)
        plain = as_instance_of(RandomPoint, self)
        plain.hypothetical, plain._multiply_by_inputs = False, False
        gradients = compat.format_tensor_into_tuples(captums(plain, inputs, baselines, *fixed))
        rows, start = compat.format_input_baseline(inputs, baselines)
        start = compat.tensorize_baseline(rows, start)
        parts = hypothetical(gradients, rows, start)
        result = compat.format_output(compat.is_tuple(inputs), parts)
        if not return_convergence_delta:
            return result
        there = tuple(p * x for p, x in zip(parts, rows, strict=True))
        return result, self.compute_convergence_delta(
            there, start, rows, additional_forward_args=additional_forward_args, target=target
        )


class GradientShap(PublicMethod, stock.GradientShap):
    """Expected gradients over random baselines and random points on the way (SHAP's GradientExplainer).

    A drop-in for `captum.attr.GradientShap`, with equal numbers for equal seeds of torch and numpy.  Attribute
    logits: only they add up over features on the scale on which the classes compete.
    """

    @keyword_only("engine", "output")
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        multiply_by_inputs: bool = True,
        *,
        engine: Engine | None = None,
        output: Output = None,
    ) -> None:
        super().__init__(forward_func, multiply_by_inputs)
        plug_into(self, GradientFunc(engine), output)

    def attribute(
        self,
        inputs: Any,
        baselines: Any,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        *,
        n_references: int = 20,
        random_state: int | None = None,
    ) -> Any:
        """Captum's ``attribute``.  ``baselines`` may also be references per sample, as in `DeepLift.attribute`: a draw
        then takes one of the sample's own."""
        own = self._own_baselines(baselines, inputs, n_samples, n_references, random_state)
        if own is None:
            fixed = (n_samples, stdevs, target, additional_forward_args, return_convergence_delta)
            return compat.unlogged(stock.GradientShap)(self, inputs, baselines, *fixed)
        given = {"target": target, "additional_forward_args": additional_forward_args}
        given |= {"stdevs": stdevs, "return_convergence_delta": return_convergence_delta}
        tunnel, single = NoiseTunnel(self._inner()), not compat.is_tuple(inputs)
        results = [tunnel.attribute(inputs, nt_samples=1, baselines=b[0] if single else b, **given) for b in own]
        return _mean_of_draws(results, return_convergence_delta)

    @as_attribute_all
    def attribute_all(
        self,
        inputs: Inputs,
        baselines: Any = None,
        *,
        targets: Any = None,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        hypothetical: bool = False,
        n_references: int = 20,
        random_state: int | None = None,
        **shared: Unpack[SharedOptions],
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        ``baselines`` has to be given; references per sample as in ``attribute``.  All outputs share the random draws.
        The delta is per draw, as Captum's: ``[N · n_samples, C]``.  ``hypothetical`` as in `DeepLift.attribute`.
        """
        check_distribution(self, baselines)
        inner = self._inner()
        if hypothetical:
            check_hypothetical(compat.format_tensor_into_tuples(inputs), None)
            inner.hypothetical = True
        tunnel = NoiseTunnel(inner)
        given = {"targets": targets, "additional_forward_args": additional_forward_args}
        given |= {"stdevs": stdevs, "return_convergence_delta": return_convergence_delta}
        own = self._own_baselines(baselines, inputs, n_samples, n_references, random_state)
        if own is not None:
            results = [tunnel.attribute_all(inputs, nt_samples=1, baselines=b, **given) for b in own]
            return _mean_of_draws(results, return_convergence_delta, isinstance(targets, TopK))
        start = check_tensors(compat.format_callable_baseline(baselines, inputs))
        return tunnel.attribute_all(
            inputs, nt_samples=n_samples, draw_baseline_from_distrib=True, baselines=start, **given
        )

    def _inner(self) -> RandomPoint:
        inner = RandomPoint(self.forward_func, self.multiplies_by_inputs)
        inner.gradient_func = self.gradient_func
        return inner

    def _own_baselines(
        self, baselines: Any, inputs: Any, n_samples: int, n: int, random_state: int | None
    ) -> list[Tensors] | None:
        """The baselines of each draw, one row per sample from its references; None if ``baselines`` are Captum's."""
        rows = compat.format_tensor_into_tuples(inputs)
        if not all(isinstance(x, Tensor) and x.dim() for x in rows):
            return None  # Captum's own error
        references = per_sample(baselines, rows, n, random_state)
        if references is None:
            return None
        samples, every = rows[0].shape[0], references.of(0, rows[0].shape[0])
        each = torch.arange(samples)
        which = torch.from_numpy(np.random.choice(references.count, (n_samples, samples)))
        return [tuple(r[each, w] for r in every) for w in which]


def _mean_of_draws(results: Sequence[Any], delta: bool, top: bool = False) -> Any:
    """The mean of the maps of one draw each, the deltas of all draws ``[N · draws, …]``, and the indices of `TopK`."""
    extras = delta or top
    maps = [r[0] if extras else r for r in results]
    mean = pytree.tree_map(lambda *xs: torch.stack(xs).mean(0), *maps)
    deltas = (torch.stack([r[1] for r in results], 1).flatten(0, 1),) if delta else ()
    indices = (results[0][-1],) if top else ()
    return (mean, *deltas, *indices) if extras else mean
