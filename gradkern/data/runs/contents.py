"""The contents of a new store: its attributes and its arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...dispatch.targets import jacobian_choice
from ...runtime import ops
from ...util import options
from ...util.options import BadValue
from .. import statistics
from ..sources import Source
from ..sources.padding import Padding
from ..store.attributes import Attributes, Fingerprint, PaddingRecord
from ..store.labels import of_rows
from ..store.layout import Array, dtype_name, map_names, reduction_key, spans
from ..store.results import FORMAT
from . import fingerprint, forecast
from .probe import Probe
from .settings import Settings


def attributes(
    asked: Fingerprint, source: Source, settings: Settings, probe: Probe, made_by: Mapping[str, Any] | None
) -> Attributes:
    """The store's attributes.  Everything that affects the last bits of a result is under ``pinned``."""
    budget = options.memory_budget()
    stored = probe.map_elements * forecast.itemsize(settings.dtype) if settings.maps else 0
    sums = probe.sums_bytes(settings.reductions)
    chunk = min(settings.chunk or forecast.chunk_size(source.samples, stored, probe.input_bytes, sums), source.samples)
    whole = settings.maps or sums_only(source, probe)
    batch = settings.batch or forecast.batch_size(chunk, probe.map_bytes, whole, budget)
    about: Attributes = {
        "format": FORMAT,
        "keys": fingerprint.KEYS,
        "numerics": fingerprint.NUMERICS,
        "fingerprint": asked,
        "pinned": {
            "chunk": chunk,
            "batch": min(batch, chunk),
            "threads": settings.threads or torch.get_num_threads(),
            "memory_budget": budget,
            "engine": probe.engine,
            "way": probe.way,
            "precision": ops.precision(),
            "plan": probe.plan_key(),
            **fingerprint.of_machine(),
        },
        "engine": settings.engine,
        "nonfinite": settings.nonfinite or ("error" if settings.reductions else "keep"),
        "inputs": map_names(len(probe.floating)),
        "reductions": list(settings.reductions),
        "arrays": {"dtype": settings.dtype, "compression": settings.compression},
        "output": list(probe.outcome.outputs.shape[1:]),
        "program": str(probe.program) if probe.program else None,
        "finished": False,
    }
    if source.padding is not None:
        about["padding"] = _padding(source.padding)
    if made_by:
        about["made_by"] = dict(made_by)
    return about


def sums_only(source: Source, probe: Probe) -> bool:
    """Whether maps are added to statistics by the kernels that compute them, so that none are kept."""
    return probe.sums_only and source.padding is None


def arrays(source: Source, settings: Settings, probe: Probe, about: Attributes) -> list[Array]:
    """The arrays of a new store: those written chunk by chunk, and those whose content is already known."""
    n, seeds, chunk = source.samples, probe.seeds, about["pinned"]["chunk"]
    outcome, inputs = probe.outcome, about["inputs"]
    listed = []
    for i, (name, maps) in enumerate(zip(inputs, outcome.maps, strict=True)):
        shape = tuple(maps.shape[2:])
        axes = tuple(f"{name.replace('attributions', 'input')}_axis{k}" for k in range(len(shape)))
        if settings.maps:
            listed.append(Array(name, (n, seeds, *shape), settings.dtype, ("sample", "target", *axes), chunk, True))
        if settings.top_features:
            k = settings.top_features
            if k > math.prod(shape):
                raise BadValue(f"top_features: got {k}, but a sample has {math.prod(shape)} features.")
            top = name.replace("attributions", "top_features")
            listed.append(Array(top, (n, seeds, k), "int64", ("sample", "target", "place"), chunk))
        for reduction in settings.reductions:
            listed.append(_reduction(reduction, reduction_key(reduction, inputs, i), (probe.classes, *shape), axes))
    out = tuple(about["output"])
    axes = tuple(f"output_axis{k}" for k in range(len(out)))
    listed.append(Array("predictions", (n, *out), dtype_name(outcome.outputs.dtype), ("sample", *axes), chunk))
    targets = np.zeros((n, seeds))
    if outcome.targets is not None:
        listed.append(Array("targets", (n, seeds), "int64", ("sample", "target"), chunk))
    else:
        indices = jacobian_choice(settings.targets)(1, out).indices
        targets = (torch.arange(seeds) if indices is None else indices).numpy()
        listed.append(Array("targets", (seeds,), "int64", ("target",), content=targets))
    if settings.names is not None:
        of_rows(settings.names, targets, out)
    if outcome.deltas is not None:
        listed.append(Array("deltas", (n, seeds), dtype_name(outcome.deltas.dtype), ("sample", "target"), chunk))
    listed += _labels(source, settings, out)
    edges = spans(n, chunk)
    listed.append(Array("chunks", edges.shape, "int64", ("chunk", "edge"), content=edges))
    return listed


def _labels(source: Source, settings: Settings, out: tuple[int, ...]) -> list[Array]:
    """Names of samples and outputs, and the lengths of samples that are padded."""
    listed = []
    if settings.ids is not None:
        if len(settings.ids) != source.samples:
            raise BadValue(f"ids: got {len(settings.ids)}, expected one for each of {source.samples} samples.")
        ids = np.array(settings.ids, dtype=object)
        listed.append(Array("ids", ids.shape, "string", ("sample",), content=ids))
    if settings.names is not None:
        names = np.array(settings.names, dtype=object)
        listed.append(Array("names", names.shape, "string", ("name",), content=names))
    if source.padding is not None:
        lengths = source.padding.lengths.numpy()
        listed.append(Array("lengths", lengths.shape, "int64", ("sample", "ragged_axis"), content=lengths))
    return listed


def _padding(padding: Padding) -> PaddingRecord:
    axes = [list(axis) for axis in padding.axes]
    lengths = [padding.shapes[k][a] for k, a in padding.axes]
    length = lengths[0] if lengths and len(set(lengths)) == 1 else None
    return {"value": padding.value, "length": length, "axes": axes, "gives": list(padding.gives)}


def _reduction(reduction: str, key: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """The array ``[C, *in]`` of a reduction's result, with one more axis for ranks."""
    dimensions, dtype, attributes = ("class", *axes), "float64", {"about": statistics.REDUCTIONS[reduction].about}
    if reduction == "ranks":
        shape, dimensions, dtype = (*shape, statistics.RANK_BINS), (*dimensions, "rank"), "int64"
    return Array(key, shape, dtype, dimensions, 1, attributes=attributes)
