"""DeepLift and DeepLiftShap by the rescale rule: secants in place of slopes, per sample and complete.

Captum 0.9 hooks modules.  It is wrong if a ReLU comes directly before a max pool, if a pool's input equals its
reference (#1276), or if pool windows overlap, and it mixes samples in a softmax (#1367); docs/captum.md shows this.
Here the rule is applied to the Program, so it also works for functional, in-place and reused activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...dispatch.request import jacobian_choice
from ...dispatch.route import one_call
from ...dispatch.targets import Seeds
from ...ir.calls import Params
from ...ir.program import LowRank, Product, Program, Scale, Select, Windows
from ...runtime import ops, reference
from ...util.chunks import spans
from ...util.options import Engine
from ...util.outputs import Output
from .. import captum_compat as compat
from ..attribute_all import Inputs, Options, Tensors, answer, check_distribution, one_by_one, points_for, typed
from ..captum_compat import stock
from ..plug import GradientFunc, plug_into
from ..points import Points, block_rows, gradient_bytes, rows_of
from .rule import Local, Rule, Values, at_place, chosen, padded, pass_through, slope
from .rule_methods import Chunk, RuleMethod


class Rescale(Rule):
    """The rescale rule (arXiv:1704.02685, section 3.5.2): at a step that is not linear, Δout / Δin.

    Elementwise steps: the secant, or the derivative at the input where |Δin| < eps.  Max pools: a window's change goes
    to the places of the input's and of the reference's maximum, each as much as it changed.  Softmax: the secant on
    logits minus their mean (the paper's normalisation, section 3.6), which is complete and per sample.  Products: the
    mean of both points, which is complete.  Other steps: the derivative at the input.
    """

    def __init__(
        self, program: Program, params: Params, values: Values, reference: Values, eps: float, native: bool = False
    ) -> None:
        super().__init__(program, params, values)
        self.reference, self.eps, self.native = reference, eps, native

    def differences(self, i: int) -> tuple[Tensor, Tensor]:
        """The differences of a step's input and of its value from those of the reference."""
        u, v = self.source(i), self.base + i
        return self.values[u] - self.reference[u], self.values[v] - self.reference[v]

    def pooled_relu(self, i: int) -> bool:
        """Whether this is a ReLU that a pool alone reads.  The pool's shares then hold its secant."""
        form, readers = self.program.steps[i].form, self.program.consumers[self.base + i]
        alone = len(readers) == 1 and self.base + i != self.program.output
        is_relu = isinstance(form, Scale) and form.function == "relu"
        return is_relu and alone and isinstance(self.program.steps[readers[0]].form, Select)

    def multipliers(self, u: int, pool: Sequence[int], relu: bool) -> Tensor:
        """The compiled op on a value ``[N, C, *spatial]`` and its reference."""
        z, ref = (
            x.reshape(x.shape[0], x.shape[1] if x.dim() > 1 else 1, *(x.shape[2:] if x.dim() == 4 else (1, -1)))
            for x in (self.values[u], self.reference[u])
        )
        return ops.rescale(z.contiguous(), ref.contiguous(), pool, relu, self.eps)


def secant(rule: Rescale, i: int) -> Local:
    din, dout = rule.differences(i)
    return Local(after=torch.where(din.abs() < rule.eps, rule.slope(i), dout / din), through=True)


def relu_secant(rule: Rescale, i: int) -> Local:
    if not rule.native:
        return secant(rule, i)
    if rule.pooled_relu(i):
        return pass_through(rule, i)
    u = rule.source(i)
    return Local(after=rule.multipliers(u, (), True)[0].reshape(rule.values[u].shape), through=True)


def shared_by_pool(rule: Rescale, i: int) -> Local:
    w, u, shape = rule.form(i, Select).windows, rule.source(i), rule.program.steps[i].shape
    if rule.native and len(w.kernel) <= 2:
        relu = u >= rule.base and rule.pooled_relu(u - rule.base)
        pool = [n for pair in zip(*_planar(w, shape[1:]), strict=True) for n in pair]
        shares = rule.multipliers(rule.source(u - rule.base) if relu else u, pool, relu)
        return Local(taps=tuple(shares.view(shares.shape[0], -1, *shape)))
    x, x_ref = rule.values[u], rule.reference[u]
    y, y_ref = rule.post(i), rule.reference[rule.base + i]  # [N, C, *out]
    top = torch.maximum(y, y_ref)
    up, down = top - y_ref, y - top
    wide = padded(w, x - x_ref, 0.0)
    taps = []
    for t, (wins, wins_ref) in enumerate(zip(chosen(w, x, y.shape), chosen(w, x_ref, y_ref.shape), strict=True)):
        din = at_place(w, t, wide, y.shape[2:])
        share = (wins * up + wins_ref * down) / din
        taps.append(torch.where(din.abs() < rule.eps, wins.to(x.dtype), share))
    return Local(taps=tuple(taps))


def normalised(rule: Rescale, i: int) -> Local:
    axis = rule.form(i, LowRank).axis
    din, dout = rule.differences(i)
    din = din - din.mean(axis + 1, keepdim=True)  # a softmax does not see the mean
    flat = din.abs() < rule.eps
    ratio = torch.where(flat, 0.0, dout / din)

    def pulled(g: Tensor) -> tuple[Tensor, ...]:
        back = g * ratio.unsqueeze(1)  # [N, S, *shape]
        back = back - back.mean(axis + 2, keepdim=True)
        if not bool(flat.any()):
            return (back,)
        kept = g * flat.unsqueeze(1)
        return (back + reference.vjp_step(rule.program, i, [rule.pre(i)], rule.post(i), kept, rule.params)[0],)

    return Local(custom=pulled)


def midpoint(rule: Rescale, i: int) -> Local:
    middle = [(rule.values[v] + rule.reference[v]) / 2 for v in rule.program.steps[i].inputs]
    out = reference.forward_step(rule.program, i, middle, rule.params)
    return Local(custom=lambda g: reference.vjp_step(rule.program, i, middle, out, g, rule.params))


#: DeepLift's rules: a line for a function, or for all functions of a form.
Rescale.table = {
    **Rule.table,
    Scale: secant,
    "affine": slope,
    "relu": relu_secant,
    Select: shared_by_pool,
    "softmax": normalised,
    "log_softmax": normalised,
    Product: midpoint,
}


class DeepLift(RuleMethod, stock.DeepLift):
    """Differences from a reference instead of gradients (Shrikumar et al., arXiv:1704.02685), the rescale rule.

    A drop-in for `captum.attr.DeepLift`, complete even in cases where Captum is not.  Attribute logits: through a
    softmax each class's contributions are relative to the mean of all classes.
    """

    eps = 1e-10  # Captum's default, for objects that another constructor has made

    def __init__(
        self,
        model: nn.Module,
        multiply_by_inputs: bool = True,
        eps: float = 1e-10,
        engine: Engine | None = None,
        output: Output = None,
    ) -> None:
        stock.DeepLift.__init__(self, model, multiply_by_inputs, eps)
        plug_into(self, GradientFunc(engine), output)

    @compat.log_usage(part_of_slo=True)
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
        rows = compat.format_tensor_into_tuples(inputs)
        start = compat.format_baseline(baselines, rows)
        if isinstance(self.gradient_func, GradientFunc):
            compat.validate_input(rows, start)
        maps = self._one(rows, target, additional_forward_args, {"baselines": start, "multiply": False})
        if maps is None:
            fixed = (target, additional_forward_args, return_convergence_delta, custom_attribution_func)
            return compat.unlogged(stock.DeepLift)(self, inputs, baselines, *fixed)
        start = compat.tensorize_baseline(rows, start)
        if custom_attribution_func is not None:
            maps = compat.call_custom_attribution_func(custom_attribution_func, maps, rows, start)
        elif self.multiplies_by_inputs:
            maps = tuple((x - base) * m for x, base, m in zip(rows, start, maps, strict=True))
        return compat.compute_conv_delta_and_format_attrs(
            self, return_convergence_delta, maps, start, rows, additional_forward_args, target, compat.is_tuple(inputs)
        )

    @typed
    def attribute_all(
        self,
        inputs: Inputs,
        baselines: Any = None,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Any = None,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        With ``return_convergence_delta`` also the delta per sample and output, ``[N, C]``.
        ``custom_attribution_func`` as in ``attribute``; it is called once per output.
        """
        rows = compat.format_tensor_into_tuples(inputs)
        start = compat.format_baseline(baselines, rows)
        compat.validate_input(rows, start)
        options = {"baselines": start, "custom_attribution_func": custom_attribution_func}
        return self._all(inputs, targets, additional_forward_args, options, return_convergence_delta)

    def _rows(self, points: Points, index: Tensor | None, seeds: int, options: Options) -> Tensors | None:
        start = compat.format_baseline(options.get("baselines"), points.inputs)
        custom = options.get("custom_attribution_func")
        options = options | {"baselines": start} | ({} if custom is None else {"multiply": False})
        parts = super()._rows(points, index, seeds, options)
        return parts if custom is None or parts is None else customised(custom, parts, points.inputs, start)

    def _rule(self, chunk: Chunk) -> Rescale:
        values, start = chunk.values(chunk.rows), chunk.values(_start(chunk))
        return Rescale(chunk.program, chunk.params, values, start, self.eps, not chunk.by_reference)

    def _finished(self, chunk: Chunk, rule: Rule, multipliers: Tensors, targets: Tensor) -> Tensors:
        if not chunk.options.get("multiply", self.multiplies_by_inputs):
            return multipliers
        points = zip(multipliers, chunk.rows, _start(chunk), strict=False)
        return tuple(m.mul_((x - start).unsqueeze(1)) for m, x, start in points)


def customised(custom: Any, multipliers: Tensors, inputs: Tensors, baselines: Sequence[Any]) -> Tensors:
    """The attributions that the caller's function makes of ``multipliers [N, S, *in]``, seed by seed."""
    start = compat.tensorize_baseline(inputs, tuple(baselines))
    by_seed = [
        compat.call_custom_attribution_func(custom, tuple(m[:, s] for m in multipliers), inputs, start)
        for s in range(multipliers[0].shape[1])
    ]
    return tuple(torch.stack(parts, 1) for parts in zip(*by_seed, strict=True))


def _planar(w: Windows, counts: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A pool's geometry per axis, rows first: kernel, stride, padding before, dilation, windows."""
    axes = list(zip(w.kernel, w.stride, (a for a, _ in w.padding), w.dilation, counts, strict=True))
    rows, columns = ((1, 1, 0, 1, 1), axes[0]) if len(axes) == 1 else axes
    return rows, columns


def _start(chunk: Chunk) -> Tensors:
    """The chunk's reference point: one row if it serves all, else one each; then the tensors that are not inputs."""
    start = []
    for x, base in zip(chunk.rows, chunk.options["baselines"], strict=False):
        rows = rows_of(base, chunk.a, chunk.b)
        start.append(rows.to(x.dtype) if isinstance(rows, Tensor) else torch.full_like(x[:1], float(rows)))
    more = chunk.rows[len(start) :]
    if more or len({s.shape[0] for s in start}) > 1:
        start = [s.expand(x.shape).contiguous() for s, x in zip(start, chunk.rows, strict=False)]
    return (*start, *more)


def check_references(baselines: Any, inputs: Any) -> Tensors:
    """A distribution of references; raises Captum's error if there are not several."""
    start: Tensors = compat.format_callable_baseline(baselines, inputs)
    if not isinstance(start[0], Tensor) or start[0].shape[0] < 2:
        raise AssertionError(
            "Baselines distribution has to be provided in form of a torch.Tensor with more than one example but "
            f"found: {start[0]}. If baselines are provided in shape of scalars or with a single baseline example, "
            "`DeepLift` approach can be used instead."
        )
    return start


def pairs_of(
    points: Points, start: Tensors, index: Tensor | None, a: int, b: int
) -> tuple[Points, Tensors, Tensor | None]:
    """The samples ``a:b`` with every reference: the points, their references, and their seeds."""
    count = start[0].shape[0]
    pairs = tuple(x[a:b].detach().repeat_interleave(count, 0) for x in points.inputs)
    more = tuple(x[a:b].repeat_interleave(count, 0) for x in points.more)
    base = tuple(s.detach().repeat(b - a, *(1,) * (s.dim() - 1)) for s in start)
    chosen = index if index is None or index.dim() == 1 else index[a:b].repeat_interleave(count, 0)
    return points.at(pairs, more), base, chosen


class DeepLiftShap(stock.DeepLiftShap, DeepLift):
    """The mean of DeepLift over a distribution of references (SHAP's DeepExplainer, arXiv:1705.07874).

    A drop-in for `captum.attr.DeepLiftShap`, complete even where Captum is not.  Attribute logits, as for DeepLift.
    """

    def __init__(
        self,
        model: nn.Module,
        multiply_by_inputs: bool = True,
        engine: Engine | None = None,
        output: Output = None,
    ) -> None:
        stock.DeepLiftShap.__init__(self, model, multiply_by_inputs)
        plug_into(self, GradientFunc(engine), output)

    @typed
    def attribute_all(
        self,
        inputs: Inputs,
        baselines: Any = None,
        *,
        targets: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Any = None,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        ``baselines`` has to be given.  The delta is per pair of sample and reference, as Captum's:
        ``[N · references, C]``.
        """
        check_distribution(self, baselines)
        start = check_references(baselines, inputs)
        as_tuple, rows = compat.is_tuple(inputs), compat.format_tensor_into_tuples(inputs)
        with one_call():
            points = points_for(self, rows, additional_forward_args)
            if points is not None and points.traced() is not None:
                seeds, _ = points.choose(jacobian_choice(targets))
                maps, delta = self._mean(points, seeds, start, return_convergence_delta, custom_attribution_func)
                return answer(maps, as_tuple, seeds, delta)

        def attribute(target: Any) -> Any:
            base = start if as_tuple else start[0]
            fixed = (additional_forward_args, return_convergence_delta, custom_attribution_func)
            return self.attribute(inputs, base, target, *fixed)

        wants_delta = return_convergence_delta
        return one_by_one(self.forward_func, inputs, additional_forward_args, targets, attribute, wants_delta)

    def _mean(
        self, points: Points, seeds: Seeds, start: Tensors, wants_delta: bool, custom: Any = None
    ) -> tuple[Tensors, Tensor | None]:
        """Some samples at a time against all references."""
        rows, n, count, index = points.inputs, points.samples, start[0].shape[0], seeds.rows(0, points.samples)
        means = tuple(x.new_empty(n, seeds.count, *x.shape[1:]) for x in rows)
        deltas = []
        pairs_at_a_time = block_rows(gradient_bytes(rows, seeds.count), rows[0].device)
        for a, b in spans(0, n, max(1, pairs_at_a_time // count)):
            paired, base, chunk_index = pairs_of(points, start, index, a, b)
            options: Options = {"baselines": base, "custom_attribution_func": custom}
            maps = self._rows(paired, chunk_index, seeds.count, options)
            assert maps is not None
            for mean, m in zip(means, maps, strict=True):
                mean[a:b] = m.view(b - a, count, *m.shape[1:]).mean(1)
            if wants_delta:
                deltas.append(self._row_delta(maps, paired, Seeds(seeds.count, seeds.axes, chunk_index), options))
        return means, torch.cat(deltas) if wants_delta else None
