"""Captum's attribution classes on gradkern's engine: the same arguments, the same results."""

from __future__ import annotations

from captum import attr as _captum

from .deeplift import DeepLift, DeepLiftShap
from .gradients import GradientShap, InputXGradient, IntegratedGradients
from .layerpaths import InternalInfluence, LayerConductance, LayerIntegratedGradients
from .layers import GuidedGradCam, LayerGradCam, LayerGradientXActivation, NeuronGradient
from .lrp import LRP
from .rulemethods import Deconvolution, GuidedBackprop
from .saliency import Saliency
from .tunnel import NoiseTunnel

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
]

#: Captum's own classes and what `gradkern.accelerate` makes of their objects.
TWINS = {getattr(_captum, name): globals()[name] for name in __all__}
