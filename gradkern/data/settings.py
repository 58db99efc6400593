"""What a dataset run is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..util.options import BadValue
from . import statistics
from .results import NAMES, codecs


@dataclass(frozen=True)
class Settings:
    """What a run is asked for, as `gradkern.run` takes it; plain data, so that it can travel to other processes."""

    method: str = "saliency"
    targets: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    maps: bool = True
    reductions: tuple[str, ...] = ()
    top_features: int = 0
    dtype: str = "float32"
    compression: str = "none"
    chunk: int | None = None
    batch: int | None = None
    threads: int | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in NAMES:
            raise BadValue(f"dtype: got {self.dtype!r}, expected one of {', '.join(NAMES)}.")
        codecs(self.compression)
        object.__setattr__(self, "reductions", statistics.check(self.reductions))
        for name in ("chunk", "batch", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BadValue(f"{name}: got {value!r}, expected a positive number, or None.")
        if not self.maps and not self.reductions and not self.top_features:
            raise BadValue("maps: got False without reductions or top_features, so nothing but predictions is left.")
