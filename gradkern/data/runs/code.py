"""The text of a function and of all the caller's own code that it refers to, to notice edits."""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import importlib.util
import inspect
import linecache
import sys
import textwrap
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None))
GIVEN = {"gradkern", "torch", "captum", "numpy", *sys.stdlib_module_names} - {"__main__"}
AROUND = {property: "fget", functools.cached_property: "func", staticmethod: "__func__", classmethod: "__func__"}


def code_text(function: Any, unchanged: Collection[str] | None = None) -> str:
    """Source, defaults and captured values of a function or other callable, and of the functions that it uses.

    Functions count if they are in its own package, or in any module that is not installed.  ``unchanged``: the only
    lines that count, since a line that differs before and after a call shows a state, not code.
    """
    return "\n".join(line for line in code_lines(function) if unchanged is None or line in unchanged)


def code_lines(function: Any) -> list[str]:
    """The lines of `code_text`."""
    inner = function.func if isinstance(function, functools.partial) else function
    return list(_Reader(package_of(inner)).lines("", function))


def class_lines(model: nn.Module) -> list[str]:
    """The lines of `code_text` for the classes of a model's modules that do not belong to installed packages."""
    return list(_Reader("").lines("", tuple(type(module) for module in model.modules())))


def package_of(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "").partition(".")[0]


class _Reader:
    """Reads the caller's own code: the modules of ``package``, and those that are not installed."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.seen: dict[int, Any] = {}  # by id; keeps the objects, so that no other gets the same id

    def own(self, module: str) -> bool:
        top = module.partition(".")[0]
        return bool(top) and (top == self.package or (top not in GIVEN and not _installed(top)))

    def lines(self, name: str, value: Any) -> Iterator[str]:
        if isinstance(value, PLAIN):
            yield f"{name} = {value!r}"
            return
        if id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if isinstance(value, (Tensor, np.ndarray)):
            yield f"{name} = {_content(value)}"
        elif isinstance(value, ModuleType):
            pass  # `function` looks up what it uses
        elif isinstance(value, FunctionType):
            yield from self.function(name, value) if self.own(package_of(value)) else ()
        elif isinstance(value, (tuple, list, set, frozenset, dict)):
            yield from self.container(name, value)
        elif isinstance(value, functools.partial):
            yield from self.lines(name, (value.func, value.args, tuple(value.keywords.items())))
        elif inspect.ismethod(value):
            yield from self.lines(name, (value.__func__, value.__self__))
        elif isinstance(value, type):
            yield from self.type(name, value) if self.own(package_of(value)) else ()
        elif isinstance(value, nn.Module):
            for part, module in value.named_modules():
                yield from self.lines(f"{name}.{part}", type(module))
            yield f"{name} = {value!r}"
            yield from self.lines(name, tuple(value.state_dict().items()))
        elif self.own(package_of(type(value))):
            yield from self.lines(name, type(value))
            slots = {slot: getattr(value, slot, None) for slot in getattr(type(value), "__slots__", ())}
            for attribute, v in {**slots, **getattr(value, "__dict__", {})}.items():
                yield from self.lines(f"{name}.{attribute}", v)
        elif type(value) in AROUND:
            yield from self.lines(name, getattr(value, AROUND[type(value)]))
        elif "__wrapped__" in getattr(value, "__dict__", {}):  # such as a function under functools.cache
            yield from self.lines(name, value.__wrapped__)

    def container(self, name: str, value: Any) -> Iterator[str]:
        if isinstance(value, tuple):
            for i, v in enumerate(value):
                yield from self.lines(f"{name}[{i}]", v)
        elif _is_plain(value):
            yield f"{name} = {sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else repr(value)}"
        else:  # a table of functions, or a cache, whose contents are not code
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, v in items:
                if callable(v):
                    yield from self.lines(f"{name}[{key!r}]" if isinstance(key, PLAIN) else name, v)

    def type(self, name: str, value: type) -> Iterator[str]:
        yield f"{name} = {_source(value, value.__qualname__)}"
        for base in value.__bases__:
            yield from self.lines(name, base)
        for attribute, member in vars(value).items():
            if not attribute.startswith("__") or callable(member):
                yield from self.lines(f"{name}.{attribute}", member)

    def function(self, name: str, function: FunctionType) -> Iterator[str]:
        code = function.__code__
        yield f"{name} = {_source(code, _text_of_code(code))}"
        yield from self.lines(f"{name} default", function.__defaults__)
        yield from self.lines(f"{name} default", tuple((function.__kwdefaults__ or {}).items()))
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if _filled(cell):
                yield from self.lines(variable, cell.cell_contents)
        used = {n for c in _all_code(code) for n in c.co_names}  # globals and attributes
        for variable in sorted(_globals(code) & function.__globals__.keys()):
            yield from self.used(variable, function.__globals__[variable], used)
        for module in _imports(code, str(function.__globals__.get("__package__") or "")):
            if self.own(module):
                with contextlib.suppress(Exception):  # the function may work without this module
                    importlib.import_module(module)
                yield from self.used(module, sys.modules.get(module), used)
        yield from self.lines(f"{name} wrapped", getattr(function, "__wrapped__", None))

    def used(self, name: str, value: Any, used: set[str]) -> Iterator[str]:
        """The lines of a global that a function uses.  Of a module, its members with the names ``used``."""
        if not isinstance(value, ModuleType):
            yield from self.lines(name, value)
        elif self.own(value.__name__):
            for variable in sorted(used & vars(value).keys()):
                yield from self.used(f"{name}.{variable}", vars(value)[variable], used - {variable})


@functools.cache
def _installed(top: str) -> bool:
    """Whether a top-level module belongs to an installed package."""
    if (module := sys.modules.get(top)) is not None:
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    else:
        found = importlib.util.find_spec(top)
        places = [] if found is None else [found.origin, *(found.submodule_search_locations or ())]
    return any(name in str(place) for place in places for name in ("site-packages", "dist-packages"))


def _is_plain(value: Any, depth: int = 8) -> bool:
    """Whether a value consists only of numbers and text, in containers."""
    if isinstance(value, PLAIN):
        return True
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return (
        depth > 0 and isinstance(value, (tuple, list, set, frozenset)) and all(_is_plain(v, depth - 1) for v in value)
    )


def _content(value: Tensor | np.ndarray) -> str:
    array = value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta:
            return repr(value)
        flat = value.detach().cpu().contiguous().reshape(-1)
        array = (torch.view_as_real(flat) if flat.is_complex() else flat).view(torch.uint8).numpy()
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:32]
    return f"{value.dtype} {tuple(value.shape)} {digest}"


def _source(value: Any, otherwise: str) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError, IndentationError):  # typed into an interpreter
        return otherwise
    if isinstance(value, CodeType) and value.co_name == "<lambda>":  # of which `inspect` finds only the first lines
        lines = [line for code in _all_code(value) for *_, line in code.co_lines() if line]
        text += "".join(linecache.getline(value.co_filename, i) for i in range(min(lines), max(lines) + 1))
    return text


def _all_code(code: CodeType) -> Iterator[CodeType]:
    """The code, and that of the functions within it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _all_code(inner)


def _text_of_code(code: CodeType) -> str:
    read = (dis.get_instructions(c) for c in _all_code(code))
    return "\n".join(f"{i.opname} {i.argrepr}" for found in read for i in found if i.opname != "RESUME")


def _globals(code: CodeType) -> set[str]:
    """The names that the code looks up in its module."""
    read = (i for c in _all_code(code) for i in dis.get_instructions(c))
    return {str(i.argval) for i in read if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _imports(code: CodeType, package: str) -> Iterator[str]:
    """The names of the modules that the code itself imports."""
    for found in _all_code(code):
        instructions = list(dis.get_instructions(found))
        for i, instruction in enumerate(instructions):
            if instruction.opname == "IMPORT_NAME":
                level = instructions[i - 2].argval  # the dots of a relative import
                dots = "." * level if isinstance(level, int) else ""
                with contextlib.suppress(ImportError):
                    yield importlib.util.resolve_name(dots + str(instruction.argval), package)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
