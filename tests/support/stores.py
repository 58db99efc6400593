"""The content of a store, and whether two stores hold the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gradkern.data import Results


def content(out: str | Path) -> dict[str, np.ndarray]:
    """Every array of a store, reductions included."""
    results = Results.open(out)
    names = [name for name, _ in results.group.arrays()]
    names += [f"reductions/{name}" for name, _ in results.group["reductions"].arrays()]
    return {name: np.asarray(results.array(name)[...]) for name in names}


def assert_same(a: str | Path, b: str | Path) -> None:
    first, second = content(a), content(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
