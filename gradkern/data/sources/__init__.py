"""Where samples come from.  One class per kind of source, entered into a registry; `open_source` asks each in turn."""

from .arrays import Arrays, Hdf5, Zarr
from .datasets import Samples, Table
from .parquet import Parquet
from .registry import Source, Span, can_be_pickled, known, open_source, register

__all__ = [
    "Arrays",
    "Hdf5",
    "Parquet",
    "Samples",
    "Source",
    "Span",
    "Table",
    "Zarr",
    "can_be_pickled",
    "known",
    "open_source",
    "register",
]
