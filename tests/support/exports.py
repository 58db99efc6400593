"""One export per architecture and process: most of a test's time would be `torch.export` of a network seen before."""

from __future__ import annotations

import io
import pickle
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from gradkern.frontend.export import export

Exported = tuple[torch.export.ExportedProgram, set[str]]
_exports: dict[bytes, Exported] = {}


class _Structure(pickle.Pickler):
    """Everything about a module tree but the values of its tensors: classes, attributes, flags, hooks, sharing."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.numbers: dict[int, int] = {}  # which tensors are the same one

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            number = self.numbers.setdefault(id(obj), len(self.numbers))
            return number, type(obj).__name__, tuple(obj.shape), str(obj.dtype), str(obj.device), obj.requires_grad
        if isinstance(obj, FunctionType) and not obj.__closure__ and not obj.__defaults__:
            return "function", id(obj.__code__)  # a lambda of the table of cases is made anew, its code is not
        return None

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Tensor, ...]) -> bytes | None:
        """None for what cannot be pickled (a class inside of a function, a hook): it is exported each time."""
        stream = io.BytesIO()
        try:
            cls(stream).dump((model, [(x.shape[1:], x.dtype, x.device) for x in inputs]))
        except Exception:
            return None
        return stream.getvalue()


def remembered(model: nn.Module, inputs: tuple[Tensor, ...]) -> Exported:
    """`gradkern.frontend.export.export`, or what it gave for the same structure."""
    key = _Structure.of(model, inputs)
    if key is None:
        return export(model, inputs)
    if key not in _exports:
        _exports[key] = export(model, inputs)
    return _exports[key]
