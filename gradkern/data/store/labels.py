"""The labels that a store keeps: names of samples and outputs, and the lengths of samples that were padded.

They are arrays that never change: ``ids`` text ``[N]``, ``names`` text ``[C]`` (one per output of the model, or
``[S]``, one per target), and ``lengths`` int64 ``[N, A]`` as in `sources.padding.Padding`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from zarr.abc.store import Store

from ...util.options import BadValue
from . import durable

LABELS = ("ids", "names", "lengths")
TEXT = ("ids", "names")


def read_text(what: str, given: Any) -> tuple[str, ...]:
    """Names as text, from a sequence, an array or a column of a table.  Raises `BadValue` where one is missing."""
    if isinstance(given, (str, bytes)):
        raise BadValue(f"{what}: got the text {given!r}, expected a sequence of names.")
    values = np.asarray(list(given) if isinstance(given, Iterator) else given, dtype=object)
    if values.ndim != 1:
        raise BadValue(f"{what}: got an array {list(values.shape)}, expected one axis.")
    for i, value in enumerate(values):
        if value is None or value != value:
            raise BadValue(f"{what}: number {i} is missing ({value!r}), expected a name.")
    return tuple(value.decode() if isinstance(value, bytes) else str(value) for value in values)


def check_text(place: str, store: Store, name: str, count: int) -> None:
    """Raise `BadValue` if the text of an array does not begin with the number of its rows, which decoding relies on."""
    content = durable.get(store, f"{name}/c.0") or b""
    if content[:4] != struct.pack("<I", count):
        raise BadValue(f"{place} is damaged: {name!r} does not hold {count} names. See `gradkern verify {place}`.")


def of_rows(names: Sequence[str], targets: np.ndarray, output: Sequence[int]) -> list[str]:
    """The names of the rows of a statistic: of the targets ``[S]`` that all samples share, else of all outputs.

    Raises `BadValue` unless there is a name per output of the model, or one per target.
    """
    outputs, shared = math.prod(output), targets.ndim == 1
    if len(names) == outputs:
        return [names[t] for t in targets] if shared else list(names)
    if shared and len(names) == len(targets):
        return list(names)
    targeted = f", or one for each of {len(targets)} targets" if shared else ""
    raise BadValue(f"names: got {len(names)}, expected one for each of {outputs} outputs{targeted}.")
