"""Captum's attribution classes on gradkern's engine: the same arguments, the same results."""

from __future__ import annotations

from .captum_compat import stock
from .gradient import InputXGradient, Saliency
from .layer.layer_methods import GuidedGradCam, LayerGradCam, LayerGradientXActivation
from .layer.layer_paths import InternalInfluence, LayerConductance, LayerIntegratedGradients
from .layer.layer_rules import LayerDeepLift, LayerDeepLiftShap, LayerLRP
from .layer.layer_shap import LayerGradientShap
from .layer.neuron import (
    NeuronConductance,
    NeuronDeconvolution,
    NeuronDeepLift,
    NeuronDeepLiftShap,
    NeuronGradient,
    NeuronGradientShap,
    NeuronGuidedBackprop,
    NeuronIntegratedGradients,
)
from .noise_tunnel import NoiseTunnel
from .paths import GradientShap, IntegratedGradients
from .rules.deeplift import DeepLift, DeepLiftShap
from .rules.lrp import LRP
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
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "LayerLRP",
    "NeuronConductance",
    "NeuronDeconvolution",
    "NeuronDeepLift",
    "NeuronDeepLiftShap",
    "NeuronGradient",
    "NeuronGradientShap",
    "NeuronGuidedBackprop",
    "NeuronIntegratedGradients",
    "NoiseTunnel",
    "Saliency",
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
    stock.LayerDeepLift: LayerDeepLift,
    stock.LayerDeepLiftShap: LayerDeepLiftShap,
    stock.LayerGradCam: LayerGradCam,
    stock.LayerGradientShap: LayerGradientShap,
    stock.LayerGradientXActivation: LayerGradientXActivation,
    stock.LayerIntegratedGradients: LayerIntegratedGradients,
    stock.LayerLRP: LayerLRP,
    stock.NeuronConductance: NeuronConductance,
    stock.NeuronDeconvolution: NeuronDeconvolution,
    stock.NeuronDeepLift: NeuronDeepLift,
    stock.NeuronDeepLiftShap: NeuronDeepLiftShap,
    stock.NeuronGradient: NeuronGradient,
    stock.NeuronGradientShap: NeuronGradientShap,
    stock.NeuronGuidedBackprop: NeuronGuidedBackprop,
    stock.NeuronIntegratedGradients: NeuronIntegratedGradients,
    stock.NoiseTunnel: NoiseTunnel,
    stock.Saliency: Saliency,
}
