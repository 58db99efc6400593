"""ATen ops to forms, one file per family.  Importing this package fills `LOWERINGS`."""

from . import activation, arithmetic, attention, conv, index, linear, masks, norm, pool, shape  # noqa: F401
from .builder import LOWERINGS, SEVERAL, MixesSamples, NoForm, ProgramBuilder, lowers

__all__ = ["LOWERINGS", "SEVERAL", "MixesSamples", "NoForm", "ProgramBuilder", "lowers"]
