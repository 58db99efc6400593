"""`check`: how far gradkern is from autograd in float64, on the caller's own model and samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import api
from .dispatch.arguments import read_inputs
from .dispatch.request import JacobianResult, Request
from .dispatch.route import decide
from .dispatch.solve import solve
from .dispatch.targets import Targets, TopK, jacobian_choice
from .util.buffers import buffers_kept
from .util.callables import model_of, unwrap, with_output
from .util.options import Engine
from .util.outputs import Output
from .util.random_state import RandomState

TOLERANCE = 1e-5  # relative to the largest entry of a sample's gradient


@dataclass(frozen=True)
class Check:
    """The error against autograd, per output.

    ``absolute``: the largest difference.  ``relative``: the same, relative to the largest gradient of that output.
    ``off_share``: the share of samples with a difference above 1e-5 of their own largest gradient.  In float32, a unit
    whose input lies within rounding of its kink produces such a sample, and then neither result is wrong.
    """

    against: str
    outputs: tuple[str, ...]
    absolute: tuple[float, ...]
    relative: tuple[float, ...]
    off_share: tuple[float, ...]
    samples: int

    @property
    def worst(self) -> float:
        """The largest relative error of all outputs."""
        return max(self.relative, default=0.0)

    def __str__(self) -> str:
        width = max([len("output"), *map(len, self.outputs)])
        rows = [
            f"gradkern against {self.against}, {self.samples} samples",
            f"{'output':>{width}}  {'max |error|':>12}  {'relative':>9}  {'samples off by > 1e-5':>22}",
        ]
        for name, a, r, s in zip(self.outputs, self.absolute, self.relative, self.off_share, strict=True):
            rows.append(f"{name:>{width}}  {a:12.3e}  {r:9.1e}  {s:22.2%}")
        return "\n".join(rows)


def check(
    model: Callable[..., Any], inputs: Tensor | api.Several, targets: Targets | TopK = None, *,
    wrt: api.Wrt = None, engine: Engine = "kernel", output: Output = None,
) -> Check:  # fmt: skip
    """Compare the results of ``engine`` with autograd on a float64 copy of the model.

    All samples are compared; a few hundred are enough.  A model that cannot be copied, or run in float64, is compared
    with autograd in its own dtype, and the table says so.

    ``engine`` is ``"kernel"`` by default, unlike elsewhere: ``"auto"`` may choose autograd, and the comparison would
    then test autograd against itself.  ``targets``, ``wrt`` and ``output`` as in `jacobian`.  Returns a `Check`, which
    prints as a table.
    """
    tensors, indices = read_inputs(inputs, wrt)
    state = RandomState()
    if isinstance(targets, TopK):
        answer, targets = api.jacobian(model, tensors, targets, wrt=indices, engine=engine, output=output)
    else:
        answer = api.jacobian(model, tensors, targets, wrt=indices, engine=engine, output=output)
    state.restore()
    request, against = _exact_request(with_output(model, output), tensors, indices, targets)
    results = solve(request, decide(request, "autograd"))
    state.restore()
    compared = [a.reshape(e.shape) for a, e in zip(answer, results.jacobians, strict=True)]
    return _compare(compared, results.jacobians, _names(results), against)


def _exact_request(
    model: Any, tensors: tuple[Tensor, ...], indices: tuple[int, ...], targets: Any
) -> tuple[Request, str]:
    exact = tuple(x.double() if x.is_floating_point() else x for x in tensors)
    try:
        twin = copy.deepcopy(unwrap(model))
        module, reason = model_of(twin), "a callable that is not a module"
        if module is not None:
            with torch.no_grad(), buffers_kept(module.double()):
                twin(*[x[:2].clone() for x in exact])
            return Request(twin, exact, indices, jacobian_choice(targets)), "autograd in float64"
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    dtype = tensors[indices[0]].dtype
    return Request(model, tensors, indices, jacobian_choice(targets)), f"autograd in {dtype} (no float64: {reason})"


def _names(results: JacobianResult) -> list[str]:
    """Names for the outputs that were differentiated."""
    seeds, shape = results.seeds, results.output_shape
    if seeds.per_sample:
        return [f"#{s}" for s in range(seeds.count)]  # a different output in each sample
    indices = torch.arange(seeds.count) if seeds.indices is None else seeds.indices
    if len(shape) < 2:
        return [str(int(n)) for n in indices]
    return [str(tuple(int(i) for i in torch.unravel_index(n, shape))) for n in indices]


def _compare(answer: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], against: str) -> Check:
    absolute, relative, off = [], [], []
    samples = expected[0].shape[0]
    for s in range(len(names)):
        error = torch.zeros(samples, dtype=torch.float64)
        scale = torch.zeros(samples, dtype=torch.float64)
        for a, e in zip(answer, expected, strict=True):
            want, got = e[:, s].double().flatten(1).cpu(), a[:, s].double().flatten(1).cpu()  # [N, F]
            same = (want == got) | (want.isnan() & got.isnan())
            gap = torch.where(same, 0.0, (want - got).abs()).nan_to_num(torch.inf)
            if want.shape[1]:
                error = torch.maximum(error, gap.amax(1))
                scale = torch.maximum(scale, want.abs().nan_to_num(0.0, 0.0, 0.0).amax(1))
        top = float(scale.max()) if samples else 0.0
        absolute.append(float(error.max()) if samples else 0.0)
        relative.append(absolute[-1] / top if top > 0 else absolute[-1])
        off.append(float((error > TOLERANCE * scale).double().mean()) if samples else 0.0)
    return Check(against, tuple(names), tuple(absolute), tuple(relative), tuple(off), samples)
