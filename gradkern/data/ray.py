"""Dataset runs on a Ray cluster: the same store, filled by one actor per GPU or CPU slot.

Needs the ``ray`` extra.  The store must be on a file system that all machines see, or an object store.  Ray restarts
a killed actor and tries its chunks again; a chunk that was finished before the kill is not computed again.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from ..util import options
from ..util.options import BadType, BadValue, Engine
from ..util.untrusted import local_path
from . import methods
from .runs.opening import open_run
from .runs.probe import device_of
from .runs.runner import disk_full, work
from .runs.settings import RunOptions, Settings, settings_of
from .runs.shards import owned_chunks
from .sources import can_be_pickled, open_source
from .sources.padding import Pad
from .store.durable import delete, get, put, store_at
from .store.layout import map_names
from .store.results import Results


class Attribute:
    """A callable for `ray.data.Dataset.map_batches`: adds maps and predictions to batches of named numpy arrays.

        dataset.map_batches(Attribute, fn_constructor_args=(model,), fn_constructor_kwargs={"columns": "x"},
                            batch_size=1024, concurrency=4)

    ``columns`` names the model's inputs; the batch comes back with ``attributions`` [n, S, *in] (``attributions_0``,
    … if there are several inputs) and ``predictions`` [n, *out].  ``engine`` as in `gradkern.jacobian`; with "auto",
    the default, each actor measures what is faster, so that the last bits may depend on the actor ("kernel" measures
    nothing).
    """

    def __init__(
        self, model: nn.Module, method: str = "saliency", targets: Any = None, *, columns: str | Sequence[str] = "data",
        arguments: Mapping[str, Any] | None = None, engine: Engine | None = None, threads: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.targets, self.engine = model, targets, options.engine(engine)
        self.arguments = dict(arguments or {})
        self.columns = (columns,) if isinstance(columns, str) else tuple(columns)
        self.method = methods.find(method, self.arguments)
        methods.check_common(self.method, self.arguments)
        self.device = device_of(model)
        self.threads = threads

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.threads:
            torch.set_num_threads(self.threads)
        if any(c not in batch for c in self.columns):
            raise BadValue(f"columns: got {list(self.columns)}, but the batch has {list(batch)}.")
        inputs = tuple(torch.from_numpy(np.array(batch[c])).to(self.device) for c in self.columns)
        outcome = self.method(methods.Batch(self.model, inputs, self.targets, self.engine, self.arguments))
        names = map_names(len(outcome.maps))
        rows = {name: maps.cpu().numpy() for name, maps in zip(names, outcome.maps, strict=True)}
        return batch | rows | {"predictions": outcome.outputs.cpu().numpy()}


class FillChunks:
    """One actor: opens the store once, then finishes the chunks that it is given."""

    def __init__(self, model_and_source: Any, out: str, settings: Settings) -> None:
        import ray

        if not Results.exists(out):  # a machine that has joined the cluster after the check
            raise BadValue(f"out: {socket.gethostname()} does not see {out}. Choose a place that all machines share.")
        model, source = ray.get(model_and_source)
        self.task = open_run(model, source, out, settings)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``batch["id"]``: indices of ranges of chunks, of which there are ``pieces``."""
        shards = [(int(number), int(batch["pieces"][0])) for number in batch["id"]]
        done = [work(self.task, owned_chunks(self.task.results.chunks, shard), progress=False) for shard in shards]
        return {"id": batch["id"], "computed": np.array(done)}


def run_on_ray(
    model: nn.Module, source: Any, out: str | Path, method: str | None = None, targets: Any = None, *,
    workers: int | None = None, cpus: float = 1, gpus: float = 0, pieces: int | None = None, columns: Any = None,
    input_dtype: torch.dtype | None = None, pad: Pad | None = None, settings: Settings | None = None,
    **options: Unpack[RunOptions],
) -> Results:  # fmt: skip
    """`gradkern.run` over a Ray cluster; the same store, bit-equal to one made without Ray.

    There are ``workers`` actors (by default one per slot of the cluster) of ``cpus`` and ``gpus`` each.  The work is
    divided into ``pieces`` ranges of chunks (by default eight per worker).  ``threads`` defaults to ``cpus``.
    ``settings`` and ``options`` as in `gradkern.run`.  Connects to a running cluster or starts a local one.
    """
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    settings = settings_of("run_on_ray", settings, {"method": method, "targets": targets, **options})
    rows = open_source(source, columns, input_dtype, pad)
    if not can_be_pickled(rows):
        raise BadType(
            f"source: {type(source).__name__} cannot be sent to other processes. Pass a path, a memory map, a zarr "
            "array or a tensor."
        )
    place = str(out) if "://" in str(out) else str(Path(out).resolve())
    new, threads = not Results.exists(place), settings.threads or max(1, int(cpus))
    check_shared(place)
    with disk_full(place):
        task = open_run(model, rows, place, replace(settings, threads=threads) if new else settings)
    total = ray.cluster_resources()
    slots = total.get("GPU", 0) // gpus if gpus else total.get("CPU", 1) // cpus
    workers = workers or max(1, int(slots))
    pieces = min(task.results.chunks, pieces or 8 * workers)
    plan = ray.data.from_items([{"id": i, "pieces": pieces} for i in range(pieces)], override_num_blocks=pieces)
    model_and_source = ray.put((model, rows))  # once per machine, not once per actor
    done = plan.map_batches(  # by Ray Data's own defaults, killed actors restart and their tasks are tried again
        FillChunks,
        fn_constructor_args=(model_and_source, place, settings),
        batch_size=1,
        num_cpus=cpus,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    done.materialize()
    if not task.results.complete():
        raise RuntimeError(
            f"{place}: {task.results.finished_chunks} of {task.results.chunks} chunks are finished, though all "
            "workers have ended. Run the same again to continue."
        )
    return Results.open(place)


def check_shared(place: str) -> None:
    """Raise `BadValue` if a machine of the cluster does not see the place of the store, or cannot write there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = local_path(place)
    shared = place if path is None else str(existing(path))
    store, mine = store_at(shared), f".gradkern-{uuid.uuid4().hex}"
    look = ray.remote(num_cpus=0)(sees)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    put(store, mine, b"seen?")
    try:
        asked = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                shared, mine, f"{mine}.{i}"
            )
            for i, node in enumerate(nodes)
        ]
        said = ray.get(asked)
        blind = [
            node["NodeManagerHostname"]
            for i, node in enumerate(nodes)
            if not (said[i] and get(store, f"{mine}.{i}") is not None)
        ]
    finally:
        for key in (mine, *(f"{mine}.{i}" for i in range(len(nodes)))):
            delete(store, key)
    if blind:
        raise BadValue(
            f"out: {', '.join(sorted(set(blind)))} cannot see or write {shared}, so what is computed there would be "
            "lost. Choose a folder that all machines of the cluster share, or an address such as s3://…; nothing was "
            "computed."
        )


def sees(place: str, mine: str, answer: str) -> bool:
    """On a worker: whether it sees the driver's key at this place (on the same file system), and can write there."""
    try:
        path = local_path(place)
        if path is not None and not path.is_dir():
            return False
        store = store_at(place)
        if get(store, mine) is None:
            return False
        put(store, answer, b"seen")
    except Exception:  # a file system or an object store may raise anything
        return False
    return True


def existing(path: Path) -> Path:
    """The nearest folder above that exists, or the folder itself."""
    return path if path.is_dir() else existing(path.parent)
