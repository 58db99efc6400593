"""Layer methods that are a rule per form: DeepLift and LRP, pulled back from the outputs to the layer's value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...dispatch.targets import Seeds
from ...runtime import reference
from ...util.chunks import spans
from ...util.options import Engine
from ...util.outputs import Output
from ...util.renamed import keyword_only
from .. import captum_compat as compat
from ..attribute_all import Options, Tensors, completeness, pick_outputs
from ..call import as_instance_of
from ..captum_compat import stock
from ..plug import GradientFunc, plug_into
from ..points import block_rows, gradient_bytes
from ..rules.averaging import apply_custom_function
from ..rules.deeplift import DeepLift, check_references, pairs_of
from ..rules.lrp import LRP
from ..rules.rule import Rule, pull
from ..rules.rule_methods import Chunk, RuleMethod, samples_at_a_time
from .layer_methods import LayerMethod, make_attribute, make_attribute_all
from .split import LayerView

Finish = Callable[[Any, Tensor, Tensor], Tensor]  # (rule, multipliers [n, S, *layer], targets) to attributions


def pull_to_layer(view: LayerView, method: RuleMethod, seeds: Seeds, options: Options, finish: Finish) -> Tensor | None:
    """The rule of ``method`` from the outputs to the layer, ``[N, S, *layer]``; None if it does not cover the model."""
    points, program = view.points, view.program
    if not method._supports(program):
        return None
    inputs = tuple(x.detach().contiguous() for x in points.base_request.inputs)
    like, n = inputs[points.wrt[0]] if points.wrt else inputs[0], points.samples
    pieces = []
    with torch.inference_mode(False), torch.no_grad():
        for a, b in spans(0, n, samples_at_a_time(program, seeds.count, like.dtype, like.device)):
            chunk = Chunk(program, view.params, tuple(x[a:b] for x in inputs), a, b, options, points.plain_torch)
            targets = seeds.part(a, b).targets(program.outputs, like.device)
            rule: Rule = method._rule(chunk)
            seeded = reference.one_hot(program, rule.values[program.output], targets)
            back = pull(rule, seeded, [view.value]).get(view.value)
            back = seeded.new_zeros(b - a, seeds.count, *view.shape) if back is None else back
            pieces.append(finish(rule, back, targets))
    return torch.cat(pieces)


class LayerDeepLift(LayerMethod, stock.LayerDeepLift):
    """DeepLift at a layer: its change from the reference, times the multipliers there (arXiv:1704.02685).

    A drop-in for `captum.attr.LayerDeepLift`, complete even where Captum is not.  Attribute logits, as for DeepLift.
    """

    attribute = make_attribute(stock.LayerDeepLift)
    attribute_all = make_attribute_all(stock.LayerDeepLift)

    def layer_maps(self, view: LayerView, seeds: Seeds, options: Options) -> Tensor | None:
        start = compat.format_baseline(options["baselines"], view.points.inputs)
        compat.validate_input(view.points.inputs, start)
        custom = options.get("custom_attribution_func")

        def finish(rule: Any, multipliers: Tensor, targets: Tensor) -> Tensor:
            value = rule.values[view.value]
            base = rule.reference[view.value].expand(value.shape)
            if custom is not None:
                return apply_custom_function(custom, (multipliers,), (value,), (base,))[0]
            return multipliers * (value - base).unsqueeze(1) if self.multiplies_by_inputs else multipliers

        return pull_to_layer(view, as_instance_of(DeepLift, self), seeds, {"baselines": start}, finish)


class LayerDeepLiftShap(LayerDeepLift, stock.LayerDeepLiftShap):
    """The mean of DeepLift at a layer over a distribution of references (arXiv:1705.07874).

    A drop-in for `captum.attr.LayerDeepLiftShap`, complete even where Captum is not.  Attribute logits.
    """

    @keyword_only("engine", "output")
    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        multiply_by_inputs: bool = True,
        *,
        engine: Engine | None = None,
        output: Output = None,
    ) -> None:
        # Captum's own calls `LayerDeepLift` by a name that a user may have replaced by ours.
        stock.LayerDeepLift.__init__(self, model, layer, multiply_by_inputs)
        plug_into(self, GradientFunc(engine), output)

    attribute = make_attribute(stock.LayerDeepLiftShap)
    attribute_all = make_attribute_all(stock.LayerDeepLiftShap)

    def _maps(self, view: LayerView, seeds: Seeds, options: Options, delta: bool) -> Any:
        points = view.points
        start = check_references(options["baselines"], points.inputs)
        means, deltas = [], []
        layer = torch.empty((), dtype=points.inputs[0].dtype).expand(1, *view.shape)
        room = block_rows(gradient_bytes([layer], seeds.count), points.inputs[0].device)
        for a, b in spans(0, points.samples, max(1, room // len(start[0]))):
            paired, base, chosen = pairs_of(points, start, seeds, a, b)
            result = self.layer_maps(view.at(paired), chosen, options | {"baselines": base})
            if result is None:
                return None
            means.append(result.view(b - a, len(start[0]), *result.shape[1:]).mean(1))
            if delta:
                deltas.append(completeness(paired, (result,), base, chosen))
        return (torch.cat(means),), torch.cat(deltas) if delta else None


class LayerLRP(LayerMethod, stock.LayerLRP):
    """The relevance of a layer's units (layer-wise relevance propagation, doi:10.1371/journal.pone.0130140).

    A drop-in for `captum.attr.LayerLRP`, for one layer; lists of layers stay with Captum.  It also serves layers for
    which Captum keeps no relevance, such as activations.  Attribute logits: a softmax has no rule.
    """

    attribute = make_attribute(stock.LayerLRP)
    attribute_all = make_attribute_all(stock.LayerLRP)

    def _one(self, rows: Tensors, options: Options, delta: bool) -> Any:
        method = as_instance_of(LRP, self)
        with method._rules() as rules:
            result = super()._one(rows, options | {"rules": rules}, delta)
        if result is not None:
            method._drop_rules(rules, options["verbose"])
        return result

    def _all(self, rows: Tensors, targets: Any, options: Options) -> Any:
        method = as_instance_of(LRP, self)
        with method._rules() as rules:
            result = super()._all(rows, targets, options | {"rules": rules})
        if result is not None and options["verbose"]:
            method._print(rules)
        return result

    def _once(self, target: Any, options: Options) -> Any:
        with as_instance_of(LRP, self)._rules_put_back():
            return super()._once(target, options)

    def layer_maps(self, view: LayerView, seeds: Seeds, options: Options) -> Tensor | None:
        method = as_instance_of(LRP, self)

        def finish(rule: Any, relevance: Tensor, targets: Tensor) -> Tensor:
            score = pick_outputs(rule.values[view.program.output], targets)  # [n, S]
            return relevance * score.view(*score.shape, *(1,) * len(view.shape))

        return pull_to_layer(view, method, seeds, options, finish) if method._knows(options["rules"]) else None

    def _delta(self, view: LayerView, parts: Tensors, seeds: Seeds, options: Options) -> Tensor:
        return as_instance_of(LRP, self)._row_delta(parts, view.points, seeds, options)
