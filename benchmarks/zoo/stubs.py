"""Stand-ins for modules that packages import and that no network needs: downloads, plots, file formats.

The packages are installed without their dependencies, so that nothing replaces the torch that gradkern was built with.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

NAMES = (
    "bib_lookup", "biosppy", "boto3", "botocore", "colt5_attention",
    "deprecate_kwargs", "edfio", "h5io", "imblearn", "mne_bids",
    "pytorch_lightning", "pyts", "spacy", "tangermeme", "tensorboardX", "tfmodisco", "torchaudio", "wfdb", "xmltodict",
)  # fmt: skip
TORCHVISION = ("nms", "qnms")  # compiled operators that torchvision describes when it is imported

_libraries: list[Any] = []  # an operator lives as long as its library


class _Named(type):
    """Its classes have every attribute, as a package's functions may be named through what stands for a submodule."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Anything(metaclass=_Named):
    """A class or function that may be named, called and subclassed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else None  # as a decorator, it leaves the function as it is

    def get_citation(self, *args: Any, **kwargs: Any) -> str:  # a class of bib_lookup is asked for it by super()
        return ""

    def __class_getitem__(cls, key: Any) -> Any:
        return cls


class _Stub(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Named(name, (_Anything,), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last, so that a module that is installed is found before."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Make the packages importable without what they never use here."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.append(_Finder())
    if importlib.util.find_spec("torchvision") is not None:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in TORCHVISION:
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
