"""The attributes of a store: everything that is recorded about a run besides its arrays, in ``zarr.json``.

`trust.check_attributes` checks them when a store is opened.  Stores of earlier versions may lack those
that are `NotRequired`.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from ...planner.timing import Way
from ...util.options import Engine

Nonfinite = Literal["error", "skip", "keep"]


class ModelKey(TypedDict):
    """Hashes of a model (`runs.fingerprint.of_model`)."""

    weights: str
    graph: str
    tensors: int


class CodeKey(TypedDict, total=False):
    """Hashes of the caller's own code: of the method, and of a function that chooses the output."""

    code: str
    output_code: str


class MethodKey(CodeKey):
    """The method, its targets and arguments as plain data, and the code."""

    method: str
    targets: Any
    arguments: dict[str, Any]
    output: NotRequired[int | str | None]


class SourceKey(TypedDict):
    """The number of samples, the shapes and dtypes of a sample's inputs, and a hash of some samples."""

    samples: int
    shapes: list[list[int]]
    dtypes: list[str]
    content: str


class StoredKey(TypedDict):
    """What is stored: the `Settings` of these names."""

    maps: bool
    reductions: list[str]
    top_features: int
    dtype: str
    compression: str


class Fingerprint(TypedDict):
    """Everything that must agree for one run to continue another."""

    model: ModelKey
    method: MethodKey
    source: SourceKey
    stored: StoredKey


class Versions(TypedDict):
    """Versions of packages, and the machine's instruction set."""

    isa: str
    torch: str
    gradkern: str
    python: str


class Pinned(Versions):
    """Everything that affects the last bits of a result."""

    chunk: int
    batch: int
    threads: int
    memory_budget: int
    engine: Engine
    way: NotRequired[Way | None]
    precision: NotRequired[str]
    plan: NotRequired[str | None]


class StoredAs(TypedDict):
    """The dtype and the compression of the maps."""

    dtype: str
    compression: str


class PaddingRecord(TypedDict):
    """How samples of different shapes were padded (`sources.padding.Padding`)."""

    value: float
    length: int | None
    axes: list[list[int]]
    gives: list[str]


class Counts(TypedDict, total=False):
    """Samples that are not finite, the first of them, and values that the stored dtype cannot hold."""

    nonfinite: int
    nonfinite_first: list[int]
    overflow: int
    underflow: int
    narrowed: int


class Attributes(TypedDict):
    """The attributes of a store.  The last four are there once the run is finished."""

    format: int
    keys: NotRequired[int]  # version of the keys of graph and plan
    numerics: NotRequired[int]  # version of the kernels' rounding
    fingerprint: Fingerprint
    pinned: Pinned
    engine: NotRequired[Engine | None]  # the requested one
    nonfinite: NotRequired[Nonfinite]
    inputs: list[str]  # the names of the maps, one per floating input
    reductions: list[str]
    arrays: StoredAs
    output: list[int]  # the shape of the model's output, per sample
    program: str | None
    made_by: NotRequired[dict[str, Any]]
    padding: NotRequired[PaddingRecord]
    checksum: NotRequired[int]
    finished: bool
    exact: NotRequired[bool]
    notes: NotRequired[list[str]]
    counts: NotRequired[Counts]
    tolerance: NotRequired[float]
