"""The direction of imports: each package of ``gradkern/`` may import those listed before it, and no others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.packages import PACKAGES, TOP

PACKAGE = Path(__file__).parents[1] / "gradkern"
MOST_AT_THE_TOP = 5  # files in gradkern/ itself
#: What the ways in import from packages further down the list: `gradkern/__init__.py` at the first use of a name.
REEXPORTED = {("__init__.py", "attr"), ("__init__.py", "data"), ("__main__.py", "cli")}


def package_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else TOP


def imported(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """The line and the package of every import from gradkern in a file."""
    package = ["gradkern", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = [*start, *(node.module or "").split(".")] if node.module else start
            targets = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "gradkern":
                inside = (PACKAGE / Path(*target[1:2])).is_dir() if len(target) > 1 else False
                yield node.lineno, target[1] if inside else TOP


def violations(path: Path, source: str) -> list[str]:
    own = PACKAGES.index(package_of(path))
    return [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {package_of(path)} imports {package}"
        for line, package in imported(path, source)
        if PACKAGES.index(package) > own and (path.relative_to(PACKAGE).as_posix(), package) not in REEXPORTED
    ]


def test_imports_lead_down() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {package_of(f) for f in files} == set(PACKAGES)
    found = [v for f in files for v in violations(f, f.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("ir/program.py", "from ..planner import plan"),
        ("codegen/units.py", "from gradkern.runtime.ops import machine"),
        ("codegen/cuda/clock_model.py", "from ...dispatch import request"),
        ("planner/plan.py", "    import gradkern.runtime.executor"),
        ("runtime/parameters.py", "from .. import api"),
        ("dispatch/guards.py", "from ..attr.points import Points"),
        ("attr/points.py", "from ..data import run"),
    ],
)
def test_a_planted_violation_is_seen(place: str, line: str) -> None:
    path = PACKAGE / place
    planted = f"def planted():\n{'' if line.startswith(' ') else '    '}{line}\n"
    assert len(violations(path, path.read_text() + "\n\n" + planted)) == len(violations(path, path.read_text())) + 1


def test_few_modules_stand_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_AT_THE_TOP


#: Runs the tests of ``gpu/`` themselves on a stand-in.
RERUNS = {"test_gpu_on_host.py"}


def test_test_modules_do_not_import_each_other() -> None:
    """What several of them need is in ``tests/support``."""
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and path.name not in RERUNS:
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert names[0] != "tests" or not any(n.startswith("test_") for n in names), f"{path}:{node.lineno}"
