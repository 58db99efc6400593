"""The base class of sources of samples, and the registry that finds the class for an object or a path.

A source has a length and random access by ranges, because a run that resumes or is sharded must read the samples of
single chunks.  Streams without these are refused, with advice.

A kind of source is one class:

    @register_source
    class Lines(Source):
        about, suffixes = "a .txt file of numbers", (".txt",)

        @classmethod
        def at(cls, path, name, columns):
            return cls(Path(path))

        def rows(self, start, stop):
            ...
"""

from __future__ import annotations

import glob
import os
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from ...util.options import BadType, BadValue, InputError
from ...util.text import shorten
from .columns import NotNumbers, Rows, stack_rows
from .padding import Pad, Padding, taken_by

Span = tuple[int, int]
LONGEST = 200  # the most characters that are shown of another library's error


class Source(ABC):
    """Samples in a fixed order.  ``read(a, b)`` gives one tensor ``[b - a, *in]`` per input of the model.

    ``about`` describes in error messages what the class accepts; ``suffixes`` are those of the files that it opens.
    """

    about: ClassVar[str] = ""
    suffixes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, samples: int) -> None:
        if samples < 1:
            raise BadValue("source: got no samples, expected at least one.")
        self.samples = samples
        self.cast: torch.dtype | None = None
        self.padding: Padding | None = None

    # ---- opening

    @classmethod
    def accepts(cls, data: Any) -> bool:
        """Whether this class reads such an object."""
        return False

    @classmethod
    def of(cls, data: Any, columns: Any) -> Source:
        """The source of an object that the class accepts; ``columns`` are the fields that the model takes."""
        raise NotImplementedError(f"{cls.__name__} accepts objects, so it needs a class method of(data, columns)")

    @classmethod
    def accepts_path(cls, path: str) -> bool:
        """Whether this class reads such a file or folder."""
        return Path(path).suffix.lower() in cls.suffixes

    @classmethod
    def at(cls, path: str, name: str | None, columns: Any) -> Source:
        """The source at a path; ``name`` picks one array of several (``path:name``)."""
        raise NotImplementedError(f"{cls.__name__} has suffixes, so it needs a class method at(path, name, columns)")

    # ---- reading

    @abstractmethod
    def rows(self, start: int, stop: int) -> tuple[Rows, ...]:
        """The samples ``start:stop``, one CPU tensor ``[stop - start, *in]`` per input of the model.

        Where samples have different shapes, a list of tensors ``[*in]`` instead: the error then names them.
        """

    def read(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """`rows`, checked, and cast if a dtype was requested."""
        return self.prepared(self.checked(start, stop), start, stop)

    def checked(self, start: int, stop: int) -> tuple[Rows, ...]:
        """`rows`, whose number was checked.  Raises `BadValue` that names a sample which cannot be read."""
        try:
            given = self.rows(start, stop)
        except Exception as error:
            self.blame(start, stop, error)
        check_rows(given, start, stop)
        return given

    def blame(self, start: int, stop: int, error: Exception) -> NoReturn:
        """Raise `BadValue` that names the first sample which cannot be read, or ``error`` itself if it says enough."""
        if not lacks_place(error):
            raise error
        for i in range(start, stop):
            try:
                self.rows(i, i + 1)
            except Exception as cause:
                if not lacks_place(cause):
                    raise
                raise BadValue(f"source: sample {i} could not be read ({one_line(cause)}).") from cause
        raise BadValue(f"source: the samples {start} … {stop - 1} could not be read ({one_line(error)}).") from error

    def prepared(self, given: tuple[Rows, ...], start: int, stop: int) -> tuple[Tensor, ...]:
        """Rows ``[stop - start, *in]``, checked, and padded or cast if that was requested.

        A single input is always cast.  Of several inputs, integers (except bytes) are not cast if another input is
        floating, because they are usually indices.
        """
        check_rows(given, start, stop)
        rows = tuple(stack_rows(x, start) for x in given) if self.padding is None else self.padding.padded(given, start)
        if self.cast is None:
            return rows
        whole = not any(x.is_floating_point() or x.dtype == torch.uint8 for x in rows)
        if whole and any(x.is_complex() for x in rows):
            raise BadType(
                "source: its samples are complex, and a cast would drop the imaginary parts. Give "
                "torch.view_as_real(x), with one axis more, to a model that takes that."
            )
        return tuple(x.to(self.cast) if whole or x.is_floating_point() or x.dtype == torch.uint8 else x for x in rows)

    def stream(self, spans: Sequence[Span]) -> Iterator[tuple[Tensor, ...]]:
        """`read` of one span after the other."""
        for start, stop in spans:
            yield self.read(start, stop)

    def cast_to(self, dtype: torch.dtype | None) -> Self:
        if dtype is not None:
            self.cast = dtype
        return self

    def pad_with(self, pad: Pad | None) -> Self:
        """Pad samples of different shapes; all samples are read once to find out their shapes."""
        if pad is not None:
            self.padding = Padding.of(self, pad)
        return self

    def for_model(self, model: Any) -> Self:
        """Add the lengths or the mask that the model's ``forward`` takes to the padded inputs."""
        if self.padding is not None:
            self.padding = replace(self.padding, gives=taken_by(model, len(self.padding.shapes)))
        return self


def lacks_place(error: Exception) -> bool:
    """Whether an error in reading does not name the sample or file; other libraries' errors may not, gradkern's do."""
    return isinstance(error, NotNumbers) or not isinstance(error, (InputError, MemoryError, ImportError))


def one_line(error: Exception) -> str:
    """The message of an error in one line."""
    text = " ".join(str(error).split())
    text = text.removeprefix("source: ") if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
    return shorten(text, LONGEST).rstrip(" .:")


def check_rows(given: Sequence[Rows], start: int, stop: int) -> None:
    """Raise `BadValue` unless there is one row per sample of ``start:stop``."""
    for x in given:
        shape = [len(x), "..."] if isinstance(x, list) else list(x.shape)
        if shape[:1] != [stop - start]:
            raise BadValue(
                f"source: reading samples {start} … {stop - 1} gave shape {shape}, expected [{stop - start}, ...]: one "
                "row per sample."
            )


def in_order(paths: Iterable[str]) -> list[str]:
    """Paths in the order of their names, with numbers in them as numbers: ``part2`` comes before ``part10``."""
    return sorted(paths, key=lambda path: ([_of_digits(p) for p in re.split(r"([0-9]+)", path)], path))


def _of_digits(text: str) -> tuple[int, str]:
    return (int(text), "") if re.fullmatch("[0-9]+", text) else (0, text)


def is_pattern(path: str) -> bool:
    """Whether a path stands for several files; the name of an existing file may contain brackets."""
    return glob.has_magic(path) and "://" not in path and not Path(path).exists()


def matching(pattern: str) -> list[str]:
    """The files of a pattern, `in_order`.  ``**`` is any number of folders; the folder's name may contain brackets."""
    folder, name = os.path.split(pattern)
    return in_order(glob.glob(pattern, recursive=True) or glob.glob(os.path.join(glob.escape(folder), name)))


Kind = TypeVar("Kind", bound=type[Source])
SOURCE_KINDS: list[type[Source]] = []


def register_source(kind: Kind) -> Kind:
    """Register a class.  The last one is asked first, so that yours come before gradkern's own."""
    SOURCE_KINDS.insert(0, kind)
    return kind


def accepted_kinds() -> str:
    """The kinds of sources that `open_source` accepts, in words."""
    *kinds, fallback = SOURCE_KINDS
    objects = [kind.about for kind in (*reversed(kinds), fallback) if kind.about]
    return f"{', '.join(objects)}, or a path that ends in {', '.join(sorted(_suffixes()))}"


def _suffixes() -> list[str]:
    return [suffix for kind in SOURCE_KINDS for suffix in kind.suffixes]


def open_source(source: Any, columns: Any = None, dtype: torch.dtype | None = None, pad: Pad | None = None) -> Source:
    """A `Source` for anything that a registered class accepts.

    ``columns``: which fields of a sample are the model's inputs (names or numbers).  ``dtype``: cast the inputs to it,
    for data that is stored in another precision than the model's (`Source.prepared` says which).  ``pad``: a number,
    with which samples of different shapes are padded to the longest, or a number and a length.
    """
    return _open(source, columns).cast_to(dtype).pad_with(pad)


def _open(source: Any, columns: Any) -> Source:
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, Path)):
        return _open_path(os.path.expanduser(source), columns)
    for kind in SOURCE_KINDS:
        if kind.accepts(source):
            return kind.of(source, columns)
    raise BadType(f"source: got {type(source).__name__}, expected {accepted_kinds()}.")


def _open_path(text: str, columns: Any) -> Source:
    if not text:
        raise BadValue("source: got an empty path.")
    path, name = _split(text)
    kind = next((k for k in SOURCE_KINDS if k.accepts_path(path)), None)
    if kind is None and Path(path).is_dir():
        raise BadValue(f"source: {path!r} is a folder. Say which files in it: {path.rstrip('/')}/*.npy, for one.")
    if kind is None:
        raise BadValue(f"source: got the path {text!r}, expected one that ends in {', '.join(sorted(_suffixes()))}.")
    if "://" not in path and not is_pattern(path) and not Path(path).exists():
        raise BadValue(f"source: there is no {path!r}.")
    try:
        return kind.at(path, name, columns)
    except Exception as error:
        if not lacks_place(error):
            raise
        there = " Copy it to this machine." if "://" in path else ""
        raise BadValue(f"source: {path} cannot be read ({one_line(error)}).{there}") from error


def _split(text: str) -> tuple[str, str | None]:
    """``"data.h5:train/x"`` → ``("data.h5", "train/x")``; a path that exists is not split."""
    if not Path(text).exists():
        for suffix in _suffixes():
            path, colon, name = text.partition(suffix + ":")
            if colon:
                return path + suffix, name
    return text, None


def member(container: Any, name: str | None) -> Any:
    """The member ``name`` of a file; the whole file if no name was given."""
    if name is None:
        return container
    listed = isinstance(container, (tuple, list))
    try:
        return container[int(name) if listed and name.isdecimal() else name]
    except (KeyError, IndexError, TypeError):
        if listed:
            raise BadValue(
                f"source: got the name {name!r}, but the file holds the numbers 0 … {len(container) - 1}."
            ) from None
        has_names = hasattr(container, "__iter__") and not hasattr(container, "shape")
        names = list(container) if has_names else "one array"
        raise BadValue(f"source: got the name {name!r}, but the file holds {names}.") from None


def can_be_pickled(source: Source) -> bool:
    """Whether the source can be sent to another process."""
    try:
        pickle.dumps(source)
    except Exception:
        return False
    return True
