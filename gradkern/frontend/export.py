"""nn.Module -> functional ATen graph: `torch.export` with a free batch size, quietly and one at a time."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from .shell import shell_copy
from .verify import Untraceable

_EXPORT_LOCK = threading.RLock()  # torch.export is not thread-safe
_NOISY = ("torch.fx.experimental.symbolic_shapes", "torch._export", "torch.export", "torch._dynamo")
_SAMPLES = 3  # in the traced batch; 0 and 1 are special to torch.export


class _Entry(nn.Module):
    """Positional inputs for any signature of ``forward``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)


def export(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, set[str]]:
    """The functional ATen graph, and the names of the constants that ``forward`` writes down."""
    with _EXPORT_LOCK, _quiet(), torch.inference_mode(False), torch.no_grad():
        try:
            entry = _Entry(shell_copy(model))
            entry.training = model.training  # not `.train()`, which would reach the modules inside
            examples = tuple(torch.zeros(_SAMPLES, *x.shape[1:], dtype=x.dtype, device=x.device) for x in inputs)
            batch = torch.export.Dim("batch")
            shapes = (tuple({0: batch} for _ in examples),)
            exported = torch.export.export(entry, examples, dynamic_shapes=shapes, strict=False)
            literals = _literals(exported)
            if _works_in_place(exported):  # making it functional doubles the cost of tracing
                exported = exported.run_decompositions({})
            return exported, literals
        except Exception as error:  # export raises whatever the model's code meets
            raise Untraceable(f"torch.export refuses it ({_first_line(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Export logs and prints what it raises; the caller gets one line instead.  Only ever under the lock."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [logger.level for logger in loggers]
    stderr = sys.stderr
    sys.stderr = _Muted(stderr)
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with _tolerant():
            yield
    finally:
        if isinstance(sys.stderr, _Muted):  # it has not been replaced meanwhile
            sys.stderr = stderr
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _tolerant() -> Iterator[None]:
    """Where the caller turns warnings into errors, torch's own warnings would end the export."""
    if not any(action == "error" for action, *_ in warnings.filters):
        yield  # changing filters is not thread-safe, so it is done only where it matters
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Muted:
    """A stream that drops what this thread writes, and passes on what others do."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._owner = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._owner else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _works_in_place(exported: torch.export.ExportedProgram) -> bool:
    schemas = (getattr(node.target, "_schema", None) for node in exported.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _literals(exported: torch.export.ExportedProgram) -> set[str]:
    """Constants that the code of ``forward`` writes down (``torch.tensor(0.5)``): they are read by a fresh copy."""
    written = set()
    specs: dict[str, Any] = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        spec = specs.get(node.name)
        if node.op != "placeholder" or spec is None or spec.kind != InputKind.CONSTANT_TENSOR:
            continue
        if all("lift_fresh" in str(user.target) for user in node.users):
            written.add(spec.target)
    return written


def _first_line(error: BaseException) -> str:
    if "Constraints violated (batch)" in str(error):
        return "its code depends on the number of samples"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:240] if text else type(error).__name__
