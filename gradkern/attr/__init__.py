"""Captum's attribution classes on gradkern's engine: the same arguments, the same results."""

from __future__ import annotations

from .captum_compat import stock
from .gradient import InputXGradient, Saliency
from .layer.layer_methods import GuidedGradCam, LayerGradCam, LayerGradientXActivation
from .layer.layer_paths import InternalInfluence, LayerConductance, LayerIntegratedGradients
from .layer.neuron import NeuronGradient
from .noise_tunnel import NoiseTunnel
from .paths import GradientShap, IntegratedGradients
from .rules.deeplift import DeepLift, DeepLiftShap
from .rules.lrp import LRP
from .rules.registry import register_rule
from .rules.rule_methods import Deconvolution, GuidedBackprop

__all__ = [
    "LRP",
    "Deconvolution",
    "DeepLift",
    "DeepLiftShap",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "LayerConductance",
    "LayerGradCam",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "NeuronGradient",
    "NoiseTunnel",
    "Saliency",
    "register_rule",
]

#: Captum's own classes and what `gradkern.accelerate` makes of their objects.
REPLACEMENTS = {
    stock.LRP: LRP,
    stock.Deconvolution: Deconvolution,
    stock.DeepLift: DeepLift,
    stock.DeepLiftShap: DeepLiftShap,
    stock.GradientShap: GradientShap,
    stock.GuidedBackprop: GuidedBackprop,
    stock.GuidedGradCam: GuidedGradCam,
    stock.InputXGradient: InputXGradient,
    stock.IntegratedGradients: IntegratedGradients,
    stock.InternalInfluence: InternalInfluence,
    stock.LayerConductance: LayerConductance,
    stock.LayerGradCam: LayerGradCam,
    stock.LayerGradientXActivation: LayerGradientXActivation,
    stock.LayerIntegratedGradients: LayerIntegratedGradients,
    stock.NeuronGradient: NeuronGradient,
    stock.NoiseTunnel: NoiseTunnel,
    stock.Saliency: Saliency,
}
