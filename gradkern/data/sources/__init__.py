"""Sources of samples.  Each kind is one class in a registry, and `open_source` asks them in turn."""

from . import arrays, datasets, parquet, tables  # each module registers its classes
from .registry import Source, Span, can_be_pickled, open_source, register_source

__all__ = [
    "Source",
    "Span",
    "arrays",
    "can_be_pickled",
    "datasets",
    "open_source",
    "parquet",
    "register_source",
    "tables",
]
