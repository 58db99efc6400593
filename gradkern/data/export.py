"""Stores of sequence models for TF-MoDISco: one-hot sequences and hypothetical contributions as a pair of npz files.

``modisco motifs -s sequences.npz -a contributions.npz`` (the package modisco-lite) reads both: ``arr_0``, ``[N, 4,
length]``.  Each file also has an array ``names`` with the samples' names.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib import format as npy

from ..util.options import BadValue
from ..util.renamed import renamed_argument
from .sources.registry import open_source
from .store.results import Results

ROWS = 256  # sequences that are read and written at a time


@renamed_argument("output", "target")
@renamed_argument("results", "store")
def to_modisco(
    store: Results | str | Path, source: Any, folder: str | Path, *, target: int = 0, columns: Any = None,
    names: Sequence[str] | None = None,
) -> tuple[Path, Path]:  # fmt: skip
    """Write ``sequences.npz`` (int8) and ``contributions.npz`` (float32) to ``folder``; returns their paths.

    ``source``: that of the run, whose first input is the one-hot sequences ``[N, bases, length]``.  ``target``: the
    position of the target among those of the run; of a run with ``targets=[5, 7]``, 1 means output 7.  ``names``: names
    of the samples (regions such as ``chr1:1000-3114``), by default the store's ``ids``.  Positions without a known base
    (N: all zeros, or 0.25 everywhere) become zeros in both files.  Memory does not grow with N.

    Raises `BadValue` for a run without hypothetical contributions, one that is not finished, or another source.
    """
    results = store if isinstance(store, Results) else Results.open(store)
    place = results.place
    if not results.about["fingerprint"]["method"]["arguments"].get("hypothetical"):
        raise BadValue(
            f"{place} has no hypothetical contributions, which TF-MoDISco reads. Run again with hypothetical=True "
            "(--hypothetical), in another store."
        )
    if results.finished_chunks < results.chunks:
        raise BadValue(
            f"{place} is not finished: {results.finished_chunks} of {results.chunks} chunks. Continue its run first."
        )
    rows = open_source(source, columns)
    names = results.ids if names is None else names
    if rows.samples != results.samples:
        raise BadValue(f"source: got {rows.samples} samples, expected the {results.samples} of {place}.")
    if names is not None and len(names) != results.samples:
        raise BadValue(f"names: got {len(names)}, expected one for each of the {results.samples} samples.")
    name = "attributions" if "attributions" in results else "attributions_0"
    if name not in results:
        raise BadValue(f"{place} stores no maps (maps=False). Run again with maps, in another store.")
    n, count, *shape = results.array(name).shape
    if len(shape) != 2:
        raise BadValue(f"{place} has maps of {shape}, expected those of sequences, [bases, length].")
    if not 0 <= target < count:
        raise BadValue(f"target: got {target}, expected the position of one of the run's {count} targets.")
    paths = Path(folder) / "sequences.npz", Path(folder) / "contributions.npz"
    Path(folder).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(_Writer(path, (n, *shape), dtype, names))
            for path, dtype in zip(paths, (np.int8, np.float32), strict=True)
        ]
        for sequences, contributions in _blocks(results, rows, name, target):
            writers[0].write(sequences)
            writers[1].write(contributions)
    return paths


def _blocks(results: Results, rows: Any, name: str, target: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The bases and contributions of some sequences, zero where the base is unknown."""
    for a in range(0, results.samples, ROWS):
        b = min(a + ROWS, results.samples)
        x = np.asarray(rows.read(a, b)[0])
        known = ((x == 0) | (x == 1)).all(1, keepdims=True) & (x.sum(1, keepdims=True) == 1)
        maps = results.maps(a, b, name)[:, target].float().numpy()
        yield x * known, maps * known


class _Writer:
    """Writes an npz file of one large array ``arr_0``, row by row, and of ``names``."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any, names: Sequence[str] | None) -> None:
        self.path, self.shape, self.dtype, self.names = path, shape, np.dtype(dtype), names
        self.partial = path.with_name(path.name + ".partial")

    def __enter__(self) -> _Writer:
        self.archive = zipfile.ZipFile(self.partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        self.file = cast(BinaryIO, self.archive.open("arr_0.npy", "w", force_zip64=True))
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        npy.write_array_header_2_0(self.file, header)
        return self

    def write(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, self.dtype).data.cast("B"))

    def __exit__(self, error: Any, *_: Any) -> None:
        self.file.close()
        if error is None and self.names is not None:
            with self.archive.open("names.npy", "w") as file:
                npy.write_array(cast(BinaryIO, file), np.array(list(self.names), dtype=np.str_), allow_pickle=False)
        self.archive.close()
        if error is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink()
