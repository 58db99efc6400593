"""The store of a run: plain zarr v3 arrays, readable without gradkern, and the ledger of finished chunks.

attributions  [N, S, *in]   maps of the targets (attributions_0, … if the model has several inputs)
predictions   [N, *out]     the model's outputs
targets       [S] or [N, S] the flat indices of the target outputs
deltas        [N, S]        if the method has them
top_features  [N, S, k]     if requested: flat indices of the features with the largest |attribution|
ids           [N]           if given: the names of the samples; ``names`` of the outputs
lengths       [N, A]        if samples were padded: their own lengths in the A axes in which they differ
chunks        [K, 2]        first and last + 1 sample of each chunk; its folder also holds the ledger
reductions/   [C, *in]      once the run is complete
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.abc.store import Store

from ...util.options import BadValue
from ...util.renamed import renamed_argument, warn_of_old_name
from ...util.untrusted import check_links, local_path
from .. import statistics
from ..sources.padding import mask_of
from . import checks, durable, labels, layout, locks, trust
from .attributes import Attributes, Counts, Pinned
from .durable import Damaged
from .layout import Array
from .ledger import FOLDER, NAMED, ChunkRecord, Ledger

FORMAT = 1
ABANDONED = 3600  # seconds after which an unfinished creation counts as abandoned
COUNTS = ("nonfinite", "nonfinite_first", "overflow", "underflow", "narrowed")  # facts that are reported at the end
UNDERFLOW = 0.01  # the share of nonzero values stored as 0 from which it is reported
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


class Results:
    """An open store.

    ``array(name)`` gives an array, ``reduction(name)`` the result of a reduction, ``maps(start, stop)`` the maps of
    some samples.  ``samples``, ``chunks`` and ``chunk`` (samples per chunk) are numbers.  ``about`` holds all
    attributes as they are stored; the properties below give the most important of them.
    """

    def __init__(self, place: str, store: Store, group: zarr.Group) -> None:
        self.place, self.store, self.group = place, store, group
        about = group.attrs["gradkern"]
        assert isinstance(about, Mapping)
        self.about = cast(Attributes, dict(about))
        self.samples = int(self.about["fingerprint"]["source"]["samples"])
        self.chunk = int(self.about["pinned"]["chunk"])
        self.chunks = -(-self.samples // self.chunk)
        self.ledger = Ledger(store, self.chunks)
        self._arrays: dict[str, Any] = {}

    # ---- making and opening

    @classmethod
    def exists(cls, place: str | Path) -> bool:
        """Whether there is a run at this place.  Raises `BadValue` if there is something else."""
        text = str(place)
        path = local_path(text)
        if path is None:
            return durable.get(durable.store_at(text), "zarr.json") is not None
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return False
        check_links(path)
        if not any((path / name).exists() for name in ("zarr.json", checks.BACKUP)):
            raise BadValue(f"out: {text} exists but is not a zarr store. Choose another place; nothing was changed.")
        return True

    @classmethod
    @renamed_argument("place", "store")
    def open(cls, store: str | Path, *, read_only: bool = True) -> Results:
        """Open a run.  Raises `BadValue` if there is none."""
        text = str(store)
        if not cls.exists(text):
            raise BadValue(f"there is no store at {text}.")
        opened = durable.store_at(text, read_only=read_only)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mode: Literal["r", "r+"] = "r" if read_only else "r+"
                group = zarr.open_group(opened, mode=mode, use_consolidated=False, zarr_format=3)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(
                f"{text}: zarr.json is damaged ({type(error).__name__}). `gradkern verify {text} --repair` restores it "
                "from the store's own copy."
            ) from error
        about = group.attrs.get("gradkern")
        if not isinstance(about, Mapping) or about.get("format") != FORMAT:
            raise BadValue(f"{text} is not a store of gradkern.run (format {FORMAT}). Nothing was changed.")
        trust.check_attributes(text, about)
        trust.check_chunks(text, opened, about)
        return cls(text, opened, group)

    @classmethod
    def create(cls, place: str | Path, arrays: Sequence[Array], about: Attributes, compression: str) -> Results:
        """Create a store atomically; if another process was faster, open its store."""
        text = str(place)
        path = local_path(text)
        if path is None:
            layout.create_arrays(durable.store_at(text), arrays, about, compression)
            return cls.open(text, read_only=False)
        path = path.resolve()  # the target, if this is a link to an empty folder
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.new")
        try:
            layout.create_arrays(durable.DurableStore(unfinished), arrays, about, compression)
            with contextlib.suppress(OSError):  # another process has created it already
                os.rename(unfinished, path)
                durable.sync_folder(path.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return cls.open(text, read_only=False)

    # ---- what the run was, and how far it is

    @property
    def finished(self) -> bool:
        """Whether the run is complete: all chunks are finished, and the reductions are written."""
        return bool(self.about.get("finished"))

    @property
    def finished_chunks(self) -> int:
        """How many chunks are finished."""
        return len(self.ledger.finished())

    @property
    def done(self) -> int:
        """The old name of `finished_chunks`."""
        warn_of_old_name("Results.done", "Results.finished_chunks", 3)
        return self.finished_chunks

    @property
    def exact(self) -> bool | None:
        """Whether the result is bit-equal to that of an uninterrupted run; None until the run is finished."""
        return self.about.get("exact")

    @property
    def notes(self) -> list[str]:
        """Why the result is not `exact`, if it is not, such as another version of torch after a resume."""
        return self.about.get("notes", [])

    @property
    def tolerance(self) -> float | None:
        """Of a result that is not `exact`: how much it may differ, relative to the largest attribution."""
        return self.about.get("tolerance")

    @property
    def method(self) -> str:
        return self.about["fingerprint"]["method"]["method"]

    @property
    def reductions(self) -> list[str]:
        """The names of the reductions."""
        return self.about["reductions"]

    @property
    def inputs(self) -> list[str]:
        """The names of the maps, one per floating input: ``attributions``, or ``attributions_0``, …"""
        return self.about["inputs"]

    @property
    def pinned(self) -> Pinned:
        """Everything that affects the last bits of the result, and that a resumed run therefore keeps."""
        return self.about["pinned"]

    # ---- writing

    def span(self, chunk: int) -> tuple[int, int]:
        """The samples of a chunk."""
        return chunk * self.chunk, min((chunk + 1) * self.chunk, self.samples)

    def write(self, chunk: int, parts: Mapping[str, np.ndarray]) -> None:
        """Write a chunk's rows of some arrays.  Afterwards they are on disk, but the chunk is not finished yet."""
        start, stop = self.span(chunk)
        for name, rows in parts.items():
            array = self.array(name)
            if self._stored_as_is(array, rows):
                key = layout.chunk_key(name, chunk, rows.ndim)
                durable.put_array(self.store, key, rows)  # byte for byte what zarr would write
            else:
                array[start:stop] = rows

    def short_files(self) -> set[tuple[str, int]]:
        """The finished chunks with a file that is missing or has the wrong size, as pairs of array and chunk.

        Looks only at names and sizes.  Empty for object stores.
        """
        if not isinstance(self.store, durable.DurableStore):
            return set()
        short, finished = set(), self.ledger.finished()
        for name in self.arrays():
            array, sizes = self.array(name), self.store.sizes(name)
            wanted = None if array.compressors else array.dtype.itemsize * math.prod(array.chunks)
            for chunk in finished:
                size = sizes.get(layout.chunk_key("", chunk, array.ndim).lstrip("/"), 0)
                if size != wanted if wanted is not None else size == 0:
                    short.add((name, chunk))
        return short

    def check_files(self) -> None:
        """Raise `Damaged` if a look at names and sizes shows that finished chunks are gone."""
        described = json.loads(durable.get(self.store, "zarr.json") or b"{}").get("consolidated_metadata") or {}
        gone = [name for name in described.get("metadata", ()) if name not in self.group]
        if self.finished and isinstance(self.store, durable.DurableStore):
            for name, array in self._reductions():
                files = [k for k, size in self.store.sizes(f"reductions/{name}").items() if size and k[:2] == "c."]
                gone += [f"part of reductions/{name}"] if len(files) < array.nchunks else []
        if gone:
            raise Damaged(
                f"{self.place}: {gone[0]} is gone. `gradkern verify {self.place} --repair`, or gradkern.data.repair, "
                "restores what can be."
            )
        if short := self.short_files():
            name, chunk = min(short, key=lambda s: s[1])
            start, stop = self.span(chunk)
            raise Damaged(
                f"{self.place}: {len(short)} files of finished chunks are missing or have another size (the first: "
                f"{name} of the samples {start} … {stop - 1}). `gradkern verify {self.place} --repair`, or "
                "gradkern.data.repair, computes them again."
            )

    def remove_partial(self, chunks: Iterable[int]) -> None:
        """Remove the half-written files of these chunks, which a killed run has left."""
        if not isinstance(self.store, durable.DurableStore):
            return
        wanted_chunks = set(chunks)
        names = {str(number) for number in wanted_chunks}
        for array in self.arrays():
            self.store.remove_partial(array, lambda file: file.split(".")[1] in names)  # c.12.0.0
        self.store.remove_partial(FOLDER, lambda file: not wanted_chunks.isdisjoint(self.ledger.span_of(file)))

    def _stored_as_is(self, array: Any, rows: np.ndarray) -> bool:
        """Whether rows in memory equal a chunk's file.  (The last chunk is padded, and others may be compressed.)"""
        return (
            rows.shape == array.chunks
            and rows.dtype == array.dtype
            and rows.dtype.byteorder in ("=", "|")
            and sys.byteorder == "little"
            and rows.flags.c_contiguous
            and not array.compressors
            and not array.filters
        )

    def complete(self) -> bool:
        """Write the reductions and mark the store complete; False if chunks are missing.  Any process may call it."""
        if self.finished:
            return True
        total = self.ledger.total()
        if total is None:
            return False
        with locks.completing(self.store, self.chunks):
            self._complete(total)
        return True

    def _complete(self, total: ChunkRecord) -> None:
        self._remove_partial_of_completion()
        for i, name in enumerate(self.inputs):
            for reduction, value in statistics.finish(self.reductions, total.sums, name).items():
                self.array(layout.reduction_key(reduction, self.inputs, i))[...] = value
        notes = total.facts["notes"]
        counts = {name: total.facts[name] for name in COUNTS if name in total.facts}
        self.about |= {"finished": True, "exact": not notes, "notes": notes, "counts": cast(Counts, counts)}
        if notes:
            self.about["tolerance"] = TOLERANCE[self.about["arrays"]["dtype"]]
        self.write_attributes()

    def write_attributes(self) -> None:
        """Write ``about`` in one step: zarr would take two, between which the arrays' descriptions are missing."""
        if "checksum" in self.about:  # a store of an earlier version has none, and no copy either
            self.about["checksum"] = checks.of_attributes(self.about)
        described = json.loads(durable.get(self.store, "zarr.json") or b"{}")
        described.setdefault("attributes", {})["gradkern"] = self.about
        durable.put(self.store, "zarr.json", json.dumps(described, indent=2).encode())

    def _remove_partial_of_completion(self) -> None:
        """Remove the half-written files of a completion that was killed."""
        if isinstance(self.store, durable.DurableStore):
            for folder in ("", *(f"reductions/{name}" for name, _ in self._reductions())):
                self.store.remove_partial(folder, lambda file: True)

    def _reductions(self) -> list[tuple[str, Any]]:
        return list(self.group["reductions"].arrays()) if "reductions" in self.group else []  # type: ignore[union-attr]

    # ---- reading

    def array(self, name: str) -> Any:
        """An array of the store, as a zarr array."""
        if name not in self._arrays:
            with zarr.config.set({"array.write_empty_chunks": True}):
                array = self.group[name]
            if not isinstance(array, zarr.Array):
                raise BadValue(f"{self.place} is damaged: {name!r} is not an array.")
            trust.check_own_array(self.place, name, array, self.samples)
            if name in labels.TEXT:
                labels.check_text(self.place, self.store, name, array.shape[0])
            self._arrays[name] = array
        return self._arrays[name]

    def arrays(self) -> list[str]:
        """Names of the arrays that are written chunk by chunk."""
        axes = {name: getattr(array.metadata, "dimension_names", None) or ("",) for name, array in self.group.arrays()}
        return [name for name, of in axes.items() if of[0] == "sample" and name not in labels.LABELS]

    def __contains__(self, name: str) -> bool:
        return name in self.group

    @cached_property
    def ids(self) -> tuple[str, ...] | None:
        """The names of the samples, if the run was given some."""
        return self._text("ids")

    @cached_property
    def names(self) -> tuple[str, ...] | None:
        """The names of the outputs, if the run was given some: one per output of the model, or per target."""
        return self._text("names")

    def _text(self, name: str) -> tuple[str, ...] | None:
        try:
            return tuple(map(str, self.array(name)[...])) if name in self else None
        except (UnicodeDecodeError, ValueError) as error:
            raise Damaged(
                f"{self.place}: {name!r} is damaged. `gradkern verify {self.place} --repair` repairs it."
            ) from error

    def row_names(self, names: Sequence[str] | None = None) -> list[str]:
        """The names of the rows of a statistic ``[C, *in]``: those given, the store's own, or ``output 3``."""
        names, targets = names or self.names, np.asarray(self.array("targets")[...])
        if names is not None:
            return labels.of_rows(names, targets, self.about["output"])
        return [f"output {c}" for c in (targets if targets.ndim == 1 else range(math.prod(self.about["output"])))]

    def sample_name(self, sample: int) -> str:
        """``12``, or with the sample's name ``12 (patient 7)``."""
        return str(sample) if self.ids is None else f"{sample} ({self.ids[sample]})"

    @renamed_argument("of", "input")
    def mask(self, start: int, stop: int, input: int = 0) -> Tensor:
        """Which numbers of the samples ``start:stop`` are data and not padding, bool ``[n, *in]``, for the input with
        index ``input``."""
        shape = self.about["fingerprint"]["source"]["shapes"][input]
        if "lengths" not in self:
            return torch.ones(stop - start, *shape, dtype=torch.bool)
        lengths = torch.from_numpy(np.asarray(self.array("lengths")[start:stop]))
        return mask_of(lengths, self.about["padding"]["axes"], shape, input)

    def maps(self, start: int, stop: int, name: str = "attributions") -> Tensor:
        """Maps ``[n, S, *in]`` of the samples ``start:stop``, in the dtype that they were stored with."""
        array = self.array(name)
        rows = torch.from_numpy(np.ascontiguousarray(array[start:stop]))
        return rows.view(torch.bfloat16) if array.attrs.get("dtype") == "bfloat16" else rows

    @renamed_argument("of", "input")
    def reduction(self, name: str, input: int = 0) -> np.ndarray:
        """The result of a reduction ``[C, *in]``, for the input with index ``input``.  The run must be complete."""
        if not self.finished:
            raise BadValue(
                f"{self.place}: {self.finished_chunks} of {self.chunks} chunks are finished; the reductions come last."
            )
        if input not in range(len(self.inputs)):
            raise BadValue(f"input: got {input!r}, expected the index of an input, below {len(self.inputs)}.")
        key = layout.reduction_key(name, self.inputs, input)
        if key not in self.group:
            raise BadValue(f"{self.place} has no reduction {name!r}, it has {self.reductions}.")
        return np.asarray(self.array(key)[...])

    def losses(self) -> list[str]:
        """Sentences on samples that are not finite, and on values that the stored dtype cannot hold."""
        counts, words = self.about.get("counts", Counts()), []
        if count := counts.get("nonfinite"):
            first = ", ".join(map(self.sample_name, counts["nonfinite_first"])) + (", …" if count > NAMED else "")
            left_out = self.reductions and self.about.get("nonfinite") == "skip"
            verdict = "they are left out of the statistics" if left_out else "they are kept as they are"
            words.append(f"{count:,} of {self.samples:,} samples are not finite (samples {first}); {verdict}")
        dtype, narrowed = self.about["arrays"]["dtype"], counts.get("narrowed", 0)
        if overflow := counts.get("overflow"):
            words.append(
                f"{overflow / narrowed:.2%} of the attributions are too large for {dtype} and are stored as Inf"
            )
        if (underflow := counts.get("underflow", 0)) > UNDERFLOW * narrowed:
            words.append(
                f"{underflow / narrowed:.2%} of the attributions that are not 0 are too small for {dtype} and are "
                "stored as 0"
            )
        return words

    def __repr__(self) -> str:
        return f"Results({self.place!r}, {self.finished_chunks} of {self.chunks} chunks, {self.samples} samples)"


def _tidy(path: Path) -> None:
    """Remove stores whose creation was killed an hour ago or more; younger ones may still be in progress."""
    for old in path.parent.glob(f".{path.name}.*.new"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > ABANDONED:
                shutil.rmtree(old)
