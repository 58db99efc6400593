"""`jacobian`, `iter_jacobian`, `prepare` and `explain`: they read arguments, decide on a route and return results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from .dispatch import eager, repeated, state
from .dispatch.arguments import OutArgument, is_one_index, read_inputs
from .dispatch.autograd_call import output_shape, whole_batch_reason
from .dispatch.checks import check_devices
from .dispatch.prepared import Prepared
from .dispatch.request import JacobianResult, Request
from .dispatch.route import decide
from .dispatch.solve import solve, timing
from .dispatch.state import BoundProgram
from .dispatch.targets import Targets, TopK, TopSeeds, jacobian_choice
from .planner.plan import Plan
from .planner.table import PlanStep
from .planner.timing import Timing
from .runtime import executor, mac_counter, parameters
from .util import options
from .util.callables import name_of, with_output
from .util.chunks import samples_per_chunk, spans
from .util.integers import as_int
from .util.options import BadType, BadValue, Engine
from .util.outputs import Output
from .util.progress import showing_progress

Model: TypeAlias = Callable[..., Any]
Several: TypeAlias = tuple[Tensor, ...] | list[Tensor]
Wrt: TypeAlias = int | Sequence[int] | None


@overload
def jacobian(
    model: Model, inputs: Tensor, targets: TopK, *, out: Tensor | None = None, wrt: int | None = None,
    engine: Engine | None = None, create_graph: bool = False, output: Output = None, progress: bool | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def jacobian(
    model: Model, inputs: Several, targets: TopK, *, out: Several | None = None, wrt: Sequence[int] | None = None,
    engine: Engine | None = None, create_graph: bool = False, output: Output = None, progress: bool | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]: ...  # fmt: skip
@overload
def jacobian(
    model: Model, inputs: Tensor, targets: Targets = None, *, out: Tensor | None = None, wrt: int | None = None,
    engine: Engine | None = None, create_graph: bool = False, output: Output = None, progress: bool | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def jacobian(
    model: Model, inputs: Tensor | Several, targets: Targets = None, *, out: Tensor | None = None, wrt: int,
    engine: Engine | None = None, create_graph: bool = False, output: Output = None, progress: bool | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def jacobian(
    model: Model, inputs: Several, targets: Targets = None, *, out: Several | None = None,
    wrt: Sequence[int] | None = None, engine: Engine | None = None, create_graph: bool = False,
    output: Output = None, progress: bool | None = None,
) -> tuple[Tensor, ...]: ...  # fmt: skip
@overload
def jacobian(
    model: Model, inputs: Tensor | Several, targets: Targets | TopK = None, *, out: OutArgument = None, wrt: Wrt = None,
    engine: Engine | None = None, create_graph: bool = False, output: Output = None, progress: bool | None = None,
) -> Any: ...  # fmt: skip


def jacobian(
    model: Model, inputs: Tensor | Several, targets: Targets | TopK = None, *, out: OutArgument = None, wrt: Wrt = None,
    engine: Engine | None = None, create_graph: bool = False, output: Output = None, progress: bool | None = None,
) -> Any:  # fmt: skip
    """The gradient of every output (or of ``targets``) with respect to every input feature, per sample.

    ``J[n, c] = ∂(Σ_m y[m, c]) / ∂x[n]``; if the samples of a batch do not mix, that is sample n's own Jacobian.

    Parameters
    ----------
    model
        A `torch.nn.Module`, one of its methods, or another callable that maps tensors ``[N, ...]`` to one tensor
        ``[N, *out]``, or to several (``output``).
    inputs
        One tensor ``[N, *in]``, or a tuple of such tensors with equal N.  Neither they nor the model are changed.
    targets
        ``None``: all C outputs.  An int: that one (the axis stays, S = 1; negative ones as in Python).  A list of S
        distinct ints: these outputs **for all samples** (unlike Captum, which reads one target per sample; a warning
        says so once if S = N).  A tensor ``[N, S]`` (or N lists): each sample's own.  A tensor ``[N]`` is refused,
        because it may mean either.  For an output with several axes a tuple of indices, a list of S tuples, or a tensor
        ``[N, S, axes]``.  ``TopK(k)``: the k highest outputs of each sample.
    out
        A tensor or numpy array (`np.memmap`) of the result's shape to write to, or a tuple of them; any floating
        dtype.  The result may be larger than memory.
    wrt
        The indices of the inputs to differentiate (an int gives one tensor, a sequence a tuple).  ``None``: all.
    engine
        ``"auto"``, ``"kernel"``, ``"reference"`` or ``"autograd"``, see `gradkern.use`.
    create_graph
        True gives a result that can itself be differentiated; it is always computed by autograd, in one piece.
        Otherwise the result is detached, even if the inputs require grad.
    output
        The tensor to differentiate, of a model that returns several: an index (of a tuple or list), a name (of a
        dict, dataclass or named tuple), or a function of what the model returns.
    progress
        True draws a progress bar, with the rate and the time left, once a call has taken seconds; ``None``: in a
        terminal only.

    Returns
    -------
    Tensor, or tuple of tensors
        ``[N, C, *in]`` (``[N, S, *in]`` with targets; ``[N, *out, *in]`` for an output with several axes; ``[N, *in]``
        for an output ``[N]``), in the dtype of the input; a tuple of them if ``inputs`` is a tuple.  With `TopK`, the
        pair of that and the indices.

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit.  The message says what was passed, what was expected, and what to do.  Also (and
        then the error is a RuntimeError too, like torch's) if autograd finds no path from the output to an input
        that is to be differentiated, whether parameters require grad or not: leave such an input out of ``wrt``.  If
        only some outputs are constant, their gradients are zeros.
    """
    if out is None and wrt is None and output is None and not create_graph and progress is None:
        repetition = repeated.again(model, inputs, targets, options.engine(engine))
        if repetition is not None:
            return repetition
    as_tuple, fn = _gives_tuple(inputs, wrt), _callable(model, output)
    tensors, indices = read_inputs(inputs, wrt)
    request = Request(fn, tensors, indices, jacobian_choice(targets), out=out)
    _note_list_of_targets(request, targets)
    with showing_progress(progress):
        results = _with_graph(request, engine) if create_graph else solve(request, decide(request, engine))
    shaped: Sequence[Tensor | np.ndarray] = results.shaped
    if out is not None:  # the caller's own objects
        shaped = out if isinstance(out, (tuple, list)) else [out]  # type: ignore[list-item]
    answer = tuple(shaped) if as_tuple else shaped[0]
    seeds = results.seeds
    return (answer, seeds.indices_per_sample()) if isinstance(seeds, TopSeeds) else answer


@overload
def iter_jacobian(
    model: Model, inputs: Tensor, targets: TopK, *, chunk: int | None = None, wrt: int | None = None,
    engine: Engine | None = None, output: Output = None, progress: bool | None = None,
) -> Iterator[tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def iter_jacobian(
    model: Model, inputs: Several, targets: TopK, *, chunk: int | None = None, wrt: Sequence[int] | None = None,
    engine: Engine | None = None, output: Output = None, progress: bool | None = None,
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]: ...  # fmt: skip
@overload
def iter_jacobian(
    model: Model, inputs: Tensor, targets: Targets = None, *, chunk: int | None = None, wrt: int | None = None,
    engine: Engine | None = None, output: Output = None, progress: bool | None = None,
) -> Iterator[Tensor]: ...  # fmt: skip
@overload
def iter_jacobian(
    model: Model, inputs: Several, targets: Targets = None, *, chunk: int | None = None,
    wrt: Sequence[int] | None = None, engine: Engine | None = None, output: Output = None,
    progress: bool | None = None,
) -> Iterator[tuple[Tensor, ...]]: ...  # fmt: skip
@overload
def iter_jacobian(
    model: Model, inputs: Tensor | Several, targets: Targets | TopK = None, *, chunk: int | None = None,
    wrt: Wrt = None, engine: Engine | None = None, output: Output = None, progress: bool | None = None,
) -> Iterator[Any]: ...  # fmt: skip


def iter_jacobian(
    model: Model, inputs: Tensor | Several, targets: Targets | TopK = None, *, chunk: int | None = None,
    wrt: Wrt = None, engine: Engine | None = None, output: Output = None, progress: bool | None = None,
) -> Iterator[Any]:  # fmt: skip
    """`jacobian` in pieces of consecutive samples, for results larger than memory.

    Yields what `jacobian` returns, for ``chunk`` samples at a time (by default, as many as make a piece of the size
    of the memory budget).  Concatenated along axis 0, the pieces are `jacobian`'s result.  A model whose samples
    depend on each other is computed as a whole first.  The other arguments as in `jacobian`; the progress bar counts
    the pieces that have been yielded.
    """
    tensors, indices = read_inputs(inputs, wrt)
    if chunk is not None:
        size = as_int(chunk)
        if size is None or size < 1:
            raise BadValue(f"chunk: got {chunk!r}, expected a positive number of samples, or None.")
        chunk = size
    request = Request(_callable(model, output), tensors, indices, jacobian_choice(targets))
    _note_list_of_targets(request, targets)
    check_devices(request.module, request.inputs)  # now, not at the first piece
    options.engine(engine)
    return _pieces(request, chunk, engine, _gives_tuple(inputs, wrt), progress)


def _pieces(
    request: Request, chunk: int | None, engine: Engine | None, as_tuple: bool, progress: bool | None
) -> Iterator[Any]:
    route = decide(request, engine)
    seeds = request.resolve_seeds(request.samples, output_shape(request, route))
    if chunk is None:
        chunk = samples_per_chunk(request.inputs[0].device, request.gradient_bytes * seeds.count)
    whole = solve(request, route) if chunk < request.samples and whole_batch_reason(request, route) else None
    with showing_progress(progress):  # only here: between the pieces, the caller's own calls may draw bars
        pieces = spans(0, request.samples, chunk)
    for start, stop in pieces:
        if whole is None:
            part = request.part(start, stop, None if request.seeds_key is not None else seeds)
            # Decide again: the caller may have changed the model since the last piece.
            results = solve(part, decide(part, engine))
            shaped, first = results.shaped, 0
        else:
            results, first = whole, start
            shaped = tuple(j[start:stop] for j in whole.shaped)
        answer = shaped if as_tuple else shaped[0]
        shown = slice(first, first + stop - start)
        chosen = results.seeds
        yield (answer, chosen.indices_per_sample()[shown]) if isinstance(chosen, TopSeeds) else answer


def prepare(
    model: Model, inputs: Tensor | Several, targets: Targets = None, *, wrt: Wrt = None,
    engine: Engine | None = None, output: Output = None,
) -> Prepared:  # fmt: skip
    """Capture and verify the model now, with some of these samples, so that no later call has to.

    Returns a callable: ``jac(x)`` is ``jacobian(model, x, targets, wrt=wrt)`` for inputs of the same shapes, dtypes and
    devices, without the checks that take most of the time of a call with few samples.  It packs the weights at its
    first call and, unlike `jacobian`, does not notice later changes of the model: call ``jac.update()`` after one.
    ``jac.program`` is what was captured, and ``str(jac)`` lists it.  If the model stays on autograd, a warning says
    why, and ``jac.program`` is None.  Then, and where autograd turns out to be faster, ``jac(x)`` is a call of
    `jacobian`.

    ``targets`` as in `jacobian`, the same for all samples; ``wrt`` (by default all floating inputs), ``engine`` and
    ``output`` as in `jacobian`.  The engine is chosen now: a later `use` has no effect on ``jac``.  Calls of `jacobian`
    with other ``wrt`` and ``targets`` use the captured network too.
    """
    request = _inspection_request(model, inputs, targets, wrt, output)
    route = decide(request, engine)
    bound = route.bound_program(request)
    return Prepared(request, None if bound is None else bound.program, route.engine, _gives_tuple(inputs, wrt))


class Explanation(Protocol):
    """What `explain` returns: a `Plan`, or the reason why autograd runs the whole model (then without steps).

    ``str()`` gives the table.  ``steps`` are its rows, ``fused_share`` is the share of the dense multiply-adds that run
    on kernels or on planned ATen calls with all seeds folded in, and ``native_share`` the share on gradkern's own
    kernels.  ``timing`` compares the plan with autograd; None if they were not compared.
    """

    @property
    def steps(self) -> Sequence[PlanStep]: ...
    @property
    def fused_share(self) -> float: ...
    @property
    def native_share(self) -> float: ...
    @property
    def timing(self) -> Timing | None: ...


@dataclass(frozen=True)
class WholeModel:
    """The explanation of a model that runs on autograd as a whole."""

    name: str
    reason: str
    steps: ClassVar[tuple[PlanStep, ...]] = ()
    fused_share: ClassVar[float] = 0.0
    native_share: ClassVar[float] = 0.0
    timing: ClassVar[None] = None

    def __str__(self) -> str:
        return f"{self.name}: autograd, the whole model. Why: {self.reason}.\nfused 0 %, own kernels 0 %"


def explain(
    model: Model, inputs: Tensor | Several, targets: Targets | TopK = None, *, wrt: Wrt = None,
    engine: Engine | None = None, output: Output = None, show: bool = True,
) -> Explanation:  # fmt: skip
    """Print, step by step, how `jacobian` runs this model, why it is not faster, and the share that is fused.

    Returns what it prints as an `Explanation`: ``str()`` of it is the table, and its attributes are the numbers.  With
    ``show=False`` nothing is printed.  With the engine ``"auto"``, the plan is compared with autograd on these samples;
    calls take the faster of the two.  Captures the model if that has not been done.  ``wrt`` (by default all floating
    inputs), ``engine`` and ``output`` as in `jacobian`.
    """
    with options.use(options.engine(engine)):
        return _explain(_inspection_request(model, inputs, targets, wrt, output), show)


def _explain(request: Request, show: bool) -> Explanation:
    route = decide(request)
    bound = None if route.why_eager else route.bound_program(request)
    explanation: Explanation
    if bound is None:
        explanation = WholeModel(name_of(request.fn), route.why_eager)
    else:
        explanation = _plan(request, bound).timed(timing(request, route))
    if show:
        print(explanation)
    return explanation


def _plan(request: Request, bound: BoundProgram) -> Plan:
    x, program = request.inputs[request.wrt[0]], bound.program
    count = request.resolve_seeds(request.samples, program.output_shape).count
    plan = executor.plan_for(program, count, x.dtype, x.device, wrt=request.wrt)
    with torch.inference_mode(False), torch.no_grad():
        params = parameters.bind(plan.program, bound.params())
        macs = mac_counter.opaque_macs(plan.program, params, request.pick(2))
        return plan.explained(macs, executor.fallback_reason(program, count, params, request.inputs, request.wrt))


# ---------------------------------------------------------------------------------------------------------------
# Arguments


def _callable(model: object, output: Output) -> Callable[..., Any]:
    if not callable(model):
        raise BadType(f"model: got {type(model).__name__}, expected a torch.nn.Module or another callable.")
    return with_output(model, output)


def _gives_tuple(inputs: object, wrt: Wrt) -> bool:
    return isinstance(inputs, (tuple, list)) if wrt is None else not is_one_index(wrt)


def _note_list_of_targets(request: Request, targets: object) -> None:
    """Say once per model what a list of targets means if it is as long as the batch: Captum reads one per sample."""
    if not isinstance(targets, list) or not len(targets) == request.samples > 1:
        return
    if all(isinstance(target, (int, tuple)) for target in targets):  # lists inside are of one sample each
        state.warn(
            request.fn,
            f"targets: a list of {len(targets)} outputs is differentiated for each of the {request.samples} samples. "
            "For one output per sample, as in Captum, pass a tensor [N, 1]: torch.as_tensor(targets)[:, None].",
        )


def _with_graph(request: Request, engine: Engine | None) -> JacobianResult:
    name = options.engine(engine)
    if name in ("kernel", "reference"):
        raise BadValue(
            f"create_graph: got True with engine={name!r}, whose result has no graph. Use engine='autograd' (or "
            "'auto', which then takes autograd)."
        )
    if request.out is not None:
        raise BadValue("create_graph: got True together with out=, expected one of them: out= takes values only.")
    return eager.with_graph(request)


def _inspection_request(model: Model, inputs: Any, targets: Any, wrt: Wrt, output: Output) -> Request:
    """A request for inspection only: by default, integer inputs are allowed, and not differentiated."""
    if wrt is None:
        tensors = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        wrt = [i for i, x in enumerate(tensors) if isinstance(x, Tensor) and x.is_floating_point()] or None
    checked, indices = read_inputs(inputs, wrt)
    if not checked[0].shape[0]:
        raise BadValue("inputs: got no samples, expected at least one: a network is verified on some of them.")
    return Request(_callable(model, output), checked, indices, jacobian_choice(targets))
