"""The path of one call: the packages that a warm `gradkern.jacobian` enters, in order."""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from types import FrameType

import gradkern
from gradkern.dispatch.state import models
from tests.cases import net
from tests.support.packages import PACKAGES, TOP

PACKAGE = Path(gradkern.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
MOST_MODULES = 7
EVERYWHERE = "util"  # options, memos and chunks may be asked from any package


def walked() -> list[tuple[str, str]]:
    """Module and name of every function of gradkern that a warm call enters, in order.

    Comprehensions are parts of the function that they stand in.
    """
    model, (x,) = net("maxpool1d")
    for engine in ("kernel", "kernel", "auto"):
        gradkern.jacobian(model, x, engine=engine)
    for entry in models.of(model).entries.values():
        entry.watch.seconds = 0.0  # a slow machine would make a comparison of outputs due
    entered: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            name = frame.f_code.co_name
            if not (name.startswith("<") and name != "<lambda>"):
                entered.append((path.relative_to(PACKAGE).as_posix(), name))

    sys.setprofile(note)
    try:
        gradkern.jacobian(model, x)
    finally:
        sys.setprofile(None)
    return entered


def package_of(module: str) -> str:
    return module.split("/")[0] if "/" in module else TOP


def test_a_warm_call_enters_each_package_once() -> None:
    path = [(module, name) for module, name in walked() if package_of(module) != EVERYWHERE]
    packages = [package for package, _ in groupby(package_of(module) for module, _ in path)]
    told = "\n".join(f"{module} {name}" for module, name in path)
    assert packages[:2] == [TOP, "dispatch"], told
    assert len(set(packages)) == len(packages), told  # no way back to a package that was left
    assert [PACKAGES.index(package) for package in packages[2:]] == sorted(
        PACKAGES.index(package) for package in packages[2:]
    ), told
    assert len({module for module, _ in path}) <= MOST_MODULES, told


def test_functions_of_a_warm_call_are_those_on_the_architecture_page() -> None:
    (listed,) = re.findall(r"```\n(api\.py .*?)```", PAGE.read_text(), re.S)
    calls = iter(walked())
    for line in listed.splitlines():
        step = tuple(line.split()[:2])
        assert step in calls, f"{step} is not where docs/architecture.md has it"  # in order: `in` moves the iterator on
