"""Probing model and source before a run: whether it can be traced, and the method on a few samples."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import api
from ...dispatch import ways
from ...dispatch.request import Request, jacobian_choice
from ...dispatch.route import compared, couples_batch, decide
from ...dispatch.targets import Seeds
from ...ir.program import Program
from ...planner.timing import Way
from ...runtime import executor
from ...util import options
from ...util.options import BadValue, Engine
from .. import methods
from ..sources import Source
from .settings import Settings

PROBED = 4


@dataclass(frozen=True)
class Probe:
    """The results of a few samples: shapes of the outcome, and the samples per second of a first try."""

    program: Program | None
    engine: Engine
    outcome: methods.Outcome
    inputs: tuple[Tensor, ...]
    rate: float
    way: Way | None = None  # of gradients, if kernels and autograd were compared

    @property
    def seeds(self) -> int:
        return self.outcome.maps[0].shape[1]

    @property
    def floating(self) -> list[int]:
        """The inputs that are differentiated."""
        return [i for i, x in enumerate(self.inputs) if x.is_floating_point()]

    @property
    def classes(self) -> int:
        """The rows of a statistic: one per target, or one per output if samples have their own targets."""
        return self.seeds if self.outcome.rows is None else math.prod(self.outcome.outputs.shape[1:])

    @property
    def map_bytes(self) -> int:
        """Bytes of one sample's maps, as they are computed."""
        return sum(m[:1].nbytes for m in self.outcome.maps)

    @property
    def map_elements(self) -> int:
        return sum(m[:1].numel() for m in self.outcome.maps)

    @property
    def input_bytes(self) -> int:
        return sum(x[:1].nbytes for x in self.inputs)

    def plan_key(self) -> str | None:
        """A hash of the plan: how each step runs."""
        if self.program is None or self.engine != "kernel":
            return None
        text = str(executor.plan_for(self.program, self.seeds, self.inputs[0].dtype))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def device_of(model: nn.Module) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def probe_run(model: nn.Module, source: Source, settings: Settings, pinned: Engine | None) -> Probe:
    """Trace, and run the method on a few samples.  ``pinned``: the engine that a store has recorded.

    Without one, kernels and autograd are compared, so that all chunks, in all processes, go the same way.
    """
    count = min(PROBED, source.samples)
    inputs = tuple(x.to(device_of(model)) for x in source.read(0, count))
    engine = pinned or options.engine(settings.engine)
    program = None
    if engine != "autograd":
        prepared = api.prepare(model, inputs)
        program = None if prepared is None else prepared.program
        engine = "autograd" if program is None else "kernel" if engine == "auto" else engine
    if program is None and count > 1:
        refuse_mixed(model, inputs)
    chooses = program is not None and pinned is None and options.engine(settings.engine) == "auto"
    method = methods.find(settings.method, settings.arguments)
    targets = targets_of_first(settings.targets, count, source.samples)
    batch = methods.Batch(model, inputs, targets, engine, settings.arguments)
    outcome = method(batch)  # warms up
    way = faster_way(model, source, outcome.maps[0].shape[1]) if chooses else None
    begin = time.perf_counter()
    with ways.pinned(way):
        outcome = method(batch)
    return Probe(program, engine, outcome, inputs, count / (time.perf_counter() - begin), way)


def faster_way(model: nn.Module, source: Source, seeds: int) -> Way | None:
    """The way of gradients of so many outputs, measured on the first samples."""
    inputs = tuple(x.to(device_of(model)) for x in source.read(0, min(ways.MOST_SAMPLES, source.samples)))
    floating = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())
    chosen = Seeds(seeds, (seeds,), torch.arange(seeds))
    request = Request(model, inputs, floating, lambda n, out: chosen)
    found = compared(request, decide(request, "auto"), chosen)
    return None if found is None else found.way


def refuse_mixed(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    floating = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())
    request = Request(model, inputs, floating, jacobian_choice(None))
    reason = couples_batch(request, decide(request))
    if reason:
        raise BadValue(
            f"model: {reason}, so a sample's result would depend on the chunk that it is in. Use model.eval(), or "
            "gradkern.jacobian on the whole batch."
        )


def targets_of_first(targets: Any, count: int, samples: int) -> Any:
    """The targets of the first ``count`` of ``samples`` if every sample has its own; other targets unchanged."""
    if isinstance(targets, list) and targets and isinstance(targets[0], list):
        targets = torch.tensor(targets)
    if isinstance(targets, (Tensor, np.ndarray)) and np.ndim(targets) == 2:
        if len(targets) != samples:
            raise BadValue(f"targets: got {len(targets)} rows, expected one for each of {samples} samples.")
        targets = torch.as_tensor(targets)[:count]
    return targets
