"""What a new store holds: its attributes and its arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..dispatch.request import jacobian_choice
from ..runtime import ops
from ..util import options
from ..util.options import BadValue
from . import fingerprint, forecast, statistics
from .probe import Probe
from .results import FORMAT, Array
from .settings import Settings
from .sources import Source


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def map_names(floating: Sequence[int]) -> list[str]:
    """Names of the arrays of maps, one per differentiated input."""
    return ["attributions"] if len(floating) == 1 else [f"attributions_{i}" for i in range(len(floating))]


def attributes(
    asked: dict[str, Any], source: Source, settings: Settings, probe: Probe, made_by: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The store's attributes.  Everything that decides about the last bits is under ``pinned``."""
    budget = options.memory_budget()
    row = sum(m[:1].nbytes for m in probe.outcome.maps)
    elements = sum(m[:1].numel() for m in probe.outcome.maps)
    reads = sum(x[:1].nbytes for x in probe.inputs)
    chunk = settings.chunk or forecast.chunk_size(
        source.samples, elements * itemsize(settings.dtype) if settings.maps else 0, reads
    )
    chunk = min(chunk, source.samples)
    batch = min(settings.batch or forecast.batch_size(chunk, row, settings.maps, budget), chunk)
    found = {
        "format": FORMAT,
        "fingerprint": asked,
        "pinned": {
            "chunk": chunk,
            "batch": batch,
            "threads": settings.threads or torch.get_num_threads(),
            "memory_budget": budget,
            "engine": probe.engine,
            "precision": ops.precision(),
            "plan": probe.plan_key(),
            **fingerprint.of_machine(),
        },
        "inputs": map_names(probe.floating),
        "reductions": list(settings.reductions),
        "arrays": {"dtype": settings.dtype, "compression": settings.compression},
        "output": list(probe.outcome.outputs.shape[1:]),
        "program": str(probe.program) if probe.program else None,
        "finished": False,
    }
    return found | ({"made_by": dict(made_by)} if made_by else {})


def arrays(source: Source, settings: Settings, probe: Probe, about: Mapping[str, Any]) -> list[Array]:
    n, seeds, chunk = source.samples, probe.seeds, about["pinned"]["chunk"]
    out, found = tuple(about["output"]), []
    outcome = probe.outcome
    for name, maps in zip(about["inputs"], outcome.maps, strict=True):
        shape = tuple(maps.shape[2:])
        axes = tuple(f"{name.replace('attributions', 'input')}_axis{i}" for i in range(len(shape)))
        if settings.maps:
            found.append(Array(name, (n, seeds, *shape), settings.dtype, ("sample", "target", *axes), chunk, True))
        if settings.top_features:
            k = settings.top_features
            if k > math.prod(shape):
                raise BadValue(f"top_features: got {k}, but a sample has {math.prod(shape)} features.")
            top = name.replace("attributions", "top_features")
            found.append(Array(top, (n, seeds, k), "int64", ("sample", "target", "place"), chunk))
        for reduction in settings.reductions:
            at = reduction if len(about["inputs"]) == 1 else f"{reduction}_{about['inputs'].index(name)}"
            last, kind = ((statistics.RANK_BINS,), "int64") if reduction == "ranks" else ((), "float64")
            text = statistics.REDUCTIONS[reduction].about
            found.append(Array(
                f"reductions/{at}", (probe.classes, *shape, *last), kind,
                ("class", *axes, *(("rank",) if last else ())), 1, attributes={"about": text},
            ))  # fmt: skip
    predicted = str(outcome.outputs.dtype).removeprefix("torch.")
    axes = tuple(f"output_axis{i}" for i in range(len(out)))
    found.append(Array("predictions", (n, *out), predicted, ("sample", *axes), chunk))
    if outcome.rows is not None:
        found.append(Array("targets", (n, seeds), "int64", ("sample", "target"), chunk))
    else:
        numbers = jacobian_choice(settings.targets)(1, out).indices
        numbers = torch.arange(seeds) if numbers is None else numbers
        found.append(Array("targets", (seeds,), "int64", ("target",), content=numbers.numpy()))
    if outcome.deltas is not None:
        found.append(Array("deltas", (n, seeds), str(outcome.deltas.dtype)[6:], ("sample", "target"), chunk))
    edges = np.arange(0, n, chunk)
    content = np.stack([edges, np.minimum(edges + chunk, n)], axis=1)  # [K, 2]
    found.append(Array("chunks", content.shape, "int64", ("chunk", "edge"), content=content))
    return found
