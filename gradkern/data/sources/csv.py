"""Reads ``.csv`` and ``.tsv``, and finds out whether the first line holds names or a sample.

pandas takes the first line for names.  In a file without names this would silently lose the first sample, so it
is read as a sample if all of it is numbers, and refused where numbers may be names.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...util.options import BadValue

LEAST = 3  # numbers of which "equally spaced" means something


def read(path: str, every: bool = False, text: str | None = None) -> Any:
    """The file as a pandas DataFrame.  Raises `BadValue` in one line if it cannot be read safely.

    ``every``: all columns are features, so none may be empty or without a name.  ``text``: a column that is read as
    text without conversion, for names (``007``, ``NA``).
    """
    try:
        import pandas
    except ImportError:
        raise BadValue("source: .csv takes pandas: pip install pandas. Or save the numbers as .npy.") from None
    separator = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    try:
        top = pandas.read_csv(path, sep=separator, header=None, nrows=2, dtype=str, skip_blank_lines=True)
        named = _has_names(path, top.to_numpy().tolist())
        kept: Any = {} if text is None else {"converters": {text: str}}
        frame = pandas.read_csv(path, sep=separator, header=0 if named else None, **kept)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise BadValue(f"source: {path} cannot be read as a table ({' '.join(str(error).split())}).") from error
    if frame.shape[1] == 1 or frame.iloc[:, -1].isna().any():  # pandas fills up short rows
        _check_cells(path, separator, frame.shape[1], named)
    if every and named and frame.columns[0] == "Unnamed: 0" and frame.shape[1] > 1:
        raise BadValue(
            f"source: the first column of {path} has no name. It is the index of the DataFrame that was saved, more "
            "often than not: save it with index=False, or say which columns are features: columns=('name', ...)."
        )
    if frame.shape[1] == 1 and ";" in str(frame.columns[0]):
        raise BadValue(
            f"source: the columns of {path} are separated by ';'. Pass pandas.read_csv(path, sep=';') (and decimal=',' "
            "if its numbers have commas)."
        )
    empty = list(frame.columns[frame.isna().all()]) if every and len(frame) else []
    if empty:
        raise BadValue(
            f"source: the column {empty[0]!r} of {path} has no number in any row. (A separator at the end of the lines "
            "makes such a column.) Leave it out, or say which columns are features: columns=('name', ...)."
        )
    return frame


def _check_cells(path: str, separator: str, columns: int, named: bool) -> None:
    """Raise `BadValue` for rows with another number of cells than there are columns, which names the first ones."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=separator)
        cells = [(len(row), reader.line_num) for row in reader]
    while cells and cells[-1][0] == 0:
        cells.pop()
    if columns > 1:
        cells = [row for row in cells if row[0]]  # an empty line is no row, unless there is only one column
    short = [(i - named, *row) for i, row in enumerate(cells) if row[0] != columns]
    if short:
        rows = ", ".join(f"sample {i} in line {line} has {count}" for i, count, line in short[:LEAST])
        more = f", and {len(short) - LEAST} others" if len(short) > LEAST else ""
        raise BadValue(f"source: {path} has {columns} columns, but {rows}{more}. Write missing numbers as empty cells.")


def _has_names(path: str, lines: Sequence[Sequence[Any]]) -> bool:
    """Whether the first of these lines holds names."""
    if not lines:
        return False
    first, *rest = [[_number(cell) for cell in line] for line in lines]
    if any(value is None for value in first):
        return True
    if not rest or any(value is None for value in rest[0]) or not _evenly_spaced(first):
        return False
    of_pandas = first == list(range(len(first)))
    if _evenly_spaced(rest[0]) and not of_pandas:
        return False  # two samples that rise evenly
    if of_pandas and len(first) >= LEAST and not _evenly_spaced(rest[0]):
        return True  # the names that pandas writes if there are none
    raise BadValue(
        f"source: the first line of {path} may hold names ({', '.join(lines[0][:LEAST])}, …) or a sample. Pass "
        "pandas.read_csv(path) if it holds names, pandas.read_csv(path, header=None) if it is a sample."
    )


def _number(cell: Any) -> float | None:
    """The number in a cell, NaN where it is empty; None for text."""
    if not isinstance(cell, str):
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        return None


def _evenly_spaced(values: Sequence[float | None]) -> bool:
    """Whether the values rise by equal steps, as names of columns may.  Of fewer than `LEAST` numbers, only 0, 1 do."""
    if len(values) < LEAST:
        return list(values) == list(range(len(values)))
    steps = np.diff(np.array(values, dtype=float))
    return bool(steps[0] > 0 and np.allclose(steps, steps[0], rtol=1e-6))
