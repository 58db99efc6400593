# ruff: noqa: F401  (names are imported here for the other files)
"""Captum's classes and private names that gradkern uses, each imported here and nowhere else.

The classes are looked up at import time.  Users try this package on their code by
``captum.attr.Saliency = gradkern.attr.Saliency``; a lookup at call time would then find our own class and recurse.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import captum.attr

#: Versions of Captum that this package is tested with.
TRIED = ("0.9.0",)
_USED_METHODS = {
    "IntegratedGradients": ("_attribute",),
    "NoiseTunnel": ("_expand_partial", "_compute_partial_attribution", "_compute_smoothing"),
}


def _error(missing: object) -> ImportError:
    return ImportError(
        f"gradkern.attr builds on private names of Captum, and captum {version('captum')} lacks one: {missing}. "
        f"Versions that work: {', '.join(TRIED)}. Install one, as in: pip install 'captum=={TRIED[-1]}'"
    )


try:
    from captum._utils.common import _format_additional_forward_args as format_additional_forward_args
    from captum._utils.common import _format_baseline as format_baseline
    from captum._utils.common import _format_output as format_output
    from captum._utils.common import _format_tensor_into_tuples as format_tensor_into_tuples
    from captum._utils.common import _is_tuple as is_tuple
    from captum._utils.common import _run_forward as run_forward
    from captum._utils.common import _select_targets as select_targets
    from captum._utils.gradient import apply_gradient_requirements, compute_gradients, undo_gradient_requirements
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR
    from captum.attr._core.gradient_shap import InputBaselineXGradient
    from captum.attr._core.noise_tunnel import SUPPORTED_NOISE_TUNNEL_TYPES
    from captum.attr._utils.approximation_methods import approximation_parameters
    from captum.attr._utils.common import _call_custom_attribution_func as call_custom_attribution_func
    from captum.attr._utils.common import _compute_conv_delta_and_format_attrs as compute_conv_delta_and_format_attrs
    from captum.attr._utils.common import _format_callable_baseline as format_callable_baseline
    from captum.attr._utils.common import _format_input_baseline as format_input_baseline
    from captum.attr._utils.common import _sum_rows as sum_rows
    from captum.attr._utils.common import _tensorize_baseline as tensorize_baseline
    from captum.attr._utils.common import _validate_input as validate_input
    from captum.attr._utils.common import _validate_noise_tunnel_type as validate_noise_tunnel_type
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, IdentityRule, PropagationRule
    from captum.log import log_usage
except ImportError as error:
    raise _error(error) from error

#: Captum's own classes, even if their names in `captum.attr` are assigned later.
stock: Any = SimpleNamespace(**vars(captum.attr))

for _class, _names in _USED_METHODS.items():
    for _name in _names:
        if not hasattr(getattr(stock, _class), _name):
            raise _error(f"{_class}.{_name}")


_LINEAR = ("Linear", "Conv", "BatchNorm", "AvgPool", "AdaptiveAvgPool", "Identity", "Dropout", "Flatten", "Unflatten")


def lacks_deep_lift_rule(module: Any) -> bool:
    """Whether this is a module of torch that is not linear, and for which Captum's DeepLift has no rule."""
    kind = type(module)
    if kind in SUPPORTED_NON_LINEAR or not kind.__module__.startswith("torch.nn.modules.") or any(module.children()):
        return False
    return not kind.__name__.startswith((*_LINEAR, "Embedding", "Upsample", "Pixel", "ZeroPad", "ConstantPad"))


def unlogged(kind: type) -> Callable[..., Any]:
    """Captum's ``attribute`` of a class without its usage log, which the calling method already writes."""
    attribute: Callable[..., Any] = kind.attribute  # type: ignore[attr-defined]
    return getattr(attribute, "__wrapped__", attribute)
