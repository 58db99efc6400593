"""Models for the command line: exported programs, factories with weights, and pickled modules only on request."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..util.options import BadType, BadValue
from . import archives

CONTAINERS = ("state_dict", "model_state_dict", "model", "weights")  # keys under which checkpoints keep a state_dict
NOT_TWICE = ("gradkern", "__main__")  # modules that are not imported again
PICKLED = (".pt", ".pth", ".pkl", ".bin")


def load_model(spec: str, weights: str | None = None, *, allow_pickle: bool = False) -> nn.Module:
    """A model in eval mode.

    ``spec`` is a ``.pt2`` from `torch.export.save`, or ``package.module:factory`` (called without arguments), to
    which ``weights`` adds a ``.safetensors`` file or a state_dict that `torch.load` reads with weights_only.  A
    pickled module (``.pt``) can run any code while it is loaded and is refused without ``allow_pickle``.
    """
    spec, weights = os.path.expanduser(spec), weights and os.path.expanduser(weights)
    suffix = Path(spec).suffix.lower()
    if suffix == ".pt2":
        if weights is not None:
            raise BadValue(f"--weights: {spec} brings its own weights. Leave it out.")
        return load_exported(spec)
    if suffix in PICKLED and ":" not in spec:
        return _load_pickled(spec, allow_pickle)
    if ":" not in spec:
        raise BadValue(
            f"model: got {spec!r}, expected a .pt2 file of torch.export.save, or package.module:factory with --weights."
        )
    model = _made(spec)
    loaded = set() if weights is None else load_weights(model, weights)
    if random := _random_tensors(spec, model, loaded):
        named = f"{', '.join(sorted(random)[:3])}{', …' if len(random) > 3 else ''}"
        way_out = "Give --weights, or a" if weights is None else f"{weights} does not have them: give a"
        raise BadValue(
            f"model: {spec} has other numbers each time it is made, so these are random ({named}). {way_out} factory "
            "that loads or seeds its own."
        )
    return model.eval()


def load_exported(path: str) -> nn.Module:
    """The module of a ``.pt2``, without the hooks that check its inputs: gradkern traces only modules without hooks."""
    _check_exists("model", path)
    program = archives.load(path)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs:
            shape = getattr(node.meta.get("val"), "shape", (None,))
            if shape and isinstance(shape[0], int):
                raise BadValue(
                    f"model: {path} was exported for batches of exactly {shape[0]}. Export it with a free batch axis: "
                    "torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('N')},))."
                )
    module = program.module(check_guards=False)  # guards are code of the file
    unguarded = torch.fx.GraphModule(module, module.graph)
    unguarded.train(False)
    return unguarded


def _load_pickled(path: str, allowed: bool) -> nn.Module:
    _check_exists("model", path)
    if not allowed:
        raise BadValue(
            f"model: {path} is a pickle. If it holds weights (a state_dict), name what makes the network: "
            f"package.module:factory --weights {path}. If it holds a module, loading it can run any code: export it "
            "with torch.export.save, or, if you trust where it comes from, add --allow-pickle."
        )
    model = torch.load(path, weights_only=False, map_location="cpu")
    if not isinstance(model, nn.Module):
        way_out = (
            f" For a state_dict name what makes the network: package.module:factory --weights {path}"
            if isinstance(model, dict) else ""
        )  # fmt: skip
        raise BadType(f"model: {path} holds {type(model).__name__}, expected a torch.nn.Module.{way_out}")
    return model.eval()


def _check_exists(argument: str, path: str) -> None:
    if not Path(path).exists():
        raise BadValue(f"{argument}: there is no {path!r}.")


def _made(spec: str) -> nn.Module:
    where, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the factory may be in the current folder, as for `python -m`
    try:
        target: Any = importlib.import_module(where)
        for part in name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise BadValue(f"model: cannot import {spec!r}: {error}") from error
    model = target if isinstance(target, nn.Module) else target()
    if not isinstance(model, nn.Module):
        raise BadType(f"model: {spec} gave {type(model).__name__}, expected a torch.nn.Module.")
    return model


def _random_tensors(spec: str, model: nn.Module, loaded: Collection[str]) -> set[str]:
    """The names of tensors that differ when the model is made again, except for those that were loaded.

    Tensors that are in no state_dict count as well.
    """
    first = {name: value for name, value in _tensors(model).items() if name not in loaded}
    if not first:
        return set()
    again = _tensors(_made(spec))
    if any(value is again.get(name) for name, value in first.items()):  # it was made when its module was imported
        again = _tensors(_made_anew(spec))
    return {n for n, value in first.items() if n in again and not _equal(value, again[n])}


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters, buffers and tensor attributes of a model that hold numbers."""
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for place, module in model.named_modules():
        found |= {f"{place}.{k}".strip("."): v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
    return {n: v for n, v in found.items() if not (is_lazy(v) or v.is_meta) and v.layout is torch.strided}


def _made_anew(spec: str) -> nn.Module:
    """The model made after a fresh import of its module, and of the modules of its own package or folder."""
    first = importlib.import_module(spec.partition(":")[0])
    home = Path(str(getattr(first, "__file__", None) or "")).parent
    files = {name: str(getattr(module, "__file__", None) or "/") for name, module in sys.modules.items()}
    kept = {
        name: sys.modules[name]
        for name, file in files.items()
        if home in Path(file).parents and "site-packages" not in file and name.partition(".")[0] not in NOT_TWICE
    }
    for name in kept:
        del sys.modules[name]
    try:
        return _made(spec)
    finally:
        sys.modules.update(kept)
        for name, module in kept.items():
            package, _, short = name.rpartition(".")
            if package in sys.modules:
                setattr(sys.modules[package], short, module)


def load_weights(model: nn.Module, path: str) -> set[str]:
    """Load weights whose names are the model's, or the model's behind one prefix (``module.``, ``model.``).

    Tied weights may be there under one of their names, as in .safetensors.  Returns the model's names of the weights.
    """
    weights, wanted = state_dict(path), model.state_dict()
    first = next(iter(wanted), "")
    prefixes = [name.removesuffix(first) for name in weights if name.endswith("." + first)]
    fitting = {}
    for prefix in dict.fromkeys(["", *prefixes]):
        named = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        there = {wanted[name].data_ptr() for name in named.keys() & wanted.keys()} - {0}
        tied = {name for name in wanted.keys() - named.keys() if wanted[name].data_ptr() in there}
        if named.keys() | tied == wanted.keys():
            fitting[prefix] = named
    if len(fitting) > 1:
        raise BadValue(
            f"--weights: {path} has several sets of weights that fit, behind {', '.join(map(repr, fitting))}. Save the "
            "one that is meant alone."
        )
    for named in fitting.values():
        shapes = {k: (list(v.shape), list(wanted[k].shape)) for k, v in named.items() if v.shape != wanted[k].shape}
        if shapes:
            name, (got, expected) = next(iter(shapes.items()))
            raise BadValue(f"--weights: {path} does not fit the model: {name} is {got} there, expected {expected}.")
        model.load_state_dict(named, strict=False)
        return set(wanted)
    missing, more = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    raise BadValue(
        f"--weights: {path} does not fit the model: it lacks {missing[:3] or 'nothing'}, and has "
        f"{more[:3] or 'nothing'} in addition."
    )


def state_dict(path: str) -> dict[str, torch.Tensor]:
    """Weights from ``.safetensors``, or from a file that `torch.load` reads with weights_only."""
    _check_exists("--weights", path)
    from safetensors.torch import load_file

    safe = Path(path).suffix.lower() == ".safetensors"
    try:
        content = load_file(path) if safe else torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise BadValue(
            f"--weights: {path} cannot be read as plain tensors ({type(error).__name__}). Where it comes from, save "
            "its state_dict alone: torch.save(model.state_dict(), path), or as .safetensors."
        ) from error
    if isinstance(content, dict) and not any(isinstance(v, torch.Tensor) for v in content.values()):
        inner = [v for k, v in content.items() if k in CONTAINERS and isinstance(v, dict)]
        if len(inner) > 1:
            names = [k for k in CONTAINERS if isinstance(content.get(k), dict)]
            raise BadValue(f"--weights: {path} has several sets of weights, {names}. Save the one that is meant alone.")
        content = inner[0] if inner else content
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise BadValue(f"--weights: {path} holds {type(content).__name__}, expected a state_dict of tensors.")
    return content
