"""The walk of one call: which rooms a warm `gradkern.jacobian` enters, in which order."""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from types import FrameType

import gradkern
from tests.cases import net
from tests.test_rooms import FLOORS, TOP

PACKAGE = Path(gradkern.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
MOST_MODULES = 8
EVERYWHERE = "util"  # options, memos and chunks may be asked from any room


def walked() -> list[tuple[str, str]]:
    """Module and name of every function of gradkern that a warm call enters, in order.

    Comprehensions are parts of the function that they stand in.
    """
    model, (x,) = net("maxpool1d")
    for _ in range(2):
        gradkern.jacobian(model, x, engine="kernel")
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


def room_of(module: str) -> str:
    return module.split("/")[0] if "/" in module else TOP


def test_a_warm_call_walks_through_the_house_once() -> None:
    path = [(module, name) for module, name in walked() if room_of(module) != EVERYWHERE]
    rooms = [room for room, _ in groupby(room_of(module) for module, _ in path)]
    told = "\n".join(f"{module} {name}" for module, name in path)
    assert rooms[:2] == [TOP, "dispatch"], told
    assert len(set(rooms)) == len(rooms), told  # no way back to a room that was left
    assert [FLOORS.index(room) for room in rooms[2:]] == sorted(FLOORS.index(room) for room in rooms[2:]), told
    assert len({module for module, _ in path}) <= MOST_MODULES, told


def test_the_walk_is_as_the_page_tells_it() -> None:
    (listed,) = re.findall(r"```\n(api\.py .*?)```", PAGE.read_text(), re.S)
    calls = iter(walked())
    for line in listed.splitlines():
        step = tuple(line.split()[:2])
        assert step in calls, f"{step} is not where docs/architecture.md has it"  # in order: `in` moves the iterator on
