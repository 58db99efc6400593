"""Taking the route that `decide` chose: by the model's Program, or on autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..planner.timing import Timing
from ..runtime.ops import Statistics
from ..util import options
from ..util.memory import out_of_memory
from .autograd_call import AutogradCall, output_shape
from .checks import too_large
from .live_model import outside_modes
from .program_call import ProgramCall
from .request import JacobianResult, Request, allocate
from .route import Route
from .watch import OutputsChanged

CHANGED = (
    "its outputs are not those of the network that was captured: something that no guard sees has changed (an "
    "environment variable, a file, a random number). gradkern.reset() captures it again"
)


def solve(request: Request, route: Route) -> JacobianResult:
    """The request's results.  Raises `Unused` for an input that the output does not depend on."""
    if request.samples == 0:
        with outside_modes():
            return allocate(request, output_shape(request, route))
    start, results = 0, None
    if route.undecided and route.engine == "auto":
        start, results = AutogradCall(request, route).run_until_capture_pays()
        if start == request.samples:
            assert results is not None
            return results
    bound = route.bound_program(request)
    if bound is not None:
        try:
            return ProgramCall(request, route, bound).run(start, results)
        except OutputsChanged:
            route.refuse(CHANGED)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not out_of_memory(error):  # a GPU's own error says more
                raise
            count = request.resolve_seeds(request.samples, bound.program.output_shape).count
            work = f" in addition to memory_budget={options.memory_budget()} bytes of work"
            raise too_large(request.gradient_bytes * request.samples * count, work) from error
    return AutogradCall(request, route).run(start, results)


def add_to_sums(request: Request, route: Route, sums: Statistics) -> Tensor | None:
    """The outputs ``[N, *out]``, with the Jacobians of one input added to ``sums`` and none of them kept.

    None, with nothing added, if that is not one chain of kernels on a CPU.
    """
    bound = route.bound_program(request)
    if bound is None or len(request.wrt) != 1 or not request.samples or route.engine == "reference":
        return None
    try:
        return ProgramCall(request, route, bound).add_to_sums(sums)
    except OutputsChanged:
        route.refuse(CHANGED)
        return None


def timing(request: Request, route: Route) -> Timing | None:
    """How long a request takes on kernels and on autograd; None for a route that does not depend on that."""
    bound = route.bound
    if route.engine != "auto" or bound is None or not request.samples:
        return None
    if bound.verified.unused.intersection(request.wrt):
        return None
    call = ProgramCall(request, route, bound)
    return call.timing() if call.setup.seeds.count else None
