"""Why a network has no Program, in one line, with the file and the line of the caller's code if they are known."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Sequence
from typing import Any

import torch


class NoProgram(RuntimeError):
    """A network that has no Program.

    ``reason`` is one readable line, and ``op`` and ``module`` name the cause if it is known.  ``mixes``: the samples of
    a batch depend on each other, so that the batch must not be cut.  ``final``: other samples would not change it.
    """

    def __init__(
        self, reason: str, *, op: str = "", module: str = "", mixes: bool = False, final: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.op = op
        self.module = module
        self.mixes = mixes
        self.final = final


def reason_of(error: BaseException) -> str:
    """Why Dynamo refused, in one line, with the file and the line of the caller's code if it knows them."""
    text = str(error)
    where = _where(getattr(error, "real_stack", None)) or location_in(text)
    if "marked" in text and "dynamic" in text and "specialized" in text:
        return f"its code depends on the number of samples{where}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    explanation = next((line for line in lines if line.startswith("Explanation:")), "").removeprefix("Explanation:")
    said = f"{first}: {_SENTENCE.split(explanation.strip())[0]}" if explanation.strip() else first
    return f"torch.compile cannot capture it ({said.rstrip('.')[:200]}){where}"


_SENTENCE = re.compile(r"(?<=[.`)])\s+(?=[A-Z])")
_OURS = os.path.dirname(__file__)
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_PYTHON = os.path.join(sysconfig.get_path("stdlib"), "")
_GENERATED = ("<frozen ", "<eval_with_key>", "<string>")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')


def _where(stack: Any) -> str:
    frames = [(f.filename, f.lineno) for f in stack or ()]
    return _last(frames)


def _last(frames: Sequence[tuple[str, int | None]]) -> str:
    """The innermost frame of code that belongs neither to Python, nor to torch, nor to gradkern."""
    for name, line in reversed(frames):
        library = name.startswith(_PYTHON) and "-packages" not in name
        if not library and not name.startswith((_TORCH, *_GENERATED)) and os.path.dirname(name) != _OURS:
            return f", {name}:{line}"
    return ""


def location_in(text: str) -> str:
    """The location of the caller's code in a traceback."""
    return _last([(name, int(line)) for name, line in _FRAME.findall(text)])


def location(node: Any) -> str:
    """The location in the caller's code that created a node."""
    return location_in(node.meta.get("stack_trace") or "")
