"""No module of `gradkern.data` imports itself by way of others, and every floor imports from below only."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import gradkern

ROOT = Path(gradkern.__file__).parent / "data"
# "" is data/__init__.py
FLOORS = ("statistics", "references", "methods", "sources", "store", "runs", "ranking", "export", "ray", "")


def imports(path: Path) -> set[Path]:
    """The files of `gradkern.data` that a file imports by a relative import."""
    files: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            files |= {file_of(module / alias.name) or file_of(module) or path for alias in node.names}
    return {file for file in files if ROOT in file.parents} - {path}


def file_of(module: Path) -> Path | None:
    return next((f for f in (module.with_suffix(".py"), module / "__init__.py") if f.is_file()), None)


def floor(path: Path) -> int:
    return FLOORS.index(path.relative_to(ROOT).parts[0].removesuffix(".py").replace("__init__", ""))


def test_no_cycles_and_no_import_from_above():
    graph = {path: imports(path) for path in ROOT.rglob("*.py")}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph) > 0
    assert not [(p, file) for p, files in graph.items() for file in files if floor(file) > floor(p)]


def test_a_cycle_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    for name, other in (("store", "runs"), ("runs", "store")):
        (tmp_path / f"{name}.py").write_text(f"from .{other} import x\n")
    with pytest.raises(graphlib.CycleError):
        test_no_cycles_and_no_import_from_above()
