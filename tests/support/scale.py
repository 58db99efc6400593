"""Many random networks, each drawn from its own seed::

    python -m tests.support.scale programs 0 100000     # built directly, against the float64 oracle
    python -m tests.support.scale captured 0 2000       # modules through the public call, against the oracle
    python -m tests.support.scale rules 0 100000        # DeepLift, guided ReLUs: kernels and plain torch; completeness

A seed that fails is printed, with its error, and the same command with that seed and 1 repeats it.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

import gradkern
from gradkern.attr.rules import linear
from gradkern.attr.rules import rule as rules
from gradkern.attr.rules.rescale import Rescale
from gradkern.attr.rules.rule_methods import with_relu
from gradkern.codegen import emitters, lowering, scratch
from gradkern.ir.program import Select
from gradkern.passes import direction
from gradkern.runtime import reference
from tests.support import oracle
from tests.support.properties import agrees, agrees_in_float32
from tests.support.random_modules import Grower as ModuleGrower
from tests.support.random_modules import Question
from tests.support.random_programs import Grower, Network
from tests.support.rule_networks import values_of

RESET = 50  # plans are forgotten after so many networks
EXACT = 1e-10


@contextlib.contextmanager
def way(name: str, pick: Callable[[int, int], int]) -> Iterator[None]:
    """What planning decides by cost, decided otherwise: directions, local seeds, small tiles and blocks."""
    with contextlib.ExitStack() as stack:
        if name == "forward":
            stack.enter_context(mock.patch.object(direction, "FORWARD_WORTHWHILE", 0))
            stack.enter_context(mock.patch.object(direction, "CUT_WORTHWHILE", (0, 1, 1.25)[pick(0, 2)]))
        elif name == "local":
            tile = (1, 2, 3, 7)[pick(0, 3)]
            stack.enter_context(mock.patch.object(lowering, "MOST_LIVE_SHARE", 2.0))
            stack.enter_context(mock.patch.object(lowering, "FEW_SEEDS", 1))
            stack.enter_context(mock.patch.object(lowering, "seed_tile", lambda seeds, _: min(seeds, tile)))
        elif name == "little":
            stack.enter_context(mock.patch.object(scratch, "SEED_BYTES", (1, 256 << 10)[pick(0, 1)]))
            stack.enter_context(mock.patch.object(scratch, "BLOCK_BYTES", (1, 512 << 10)[pick(0, 1)]))
            stack.enter_context(mock.patch.object(emitters, "L1_BYTES", (0, 24 << 10)[pick(0, 1)]))
        yield


class Interpreted(nn.Module):
    """A Program's forward pass in plain torch, for the oracle."""

    def __init__(self, net: Network, seed: int) -> None:
        super().__init__()
        self.net, self.seed = net, seed

    def forward(self, *inputs: Tensor) -> Tensor:
        program = self.net.program
        return reference.forward(program, self.net.params(self.seed), inputs)[program.output]


def any_outside(net: Network) -> bool:
    """Whether a window of a pool lies wholly in the padding: torch's own backward pass must not see it."""
    p = net.program
    pools = [s for s in p.steps if isinstance(s.form, Select) and s.form.ties != "split"]
    return any(s.form.windows.outside(p.shape(s.inputs[0])[1:]) for s in pools)


def targets_of(pick: Callable[[int, int], int], n: int, outputs: int) -> Tensor | None:
    draw = lambda *shape: torch.tensor([pick(0, outputs - 1) for _ in range(shape[-1] * shape[0])]).view(shape)  # noqa: E731
    match pick(0, 2):
        case 0:
            return None
        case 1:
            return draw(1, pick(1, 13))[0]
    return draw(n, 2)


def network(pick: Callable[[int, int], int]) -> Network:
    return Grower(pick, pick(0, 3) == 0, outside=True).grow(pick(1, 9))


def programs(pick: Callable[[int, int], int]) -> str:
    """A Program of any forms, in any dtype, direction, block and tile, on one to three threads."""
    net, n = network(pick), (1, 2, 3, 5, 9)[pick(0, 4)]
    wrt = ((0,), (1,), (1, 0), (0, 1))[pick(0, 3)] if len(net.program.inputs) == 2 else None
    targets, seed = targets_of(pick, n, net.program.outputs), pick(0, 1 << 20)
    if any_outside(net):
        y, (j, *_) = reference.jacobian(net.program, net.params(seed), net.inputs(n, seed + 1))
        if not bool(y.isfinite().all() and j.isfinite().all()):
            return "not finite"
    torch.set_num_threads((1, 1, 1, 2, 3)[pick(0, 4)])
    name = ("plain", "forward", "local", "little")[pick(0, 3)]
    with way(name, pick):
        if pick(0, 3) == 0:
            agrees_in_float32(net, n, targets, wrt, seed)
            return f"{name} float32"
        agrees(net, n, targets, wrt, seed, n > 1 and pick(0, 3) == 0)
        if pick(0, 7) == 0 and not any_outside(net):  # the reference itself, against autograd of one number at a time
            xs = net.inputs(n, seed + 1)
            want_y, want = oracle.jacobian(Interpreted(net, seed), xs)
            y, got = reference.jacobian(net.program, net.params(seed), xs)
            assert oracle.relative_error(y, want_y) < EXACT
            for g, w in zip(got, want, strict=True):
                assert oracle.relative_error(g, w) < EXACT or float((g - w).abs().max()) < EXACT * 1e-3
            return f"{name} float64, autograd"
    return f"{name} float64"


def rules_of_deeplift(pick: Callable[[int, int], int]) -> str:
    """DeepLift's multipliers, or rectified gradients, of the kernels and of plain torch; completeness."""
    net, n, seed = network(pick), pick(1, 4), pick(0, 1 << 20)
    params, xs = net.params(seed), net.inputs(n, seed + 1)
    base = net.inputs((1, n)[pick(0, 1)], seed + 2)
    name = ("rescale", "rescale", "gradient", "guided_relu", "open_relu")[pick(0, 4)]
    program = with_relu(net.program, name) if name.endswith("relu") else net.program
    targets = targets_of(pick, n, program.outputs)
    targets = torch.arange(program.outputs) if targets is None else targets
    torch.set_num_threads((1, 1, 2)[pick(0, 2)])

    def attributions(plain: bool) -> tuple[rules.Rule, tuple[Tensor, ...]]:
        values = values_of(program, params, xs, plain)
        rule = rules.Rule(program, params, values)
        if name == "rescale":
            rule = Rescale(program, params, values, values_of(program, params, base, plain), 1e-10, not plain)
        return rule, linear.rule_multipliers(rule, xs, targets, tuple(range(len(xs))), native=not plain)

    with torch.no_grad():
        (rule, want), (_, got) = attributions(True), attributions(False)
        ends = [reference.forward(program, params, z)[program.output].flatten(1) for z in (xs, base)]
    for g, w in zip(got, want, strict=True):
        if any_outside(net):  # whether 0 times its -inf is NaN or left out depends on the order of the terms
            both = g.isfinite() & w.isfinite()
            g, w = g.where(both, 0.0), w.where(both, 0.0)
        same = torch.equal(g.isnan(), w.isnan())
        g, w = g.nan_to_num(), w.nan_to_num()
        assert same and (oracle.relative_error(g, w) < 1e-9 or float((g - w).abs().max()) < 1e-12)
    if name == "rescale" and not rule.unruled and all(bool(torch.isfinite(e).all()) for e in ends):
        parts = [m * (x - b).unsqueeze(1) for m, x, b in zip(got, xs, base, strict=True)]
        found = sum(p.flatten(2).sum(2) for p in parts)
        size = sum(p.abs().flatten(2).sum(2) for p in parts).clamp(min=1.0)
        change = oracle.pick((ends[0] - ends[1]).expand(n, -1), targets)
        assert float(((found - change).abs() / size).max()) < 1e-8, "incomplete"
        return "rescale, complete"
    return name


def captured(pick: Callable[[int, int], int]) -> str:
    """A network of modules through the public calls, against the float64 oracle."""
    model, shape = ModuleGrower(pick).grow()
    with torch.no_grad():
        outputs = model(torch.zeros(1, *shape).double()).flatten(1).shape[1]
    q = Question.of(pick, outputs)
    x = torch.randn(q.n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(pick(0, 1 << 20)))
    x = x.to(q.dtype)
    model = model.to(q.dtype)
    if q.dtype == torch.float32:
        for p in model.parameters():
            p.requires_grad_(False)
    want = oracle.jacobian(model, x)[1][0]
    plain = gradkern.jacobian(model, x, engine="autograd")
    torch.set_num_threads(q.threads)
    name = ("plain", "forward", "local", "little")[pick(0, 3)]
    asked: Tensor | list[int] | None = q.targets
    if q.targets is not None:
        want, plain = oracle.pick(want, q.targets), oracle.pick(plain, q.targets)
        asked = q.targets.tolist() if q.targets.dim() == 1 else q.targets
    with way(name, pick), gradkern.use("kernel", memory_budget=q.budget):
        got = torch.cat(list(gradkern.iter_jacobian(model, x, asked, chunk=q.chunk)))
    got, want, plain = (j.reshape(q.n, -1, *shape).double() for j in (got, want, plain))
    if q.dtype == torch.float64:
        error = oracle.relative_error(got, want)
        assert error < EXACT or float((got - want).abs().max()) < 1e-13, error
    else:  # torch's own float32 says how badly conditioned a sample is, and whether its pattern flips
        scale = max(float(want.abs().max()), 1e-2)
        mine, theirs = ((j - want).abs().flatten(1).amax(1) / scale for j in (got, plain))
        assert bool((mine <= (20 * theirs).clamp(min=1e-5)).all()), (mine.max(), theirs.max())
    return f"{name} {str(q.dtype).removeprefix('torch.')}"


KINDS: dict[str, Callable[[Callable[[int, int], int]], str]] = {
    "programs": programs,
    "rules": rules_of_deeplift,
    "captured": captured,
}


def one(kind: str, seed: int) -> str:
    """The network of a seed; raises what is wrong with it, and says what it was."""
    try:
        return KINDS[kind](random.Random(f"{kind} {seed}").randint)
    finally:
        torch.set_num_threads(1)


def main(kind: str, first: int, count: int, seconds: float = float("inf")) -> int:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", ".*first results are not torch's own")
    seen: Counter[str] = Counter()
    failed, begin = [], time.monotonic()
    for seed in range(first, first + count):
        if time.monotonic() - begin > seconds:
            break
        if seed % RESET == 0:
            gradkern.reset()
        try:
            seen[one(kind, seed)] += 1
        except Exception:
            failed.append(seed)
            print(f"{kind} {seed} FAILED\n{traceback.format_exc()}", flush=True)
        if seed % 1000 == 999:
            print(f"{kind}: {seed + 1 - first} done, {len(failed)} failed", file=sys.stderr, flush=True)
    print(json.dumps({"kind": kind, "first": first, "done": sum(seen.values()), **seen, "failed": failed}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:4]), *map(float, sys.argv[4:])))
