"""Models for the command line: exported programs, factories with weights, and pickled modules only on request."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..util.options import BadType, BadValue
from . import archives

CONTAINERS = ("state_dict", "model_state_dict", "model", "weights")  # of checkpoints, for their state_dict
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
        return exported(spec)
    if suffix in PICKLED and ":" not in spec:
        return _pickled(spec, allow_pickle)
    if ":" not in spec:
        raise BadValue(
            f"model: got {spec!r}, expected a .pt2 file of torch.export.save, or package.module:factory with --weights."
        )
    model = _made(spec)
    if weights is not None:
        load_weights(model, weights)
    elif _is_random(spec, model):
        raise BadValue(
            f"model: {spec} has other weights each time it is called, so these are random. Give --weights, or a "
            "factory that loads or seeds its own."
        )
    return model.eval()


def exported(path: str) -> nn.Module:
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


def _pickled(path: str, allowed: bool) -> nn.Module:
    if not allowed:
        raise BadValue(
            f"model: {path} is a pickled module, which can run any code while it is loaded. Export it with "
            "torch.export.save, give package.module:factory with --weights, or, if you trust where it comes from, "
            "add --allow-pickle."
        )
    _check_exists("model", path)
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


def _is_random(spec: str, model: nn.Module) -> bool:
    """Does the factory make other weights when it is called again?"""
    first, again = model.state_dict(), _made(spec).state_dict()
    return any(not torch.equal(value, again[name]) for name, value in first.items() if name in again)


def load_weights(model: nn.Module, path: str) -> None:
    """Load weights whose names are the model's, or the model's behind one prefix (``module.``, ``model.``)."""
    weights, wanted = state_dict(path), model.state_dict().keys()
    first = next(iter(wanted), "")
    prefixes = [name.removesuffix(first) for name in weights if name.endswith("." + first)]
    for prefix in ["", *prefixes]:
        named = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if named.keys() == wanted:
            model.load_state_dict(named)
            return
    missing, more = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
    raise BadValue(
        f"--weights: {path} does not fit the model: it lacks {missing[:3] or 'nothing'}, and has "
        f"{more[:3] or 'nothing'} beside."
    )


def state_dict(path: str) -> dict[str, torch.Tensor]:
    """Weights from ``.safetensors``, or from a file that `torch.load` reads with weights_only."""
    _check_exists("--weights", path)
    if Path(path).suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise BadValue(
            f"--weights: {path} cannot be read as plain tensors ({type(error).__name__}). Where it comes from, save "
            "its state_dict alone: torch.save(model.state_dict(), path), or as .safetensors."
        ) from error
    if isinstance(content, dict) and not any(isinstance(v, torch.Tensor) for v in content.values()):
        inner = [v for k, v in content.items() if k in CONTAINERS and isinstance(v, dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise BadValue(f"--weights: {path} holds {type(content).__name__}, expected a state_dict of tensors.")
    return content
