"""Checksums (CRC-32C) of what a store holds and of what was read from the source, and the copy of its metadata."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping

import google_crc32c
import numpy as np
from zarr.abc.store import Store

from . import durable

UNKNOWN = 0  # stands in place of a checksum for chunks that an earlier version wrote without one
BLOCK = 1 << 18
BACKUP = "chunks/created.json"


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """The CRC-32C of the bytes of some arrays, and of their shapes and dtypes; never `UNKNOWN`."""
    value = 0
    for array in arrays:
        value = google_crc32c.extend(value, f"{array.dtype.str}{array.shape}".encode())
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for at in range(0, len(content), BLOCK):  # the function takes only bytes; a small copy stays in the cache
            value = google_crc32c.extend(value, bytes(content[at : at + BLOCK]))
    return value or 1


def of_attributes(about: Mapping[str, object]) -> int:
    """The checksum of a store's attributes, which is kept among them."""
    content = {name: value for name, value in about.items() if name != "checksum"}
    return google_crc32c.value(json.dumps(content, sort_keys=True).encode()) or 1


# ---------------------------------------------------------------------------------------------------------------
# The files that a store is created with: descriptions of the arrays, and those arrays that never change


def write_backup(store: Store, keys: Iterable[str]) -> None:
    """Copy these files into one file, for `read_backup`."""
    files = {key: base64.b64encode(durable.get(store, key) or b"").decode() for key in sorted(keys)}
    content = json.dumps(files)
    durable.put(store, BACKUP, json.dumps({"checksum": _of_text(content), "files": content}).encode())


def read_backup(store: Store) -> dict[str, bytes] | None:
    """The files as they were at creation; None if the copy is damaged, or missing (a store of an earlier version)."""
    content = durable.get(store, BACKUP)
    try:
        backup = json.loads(content or b"")
        if _of_text(backup["files"]) != backup["checksum"]:
            return None
        files = {key: base64.b64decode(text) for key, text in json.loads(backup["files"]).items()}
        return files if "zarr.json" in files and all(map(_inside, files)) else None
    except (ValueError, KeyError, TypeError):
        return None


def _inside(key: str) -> bool:
    """Whether this is the key of a description, or of the only chunk of an array, inside the store."""
    return re.fullmatch(r"([A-Za-z]\w*/){0,2}(zarr\.json|c(\.0)+)", key) is not None


def _of_text(text: str) -> int:
    return google_crc32c.value(text.encode())
