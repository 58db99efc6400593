"""Sources on disk: a path (with ``:name`` for one array of several) to something that `open_source` takes."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..util.options import BadValue

SUFFIXES = (".npy", ".npz", ".pt", ".safetensors", ".zarr", ".h5", ".hdf5", ".parquet")


def split(text: str) -> tuple[str, str | None]:
    """``"data.h5:train/x"`` → ``("data.h5", "train/x")``; a path that exists is taken as it is."""
    if Path(text).exists():
        return text, None
    for suffix in SUFFIXES:
        path, found, name = text.partition(suffix + ":")
        if found:
            return path + suffix, name
    return text, None


def open_path(text: str, columns: Any = None) -> Any:
    """Open what the path names, as lazily as its kind allows."""
    path, name = split(text)
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet" or (Path(path).is_dir() and glob.glob(f"{path}/*.parquet")) or "*" in path:
        return _parquet(path, name or columns)
    if suffix not in SUFFIXES:
        raise BadValue(f"source: got the path {text!r}, expected one that ends in {', '.join(SUFFIXES)}.")
    if "://" not in path and not Path(path).exists():
        raise BadValue(f"source: there is no {path!r}.")
    if suffix == ".npy":
        return np.load(path, mmap_mode="r")
    if suffix == ".npz":
        return _named(dict(np.load(path).items()), name)
    if suffix == ".pt":
        return _named(torch.load(path, weights_only=True, mmap=True), name)
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        return _named(load_file(path), name)
    if suffix == ".zarr":
        import zarr

        return _named(zarr.open(path, mode="r"), name)
    import h5py

    return _named(h5py.File(path, "r"), name)


def _parquet(path: str, columns: Any) -> Any:
    from .sources import Parquet

    folder = Path(path)
    paths = sorted(glob.glob(f"{path}/*.parquet" if folder.is_dir() else path))
    if not paths:
        raise BadValue(f"source: there are no parquet files at {path!r}.")
    return Parquet(paths, columns)


def _named(found: Any, name: str | None) -> Any:
    if name is None:
        return found
    try:
        return found[name]
    except (KeyError, IndexError, TypeError):
        known = list(found) if hasattr(found, "__iter__") and not hasattr(found, "shape") else "one array"
        raise BadValue(f"source: got the name {name!r}, but the file holds {known}.") from None
