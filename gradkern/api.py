"""`jacobian`, `iter_jacobian`, `prepare` and `explain`: the decision which way each call goes, and the way there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .dispatch import batching, eager, guards, state
from .dispatch.eager import Facts
from .dispatch.request import Job, OutArgument, check_devices, jacobian_choice, read_inputs
from .dispatch.targets import Seeds, TopSeeds
from .ir.program import Opaque, Program
from .planner.plan import Plan
from .runtime import binding, executor
from .util import options
from .util.chunks import spans
from .util.options import BadType, BadValue

TRACE_SAMPLES = 4
PROBE_SAMPLES = 3


def jacobian(
    model: Callable[..., Tensor],
    inputs: Tensor | Sequence[Tensor],
    targets: Any = None,
    *,
    out: OutArgument = None,
    wrt: int | Sequence[int] | None = None,
    engine: str | None = None,
    create_graph: bool = False,
) -> Any:
    """The gradient of every output (or of ``targets``) with respect to every input feature, per sample.

    ``J[n, c] = ∂(Σ_m y[m, c]) / ∂x[n]``; where the samples of a batch do not mix, that is sample n's own Jacobian.

    Parameters
    ----------
    model
        A `torch.nn.Module` (or its bound ``forward``) that maps tensors ``[N, ...]`` to one tensor ``[N, *out]``.
        Any other callable works too, on autograd.
    inputs
        One tensor ``[N, *in]``, or a tuple of such with equal N.  They and the model are left as they are.
    targets
        ``None``: all C outputs.  An int: that one (the axis stays, S = 1; negative ones as in Python).  A list or
        1-D tensor of S ints: these outputs **for all samples** (unlike Captum, which reads one target per sample).
        A tensor ``[N, S]`` (or N lists): each sample's own.  For an output with several axes a tuple of indices, a
        list of S tuples, or a tensor ``[N, S, axes]``.  ``TopK(k)``: the k highest outputs of each sample.
    out
        A tensor or numpy array (`np.memmap`) of the result's shape to write to, or a tuple of them; any floating
        dtype.  The result may be larger than memory.
    wrt
        The numbers of the inputs to differentiate (an int gives one tensor, a sequence a tuple).  ``None``: all.
    engine
        ``"auto"``, ``"kernel"``, ``"reference"`` or ``"autograd"``, see `gradkern.use`.
    create_graph
        True gives a result that can itself be differentiated: always by autograd, in one piece.  Otherwise the
        result is detached, also where the inputs require grad.

    Returns
    -------
    ``[N, C, *in]`` (``[N, S, *in]`` with targets; ``[N, *out, *in]`` for an output with several axes; ``[N, *in]``
    for an output ``[N]``), in the dtype of the input; a tuple of them where ``inputs`` is a tuple.  With
    ``TopK``: the pair of that and the indices.

    Raises
    ------
    ValueError, TypeError
        Where something does not fit: with what was got, what was expected, and what to do.
    """
    given, numbers = read_inputs(inputs, wrt)
    job = Job(_callable(model), given, numbers, jacobian_choice(targets), out=out)
    if create_graph:
        results: Sequence[Any] = _with_graph(job, engine)
    else:
        solve(job, engine)
        results = job.shaped() if out is None else list(out) if isinstance(out, (tuple, list)) else [out]
    return _handed_back(results, job.seeds, _gives_tuple(inputs, wrt))


def iter_jacobian(
    model: Callable[..., Tensor],
    inputs: Tensor | Sequence[Tensor],
    targets: Any = None,
    *,
    chunk: int | None = None,
    wrt: int | Sequence[int] | None = None,
    engine: str | None = None,
) -> Iterator[Any]:
    """`jacobian` in pieces of consecutive samples, for results larger than memory.

    Yields what `jacobian` returns, for ``chunk`` samples at a time (by default, as many as make a piece of the size
    of the memory budget); the pieces put together along axis 0 are `jacobian`'s result.  A model whose samples mix
    is computed as a whole first.
    """
    given, numbers = read_inputs(inputs, wrt)
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise BadValue(f"chunk: got {chunk!r}, expected a positive number of samples, or None.")
    job = Job(_callable(model), given, numbers, jacobian_choice(targets))
    check_devices(job.module, job.inputs)
    options.engine(engine)
    return _pieces(job, chunk, engine, _gives_tuple(inputs, wrt))


def _pieces(job: Job, chunk: int | None, engine: str | None, many: bool) -> Iterator[Any]:
    shape = batching.output_shape(job)
    seeds = job.choose(job.samples, shape)
    if chunk is None:
        size = sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in (job.inputs[w] for w in job.wrt))
        chunk = max(1, options.memory_budget() // max(size * seeds.count, 1))
    whole = chunk < job.samples and _must_be_whole(job)
    if whole:
        solve(job, engine)
        seeds = job.seeds or seeds
    for start, stop in spans(0, job.samples, chunk):
        if whole:
            part = [r[start:stop] for r in job.shaped()]
            rows = seeds.found()[start:stop] if isinstance(seeds, TopSeeds) else None
        else:
            piece = job.part(start, stop, seeds)
            solve(piece, engine)
            part = list(piece.shaped())
            rows = piece.seeds.found() if isinstance(piece.seeds, TopSeeds) else None
        result = tuple(part) if many else part[0]
        yield result if rows is None else (result, rows)


def prepare(model: Callable[..., Tensor], inputs: Tensor | Sequence[Tensor]) -> Program | None:
    """Trace and verify the model now, with some of these samples, so that no later call has to.

    Returns the Program (which prints itself), or None where the model stays on autograd; a warning says why.
    """
    job = _looking_job(model, inputs)
    verdict = verdict_of(job)
    return None if verdict is None else verdict.program


def explain(
    model: Callable[..., Tensor],
    inputs: Tensor | Sequence[Tensor],
    targets: Any = None,
    *,
    show: bool = True,
) -> Any:
    """Print, step by step, how `jacobian` runs this model, why not faster, and the share that is fused.

    Returns the plan: ``str()`` of it is that table; ``.steps`` are its rows, ``.fused_share`` the share of the dense
    multiply-adds that run on kernels or planned ATen calls with all seeds folded in, ``.native_share`` on own
    kernels alone.  Traces the model where that has not been done.  ``show=False`` prints nothing.
    """
    job = _looking_job(model, inputs)
    refused = guards.at_once(job.fn, job.inputs)
    verdict = None if refused else verdict_of(job)
    if verdict is None or verdict.program is None:
        reason = refused.reason if refused else verdict.reason if verdict else ""
        found: Any = WholeModel(type(job.module or job.fn).__name__, reason)
    else:
        found = _plan(job, verdict.program, jacobian_choice(targets)(job.samples, verdict.program.output_shape))
    if show:
        print(found)
    return found


def _plan(job: Job, program: Program, seeds: Seeds) -> Plan:
    assert job.module is not None
    x = job.inputs[job.wrt[0]]
    plan = executor.plan_for(program, seeds.count, x.dtype, x.device)
    with torch.inference_mode(False), torch.no_grad():
        return plan.counting(batching.opaque_macs(plan.program, binding.bind(plan.program, job.module), job.pick(2)))


class WholeModel:
    """The explanation of a model that runs on autograd as a whole."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        self.steps: tuple[Any, ...] = ()
        self.fused_share = 0.0
        self.native_share = 0.0

    def __str__(self) -> str:
        return f"{self.name}: autograd, the whole model. Why: {self.reason}.\nfused 0 %, own kernels 0 %"


# ---------------------------------------------------------------------------------------------------------------
# The decision


def solve(job: Job, engine: str | None = None, *, strict: bool = False) -> None:
    """Fill ``job.results``.  ``strict``: an input that the output does not depend on is an error, not zeros."""
    name = options.engine(engine)
    check_devices(job.module, job.inputs)
    if job.samples == 0:
        with eager.outside_modes():
            job.open(batching.output_shape(job))
        return
    refused = guards.at_once(job.fn, job.inputs)
    if name == "autograd" or refused is not None or job.module is None:
        if refused is not None and name != "autograd":
            _say(job, refused.reason)
        _live(job, 0, _facts(job, refused), strict)
        return
    known = state.entry(job.module)
    key = state.key_of(job.module, job.inputs)
    verdict, start = known.verdict(key), 0
    if verdict is None and name == "auto":
        start = _live_until_tracing_pays(job, known, key, strict)
        if start == job.samples:
            return
    if verdict is None:
        verdict = known.trace(key, job.module, lambda: job.pick(TRACE_SAMPLES))
    if verdict.program is None:
        _live(job, start, _facts(job, None), strict)
    else:
        opaque = any(isinstance(step.form, Opaque) for step in verdict.program.steps)
        saved = _facts(job, None).per_sample if opaque else 0
        batching.run(job, verdict.program, start, name, strict=strict, saved=saved)


def _live_until_tracing_pays(job: Job, known: state.Entry, key: Any, strict: bool) -> int:
    """Autograd, chunk by chunk, for as long as tracing would cost more than it saves; gives the samples done.

    The rule of the ski rental: by the time tracing pays, at most its own cost has been spent without it.
    """
    if known.worth_tracing(key, 0.0):
        return 0
    facts = _facts(job, None)
    budget = options.memory_budget()
    with _kept(job, facts):
        for start, stop in spans(0, job.samples, facts.chunk(job.samples, job.sample_bytes, budget)):
            begin = time.perf_counter()
            eager.fill(job, start, stop, budget // 2, strict=strict)
            seconds = time.perf_counter() - begin
            if facts.whole and job.samples > 1:
                continue  # it cannot be traced
            known.spend(key, seconds)
            left = job.samples - stop
            predicted = seconds / (stop - start) * (left + job.ahead)
            if left and known.worth_tracing(key, predicted):
                return stop
    return job.samples


def _live(job: Job, start: int, facts: Facts, strict: bool) -> None:
    """Autograd for the samples from ``start`` on."""
    budget = options.memory_budget()
    with _kept(job, facts):
        for a, b in spans(start, job.samples, facts.chunk(job.samples, job.sample_bytes, budget)):
            eager.fill(job, a, b, budget // 2, strict=strict)


def _kept(job: Job, facts: Facts) -> AbstractContextManager[Any]:
    """Put the buffers back afterwards, one call at a time, where a forward changes them."""
    stack = ExitStack()
    if facts.mutates and job.module is not None:
        stack.enter_context(state.entry(job.module).live)
        stack.enter_context(eager.buffers_kept(job.module))
    return stack


def _facts(job: Job, refused: guards.Refusal | None) -> Facts:
    """May the batch be cut, do buffers change, what does a sample take: measured once per structure."""
    if refused is not None and refused.whole:
        return Facts(refused.reason, mutates=True)
    if job.samples == 1:
        return Facts("there is one sample", mutates=True)
    return _measured(job)


def _measured(job: Job) -> Facts:
    def measure() -> Facts:
        return eager.probe(job.fn, job.module, job.pick(PROBE_SAMPLES), job.wrt)

    if job.module is None:
        return measure()
    known, key = state.entry(job.module), state.key_of(job.module, job.inputs)
    facts = known.facts(key, measure)
    verdict = known.verdict(key)
    return replace(facts, whole=verdict.reason) if verdict is not None and verdict.mixes else facts


def _must_be_whole(job: Job) -> bool:
    """Do the samples of this model mix, so that the batch must go through one forward?"""
    return bool(why_whole(job))


def why_whole(job: Job) -> str:
    """Why the batch must go through one forward: the samples of this model mix; empty where they do not."""
    refused = guards.at_once(job.fn, job.inputs)
    if refused is None and job.module is not None:
        verdict = state.entry(job.module).verdict(state.key_of(job.module, job.inputs))
        if verdict is not None and verdict.program is not None:
            return ""
    return _facts(job, refused).whole


def samples_mix(job: Job) -> bool:
    """Do samples of one batch depend on each other, or draw random numbers, or change buffers?"""
    refused = guards.at_once(job.fn, job.inputs)
    if refused is not None and refused.whole:
        return True
    if refused is None and job.module is not None:
        verdict = state.entry(job.module).verdict(state.key_of(job.module, job.inputs))
        if verdict is not None and verdict.program is not None:
            return False
    return bool(_measured(job).whole)


def verdict_of(job: Job) -> state.Verdict | None:
    """Trace now; None where the call goes to autograd at once (and a warning has said why)."""
    check_devices(job.module, job.inputs)
    refused = guards.at_once(job.fn, job.inputs)
    if refused is not None or job.module is None:
        _say(job, refused.reason if refused else "")
        return None
    key = state.key_of(job.module, job.inputs)
    return state.entry(job.module).trace(key, job.module, lambda: job.pick(TRACE_SAMPLES))


def _say(job: Job, reason: str) -> None:
    if job.module is None:
        state.warn_once(f"This call runs on autograd: {reason}.")
    else:
        state.entry(job.module).warn(f"{type(job.module).__name__} runs on autograd: {reason}.")


# ---------------------------------------------------------------------------------------------------------------
# Small things


def _callable(model: Any) -> Callable[..., Any]:
    if not callable(model):
        raise BadType(f"model: got {type(model).__name__}, expected a torch.nn.Module or another callable.")
    return model


def _gives_tuple(inputs: Any, wrt: int | Sequence[int] | None) -> bool:
    return isinstance(inputs, (tuple, list)) if wrt is None else not isinstance(wrt, int)


def _handed_back(results: Sequence[Any], seeds: Seeds | None, many: bool) -> Any:
    result = tuple(results) if many else results[0]
    return (result, seeds.found()) if isinstance(seeds, TopSeeds) else result


def _with_graph(job: Job, engine: str | None) -> tuple[Tensor, ...]:
    name = options.engine(engine)
    if name in ("kernel", "reference"):
        raise BadValue(
            f"create_graph: got True with engine={name!r}, whose result has no graph. Use engine='autograd' (or "
            "'auto', which then takes autograd)."
        )
    if job.to_caller:
        raise BadValue("create_graph: got True together with out=, expected one of them: out= takes values only.")
    check_devices(job.module, job.inputs)
    return eager.with_graph(job)


def _looking_job(model: Callable[..., Any], inputs: Any) -> Job:
    """A job that is only looked at: integer inputs are simply not differentiated."""
    tensors = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    floating = [i for i, x in enumerate(tensors) if isinstance(x, Tensor) and x.is_floating_point()]
    given, numbers = read_inputs(inputs, floating or None)
    return Job(_callable(model), given, numbers, jacobian_choice(None))
