"""A request of a model that has a Program: which way it goes, and its results."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable
from functools import cached_property

import torch
from torch import Tensor

from ..planner.timing import Timing, Way
from ..runtime.ops import Statistics
from ..runtime.whole_chain import WholeChain
from ..runtime.whole_network import whole_network
from ..util.memo import Memo, WeakMemo
from . import batching, eager, repeated, ways
from .autograd_call import AutogradCall
from .checks import check_fits_in_memory
from .first_use import clock
from .request import JacobianResult, Request, allocate
from .route import Route
from .state import BoundProgram
from .watch import SAMPLES
from .ways import CallSetup

CALLS_PER_PROGRAM = 32  # kinds of calls that are remembered


#: By verified Program, then by seeds, inputs, threads and size of the call.
_setups: WeakMemo[Memo[CallSetup]] = WeakMemo(lambda: Memo(CALLS_PER_PROGRAM))


class ProgramCall:
    """One request of a model, and its Program with the tensors of this call."""

    def __init__(self, request: Request, route: Route, bound: BoundProgram) -> None:
        self.request, self.route, self.bound = request, route, bound

    @property
    def autograd(self) -> AutogradCall:
        """The same request on live autograd."""
        return AutogradCall(self.request, self.route)

    @cached_property
    def setup(self) -> CallSetup:
        """The `CallSetup` of calls like this one, remembered if their seeds do not depend on the samples."""
        request = self.request
        # Parts of a call have the size of the whole.
        kind = request.wrt, torch.get_num_threads(), bisect_right(ways.SIZES, request.call_samples)
        if request.seeds_key is None:
            return self._make_setup(kind)
        return _setups.of(self.bound.verified).get_or_make((request.seeds_key, *kind), lambda: self._make_setup(kind))

    def _make_setup(self, kind: tuple[Hashable, ...]) -> CallSetup:
        request, program = self.request, self.bound.program
        self.route.check_reached(request)
        x = request.inputs[request.wrt[0]]
        seeds = request.resolve_seeds(request.samples, program.output_shape)
        whole = None
        # On a GPU, whether its kernels are wanted depends on the engine, and their first results are compared.
        if request.seeds_key is not None and seeds.count and x.device.type == "cpu" and batching.has_kernels(x):
            whole = whole_network(program, self.bound.params(), request.inputs, seeds.indices, seeds.axes, request.wrt)
        timing_key = program.key, seeds.awaits_outputs, seeds.count, x.dtype, x.device, *kind
        return CallSetup(seeds, timing_key, whole)

    def way(self) -> Way:
        """The way that all parts of this public call go: the one that a store has pinned, kernels if the caller asks
        for them, or else the faster one."""
        pinned, count, route = ways.pinned_way.get(), self.setup.seeds.count, self.route
        if pinned is not None and route.engine != "reference":
            return pinned
        if route.engine != "auto" or not count:
            return "kernels"
        way = route.way_by_seed_count.get(count)
        if way is None:
            way = route.way_by_seed_count[count] = self.timing().way
        return way

    def timing(self) -> Timing:
        """How long calls like this one take on kernels and on autograd; measured now if that has not been done."""

        def measure() -> Timing:
            profile = self.autograd.profile_beside_program()
            with self.autograd.restoring_buffers(profile):
                return ways.measure(self.request, self.bound, self.setup, profile)

        return ways.timings.get_or_make(self.setup.timing_key, measure)

    def run(self, start: int, results: JacobianResult | None) -> JacobianResult:
        """The results of the samples from ``start`` on; ``results``: those before.  Raises `OutputsChanged`."""
        request, route, bound, way = self.request, self.route, self.bound, self.way()
        if way != "kernels":
            profile, batched = self.autograd.profile_beside_program(), way == "batched"
            with self.autograd.restoring_buffers(profile):
                return eager.run_as_measured(request, profile, start, results, self.setup.seeds.count, batched=batched)
        if results is None and route.engine != "reference":
            whole = self._by_whole_network()
            if whole is not None:
                return whole
        torch_bytes = self.autograd.profile_beside_program().per_sample if bound.verified.opaque_steps else 0
        return batching.run(
            request, bound.program, bound.tensors, route.engine, start, results,
            torch_bytes=torch_bytes, watch=route.entry.watch,
        )  # fmt: skip

    def _by_whole_network(self) -> JacobianResult | None:
        """The results by the kernels of the whole network; None if the call needs anything more."""
        request, route, bound = self.request, self.route, self.bound
        whole, watch = self.setup.whole, route.entry.watch
        if whole is None or request.keep_outputs or torch.is_inference_mode_enabled() or watch.due():
            return None
        if request.out is not None:
            results = allocate(request, bound.program.output_shape)
            fits = whole.can_fill(results.jacobians)
            filled = fits and repeated.run(whole, watch, bound.tensors, request.inputs, results.jacobians) is not None
            return results if filled else None
        check_fits_in_memory(request.samples * whole.gradient_bytes)
        begin = clock()
        jacobians = repeated.run(whole, watch, bound.tensors, request.inputs)
        if jacobians is None:
            return None
        if clock() - begin < repeated.SHORT:
            repeated.note(request, route.engine, route.entry, bound.verified.graph, whole)
        return JacobianResult(self.setup.seeds, bound.program.output_shape, tuple(jacobians), whole.shaped(jacobians))

    def add_to_sums(self, sums: Statistics) -> Tensor | None:
        """The outputs ``[N, *out]``, with the Jacobians of one input added to ``sums``; None, with nothing added, if
        that is not one chain of kernels on a CPU."""
        request, whole, watch = self.request, self.setup.whole, self.route.entry.watch
        if not isinstance(whole, WholeChain) or self.way() != "kernels":
            return None
        packed = whole.packed(self.bound.tensors)
        if packed is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            inputs, rows = [x.detach() for x in request.inputs], whole.rows(packed)
            if watch.due():  # afterwards it would be too late
                few = [x[:SAMPLES] for x in inputs]
                y = whole.add_to(Statistics.none(len(few[0])), packed, rows, few)
                watch.compare(request.fn, request.module, few, y)
            begin = clock()
            y = whole.add_to(sums, packed, rows, inputs)
            watch.add(clock() - begin)
        return y
