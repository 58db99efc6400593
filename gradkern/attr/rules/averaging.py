"""DeepLift averaged over references: blocks of pairs of a sample and a reference, summed as they are computed.

With 2 samples and 3 references, the pairs are (0, 0), (0, 1), (0, 2), (1, 0), …  The forward pass of a sample is
computed once for all its references, and that of a reference that all samples share once for all samples.  A pair's
multipliers do not depend on other pairs, and the order of the sum is fixed, so results do not depend on the memory
budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dispatch import state
from ...dispatch.route import one_call
from ...dispatch.targets import Seeds, jacobian_choice
from ...ir.calls import Params
from ...ir.program import Program
from ...util.callables import name_of
from ...util.chunks import row_blocks
from ...util.options import BadArgument
from ...util.progress import with_progress
from ...util.samples import rows_of_targets
from .. import captum_compat as compat
from ..attribute_all import Options, Tensors, answer, one_by_one, pick_outputs, points_for
from ..captum_targets import captum_seeds
from ..plug import GradientFunc
from ..points import Points
from ..references import References, check_hypothetical, hypothetical, of_bases, per_sample
from .linear import rule_multipliers, rule_values, values_needed
from .rescale import Rescale
from .rule import Values
from .rule_methods import Chunk, RuleMethod, samples_at_a_time

LEAST_PAIRS = 32  # pairs per call of the engine at least, if they fit, so that the fixed cost of a call is small
MakeRule = Callable[[Chunk, Values, Values], Rescale]
#: Takes multipliers ``[P, S, *in]`` of P pairs, and their samples and references ``[P, *in]``, to contributions.
Contributions = Callable[[Tensors, Tensors, Tensors], Tensors]


def times_change(multipliers: Tensors, rows: Tensors, start: Tensors) -> Tensors:
    """``m · (x - reference)``."""
    return tuple(m * (x - base).unsqueeze(1) for m, x, base in zip(multipliers, rows, start, strict=True))


def as_they_are(multipliers: Tensors, rows: Tensors, start: Tensors) -> Tensors:
    return multipliers


def of_every_base(multipliers: Tensors, rows: Tensors, start: Tensors) -> Tensors:
    """`gradkern.attr.references.hypothetical` of all seeds."""
    return tuple(of_bases(m, base.unsqueeze(1), 2) for m, base in zip(multipliers, start, strict=True))


@dataclass(frozen=True)
class ContributionOptions:
    """What a call requests: hypothetical contributions, deltas, a custom function that computes contributions."""

    hypothetical: bool = False
    delta: bool = False
    custom: Any = None


Averages = tuple[Tensors, Tensor | None]  # maps, and the deltas of all pairs


def with_delta(averages: Averages, as_tuple: bool) -> Any:
    """The result of ``attribute``: maps, and the delta if there is one."""
    maps, delta = averages
    result = compat.format_output(as_tuple, maps)
    return result if delta is None else (result, delta)


def apply_custom_function(custom: Any, multipliers: Tensors, inputs: Tensors, baselines: Sequence[Any]) -> Tensors:
    """The attributions that the caller's function makes of ``multipliers [N, S, *in]``, seed by seed."""
    start = compat.tensorize_baseline(inputs, tuple(baselines))
    by_seed = [
        compat.call_custom_attribution_func(custom, tuple(m[:, s] for m in multipliers), inputs, start)
        for s in range(multipliers[0].shape[1])
    ]
    return tuple(torch.stack(parts, 1) for parts in zip(*by_seed, strict=True))


@dataclass
class Averaging:
    """One call: the points, the seeds, and the references of each sample."""

    points: Points
    seeds: Seeds
    references: References
    program: Program
    params: Params
    wants_delta: bool

    def __post_init__(self) -> None:
        self.inputs = tuple(x.detach().contiguous() for x in self.points.base_request.inputs)
        self.own = len(self.points.inputs)  # the rest are other arguments of the model, equal at the reference
        self._known: dict[str, tuple[Any, dict[int, Tensor]]] = {}

    def values(self, kind: str, place: Any, rows: Tensors) -> dict[int, Tensor]:
        """The values of a forward pass at ``rows``; of each ``kind``, the values of the latest ``place`` are kept."""
        if kind not in self._known or self._known[kind][0] != place:
            self._known.pop(kind, None)
            stored, delta = dict(enumerate(rows)), self.wants_delta
            if not self.points.plain_torch:
                stored = rule_values(self.program, self.params, rows, values_needed(self.program, False, delta)).stored
            if delta:
                # By torch: its sums round less than the kernels', which shows in the deltas of large outputs.
                stored[self.program.output] = Values(self.program, self.params, dict(stored))[self.program.output]
            self._known[kind] = (place, stored)
        return self._known[kind][1]

    def pairs(self, a: int, b: int, first: int, last: int) -> tuple[Tensors, Values, Tensors, Values]:
        """The samples ``a:b`` with their references ``first:last``, and the values at both."""
        k, own = last - first, self.own
        alone = tuple(x[a:b] for x in self.inputs)
        rows = tuple(x.repeat_interleave(k, 0) for x in alone)
        at = {v: x.repeat_interleave(k, 0) for v, x in self.values("samples", (a, b), alone).items()}
        chosen = tuple(r[:, first:last] for r in self.drawn(a, b))
        start = (*(r.reshape(-1, *r.shape[2:]) for r in chosen), *rows[own:])
        if self.references.shared and len(self.inputs) == own:
            once = self.values("references", (first, last), tuple(g[first:last] for g in self.references.given))
            before = {v: x.repeat(b - a, *(1,) * (x.dim() - 1)) for v, x in once.items()}
        else:
            before = dict(self.values("references", (a, b, first, last), start))
        at |= dict(enumerate(rows))
        before |= dict(enumerate(start))
        return rows, Values(self.program, self.params, at), start, Values(self.program, self.params, before)

    def drawn(self, a: int, b: int) -> Tensors:
        """All references of the samples ``a:b``, drawn once."""
        if self._known.get("drawn", (None,))[0] != (a, b):
            self._known["drawn"] = ((a, b), dict(enumerate(self.references.of(a, b))))
        return tuple(self._known["drawn"][1].values())

    def run(
        self, make: MakeRule, contributions: Contributions, options: Options
    ) -> tuple[Tensors, Tensor | None, Rescale]:
        """The means ``[N, S, *in]``, the deltas of all pairs ``[N · R, S]`` if requested, and the last rule."""
        points, seeds, count = self.points, self.seeds, self.references.count
        n, outputs, device = points.samples, self.program.outputs, self.inputs[0].device
        totals = tuple(x.new_zeros(n, seeds.count, *x.shape[1:]) for x in points.inputs)
        deltas = self.inputs[0].new_empty(n, count, seeds.count) if self.wants_delta else None
        rule: Rescale | None = None
        blocks = row_blocks(n, count, self.pairs_at_a_time())
        pairs = with_progress(blocks, n * count, "pairs", lambda block: (block[1] - block[0]) * (block[3] - block[2]))
        for a, b, first, last in pairs:
            k = last - first
            rows, at, start, before = self.pairs(a, b, first, last)
            targets = seeds.part(a, b).repeat_interleave(k).targets(outputs, device)
            chunk = Chunk(self.program, self.params, rows, a, b, options, points.plain_torch)
            rule = make(chunk, at, before)
            multipliers = rule_multipliers(rule, rows, targets, points.wrt, native=not points.plain_torch)
            check_once(points.fn, rule, multipliers, rows[: self.own], start[: self.own], targets)
            parts = contributions(multipliers, rows[: self.own], start[: self.own])
            for total, part in zip(totals, parts, strict=True):
                by_pair = part.view(b - a, k, *part.shape[1:])
                for r in range(k):  # one after the other, so that the sum has one order
                    total[a:b] += by_pair[:, r]
            if deltas is not None:
                difference = at[self.program.output] - before[self.program.output]
                if contributions is of_every_base:
                    parts = times_change(multipliers, rows[: self.own], start[: self.own])
                missed = sum(sum_trailing_axes(p, 2) for p in parts) - pick_outputs(difference, targets)
                deltas[a:b, first:last] = missed.view(b - a, k, -1)
        for total in totals:
            total /= count
        assert rule is not None
        return totals, None if deltas is None else deltas.flatten(0, 1), rule

    def pairs_at_a_time(self) -> int:
        """The number of pairs whose values, slopes, maps and contributions fit in the memory budget."""
        x = self.inputs[0]
        return samples_at_a_time(self.program, self.seeds.count, x.dtype, x.device, least=LEAST_PAIRS)


class OverReferences(RuleMethod):
    """DeepLift's calls that average over references."""

    multiplies_by_inputs: bool

    def _rescale(self, chunk: Chunk, values: Values, before: Values, start: Tensors) -> Rescale:
        raise NotImplementedError

    def _one_reference(self, inputs: Tensors, baselines: Tensors, *fixed: Any) -> Any:
        """``attribute`` against one reference per sample."""
        raise NotImplementedError

    def _references(
        self, baselines: Any, rows: Tensors, n: int, random_state: int | None, hypothetical: bool
    ) -> References | None:
        """The references over which this call averages; None if it is a call of Captum's."""
        if not all(isinstance(x, Tensor) and x.dim() for x in rows):
            return None  # Captum's own error
        references = per_sample(baselines, rows, n, random_state)
        if references is None and hypothetical:
            start = compat.format_baseline(baselines, rows)
            compat.validate_input(rows, start)
            start = compat.tensorize_baseline(rows, start)
            given = tuple(s.expand_as(x).unsqueeze(1) for s, x in zip(start, rows, strict=True))
            references = References(rows, 1, given)
        return references

    def _average_one(
        self, references: References, inputs: Any, target: Any, extra: Any, wanted: ContributionOptions
    ) -> Any:
        """``attribute`` with references per sample."""
        if wanted.hypothetical:
            check_hypothetical(references.inputs, wanted.custom)
        averages = self._one_on_engine(references, target, extra, wanted)
        averages = self._one_by_one(references, target, extra, wanted) if averages is None else averages
        return with_delta(averages, compat.is_tuple(inputs))

    def _one_on_engine(
        self, references: References, target: Any, extra: Any, wanted: ContributionOptions
    ) -> Averages | None:
        """Averages for Captum's ``target``; None if Captum takes the call, errors included."""
        if not isinstance(self.gradient_func, GradientFunc):
            return None
        points = points_for(self, references.inputs, extra)
        if points is None or points.captured() is None:
            return None
        try:
            seeds, _ = points.choose(lambda n, out: captum_seeds(target, n, out))
        except BadArgument:
            return None
        maps, delta = self._mean(points, seeds, references, wanted)
        rows = references.inputs
        compat.undo_gradient_requirements(rows, compat.apply_gradient_requirements(rows))  # Captum's warnings
        return tuple(m[:, 0] for m in maps), None if delta is None else delta[:, 0]

    def _average_all(
        self, references: References, inputs: Any, targets: Any, extra: Any, wanted: ContributionOptions
    ) -> Any:
        """``attribute_all`` with references per sample."""
        if wanted.hypothetical:
            check_hypothetical(references.inputs, wanted.custom)
        as_tuple = compat.is_tuple(inputs)
        with one_call():
            points = points_for(self, references.inputs, extra)
            if points is not None and points.captured() is not None:
                seeds, _ = points.choose(jacobian_choice(targets))
                maps, delta = self._mean(points, seeds, references, wanted)
                return answer(maps, as_tuple, seeds, delta)

        def attribute(target: Any) -> Any:
            return with_delta(self._one_by_one(references, target, extra, wanted), as_tuple)

        return one_by_one(self.forward_func, inputs, extra, targets, attribute, wanted.delta)

    def _mean(self, points: Points, seeds: Seeds, references: References, wanted: ContributionOptions) -> Averages:
        """The mean over the references on the engine, ``[N, S, *in]``, and the deltas of all pairs, ``[N · R, S]``."""
        program = points.captured()
        assert program is not None
        points.route.check_reached(points.base_request)

        def make(chunk: Chunk, at: Values, before: Values) -> Rescale:
            start = tuple(before[v] for v in range(len(chunk.rows)))
            return self._rescale(chunk, at, before, start)

        def by_user(multipliers: Tensors, rows: Tensors, start: Tensors) -> Tensors:
            return apply_custom_function(wanted.custom, multipliers, rows, start)

        contributions = times_change if self.multiplies_by_inputs else as_they_are
        contributions = by_user if wanted.custom is not None else contributions
        contributions = of_every_base if wanted.hypothetical else contributions
        with torch.inference_mode(False), torch.no_grad():
            averaging = Averaging(points, seeds, references, program, points.bound.params(), wanted.delta)
            options: Options = {"baselines": points.inputs}
            maps, delta, rule = averaging.run(make, contributions, options)
        self._done(points, rule)
        if delta is not None and wanted.custom is None and self.multiplies_by_inputs:
            sizes = sizes_of(maps, 2)  # [N, S]
            say_if_large(points.fn, sizes.repeat_interleave(references.count, 0).flatten(), delta.flatten())
        return maps, delta

    def _one_by_one(self, references: References, target: Any, extra: Any, wanted: ContributionOptions) -> Averages:
        """The mean of ``attribute`` over the references, for a model without a Program."""
        totals, deltas, rows = None, [], references.inputs
        every = references.of(0, rows[0].shape[0])
        custom = hypothetical if wanted.hypothetical else wanted.custom
        for r in range(references.count):
            start = tuple(g[:, r].contiguous() for g in every)
            result = self._one_reference(rows, start, target, extra, wanted.delta, custom)
            maps = result[0] if wanted.delta else result
            if wanted.delta:
                deltas.append(result[1])
            totals = maps if totals is None else tuple(t + m for t, m in zip(totals, maps, strict=True))
        assert totals is not None
        mean = tuple(t / references.count for t in totals)
        return mean, torch.stack(deltas, 1).flatten() if wanted.delta else None


LARGE = 0.01  # a delta above this share of the sum of the attributions' sizes is large: more than rounding leaves
CHECKED = 8  # the samples whose delta is always computed, to warn if it is large
ROUNDING = 1e-4  # a smaller delta, as a share of the output, may be rounding


def say_if_large(fn: Any, sizes: Tensor, deltas: Tensor) -> None:
    """Warn, once per model, if attributions do not add up to the change of the output.

    ``deltas``: the difference, per attribution.  ``sizes``: the sum of an attribution's absolute values.
    """
    if deltas.shape == sizes.shape and bool((deltas.detach().abs() > LARGE * sizes).any()):
        state.warn(
            fn,
            f"{name_of(fn)}: DeepLift's attributions do not add up to the change of the output: the delta of some "
            f"samples is more than {LARGE:.0%} of the sum of their sizes.",
        )


def check_once(fn: Any, rule: Rescale, multipliers: Tensors, rows: Tensors, start: Tensors, targets: Tensor) -> None:
    """`say_if_large` for the first samples of a model, whether or not anybody asks for deltas.

    ``targets``: the outputs ``[S]`` or ``[N, S]``.  Steps without a rule, and constants, are warned about separately.
    """
    said = bool(rule.unruled or rule.detached)
    if said or len(multipliers) < len(rows) or not state.first_time(fn, "completeness"):
        return
    few, at = slice(0, CHECKED), rule.program.output
    chosen, values = rows_of_targets(targets, few), (rule.values[at][few], rule.reference[at][few])
    y, y_ref = (pick_outputs(v.expand_as(values[0]), chosen) for v in values)
    parts = times_change(*(tuple(z[few] for z in zs) for zs in (multipliers, rows, start)))
    missed = sum(sum_trailing_axes(p, 2) for p in parts) - (y - y_ref)
    rounding = max(ROUNDING, 16 * torch.finfo(y.dtype).eps)
    inexact = (y - y_ref).isfinite() & ~(missed.abs() <= rounding * (y.abs() + y_ref.abs()))
    say_if_large(fn, sizes_of(parts, 2)[inexact].nan_to_num(), missed[inexact].nan_to_num(nan=torch.inf))


def sizes_of(maps: Tensors, axes: int) -> Tensor:
    """The sums of the absolute values over all but the first ``axes`` axes, and over the inputs."""
    return torch.stack([sum_trailing_axes(m.detach().abs(), axes) for m in maps]).sum(0)


def sum_trailing_axes(x: Tensor, axes: int) -> Tensor:
    """The sums over all but the first ``axes`` axes, which may be all that there are."""
    return x.unsqueeze(-1).flatten(axes).sum(axes)
