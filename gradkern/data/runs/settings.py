"""The settings of a dataset run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, get_args

from ...util.options import BadValue, Engine
from ...util.outputs import Output, check_output_choice
from .. import statistics
from ..store.attributes import Nonfinite
from ..store.labels import read_text
from ..store.layout import STORED_AS, codecs


@dataclass(frozen=True)
class Settings:
    """The settings of a run as one value.  The fields are the keywords of `gradkern.run`, which explains them.

    Plain data, so that it can travel to other processes.
    """

    method: str = "saliency"
    targets: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    maps: bool = True
    reductions: Sequence[str] | str = ()
    top_features: int = 0
    dtype: str = "float32"
    compression: str = "none"
    chunk: int | None = None
    batch: int | None = None
    threads: int | None = None
    engine: Engine | None = None
    output: Output = None
    nonfinite: Nonfinite | None = None
    trust_source: bool = False
    ids: Sequence[str] | None = field(default=None, repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in STORED_AS:
            raise BadValue(f"dtype: got {self.dtype!r}, expected one of {', '.join(STORED_AS)}.")
        codecs(self.compression)
        check_output_choice(self.output)
        object.__setattr__(self, "reductions", statistics.check_reductions(self.reductions))
        object.__setattr__(self, "arguments", dict(self.arguments))
        for name in ("chunk", "batch", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BadValue(f"{name}: got {value!r}, expected a positive number, or None.")
        for name in ("ids", "names"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, read_text(name, getattr(self, name)))
        if isinstance(self.targets, range):
            object.__setattr__(self, "targets", list(self.targets))
        if self.nonfinite is not None and self.nonfinite not in get_args(Nonfinite):
            raise BadValue(f"nonfinite: got {self.nonfinite!r}, expected one of {', '.join(get_args(Nonfinite))}.")
        if not self.maps and not self.reductions and not self.top_features:
            raise BadValue("maps: got False without reductions or top_features, so nothing but predictions is left.")

    @property
    def sums_alone(self) -> bool:
        """Whether all that is stored of the maps are sums over samples."""
        return not self.maps and not self.top_features and {"ranks", "variance"}.isdisjoint(self.reductions)


class CommonOptions(TypedDict, total=False):
    """The fields of `Settings` that `gradkern.run` and `gradkern.importance` take as keywords."""

    arguments: Mapping[str, Any] | None
    top_features: int
    dtype: str
    compression: str
    chunk: int | None
    batch: int | None
    threads: int | None
    engine: Engine | None
    nonfinite: Nonfinite | None
    trust_source: bool
    ids: Any


class RunOptions(CommonOptions, total=False):
    """All fields of `Settings` that are keywords only (``method`` and ``targets`` may also be positional)."""

    maps: bool
    reductions: Sequence[str] | str
    output: Output
    names: Any


def settings_of(caller: str, settings: Settings | None, keywords: Mapping[str, Any]) -> Settings:
    """The settings, from one value or from keywords; a keyword that is None counts as not given."""
    unknown = keywords.keys() - {f.name for f in fields(Settings)}
    if unknown:
        raise TypeError(f"{caller}() got an unexpected keyword argument {min(unknown)!r}")
    given = {name: value for name, value in keywords.items() if value is not None}
    if settings is None:
        return Settings(**given)
    if given:
        raise BadValue(
            f"{caller}: got {', '.join(sorted(given))} together with settings=. Pass only one of them: "
            f"dataclasses.replace(settings, {min(given)}=...), or keywords alone."
        )
    return settings
