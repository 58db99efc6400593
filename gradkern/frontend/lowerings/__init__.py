"""ATen ops to forms, one file per family.  Importing this package fills `LOWERINGS`."""

from . import (  # noqa: F401
    activation,
    arithmetic,
    assign,
    attention,
    compound,
    conv,
    einsum,
    fourier,
    gather,
    index,
    linear,
    masks,
    norm,
    pool,
    reduce,
    resample,
    rows,
    shape,
)
from .builder import LOWERINGS, MULTI_RESULT_OPS, MixesSamples, NoForm, ProgramBuilder, lowers

__all__ = ["LOWERINGS", "MULTI_RESULT_OPS", "MixesSamples", "NoForm", "ProgramBuilder", "lowers"]
