"""DeepLift and DeepLiftShap by the rescale rule: secants in place of slopes, per sample and complete.

Captum 0.9 hooks modules and is wrong where a ReLU stands directly before a max pool, where a pool's input does not
differ from its reference (#1276), where pool windows overlap, and mixes samples in a softmax (#1367); docs/captum.md
shows it.  Here the rule stands in the Program, so it also holds for functional, in-place and reused activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from captum import attr as captum_attr
from captum._utils.common import _format_baseline, _format_tensor_into_tuples, _is_tuple
from captum._utils.gradient import apply_gradient_requirements, undo_gradient_requirements
from captum.attr._utils.common import (
    _call_custom_attribution_func,
    _compute_conv_delta_and_format_attrs,
    _format_callable_baseline,
    _tensorize_baseline,
    _validate_input,
)
from captum.log import log_usage
from torch import Tensor, nn

from ...dispatch.request import jacobian_choice
from ...dispatch.targets import Seeds
from ...ir.program import LowRank, Program, Scale, Select, Windows
from ...runtime import ops, reference
from ..attribute_all import answer, each_output, points_for, resolved, with_indices
from ..plug import GradientFunc
from ..points import part, rows_of
from .methods import RuleMethod, one_target, values_of
from .rule import Local, Params, Rule, Values, chosen, padded, tap_slices


class Rescale(Rule):
    """The rescale rule (arXiv:1704.02685, section 3.5.2): at a step that is not linear, Δout / Δin.

    Elementwise steps: the secant, the derivative at the input where |Δin| < eps.  Max pools: a window's change goes
    to where the input's maximum is and to where the reference's was, as much as each of them moved.  Softmax: the
    secant on logits less their mean (the paper's normalisation, section 3.6), which is complete and per sample.
    Products: the mean of both points, which is complete.  Other steps: the derivative at the input.
    """

    def __init__(
        self, program: Program, params: Params, values: Values, reference: Values, eps: float, native: bool = False
    ) -> None:
        super().__init__(program, params, values)
        self.reference, self.eps, self.native = reference, eps, native

    def scale(self, i: int) -> Local:
        form = self.program.steps[i].form
        if form.function == "affine":
            return super().scale(i)
        u = self.program.steps[i].inputs[0]
        if form.function == "relu" and self.native:
            if self.pool_behind(i) is not None:
                return Local(through=True)  # the pool's shares hold its secant
            return Local(after=self.multipliers(u, (), True)[0].reshape(self.values[u].shape), through=True)
        din = self.values[u] - self.reference[u]  # [N, *in]
        dout = self.post(i) - self.reference[self.base + i]
        return Local(after=torch.where(din.abs() < self.eps, self.slope(i), dout / din), through=True)

    def pool_behind(self, i: int) -> int | None:
        """The pool that alone reads the ReLU ``i``."""
        readers = self.program.consumers[self.base + i]
        alone = len(readers) == 1 and self.base + i != self.program.output
        if alone and isinstance(self.program.steps[readers[0]].form, Select):
            return readers[0]
        return None

    def multipliers(self, u: int, pool: Sequence[int], relu: bool) -> Tensor:
        """The compiled op on a value ``[N, C, *spatial]`` and its reference."""
        z, ref = (
            x.reshape(x.shape[0], x.shape[1] if x.dim() > 1 else 1, *(x.shape[2:] if x.dim() == 4 else (1, -1)))
            for x in (self.values[u], self.reference[u])
        )
        return ops.rescale(z.contiguous(), ref.contiguous(), pool, relu, self.eps)

    def select(self, i: int) -> Local:
        w = self.program.steps[i].form.windows
        u = self.program.steps[i].inputs[0]
        if self.native and len(w.kernel) <= 2:
            relu = u >= self.base and self.is_folded(u - self.base)
            shape = self.program.steps[i].shape
            pool = [n for pair in zip(*_planar(w, shape[1:]), strict=True) for n in pair]
            z = self.program.steps[u - self.base].inputs[0] if relu else u
            found = self.multipliers(z, pool, relu)
            return Local(taps=tuple(found.view(found.shape[0], -1, *shape)))
        x, x_ref = self.values[u], self.reference[u]
        y, y_ref = self.post(i), self.reference[self.base + i]  # [N, C, *out]
        top = torch.maximum(y, y_ref)
        up, down = top - y_ref, y - top
        wide = padded(w, x - x_ref, 0.0)
        taps = []
        here_all, there_all = chosen(w, x, y.shape), chosen(w, x_ref, y_ref.shape)
        for t, (here, there) in enumerate(zip(here_all, there_all, strict=True)):
            din = wide[(..., *tap_slices(w, t, y.shape[2:]))]
            share = (here * up + there * down) / din
            taps.append(torch.where(din.abs() < self.eps, here.to(x.dtype), share))
        return Local(taps=tuple(taps))

    def is_folded(self, i: int) -> bool:
        form = self.program.steps[i].form
        return isinstance(form, Scale) and form.function == "relu" and self.pool_behind(i) is not None

    def other(self, i: int) -> Local:
        step = self.program.steps[i]
        if isinstance(step.form, LowRank) and step.form.function in ("softmax", "log_softmax"):
            return Local(own=self.normalised(i, step.form.axis))
        if type(step.form).__name__ == "Product":
            middle = [(self.values[v] + self.reference[v]) / 2 for v in step.inputs]
            out = reference.forward_step(self.program, i, middle, self.params)
            return Local(own=lambda g: reference.vjp_step(self.program, i, middle, out, g, self.params))
        return super().other(i)

    def normalised(self, i: int, axis: int) -> Any:
        u = self.program.steps[i].inputs[0]
        din = self.values[u] - self.reference[u]
        din = din - din.mean(axis + 1, keepdim=True)  # a softmax does not see the mean
        dout = self.post(i) - self.reference[self.base + i]
        flat = din.abs() < self.eps
        ratio = torch.where(flat, 0.0, dout / din)

        def own(g: Tensor) -> tuple[Tensor, ...]:
            back = g * ratio.unsqueeze(1)  # [N, S, *shape]
            back = back - back.mean(axis + 2, keepdim=True)
            if not bool(flat.any()):
                return (back,)
            kept = g * flat.unsqueeze(1)
            args = [self.values[u]]
            return (back + reference.vjp_step(self.program, i, args, self.post(i), kept, self.params)[0],)

        return own


class DeepLift(RuleMethod, captum_attr.DeepLift):
    """Differences from a reference instead of gradients (Shrikumar et al., arXiv:1704.02685), the rescale rule.

    A drop-in for `captum.attr.DeepLift`, complete also where Captum is not.  Attribute logits: through a softmax
    each class's contributions are relative to the mean of all classes.
    """

    def __init__(
        self, model: nn.Module, multiply_by_inputs: bool = True, eps: float = 1e-10, engine: str | None = None
    ) -> None:
        captum_attr.DeepLift.__init__(self, model, multiply_by_inputs, eps)
        self.gradient_func = GradientFunc(engine)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Any = None,
    ) -> Any:
        """As Captum's, by the rule above."""
        rows = _format_tensor_into_tuples(inputs)
        start = _format_baseline(baselines, rows)
        found = None
        if isinstance(self.gradient_func, GradientFunc):
            _validate_input(rows, start)
            given = {"baselines": start, "multiply": False}
            found = one_target(self, rows, target, additional_forward_args, given)
        if found is None:
            return captum_attr.DeepLift.attribute.__wrapped__(
                self,
                inputs,
                baselines,
                target,
                additional_forward_args,
                return_convergence_delta,
                custom_attribution_func,
            )
        undo_gradient_requirements(rows, apply_gradient_requirements(rows))  # Captum's warnings
        start = _tensorize_baseline(rows, start)
        if custom_attribution_func is not None:
            found = _call_custom_attribution_func(custom_attribution_func, found, rows, start)
        elif self.multiplies_by_inputs:
            found = tuple((x - base) * m for x, base, m in zip(rows, start, found, strict=True))
        return _compute_conv_delta_and_format_attrs(
            self, return_convergence_delta, found, start, rows, additional_forward_args, target, _is_tuple(inputs)
        )

    def attribute_all(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Any = None,
        baselines: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        With ``return_convergence_delta`` also the delta per sample and output, ``[N, C]``.
        """
        rows = _format_tensor_into_tuples(inputs)
        start = _format_baseline(baselines, rows)
        _validate_input(rows, start)
        return self._every(inputs, targets, additional_forward_args, {"baselines": start}, return_convergence_delta)

    def _rows(self, rows, more, index, seeds, given):
        given = given | {"baselines": _format_baseline(given.get("baselines"), rows)}
        return super()._rows(rows, more, index, seeds, given)

    def _rule(self, program, params, rows, a, b, given, plain):
        return Rescale(
            program,
            params,
            values_of(program, params, rows, plain),
            values_of(program, params, _start(rows, given["baselines"], a, b), plain),
            self.eps,
            not plain,
        )

    def _finished(self, rule, found, rows, targets, a, b, given):
        if not given.get("multiply", self.multiplies_by_inputs):
            return found
        start = _start(rows, given["baselines"], a, b)
        return tuple(m.mul_((x - s).unsqueeze(1)) for m, x, s in zip(found, rows, start, strict=False))


def _planar(w: Windows, counts: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A pool's geometry per axis, rows first: kernel, stride, padding before, dilation, windows."""
    axes = list(zip(w.kernel, w.stride, (a for a, _ in w.padding), w.dilation, counts, strict=True))
    rows, columns = ((1, 1, 0, 1, 1), axes[0]) if len(axes) == 1 else axes
    return rows, columns


def _start(rows: Sequence[Tensor], baselines: Sequence[Any], a: int, b: int) -> tuple[Tensor, ...]:
    """The reference point of the rows ``a:b``: one row where one serves all, else one each; then what is not moved."""
    found = []
    for x, base in zip(rows, baselines, strict=False):
        here = rows_of(base, a, b)
        found.append(here.to(x.dtype) if isinstance(here, Tensor) else torch.full_like(x[:1], float(here)))
    more = rows[len(found) :]
    if more or len({f.shape[0] for f in found}) > 1:
        found = [f.expand(x.shape).contiguous() for f, x in zip(found, rows, strict=False)]
    return (*found, *more)


class DeepLiftShap(captum_attr.DeepLiftShap, DeepLift):
    """The mean of DeepLift over a distribution of references (SHAP's DeepExplainer, arXiv:1705.07874).

    A drop-in for `captum.attr.DeepLiftShap`, complete also where Captum is not.  Attribute logits, as for DeepLift.
    """

    def __init__(self, model: nn.Module, multiply_by_inputs: bool = True, engine: str | None = None) -> None:
        captum_attr.DeepLiftShap.__init__(self, model, multiply_by_inputs)
        self.gradient_func = GradientFunc(engine)

    def attribute_all(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Any,
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        The delta is per pair of sample and reference, as Captum's: ``[N · references, C]``.
        """
        start = _format_callable_baseline(baselines, inputs)
        assert isinstance(start[0], Tensor) and start[0].shape[0] > 1, (
            "Baselines distribution has to be provided in form of a torch.Tensor with more than one example but "
            f"found: {start[0]}. If baselines are provided in shape of scalars or with a single baseline example, "
            "`DeepLift` approach can be used instead."
        )
        many, rows = _is_tuple(inputs), _format_tensor_into_tuples(inputs)
        points = points_for(self, rows, additional_forward_args)
        if points is not None and points.traced() is not None:
            seeds, _ = points.choose(jacobian_choice(targets))
            index = part(seeds, 0, points.samples)
            found, delta = self._mean(rows, points.more, index, seeds, start, return_convergence_delta)
            return answer(found, many, seeds, delta)
        seeds, out = resolved(self.forward_func, rows, additional_forward_args, targets)

        def attribute(target: Any) -> Any:
            return self.attribute(
                inputs,
                baselines=start if many else start[0],
                target=target,
                additional_forward_args=additional_forward_args,
                return_convergence_delta=return_convergence_delta,
            )

        return with_indices(each_output(attribute, seeds, out, rows[0].shape[0]), seeds)

    def _mean(
        self,
        rows: tuple[Tensor, ...],
        more: tuple[Tensor, ...],
        index: Tensor | None,
        seeds: Any,
        start: tuple[Tensor, ...],
        wants_delta: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Some samples at a time against all references."""
        n, count = rows[0].shape[0], start[0].shape[0]
        totals = tuple(x.new_empty(n, seeds.count, *x.shape[1:]) for x in rows)
        deltas = []
        each = seeds.count * count * sum(x[0].numel() * x.element_size() for x in rows)
        size = max(1, (16 << 20) // max(each, 1))
        for a in range(0, n, size):
            b = min(a + size, n)
            pairs = tuple(x[a:b].detach().repeat_interleave(count, 0) for x in rows)
            extra = tuple(x[a:b].repeat_interleave(count, 0) for x in more)
            base = tuple(s.detach().repeat(b - a, *(1,) * (s.dim() - 1)) for s in start)
            here = index
            if index is not None and index.dim() == 2:
                here = index[a:b].repeat_interleave(count, 0)
            found = self._rows(pairs, extra, here, seeds.count, {"baselines": base})
            assert found is not None
            for total, f in zip(totals, found, strict=True):
                total[a:b] = f.view(b - a, count, *f.shape[1:]).mean(1)
            if wants_delta:
                pair_seeds = Seeds(seeds.count, seeds.axes, here)
                deltas.append(self._row_delta(found, pairs, extra, pair_seeds, {"baselines": base}))
        return totals, torch.cat(deltas) if wants_delta else None
