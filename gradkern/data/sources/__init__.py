"""Where samples come from.  One class per kind of source, entered into a registry; `open_source` asks each in turn."""

from . import arrays, datasets, parquet  # each enters its classes into the registry
from .registry import Source, can_be_pickled, open_source, register

__all__ = ["Source", "arrays", "can_be_pickled", "datasets", "open_source", "parquet", "register"]
