"""Arrays as sources: tensors, numpy, memory maps, zarr, HDF5, and the files that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...util.options import BadType, BadValue
from ...util.untrusted import check_array, check_links, check_memory, local_path
from .columns import Rows, UnequalRows, array_of, members, to_tensor
from .registry import Source, member, register_source


@register_source
class Arrays(Source):
    """Anything with ``shape`` and slicing, one array ``[N, *in]`` per input of the model."""

    about = "a tensor, a numpy array or memmap, a tuple or dict of arrays (one per input of the model)"
    suffixes: ClassVar[tuple[str, ...]] = (".npy", ".npz", ".pt", ".safetensors")

    def __init__(self, arrays: Sequence[Any]) -> None:
        arrays = [UnequalRows(list(a.unbind())) if isinstance(a, Tensor) and a.is_nested else a for a in arrays]
        for i, array in enumerate(arrays):
            if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
                raise BadValue(f"source: number {i} is masked, and masks would be lost. Fill it: array.filled(value).")
            if isinstance(array, Tensor) and array.layout is not torch.strided:
                raise BadType(f"source: number {i} is a sparse tensor. Make it dense: x.to_dense().")
            if not getattr(array, "shape", ()):
                raise BadType(f"source: number {i} is {type(array).__name__} without axes, expected [N, ...].")
            if array.shape[0] != arrays[0].shape[0]:
                raise BadValue(
                    f"source: number {i} has {array.shape[0]} samples and number 0 has {arrays[0].shape[0]}, expected "
                    "as many."
                )
            size = getattr(getattr(array, "dtype", None), "itemsize", 1) * math.prod(array.shape[1:])
            check_memory(size, f"source: number {i}: a sample")
        super().__init__(arrays[0].shape[0])
        self.arrays = arrays

    @classmethod
    def accepts(cls, data: Any) -> bool:
        if isinstance(data, (tuple, list)):
            one_input = isinstance(data, list) and is_nested_numbers(data)
            return bool(data) and (one_input or all(hasattr(a, "shape") or is_nested_numbers(a) for a in data))
        if isinstance(data, (Tensor, np.ndarray, dict)):
            return True
        return hasattr(data, "shape") and (
            hasattr(data, "__array__") or hasattr(data, "__dlpack__") or _is_sparse(data)
        )

    @classmethod
    def of(cls, data: Any, columns: Any) -> Source:
        if isinstance(data, list) and is_nested_numbers(data):
            return cls([array_of(data)])
        if isinstance(data, list) and len(data) > 1:
            raise BadValue(
                f"source: got a list of {len(data)} arrays, which may be samples, or the inputs of a model with "
                "several. For samples pass np.stack(arrays), for inputs tuple(arrays)."
            )
        if _is_sparse(data):
            raise BadType(f"source: got {type(data).__name__}, which is sparse. Make it dense: x.toarray().")
        if not hasattr(data, "__array__") and hasattr(data, "__dlpack__"):
            data = torch.from_dlpack(data)
        if isinstance(data, (tuple, list)):
            return cls([array_of(a) if isinstance(a, list) else a for a in data])
        nested = isinstance(data, Tensor) and data.is_nested  # a nested tensor may have no shape
        return cls([data] if nested or hasattr(data, "shape") else members(data, columns))

    @classmethod
    def at(cls, path: str, name: str | None, columns: Any) -> Source:
        return cls.of(member(cls.load(path), name), columns)

    @classmethod
    def load(cls, path: str) -> Any:
        """The content of a file: an array, or several by name.  It is read as lazily as its kind allows."""
        suffix = Path(path).suffix.lower()
        if suffix == ".npy":
            return _load_npy(path)
        if suffix == ".npz":
            arrays = np.load(path)  # reads each array only when it is asked for
            for entry in arrays.zip.infolist():
                check_memory(entry.file_size, f"source: {path}: {entry.filename}")
            return arrays
        if suffix == ".pt":
            return torch.load(path, weights_only=True, mmap=True)
        from safetensors.torch import load_file

        return load_file(path)

    def rows(self, start: int, stop: int) -> tuple[Rows, ...]:
        return tuple(to_tensor(a[start:stop]) for a in self.arrays)

    # ---- pickling for other processes: as the path to open an array again, if it has one, not as its content

    def opener(self, array: Any) -> partial[Any] | None:
        """A function that opens ``array`` again in another process; None if its content must be sent."""
        if not (isinstance(array, np.memmap) and array.filename is not None and array.flags.c_contiguous):
            return None
        offset = array.offset + array.__array_interface__["data"][0] - _start_of_map(array)
        return partial(np.memmap, str(array.filename), array.dtype, "r", offset, array.shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"arrays": [self.opener(a) or a for a in self.arrays]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = [a() if isinstance(a, partial) else a for a in self.arrays]


def _load_npy(path: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except ValueError as error:
        raise BadValue(
            f"source: {path} is not an array of numbers that can be read ({error}). If it holds samples of different "
            "shapes, save them as lists in a parquet file, or padded to one shape."
        ) from error


def _start_of_map(array: np.memmap) -> int:
    """The address at which the map behind ``array`` begins, to which its ``offset`` refers."""
    base: Any = array
    while isinstance(base.base, np.memmap):
        base = base.base
    return base.__array_interface__["data"][0]


def _is_sparse(data: Any) -> bool:
    return package_of(data) == "scipy" and hasattr(data, "toarray")


def is_nested_numbers(data: Any) -> bool:
    """Whether ``data`` is a list of (lists of) numbers; a list of tuples may be a Dataset of samples and labels."""
    first = data
    while isinstance(first, list) and first:
        first = first[0]
    return isinstance(data, list) and isinstance(first, (bool, int, float))


def package_of(data: Any) -> str:
    """The package that an object's class comes from, found without importing an optional library."""
    return type(data).__module__.partition(".")[0]


@register_source
class Zarr(Arrays):
    """A zarr array, or arrays of a zarr group."""

    about = "a zarr array or group"
    suffixes = (".zarr",)

    @classmethod
    def accepts(cls, data: Any) -> bool:
        return package_of(data) == "zarr"

    @classmethod
    def accepts_path(cls, path: str) -> bool:
        return super().accepts_path(path) or any(Path(path, name).is_file() for name in ("zarr.json", ".zarray"))

    def __init__(self, arrays: Sequence[Any]) -> None:
        for i, array in enumerate(arrays):
            check_array(array, f"source: number {i}")
        super().__init__(arrays)

    @classmethod
    def load(cls, path: str) -> Any:
        import zarr

        folder = local_path(path)
        if folder is not None and folder.is_dir():
            check_links(folder)
        try:
            return zarr.open(path if folder is None else folder, mode="r")
        except (ValueError, TypeError, LookupError) as error:
            raise BadValue(f"source: {path} is not a zarr array or group that can be read ({error}).") from error


@register_source
class Hdf5(Arrays):
    """An HDF5 dataset, or datasets of a group."""

    about = "an h5py dataset or group"
    suffixes = (".h5", ".hdf5")

    @classmethod
    def accepts(cls, data: Any) -> bool:
        return package_of(data) == "h5py"

    @classmethod
    def load(cls, path: str) -> Any:
        import h5py

        return h5py.File(path, "r")

    @classmethod
    def at(cls, path: str, name: str | None, columns: Any) -> Source:
        """The source at a path.  Datasets that are links into other files are refused: the file may come from anyone,
        and the links would read files that its sender may not."""
        source = super().at(path, name, columns)
        assert isinstance(source, Hdf5)
        for array in source.arrays:
            if array.is_virtual or array.external or not Path(array.file.filename).samefile(path):
                raise BadValue(
                    f"source: {array.name} of {path} is kept in another file. If you trust where it leads, open it "
                    "with h5py and pass the dataset."
                )
        return source

    def opener(self, array: Any) -> partial[Any]:
        return partial(_open_hdf5, str(array.file.filename), array.name)


def _open_hdf5(path: str, name: str) -> Any:
    return Hdf5.load(path)[name]
