"""The fingerprint, by which a run is recognised: the model's weights and graph, the method, the source."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...dispatch.targets import TopK
from ...ir.program import Program
from ...runtime import ops
from ...util.options import BadValue
from ...util.outputs import OneOutput, Sums, output_name
from ...util.text import shorten
from .. import methods
from ..store.attributes import Attributes, CodeKey, Fingerprint, MethodKey, ModelKey, SourceKey, StoredKey, Versions
from ..store.layout import dtype_name
from .code import class_lines, code_lines, code_text, package_of
from .settings import Settings

SHOWN = 60  # characters of a value in a message
KEYS = 3  # version of the keys of graph and plan; a store without it has version 1
DEVIATIONS_SINCE = 3  # the version of the keys since which statistics hold deviations in place of sums of squares
NUMERICS = 1  # counted up when kernels begin to round differently; a store without it has version 1


class Mismatch(BadValue):
    """The store belongs to another run: another model, method or source."""


def of_model(model: nn.Module, program: Program | None, unchanged: frozenset[str] | None = None) -> ModelKey:
    """Hashes of everything that determines the model's results: its weights and buffers, and its graph.

    For a model that was not captured, its modules and the code of their classes stand for the graph.  ``unchanged`` as
    in `code.code_text`.
    """
    digest = hashlib.sha256()
    model = model.model if isinstance(model, OneOutput) else model
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        _add_tensor(digest, name, tensor)
    if program is not None:
        graph = program.key
    else:
        code = [line for line in class_lines(model) if unchanged is None or line in unchanged]
        graph = _hash("\n".join([repr(model), *code]))
    return {"weights": digest.hexdigest()[:32], "graph": graph, "tensors": len(tensors)}


def _add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data if not flat.is_complex() else flat.numpy().tobytes())


def of_source(samples: int, rows_by_sample: Mapping[int, tuple[Tensor, ...]]) -> SourceKey:
    """Number of samples, shapes and dtypes, and a hash of the samples in ``rows_by_sample`` [1, *in], by index."""
    digest = hashlib.sha256()
    rows: tuple[Tensor, ...] = ()
    for i, rows in rows_by_sample.items():
        for k, x in enumerate(rows):
            _add_tensor(digest, f"{i} {k}", x)
    return {
        "samples": samples,
        "shapes": [list(x.shape[1:]) for x in rows],
        "dtypes": [dtype_name(x.dtype) for x in rows],
        "content": digest.hexdigest()[:32],
    }


def of_targets(targets: Any) -> Any:
    """Targets as plain data: a string, a list, or the hash of a large array."""
    if targets is None:
        return None
    if isinstance(targets, TopK):
        return f"TopK({targets.k})"
    if isinstance(targets, (Tensor, np.ndarray)):
        array = np.asarray(targets)
        if array.size <= 64:
            return array.tolist()
        content = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:32]
        return {"shape": list(array.shape), "content": content}
    return json.loads(json.dumps(targets, default=int))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any, unchanged: frozenset[str] | None = None) -> Any:
    """A method's argument as plain data; tensors by their content."""
    if isinstance(value, (Tensor, np.ndarray)):
        return of_targets(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v, unchanged) for v in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if callable(value):
        name = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
        return {"function": name, "code": _hash(code_text(value, unchanged))}
    raise BadValue(
        f"arguments: got {type(value).__name__}, expected numbers, text, tensors, functions, or lists of these."
    )


def code_before(model: nn.Module, settings: Settings) -> frozenset[str]:
    """The lines of all of the caller's code, before any of it has run."""
    functions = [methods.METHODS.get(settings.method), settings.output, *settings.arguments.values()]
    own = [f for f in functions if callable(f) and package_of(f) != "gradkern"]
    return frozenset([*class_lines(model), *(line for f in own for line in code_lines(f))])


def of_run(
    model: nn.Module, source: SourceKey, settings: Settings, program: Program | None,
    unchanged: frozenset[str] | None = None,
) -> Fingerprint:  # fmt: skip
    """Everything that must agree for one run to continue another.

    ``source``: the result of `of_source`; ``unchanged``: that of `code_before`.
    """
    method: MethodKey = {
        "method": settings.method,
        "targets": of_targets(settings.targets),
        "arguments": {name: _plain(value, unchanged) for name, value in sorted(settings.arguments.items())},
        **of_code(settings.method, settings.output, unchanged),
    }
    if settings.output is not None:
        method["output"] = output_name(settings.output)
    stored: StoredKey = {
        "maps": settings.maps,
        "reductions": list(settings.reductions),
        "top_features": settings.top_features,
        "dtype": settings.dtype,
        "compression": settings.compression,
    }
    return {"model": of_model(model, program, unchanged), "method": method, "source": source, "stored": stored}


def of_code(method: str, output: Any, unchanged: frozenset[str] | None = None) -> CodeKey:
    """Hashes of the caller's own code: of a method, and of a function that chooses the output."""
    hashes: CodeKey = {}
    function = methods.METHODS.get(method)
    if function is not None and package_of(function) != "gradkern":
        hashes["code"] = _hash(code_text(function, unchanged))
    if isinstance(output, Sums):
        hashes["output_code"] = str(output)  # it has no name, and its code does not say which sums
    elif callable(output) and package_of(output) != "gradkern":
        hashes["output_code"] = _hash(code_text(output, unchanged))
    return hashes


def of_machine() -> Versions:
    """Versions and instruction set: a run that continues under others is equal only within rounding."""
    machine = ops.machine()
    return {
        "isa": machine.isa if machine else "none",
        "torch": torch.__version__,
        "gradkern": _version("gradkern"),
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


WORDS = {
    "model.weights": "the model has other weights",
    "model.graph": "the model computes something else (its graph differs)",
    "model.tensors": "the model has other parameters",
    "method.code": "the code of the method has changed",
    "method.output_code": "the code of the function output= has changed",
    "source.samples": "the source has another number of samples",
    "source.shapes": "the source has samples of another shape",
    "source.dtypes": "the source has another dtype",
    "source.content": "the source has other content",
}


def keys_version(about: Attributes | None = None) -> tuple[int, str]:
    """The version of a store's keys of graph and plan (None: the present one).  Keys of two versions are not
    comparable."""
    return (KEYS, _version("gradkern")) if about is None else (about.get("keys", 1), about["pinned"]["gradkern"])


def sums_squares(about: Attributes) -> bool:
    """Whether a store's statistics hold sums of squares, as in an earlier version, in place of deviations."""
    return int(about.get("keys", 1)) < DEVIATIONS_SINCE


def check_numerics(place: str, about: Attributes) -> None:
    """Raise `Mismatch` if new chunks would not be bit-equal to those of an unfinished store."""
    stored = about.get("numerics", 1)
    if stored != NUMERICS and not about.get("finished"):
        raise Mismatch(
            f"{place} was begun by gradkern {about['pinned']['gradkern']}, whose kernels round differently (version "
            f"{stored} of the numerics, here {NUMERICS}), and nothing was changed. Finish it with that version, or "
            "choose another place."
        )


def check_same(place: str, stored: Mapping[str, Any], asked: Mapping[str, Any], *, graph: bool = True) -> None:
    """Raise `Mismatch` if the requested run is not the one in the store.

    ``graph``: also compare the graph's keys, which makes sense only if both have the same version.
    """
    stored, asked = json.loads(json.dumps(stored)), json.loads(json.dumps(asked))
    differences = []
    for part in stored:
        for name in dict.fromkeys([*stored[part], *({"output"} & asked.get(part, {}).keys())]):
            was, now = stored[part].get(name), asked.get(part, {}).get(name)
            if was != now and (graph or (part, name) != ("model", "graph")):
                words = WORDS.get(f"{part}.{name}", f"{name} differs")
                differences.append(f"{words}: the store has {_short(was)}, this call {_short(now)}")
    if differences:
        raise Mismatch(
            f"{place} belongs to another run, and nothing was changed. {'; '.join(differences)}. Continue with "
            "what the store was made with, or choose another place (gradkern never deletes results)."
        )


def _short(value: Any) -> str:
    return shorten(value if isinstance(value, str) else json.dumps(value), SHOWN)
