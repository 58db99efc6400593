"""The text of a function with everything of the caller's that it refers to, to notice that it was edited."""

from __future__ import annotations

import dis
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_text(function: Any) -> str:
    """Source, defaults and captured values of a function (or an object that can be called), and those of the functions
    of the same package that it uses.

    Lists and dicts are left out: they are as often a state that changes while the function runs.
    """
    package = getattr(function, "__module__", "").partition(".")[0]
    return "\n".join(_lines(function, package, set()))


def _lines(value: Any, package: str, seen: set[int]) -> Iterator[str]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, PLAIN):
        yield repr(value)
    elif isinstance(value, tuple):
        for v in value:
            yield from _lines(v, package, seen)
    elif isinstance(value, FunctionType):
        if _belongs(value, package):
            yield from _of_function(value, package, seen)
    elif isinstance(value, type):
        if _belongs(value, package):
            yield _source(value, value.__qualname__)
            for member in vars(value).values():
                yield from _lines(inspect.unwrap(getattr(member, "__func__", member)), package, seen)
    elif inspect.ismethod(value):
        yield from _lines(value.__func__, package, seen)
        yield from _lines(value.__self__, package, seen)
    elif _belongs(type(value), package):
        yield from _lines(type(value), package, seen)
        for name, v in getattr(value, "__dict__", {}).items():
            yield name
            yield from _lines(v, package, seen)


def _belongs(value: Any, package: str) -> bool:
    return getattr(value, "__module__", "").partition(".")[0] == package


def _of_function(function: FunctionType, package: str, seen: set[int]) -> Iterator[str]:
    yield _source(function, _text_of_code(function.__code__))
    captured = tuple(cell.cell_contents for cell in function.__closure__ or () if _filled(cell))
    for value in (function.__defaults__, tuple((function.__kwdefaults__ or {}).items()), captured):
        yield from _lines(value, package, seen)
    for name in sorted(_names(function.__code__) & function.__globals__.keys()):
        yield name
        yield from _lines(function.__globals__[name], package, seen)


def _source(value: Any, otherwise: str) -> str:
    try:
        return textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):  # typed into an interpreter
        return otherwise


def _text_of_code(code: CodeType) -> str:
    inner = "".join(_text_of_code(c) for c in code.co_consts if isinstance(c, CodeType))
    return "\n".join(f"{i.opname} {i.argrepr}" for i in dis.get_instructions(code) if i.opname != "RESUME") + inner


def _names(code: CodeType) -> set[str]:
    """The names that the code looks up, in functions within it too."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
