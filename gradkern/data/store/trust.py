"""Checks a store before it is used: one that was damaged, or made by somebody else, must not do harm.

Attributes have the types that the code relies on, arrays have the sizes that the attributes say and codecs that only
decompress, records are as large as their file, and nothing leads out of the store.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from zarr.abc.store import Store

from ...util.options import BadValue
from ...util.untrusted import check_array, check_memory
from .. import statistics
from ..sources.padding import TAKEN
from . import durable, labels, layout

#: The attributes that the code relies on, and their types.
ATTRIBUTES: Mapping[str, Any] = {
    "fingerprint": {
        "model": {}, "method": {"method": str}, "stored": {},
        "source": {"samples": int, "shapes": [[int]], "dtypes": [str]},
    },
    "pinned": {"chunk": int, "batch": int, "threads": int, "memory_budget": int, "engine": str},
    "inputs": [str], "reductions": [str], "output": [int], "finished": bool,
    "arrays": {"dtype": str, "compression": str},
}  # fmt: skip
FINISHED: Mapping[str, Any] = {"exact": bool, "notes": [str]}
FACTS: Mapping[str, Any] = {"samples": int, "seconds": (int, float), "batches": [int], "notes": [str]}
MOST_THREADS = 4096
MOST_CHUNKS = 1 << 20  # the most chunks that the attributes may name without a list of chunks


def check_attributes(place: str, about: Mapping[str, Any]) -> None:
    """Raise `BadValue` if the store's attributes are not those of a run."""
    wanted = {**ATTRIBUTES, **(FINISHED if about.get("finished") else {})}
    ok = _fits(about, wanted)
    if ok:
        source, pinned = about["fingerprint"]["source"], about["pinned"]
        ok = (
            1 <= pinned["chunk"] <= source["samples"] < 1 << 62
            and pinned["batch"] >= 1
            and 1 <= pinned["threads"] <= MOST_THREADS
            and about["inputs"] == layout.map_names(len(about["inputs"]))
            and set(about["reductions"]) <= set(statistics.REDUCTIONS)
            and about["arrays"]["dtype"] in layout.STORED_AS
            and min((s for shape in (*source["shapes"], about["output"]) for s in shape), default=0) >= 0
            and isinstance(about.get("program"), (str, type(None)))
            and _fits(about.get("made_by", {}), {})
            and _padding_fits(about)
        )
    if not ok:
        raise BadValue(f"{place} is damaged: its attributes are not those of a run. Make it again.")


def _padding_fits(about: Mapping[str, Any]) -> bool:
    padding, shapes = about.get("padding"), about["fingerprint"]["source"]["shapes"]
    if padding is None:
        return True
    wanted = {"value": (int, float), "length": (int, type(None)), "axes": [[int]], "gives": [str]}
    return (
        _fits(padding, wanted)
        and set(padding["gives"]) <= set(TAKEN.values())
        and all(len(a) == 2 and 0 <= a[0] < len(shapes) and 0 <= a[1] < len(shapes[a[0]]) for a in padding["axes"])
    )


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(value, Mapping) and all(name in value and _fits(value[name], w) for name, w in wanted.items())
    if isinstance(wanted, list):
        return isinstance(value, list) and all(_fits(v, wanted[0]) for v in value)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def check_chunks(place: str, store: Store, about: Mapping[str, Any]) -> None:
    """Raise `BadValue` if the list of chunks does not match the attributes, which may name any number."""
    chunks = -(-about["fingerprint"]["source"]["samples"] // about["pinned"]["chunk"])
    if chunks > MOST_CHUNKS and durable.size(store, "chunks/c.0.0") != 16 * chunks:
        raise BadValue(f"{place} is damaged: it has no list of its {chunks:,} chunks. Make it again.")


def check_own_array(place: str, name: str, array: Any, samples: int) -> None:
    """`check_array`, and a check of the array's size for a store of ``samples`` samples."""
    check_array(array, f"{place}: the array {name!r}", text=name in labels.TEXT)
    dimensions = getattr(array.metadata, "dimension_names", None) or ("",)
    if dimensions[0] == "sample" and array.shape[0] != samples:
        raise BadValue(f"{place} is damaged: {name!r} has {array.shape[0]} rows, expected {samples}.")
    if not name.startswith(("attributions", "top_features")):  # the others are read as a whole
        check_memory(array.dtype.itemsize * array.size, f"{place}: the array {name!r}")


def read_record(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the facts of a record of the ledger.

    Raises `ValueError` if the content is damaged, or says that it is larger than it is.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if sum(e.file_size for e in entries) > len(content) or any(e.compress_type for e in entries):
                raise ValueError("it says that it is larger than its file")
            for entry in entries:
                arrays[entry.filename.removesuffix(".npy")] = _array(archive.read(entry))
        facts = json.loads(arrays.pop("facts.json").tobytes())
    except (zipfile.BadZipFile, LookupError, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(str(error)) from error
    if not _fits(facts, FACTS):
        raise ValueError("it has other facts than a record")
    return arrays, facts


def _array(content: bytes) -> np.ndarray:
    """The array of an ``.npy``, whose header must match the length of the content."""
    file = io.BytesIO(content)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[np.lib.format.read_magic(file)](file)
    count = int(np.prod(shape, dtype=object))
    if dtype.hasobject or any(s < 0 for s in shape) or count * dtype.itemsize != len(content) - file.tell():
        raise ValueError("an array is not as large as its header says")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
