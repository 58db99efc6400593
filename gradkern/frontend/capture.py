"""The network as a graph, captured and guarded by torch.compile's front end (Dynamo).

Dynamo reads the Python code of a forward pass and writes a graph, and guards over everything that the code looked at:
attributes, globals, closures, containers, hooks, training flags, shapes.  At every later call its guards are checked
in C++.  If they hold, the backend is called with the *live* tensors that the graph reads.  Our backend records which
graph it is and those tensors.  It computes only the values that the code keeps.  If no guards hold, the code is
captured again.

The graph is captured with grad mode on and inputs that require grad, so that ``torch.no_grad`` regions, custom
`autograd.Function`s and tensor hooks stay visible in it (`regions.py`).
"""

from __future__ import annotations

import _warnings
import logging
import re
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..util.callables import by_name
from ..util.outputs import choose_output
from ..util.torch_compat import (
    cache_entries,
    disable_current_modes,
    dynamo,
    recurrent_shapes_only,
    shapes_config,
    tracing_context,
)
from . import regions
from .refusal import NoProgram, reason_of

LOCK = threading.RLock()  # capture and export are not thread-safe
_NOISY = ("torch._dynamo", "torch._guards", "torch.fx.experimental.symbolic_shapes", "torch._export", "torch.export")
_SAYS = ("debug", "info", "warning", "error", "exception", "critical", "log", "isEnabledFor")
_CONFIG: dict[str, Any] = {
    "skip_nnmodule_hook_guards": False,  # a hook that comes or goes is a change
    "specialize_int": True,  # numbers are constants, and guarded
    "specialize_float": True,
    "automatic_dynamic_shapes": False,  # only the batch axis is free
    "allow_rnn": True,
    "suppress_errors": False,
    "optimize_ddp": False,
    # Printing and logging belong to a real forward pass; checking the guards must not repeat it.
    "ignore_logging_functions": {print, warnings.warn, *(getattr(logging.Logger, name) for name in _SAYS)}
    | {getattr(logging, name) for name in _SAYS if hasattr(logging, name)}
    | {
        getattr(_warnings, name)
        for name in ("_filters_mutated", "_filters_mutated_lock_held")
        if hasattr(_warnings, name)
    },
}
_INPUT = re.compile(r"L\['inputs'\]\[(\d+)\]")
_SIZE = re.compile(r"L\['inputs'\]\[\d+\]\.size\(\)\[0\]")
_PATH = re.compile(r"\['?([^'\]]+)'?\]|([A-Za-z_0-9]\w*)")
_BEHIND = re.compile(r"L\['fn'\](\.(__self__|func)\b)*")  # a method's or a partial's module is the model
_NO_HOOKS = "EMPTY_NN_MODULE_HOOKS_DICT"  # the type of a guard
_PRIVATE = frozenset(("_modules", "_parameters", "_buffers", "__dict__"))

Method = tuple[weakref.ref[type], str, types.CodeType]  # the class that has or inherits it, its name, its code
T = TypeVar("T")
Reader = Callable[[dict[str, Any], dict[str, Any]], dict[str, Tensor]]  # from a call's arguments and the globals
Reads = str | int | None  # a tensor's name, the number of an input, or None for the batch size


@dataclass(eq=False)
class GuardedGraph:
    """One captured graph.

    ``reads``: the meaning of each placeholder.  ``guards``: those of Dynamo.  ``read_tensors``: finds the live tensors
    that it reads, by name, given the arguments of the captured function.  ``methods``: the methods that ran during
    capture; Dynamo does not guard against their replacement in a class.
    """

    module: torch.fx.GraphModule | None  # None once it has been lowered
    reads: tuple[Reads, ...]
    names: tuple[str, ...]  # the names of the tensors, in order
    guards: Any = None
    read_tensors: Reader = lambda local, shared: {}
    methods: tuple[Method, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether Dynamo still has it: `torch._dynamo.reset` drops a graph, and so does the end of a guarded object."""
        return self.guards is not None and self.guards.cache_entry is not None


@dataclass(eq=False)
class GraphMatch:
    """The graph that one call would run, and the live tensors that it reads, by name."""

    graph: GuardedGraph
    tensors: dict[str, Tensor]


class _Missed(Exception):
    """The guards of no graph hold: Dynamo has left the function as it is."""


def _entry(fn: Callable[..., Any], given: dict[int, Any], inputs: tuple[Tensor, ...], output: Any) -> Tensor | None:
    if not is_compiling():
        raise _Missed
    # Each name that is read here is a guard for every call to check, so there are few.
    # ``fn`` may work in place on its inputs, which is forbidden on leaves.  Its result is cloned so that it is the
    # graph's own last step; every other result of the graph is then a side effect of ``fn``.
    arguments = [x.clone() for x in inputs]
    for place, value in given.items():
        arguments.insert(place, value)
    result = fn(*arguments)
    if output is not None:
        result = choose_output(result, output)
    return result.clone() if isinstance(result, Tensor) else None


class GraphCache:
    """The graphs of one function for inputs of one signature.  It holds no reference to the function.

    ``code``: the code object that Dynamo keeps guards and graphs with.  ``shared``: the globals that it runs with.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        # A separate code object: Dynamo limits the recompilations of each code object, and one limit for all models of
        # the process would be too low.  Separate globals: Dynamo stores in them the modules that it has seen.
        self.code = _entry.__code__.replace(co_name="entry")
        self.shared = dict(globals())
        self.graphs: tuple[GuardedGraph, ...] = ()
        self.latest: GuardedGraph | None = None  # the one whose guards held last
        entry = types.FunctionType(self.code, self.shared)
        backend = _Backend()
        options: Any = {"guard_filter_fn": backend.note_methods}
        self._compiled = torch.compile(entry, backend=backend, fullgraph=True, dynamic=False, options=options)

    def capture(self, fn: Callable[..., Any], stand_ins: tuple[Tensor, ...]) -> GraphMatch:
        """The graph whose guards hold now, captured if there is none.  Raises `NoProgram`.

        ``stand_ins``: like the inputs except for their values; the floating ones require grad.
        """
        for x in stand_ins:
            dynamo.mark_dynamic(x, 0)
        with LOCK, _settings(), torch.inference_mode(False), torch.enable_grad():
            try:
                try:
                    captured = self._call(fn, stand_ins)
                    outdated = any(code_of(getattr(o(), name, None)) is not c for o, name, c in captured.graph.methods)
                except dynamo.exc.FailOnRecompileLimitHit:
                    outdated = True
                if outdated:
                    self._begin()
                    captured = self._call(fn, stand_ins)
                return captured
            except _Missed:
                raise NoProgram("torch.compile is switched off (set_stance or TORCHDYNAMO_DISABLE)") from None
            except Exception as error:
                inner = getattr(error, "inner_exception", error)
                raise inner if isinstance(inner, NoProgram) else NoProgram(reason_of(error)) from error

    def _call(self, fn: Callable[..., Any], stand_ins: tuple[Tensor, ...]) -> GraphMatch:
        local = by_name(fn, stand_ins)
        ran = self._compiled(**local)
        if ran is None:
            raise NoProgram("its output is not one tensor")
        graph, arguments = ran
        tensors = _tensors_by_name(graph, arguments)
        if graph.guards is None:
            self._learn_guards(graph, local, tensors)
        return GraphMatch(graph, tensors)

    def _learn_guards(self, graph: GuardedGraph, local: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Learn Dynamo's code and guards for a new graph, and where its tensors are read."""
        graphs = tuple(known for known in self.graphs if known.alive)
        entry = next(e for e in cache_entries(self.code) if all(e.guard_manager is not g.guards for g in graphs))
        graph.guards, code = entry.guard_manager, entry.code
        self.graphs = (*graphs, graph)
        try:
            evaluate = _evaluating_reader(graph)
            read = evaluate(local, self.shared)
            evaluates = all(read[name] is x for name, x in tensors.items())
        except Exception:  # an expression in Dynamo's own terms, which may fail in any way
            evaluates = False
        graph.read_tensors = evaluate if evaluates else _rerunning_reader(graph, code)


def _evaluating_reader(graph: GuardedGraph) -> Reader:
    """Reads the tensors by the Python expressions of their places, such as ``L['fn'].weight``, in one function."""
    assert graph.module is not None
    sources = [_source(n) for n in graph.module.graph.nodes if n.op == "placeholder"]
    items = ", ".join(f"{name!r}: {expression}" for name, expression in _tensors_by_name(graph, sources).items())
    reader: Reader = eval(f"lambda L, G: {{{items}}}")
    return reader


def _rerunning_reader(graph: GuardedGraph, code: types.CodeType) -> Reader:
    """Reads the tensors by running Dynamo's code, which passes them to `_Backend`; slower, but covers every case."""

    def read(local: dict[str, Any], shared: dict[str, Any]) -> dict[str, Tensor]:
        _, arguments = types.FunctionType(code, shared)(**local)
        return _tensors_by_name(graph, arguments)

    return read


def _tensors_by_name(graph: GuardedGraph, arguments: Sequence[T]) -> dict[str, T]:
    """The arguments of a graph that stand for tensors."""
    return {read: x for x, read in zip(arguments, graph.reads, strict=True) if isinstance(read, str)}


class _Backend:
    """The backend of one `GraphCache`.  It does not compute the model's output: the compiled function returns the graph
    that a call takes, with the graph's arguments."""

    def __init__(self) -> None:
        self.latest: tuple[GuardedGraph, set[types.CodeType]] | None = None  # captured, and the code that was read

    def __call__(self, module: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        reads = {node: _reads(node) for node in module.graph.nodes if node.op == "placeholder"}
        kept = regions.make_explicit(module, [node for node, read in reads.items() if not isinstance(read, str)])
        names = tuple(read for read in reads.values() if isinstance(read, str))
        graph = GuardedGraph(module, tuple(reads.values()), names)
        self.latest = graph, set(tracing_context.get_traced_code() or ())

        def run(*arguments: Any) -> tuple[Any, ...]:
            return ((graph, arguments), *(() if kept is None else kept(*arguments)))

        return run

    def note_methods(self, guards: Sequence[Any]) -> list[bool]:
        """Note the methods of the guarded objects when Dynamo asks which guards to keep: those of the graph."""
        if self.latest is not None:
            (graph, read), self.latest = self.latest, None
            values = [guard.value for guard in guards if guard.has_value]
            owners = {value if isinstance(value, type) else type(value) for value in values}
            graph.methods = tuple(m for owner in owners for m in _methods(owner, read))
        empty = {guard.name for guard in guards if guard.guard_type == _NO_HOOKS}
        return [_counts(guard, empty) for guard in guards]


def _counts(guard: Any, empty: set[str]) -> bool:
    """Whether a guard can fail while all others hold.  ``empty``: the tables that are guarded to have no hooks."""
    if guard.guard_type == _NO_HOOKS:  # the hooks that take keyword arguments are among all hooks
        table = guard.name.removesuffix("_with_kwargs")
        return table == guard.name or table not in empty
    # A graph does not depend on hooks for the tensors that autograd saves, and checking them takes Python code.
    return guard.guard_type != "AUTOGRAD_SAVED_TENSORS_HOOKS"


def _methods(owner: type, traced: set[types.CodeType]) -> Iterator[Method]:
    called = ("__call__", "_call_impl") if issubclass(owner, nn.Module) else ()  # Dynamo may pass over them
    for name in dict.fromkeys(name for base in owner.__mro__ for name in vars(base)):
        code = code_of(getattr(owner, name, None))
        if code is not None and (code in traced or name in called):
            yield weakref.ref(owner), name, code


def code_of(method: Any) -> types.CodeType | None:
    return getattr(getattr(method, "fget", method), "__code__", None)


def _reads(node: torch.fx.Node) -> Reads:
    name = _source(node)
    if of_input := _INPUT.fullmatch(name):
        return int(of_input.group(1))
    if _SIZE.fullmatch(name):
        return None
    if not isinstance(node.meta.get("example_value"), Tensor):
        raise NoProgram(f"it reads {plain_name(name)}, which is not a tensor and changes from call to call")
    return plain_name(name)


def _source(node: torch.fx.Node) -> str:
    """Where Dynamo reads a placeholder: an expression in ``L``, the arguments by name, and ``G``, the globals."""
    name = node._dynamo_source.name  # type: ignore[attr-defined]
    return name if isinstance(name, str) else name()


def plain_name(source: str) -> str:
    """A tensor's or a module's name from Dynamo's: ``L['fn']._modules['conv']._parameters['weight']`` is
    ``conv.weight``."""
    source = _BEHIND.sub("", source)
    return ".".join(p for pair in _PATH.findall(source) for p in pair if p and p not in _PRIVATE)


# ---------------------------------------------------------------------------------------------------------------
# Settings


@contextmanager
def _settings() -> Iterator[None]:
    """Dynamo's settings during a capture.

    Sizes are treated as unknown, so that one graph serves one sample and many.  oneDNN would be chosen by the batch
    size, which would become a guard.
    """
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(quiet())
        enter(dynamo.config.patch({k: v for k, v in _CONFIG.items() if hasattr(dynamo.config, k)}))
        enter(shapes_config.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
        enter(_without_onednn())
        enter(recurrent_shapes_only())
        enter(disable_current_modes())  # such as a profiler's, under which Dynamo does nothing
        yield


@contextmanager
def _without_onednn() -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Mute what capture and export log, print and warn of; the caller gets one line instead.  Needs the lock."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [logger.level for logger in loggers]
    stderr = sys.stderr
    sys.stderr = _Muted(stderr)
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with _unwarned():
            yield
    finally:
        if isinstance(sys.stderr, _Muted):  # it has not been replaced meanwhile
            sys.stderr = stderr
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Drop this thread's warnings: torch warns of its own internals, and a real forward pass repeats the model's."""
    if any(action == "error" for action, *_ in warnings.filters):  # a warning would end the capture
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        return
    before, owner = warnings.showwarning, threading.get_ident()  # changing filters would concern all threads

    def show(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != owner:
            before(*args, **kwargs)

    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:  # it has not been replaced meanwhile
            warnings.showwarning = before


class _Muted:
    """A stream that drops the output of this thread, and passes on that of other threads."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._owner = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._owner else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
