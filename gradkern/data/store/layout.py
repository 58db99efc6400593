"""The arrays of a store: their names, dtypes and codecs, and their creation.

zarr has no name for bfloat16, which is stored as the uint16 of its bits; the attribute ``dtype`` says so.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, ZstdCodec

from ...util.options import BadValue
from . import checks
from .attributes import Attributes

STORED_AS = {"float32": "float32", "float64": "float64", "float16": "float16", "bfloat16": "uint16"}
FILL_VALUES = {
    "bfloat16": 0x7FC0,
    "int64": -1,
    "string": "",
}  # the bits of a NaN; no index.  Others: NaN, or 0 if there is none
ENCODING: Any = {"name": "default", "separator": "."}  # all chunks in one folder: one folder to force to disk


@dataclass(frozen=True)
class Array:
    """One array to be created.  ``chunk`` is the number of rows per chunk; None: all rows in one chunk."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]
    chunk: int | None = None
    compressed: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)
    content: np.ndarray | None = None


def map_names(count: int) -> list[str]:
    """Names of the arrays of maps, one per differentiated input."""
    return ["attributions"] if count == 1 else [f"attributions_{i}" for i in range(count)]


def reduction_key(reduction: str, inputs: Sequence[str], of: int) -> str:
    """The key of a reduction's result, for the input with index ``of``."""
    return f"reductions/{reduction}" if len(inputs) == 1 else f"reductions/{reduction}_{of}"


def chunk_key(name: str, chunk: int, axes: int) -> str:
    """The file of a chunk of rows, for an array with ``axes`` axes."""
    return f"{name}/c." + ".".join([str(chunk), *["0"] * (axes - 1)])


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in attributes and messages, such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def spans(samples: int, chunk: int) -> np.ndarray:
    """The first and last + 1 sample of each chunk, int64 ``[K, 2]``."""
    starts = np.arange(0, samples, chunk)
    return np.stack([starts, np.minimum(starts + chunk, samples)], axis=1)


def codecs(compression: str) -> Any:
    """``none``, ``zstd`` or ``blosc``, each with an optional level: ``zstd:3``."""
    name, _, level = compression.partition(":")
    if name not in ("none", "zstd", "blosc") or (level and not level.isdigit()):
        raise BadValue(f"compression: got {compression!r}, expected 'none', 'zstd' or 'blosc' (a level: 'zstd:3').")
    if int(level or 0) > {"zstd": 22, "blosc": 9}.get(name, 0):
        raise BadValue(f"compression: got {compression!r}, expected a level up to 22 for zstd, 9 for blosc.")
    if name == "none":
        return None
    if name == "zstd":
        return ZstdCodec(level=int(level or 1))
    return BloscCodec(cname="zstd", clevel=int(level or 3), shuffle="bitshuffle")


def create_arrays(store: Store, arrays: Sequence[Array], attributes: Attributes, compression: str) -> None:
    """Make the arrays and attributes of a new store, and a copy of both for `gradkern.data.verify`."""
    about = json.loads(json.dumps(attributes))
    group = zarr.create_group(store, attributes={"gradkern": {**about, "checksum": checks.of_attributes(about)}})
    for a in arrays:
        array = group.create_array(
            a.name,
            shape=a.shape,
            chunks=(a.chunk or max(a.shape[0], 1), *(max(s, 1) for s in a.shape[1:])) if a.shape else (),
            dtype=STORED_AS.get(a.dtype, a.dtype),
            compressors=codecs(compression) if a.compressed else None,
            fill_value=FILL_VALUES.get(a.dtype, float("nan") if a.dtype.startswith("float") else 0),
            dimension_names=list(a.dimensions),
            chunk_key_encoding=ENCODING,
            attributes={**({"dtype": "bfloat16"} if a.dtype == "bfloat16" else {}), **a.attributes},
        )
        if a.content is not None:
            array[...] = a.content
    consolidate(store)
    keys = {f"{a.name}/zarr.json" for a in arrays}
    keys |= {f"{a.name.rpartition('/')[0]}/zarr.json".lstrip("/") for a in arrays}  # groups
    keys |= {chunk_key(a.name, 0, len(a.shape)) for a in arrays if a.content is not None}
    checks.write_backup(store, keys)


def consolidate(store: Store) -> None:
    """One file with the metadata of all arrays, which readers open faster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not in the specification of zarr v3 yet; readers know it
        zarr.consolidate_metadata(store)
