"""Probes model and source before a run: captures the model, and runs the method on a few samples."""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import api
from ...dispatch import ways
from ...dispatch.autograd_call import whole_batch_reason
from ...dispatch.request import Request
from ...dispatch.route import decide
from ...dispatch.solve import timing
from ...dispatch.targets import Seeds, jacobian_choice
from ...ir.program import Program
from ...planner.timing import Way
from ...runtime import executor, ops
from ...util import options
from ...util.buffers import buffers_kept
from ...util.options import BadType, BadValue, Engine, debugging
from ...util.random_state import RandomState
from .. import methods, statistics
from .reading import SpotSamples
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
    spot_samples: SpotSamples  # the samples that were read
    way: Way | None = None  # how gradients are computed, if kernels and autograd were compared
    sums_only: bool = False  # kernels add the maps to statistics, and keep none

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
        return self.seeds if self.outcome.targets is None else math.prod(self.outcome.outputs.shape[1:])

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

    def sums_bytes(self, reductions: Sequence[str] | str) -> int:
        """Bytes of the statistics of one chunk."""
        shapes = [tuple(self.inputs[i].shape[1:]) for i in self.floating]
        return sum(statistics.nbytes(reductions, self.classes, shape) for shape in shapes)

    def plan_key(self) -> str | None:
        """A hash of the plan: how each step runs."""
        if self.program is None or self.engine != "kernel":
            return None
        text = str(executor.plan_for(self.program, self.seeds, self.inputs[0].dtype, wrt=tuple(self.floating)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def device_of(model: nn.Module) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def probe_run(
    model: nn.Module, spot_samples: SpotSamples, samples: int, settings: Settings, pinned: Engine | None
) -> Probe:
    """Capture, and run the method on a few of the samples that were read, which are spread over all ``samples``.

    ``pinned``: the engine that a store has recorded.  Without one, kernels and autograd are compared once, so that
    all chunks, in all processes, use the same of the two.
    """
    device = device_of(model)
    chosen = choose_samples(model, spot_samples, device)
    inputs = _join_samples(spot_samples, chosen, device)
    check_count(model, inputs)
    check_dtypes(model, inputs)
    method = methods.find(settings.method, settings.arguments)
    methods.check_arguments(method, settings.arguments, inputs, samples)
    engine = pinned or options.engine(settings.engine)
    program = None
    if engine != "autograd":
        program = api.prepare(model, inputs, engine=engine).program
        engine = "autograd" if program is None else "kernel" if engine == "auto" else engine
    if program is None and len(chosen) > 1:
        refuse_mixed(model, inputs)
    chooses = program is not None and pinned is None and options.engine(settings.engine) == "auto"
    arguments = methods.arguments_of(method, settings.arguments, chosen, samples, inputs)
    targets = targets_of_samples(settings.targets, chosen, samples)
    batch = methods.Batch(model, inputs, targets, engine, arguments)
    outcome = method(batch)  # warms up
    way = faster_way(model, spot_samples, outcome.maps[0].shape[1]) if chooses else None
    begin = time.perf_counter()
    with ways.pinned(way):
        method(batch)
    rate = len(chosen) / (time.perf_counter() - begin)
    with ways.pinned(way):
        sums_only = settings.sums_alone and outcome.targets is None and adds_up(method, batch)
    return Probe(program, engine, outcome, inputs, rate, spot_samples, way, sums_only)


def adds_up(method: methods.Method, batch: methods.Batch) -> bool:
    return methods.add_to_sums(method, batch, ops.Statistics.none(len(batch.inputs[0]))) is not None


def check_count(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Raise `BadValue` if ``forward`` takes another number of inputs than a sample has."""
    try:
        forward = inspect.signature(model.forward)
    except (TypeError, ValueError):  # the signature is unknown
        return
    try:
        forward.bind(*inputs)
    except TypeError as error:
        shapes = ", ".join(str(list(x.shape[1:])) for x in inputs)
        raise BadValue(
            f"source: a sample has {len(inputs)} inputs, of shape {shapes}, but {type(model).__name__}.forward takes "
            f"{forward} ({error}). columns= chooses some; arrays in a tuple are inputs, arrays in a list are samples."
        ) from error


def check_dtypes(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Raise `BadType`, saying what to do, for inputs without derivatives, or of a dtype that the model cannot take."""
    kinds = ", ".join(str(x.dtype).removeprefix("torch.") for x in inputs)
    if not any(x.is_floating_point() for x in inputs):
        raise BadType(
            f"source: its samples are {kinds}, and only floating numbers have gradients: input_dtype=torch.float32 "
            "(--input-dtype float32); of complex ones give torch.view_as_real(x)."
        )
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if wanted is None or all(x.dtype == wanted for x in inputs if x.is_floating_point()):
        return
    try:
        with torch.no_grad(), buffers_kept(model):
            model(*(x[:1] for x in inputs))
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error) and "Input type" not in str(error):
            return  # the cause is not the dtype; the run will raise the error
        name = str(wanted).removeprefix("torch.")
        raise BadType(
            f"source: its samples are {kinds}, the model is {name}: input_dtype=torch.{name} (--input-dtype {name}), "
            "or convert the model to the dtype of the samples."
        ) from error


def faster_way(model: nn.Module, spot_samples: SpotSamples, seeds: int) -> Way | None:
    """The faster way for gradients of ``seeds`` outputs, measured on samples spread over the source."""
    inputs = _join_samples(spot_samples, list(spot_samples.rows)[: ways.MOST_SAMPLES], device_of(model))
    floating = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())
    chosen = Seeds(seeds, (seeds,), torch.arange(seeds))
    request = Request(model, inputs, floating, lambda n, out: chosen)
    timed = timing(request, decide(request, "auto"))
    return None if timed is None else timed.way


def choose_samples(model: nn.Module, spot_samples: SpotSamples, device: torch.device) -> list[int]:
    """The indices of a few samples, spread over the source, whose output depends on them.

    A sample that is all zero, or at which every unit is off, shows neither a wrong derivative nor mixed samples.
    """
    indices = list(spot_samples.rows)
    for i in indices[1:]:
        _check_shapes(spot_samples, indices[0], i)
    order = [i for step in range(-(-len(indices) // PROBED)) for i in indices[step :: -(-len(indices) // PROBED)]]
    order.sort(key=lambda i: not any(_varies(x) for x in spot_samples.rows[i]))  # stable: those that vary come first
    chosen: list[int] = []
    for at in range(0, len(order), PROBED):
        tried = order[at : at + PROBED]
        inputs = _join_samples(spot_samples, tried, device)
        chosen += [i for i, alive in zip(tried, _alive(model, inputs), strict=True) if alive]
        if len(chosen) >= PROBED:
            break
    rest = [i for i in order if i not in chosen]
    return sorted([*chosen, *rest][:PROBED])


def _check_shapes(spot_samples: SpotSamples, first: int, other: int) -> None:
    for x, y in zip(spot_samples.rows[first], spot_samples.rows[other], strict=True):
        if x.shape[1:] != y.shape[1:]:
            raise BadValue(
                f"source: the samples have different shapes: sample {first} has {list(x.shape[1:])}, sample {other} "
                f"has {list(y.shape[1:])}. Give all of them one length, or pad=0.0 (--pad 0) to fill the shorter ones."
            )


def _join_samples(spot_samples: SpotSamples, chosen: list[int], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts).to(device) for parts in zip(*(spot_samples.rows[i] for i in chosen), strict=True))


def _varies(x: Tensor) -> bool:
    return x.numel() == 1 or bool((x != x.flatten()[:1]).any())


def _alive(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[bool]:
    """Whether the outputs have a gradient other than zero, for each sample; True where that cannot be found out."""
    samples = inputs[0].shape[0]
    floating = [x.is_floating_point() for x in inputs]
    state = RandomState()
    try:
        with torch.enable_grad(), buffers_kept(model):
            leaves = [x.detach().clone().requires_grad_(f) for x, f in zip(inputs, floating, strict=True)]
            y = model(*leaves)
            weights = torch.linspace(1, 2, y[0].numel(), dtype=y.dtype, device=y.device).view_as(y[0])
            wanted = [x for x, f in zip(leaves, floating, strict=True) if f]
            gradients = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
    except Exception:  # the model's own errors come up when the method runs
        if debugging():
            raise
        return [True] * samples
    finally:
        state.restore()
    alive = torch.zeros(samples, dtype=torch.bool)
    for g in gradients:
        if g is not None:
            alive |= (g.reshape(samples, -1) != 0).any(1).cpu()
    return alive.tolist()


def refuse_mixed(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    floating = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())
    request = Request(model, inputs, floating, jacobian_choice(None))
    reason = whole_batch_reason(request, decide(request))
    if reason:
        raise BadValue(
            f"model: {reason}, so a sample's result would depend on the chunk that it is in. Use model.eval(), or "
            "gradkern.jacobian on the whole batch."
        )


def targets_of_samples(targets: Any, chosen: Sequence[int] | slice, samples: int) -> Any:
    """The targets of the ``chosen`` of ``samples`` if every sample has its own; other targets unchanged."""
    if isinstance(targets, list) and targets and isinstance(targets[0], list):
        targets = torch.tensor(targets)
    if isinstance(targets, (Tensor, np.ndarray)) and np.ndim(targets) == 2:
        if len(targets) != samples:
            raise BadValue(f"targets: got {len(targets)} rows, expected one for each of {samples} samples.")
        targets = torch.as_tensor(targets)[chosen]
    return targets
