"""The rules of attribution methods on the CUDA kernels, run on the host: ReLUs that rectify, slopes that are given."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradkern
from gradkern import attr
from gradkern.attr.rules import linear
from gradkern.attr.rules import rule as rules
from gradkern.attr.rules.deeplift import Rescale
from gradkern.attr.rules.rule_methods import samples_at_a_time, with_relu
from gradkern.codegen.chain import Chain
from gradkern.codegen.machine import TooLarge
from gradkern.planner import plan
from gradkern.planner.plan import GroupedPlan
from gradkern.runtime import ops
from tests.cases import CASES
from tests.support import oracle, rule_oracle
from tests.support.case_runs import program_of
from tests.support.host_device import POISON, HostDevice, installed
from tests.support.pools import POOLS, equal, numbers, with_counts
from tests.support.properties import questions
from tests.support.random_programs import programs
from tests.support.rule_networks import DEEP, build, values_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++"),
    pytest.mark.filterwarnings("ignore"),
]

NAMES = ("residual", "maxpool1d_overlap_pad", "maxpool2d", "two_inputs", "bn_linear", "skips_all")


def all_outputs(method: str, name: str, device: HostDevice | None, samples: int = 3) -> torch.Tensor:
    """All outputs by the kernels of ``device``, or by plain torch."""
    case = CASES[name]
    model, inputs = case.build(dtype=torch.float64), case.inputs(samples, dtype=torch.float64)
    options = {"inputs": inputs if len(inputs) > 1 else inputs[0]}
    with torch.no_grad():
        if device is None:
            found = getattr(attr, method)(model, engine="reference").attribute_all(**options)
        else:
            with installed(device):
                found = getattr(attr, method)(model, engine="kernel").attribute_all(**options)
    return torch.cat([f.flatten(1) for f in (found if isinstance(found, tuple) else (found,))], 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution", "DeepLift", "LRP"])
def test_rules_as_the_reference(name: str, method: str) -> None:
    device = HostDevice(threads=32)
    found = all_outputs(method, name, device)
    assert device.launches > 0
    torch.testing.assert_close(found, all_outputs(method, name, None), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("GuidedBackprop", "maxpool2d"), ("Deconvolution", "maxpool2d")),
        *((method, name) for method in ("DeepLift", "LRP") for name in ("maxpool2d", "residual", "two_inputs")),
    ],
)
@pytest.mark.parametrize("shared", [256, 1500])
def test_rules_where_shared_memory_is_small(method: str, name: str, shared: int) -> None:
    """Chains of parts of the network, beside ATen."""
    device = HostDevice(shared_bytes=shared, threads=32)
    found = all_outputs(method, name, device)
    assert (device.launches > 0) == (shared > 256 or name != "maxpool2d")  # where sums alone fit
    torch.testing.assert_close(found, all_outputs(method, name, None), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", ["guided_relu", "open_relu"])
def test_the_plan_keeps_them_in_one_chain(function: str) -> None:
    for name in ("cnn1d", "lenet5", "mlp"):
        made = plan.plan(with_relu(program_of(name), function), 3, machine=HostDevice().machine)
        assert made.single_chain
        assert made.native_share == 1.0


@pytest.mark.parametrize("method", ["GuidedBackprop", "DeepLift"])
def test_seeds_in_several_tiles(method: str) -> None:
    """Given slopes are read again for every tile of seeds, and rectified cotangents belong to theirs."""
    device = HostDevice(shared_bytes=4096, threads=32)
    tiles = []
    real = device.chain_vjp

    def noting(*args):
        *_, seed_tile, results = args
        tiles.append((seed_tile, results[0].shape[1] if results else 0))
        return real(*args)

    device.chain_vjp = noting  # type: ignore[method-assign]
    found = all_outputs(method, "conv_output", device)
    assert any(tile < seeds for tile, seeds in tiles)
    torch.testing.assert_close(found, all_outputs(method, "conv_output", None), rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------
# DeepLift's multipliers: the kernel against the CPU's, bit by bit, and against the definition


def both(z: Tensor, reference: Tensor, pool: tuple[int, ...], relu: bool, eps: float = 1e-10) -> tuple[Tensor, Tensor]:
    got = HostDevice(threads=32).rescale(z, reference, pool, relu, eps)
    assert not (got == torch.tensor(POISON, dtype=got.dtype)).any()
    return got, ops.rescale(z, reference, pool, relu, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_multipliers_on_the_host_equal_the_cpus_to_the_bit(name: str, dtype: torch.dtype) -> None:
    plane, geometry = POOLS[name]
    pool = with_counts(plane, geometry)
    for relu in (True, False) if pool else (True,):
        for rows in (1, 5):
            z, reference = (numbers((n, 3, *plane), dtype) for n in (5, rows))
            z[1] = reference[0]  # a sample that does not move
            got, want = both(z, reference, pool, relu)
            assert torch.equal(got, want)
            assert torch.isfinite(got).all()


@pytest.mark.parametrize("name", POOLS)
def test_multipliers_of_non_finite_numbers_equal_the_cpus(name: str) -> None:
    plane, geometry = POOLS[name]
    pool = with_counts(plane, geometry)
    generator = torch.Generator().manual_seed(3)
    for bad in (float("nan"), float("inf"), -float("inf")):
        z, reference = (numbers((4, 2, *plane), torch.float32, generator) for _ in range(2))
        for x in (z, reference):
            x[torch.rand(x.shape, generator=generator) < 0.2] = bad
        z[3], reference[3] = bad, bad
        for relu in (True, False) if pool else (True,):
            equal(*both(z, reference, pool, relu))


def test_slope_below_eps_is_the_derivative_and_above_it_the_secant() -> None:
    """Below eps the derivative at the input, at eps and above the secant."""
    z = torch.tensor([[[[0.0, 1e-3, 1e-3, -1e-3, 2.0]]]])
    reference = torch.tensor([[[[0.0, 1e-3 - 1e-4, -1e-4, 1e-4, 2.0]]]])
    for eps, want in ((1e-2, [0.0, 1.0, 1.0, 0.0, 1.0]), (1e-10, [0.0, 1.0, 10 / 11, 1 / 11, 1.0])):
        got, cpu = both(z, reference, (), True, eps)
        assert torch.equal(got, cpu)
        torch.testing.assert_close(got.flatten(), torch.tensor(want))
    pool = with_counts((1, 5), (1, 2, 1, 2, 0, 0, 1, 1))
    for eps in (1e-2, 1e-10):
        assert torch.equal(*both(z, reference, pool, True, eps))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", [n for n in POOLS if n not in ("relu", "everything")])
def test_multipliers_by_their_definition(name: str, relu: bool) -> None:
    plane, (kh, kw, sh, sw, ph, pw, dh, dw) = POOLS[name]
    pool = with_counts(plane, POOLS[name][1])
    module = nn.MaxPool2d((kh, kw), (sh, sw), (ph, pw), (dh, dw))
    z, reference = (numbers((1, 2, *plane), torch.float64) for _ in range(2))
    g = torch.randn(1, 2, *pool[8:], dtype=torch.float64)
    found = HostDevice(threads=32).rescale(z, reference, pool, relu, 1e-10)
    windows = gradkern.ir.program.Windows((kh, kw), (sh, sw), ((ph, ph + sh), (pw, pw + sw)), (dh, dw))
    got = rules.scatter_taps(windows, list(found), g.unsqueeze(1), plane)[:, 0]
    x, r = (z.clamp(min=0), reference.clamp(min=0)) if relu else (z, reference)
    want = rule_oracle.pool_multipliers(module, x, r, module(x), module(r), g)
    if relu:
        moved = z - reference
        want = want * torch.where(moved.abs() < 1e-10, (z > 0).double(), (x - r) / moved)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------
# Whole methods


@pytest.mark.parametrize("shared", [1200, 232448])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DEEP)
def test_deep_lift_on_the_device_equals_its_definition(name: str, dtype: torch.dtype, shared: int) -> None:
    make, shape = DEEP[name]
    model = build(make)
    modules = rule_oracle.flat_modules(model)
    x, base = (torch.randn(64, *shape, dtype=torch.float32).double() for _ in range(2))
    base[2::3, ..., :3] = x[2::3, ..., :3]  # places that do not move
    keep = torch.arange(3)
    if dtype == torch.float32:  # quotients of differences: of each kind those that rounding changes least
        least = rule_oracle.least_movement(modules, x, base)
        keep += 3 * torch.stack([least[kind:63:3].argmax() for kind in range(3)])
    x, base = x[keep], base[keep]
    want = torch.stack(
        [torch.cat([rule_oracle.deep_lift(modules, x[n : n + 1], base[n : n + 1], c) for n in range(3)])
         for c in range(3)], 1,
    )  # fmt: skip
    device = HostDevice(threads=32, shared_bytes=shared)
    with installed(device):
        got = attr.DeepLift(model.to(dtype), engine="kernel").attribute_all(x.to(dtype), baselines=base.to(dtype))
    if shared == 232448:
        assert device.launches == 3  # forward at the input and at the reference, backward
    else:
        assert device.launches > 0
    assert device.rescales > 0
    assert oracle.relative_error(got, want) < (1e-10 if dtype == torch.float64 else 1e-4)
    with installed(device):
        one = attr.DeepLift(model, engine="kernel").attribute(x.to(dtype), base.to(dtype), target=2)
    assert oracle.relative_error(one, want[:, 2]) < (1e-10 if dtype == torch.float64 else 1e-4)


class Rows(nn.Module):
    """All that LRP has rules for in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Linear(15, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool1d(self.norm(self.conv(x)).relu(), 2)
        return self.last(self.fc(x.flatten(1)).tanh())


@pytest.mark.parametrize("shared", [1200, 232448])
@pytest.mark.parametrize(
    "rule", [None, EpsilonRule(0.1), GammaRule(0.4), Alpha1_Beta0_Rule()], ids=lambda rule: type(rule).__name__
)
def test_weights_that_a_rule_changes(rule: object, shared: int) -> None:
    model, x = build(Rows), torch.randn(4, 1, 12, dtype=torch.float64)

    def relevance(engine: str) -> Tensor:
        if rule is not None:
            model.conv.rule = model.norm.rule = model.fc.rule = rule
        return attr.LRP(model, engine=engine).attribute_all(x)

    device = HostDevice(threads=32, shared_bytes=shared)
    with installed(device):
        got = relevance("kernel")
    assert device.launches > 0
    torch.testing.assert_close(got, relevance("reference"), rtol=1e-9, atol=1e-9)


def test_relevance_by_its_definition() -> None:
    model = nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(15, 3)).double()
    x = torch.randn(3, 1, 12, dtype=torch.float64)
    modules = list(model)
    want = torch.stack([torch.cat([rule_oracle.relevance(modules, x[n : n + 1], c) for n in range(3)])
                        for c in range(3)], 1)  # fmt: skip
    device = HostDevice(threads=32)
    with installed(device):
        got = attr.LRP(model, engine="kernel").attribute_all(x)
        own = attr.LRP(model, engine="kernel").attribute_all(x, targets=torch.tensor([[0, 1], [2, 2], [1, 0]]))
    assert device.launches == 4
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(own, oracle.pick(want, torch.tensor([[0, 1], [2, 2], [1, 0]])), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("shared", "launches"), [(256, 3), (3000, 5), (232448, 3)])
def test_deep_lift_of_a_network_that_ends_in_a_softmax_equals_the_reference(shared: int, launches: int) -> None:
    """What comes back through the tail that no rule's kernel runs is dense."""
    body = [nn.Conv1d(1, 3, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(15, 6), nn.ReLU(), nn.Linear(6, 3)]
    model, x = nn.Sequential(*body, nn.Softmax(1)).double(), torch.randn(4, 1, 12, dtype=torch.float64)
    device = HostDevice(threads=32, shared_bytes=shared)
    with installed(device):
        got = attr.DeepLift(model, engine="kernel").attribute_all(x)
    assert device.launches == launches  # two forward passes and one back, or parts of them
    want = attr.DeepLift(model, engine="reference").attribute_all(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_more_slopes_than_a_launch_takes() -> None:
    """A pool has a slope for each place of its window; the planner cuts where a chain has too many inputs."""
    body = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    body += [nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(18, 3)]
    model, x = nn.Sequential(*body).double(), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    device = HostDevice(threads=32)
    with installed(device):
        got = attr.DeepLift(model, engine="kernel").attribute_all(x)
    assert device.launches > 3
    want = attr.DeepLift(model, engine="reference").attribute_all(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_means_over_references_and_paths_through_layers() -> None:
    """What is built on the rules' forward and backward passes."""
    case = CASES["maxpool1d"]
    model, x = case.build(dtype=torch.float64), case.inputs(3, dtype=torch.float64)[0]
    base = case.inputs(4, 7, torch.float64)[0]
    layer = next(m for m in model.modules() if isinstance(m, nn.MaxPool1d))
    calls = {
        "shap": lambda e: attr.DeepLiftShap(model, engine=e).attribute_all(x, baselines=base),
        "grad-cam": lambda e: attr.LayerGradCam(model, layer, engine=e).attribute_all(x),
        "conductance": lambda e: attr.LayerConductance(model, layer, engine=e).attribute_all(x, n_steps=4),
    }
    for name, call in calls.items():
        device = HostDevice(threads=32)
        with installed(device):
            got = call("kernel")
        assert device.launches > 0, name
        torch.testing.assert_close(got, call("reference"), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------
# What the planner refuses


def test_what_no_kernel_takes_is_left_to_torch() -> None:
    """The plain executor, without a launch."""
    device = HostDevice(shared_bytes=64, threads=32)
    for method in ("DeepLift", "LRP"):
        found = all_outputs(method, "maxpool2d", device)
        torch.testing.assert_close(found, all_outputs(method, "maxpool2d", None), rtol=1e-10, atol=1e-10)
    assert device.launches == 0
    assert device.rescales > 0


def test_a_chain_that_turns_out_too_large(monkeypatch) -> None:
    """The plan was made for one-hot seeds, and dense ones need more room."""

    chain = GroupedPlan.chain

    def refuse(self: GroupedPlan, *args: Any) -> Chain:
        if self.program.slopes:
            raise TooLarge(2, 1)
        return chain(self, *args)

    gradkern.reset()
    monkeypatch.setattr(GroupedPlan, "chain", refuse)
    device = HostDevice(threads=32)
    found = all_outputs("LRP", "residual", device)
    assert device.launches == 1  # the forward pass
    torch.testing.assert_close(found, all_outputs("LRP", "residual", None), rtol=1e-10, atol=1e-10)


def test_values_that_do_not_fit_one_chain() -> None:
    """All values that a rule looks at stay on the chip until the end, so they need more room than a gradient."""
    program = program_of("cnn1d")
    wanted = linear.values_needed(program, True)

    def between(shared: int) -> bool:
        machine = HostDevice(shared_bytes=shared).machine
        gradient = plan.plan(program, 1, machine=machine)
        return gradient.single_chain and not plan.plan(program, 0, machine=machine, wanted=tuple(wanted)).single_chain

    shared = next((size for size in range(2048, 65536, 2048) if between(size)), None)
    assert shared is not None, "nothing between the two limits"
    case = CASES["cnn1d"]
    model, x = case.build(), case.inputs(2)[0]
    device = HostDevice(shared_bytes=shared, threads=32)
    with installed(device):
        got = attr.LRP(model, engine="kernel").attribute_all(x)
    assert device.launches > 0
    want = attr.LRP(case.build(dtype=torch.float64), engine="reference").attribute_all(x.double())
    assert oracle.disagreeing(got, want, 1e-3) == 0


def test_rules_with_non_finite_weights_run_on_torch() -> None:
    """Skipping zeros is not exact then: no kernel runs."""
    model, x = build(Rows), torch.randn(3, 1, 12, dtype=torch.float64)
    gradkern.prepare(model, x)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("inf")
    for method in ("DeepLift", "LRP"):
        device = HostDevice(threads=32)
        with installed(device):
            got = getattr(attr, method)(model, engine="kernel").attribute_all(x)
        assert device.launches == 0
        assert got.isnan().any()
        equal(got, getattr(attr, method)(model, engine="reference").attribute_all(x))


def test_a_gpu_takes_larger_chunks() -> None:
    program = program_of("lenet5")
    with gradkern.use(memory_budget=1 << 30):
        large, small = (samples_at_a_time(program, 10, torch.float32, torch.device(d)) for d in ("cuda", "cpu"))
    assert large > 4 * small


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck))
@given(questions(programs()), st.sampled_from([300, 1500, 232448]), st.booleans())
def test_rules_of_random_programs_equal_the_reference(question, shared, secants) -> None:
    """The gradient, or secants, on chains against the plain executor."""
    net, n, targets, wrt, seed, _ = question
    program, params, xs, base = net.program, net.params(seed), net.inputs(n, seed + 1), net.inputs(n, seed + 2)
    targets = torch.arange(program.outputs) if targets is None else targets
    wrt = tuple(range(len(xs))) if wrt is None else wrt

    def rule(plain: bool) -> rules.Rule:
        values = values_of(program, params, xs, plain)
        if not secants:
            return rules.Rule(program, params, values)
        return Rescale(program, params, values, values_of(program, params, base, plain), 1e-10, not plain)

    with torch.no_grad():
        want = linear.rule_multipliers(rule(True), xs, targets, wrt, native=False)
        with installed(HostDevice(shared_bytes=shared, threads=32)):
            got = linear.rule_multipliers(rule(False), xs, targets, wrt, native=True)
    for g, w in zip(got, want, strict=True):
        assert oracle.relative_error(g, w) < 1e-9 or float((g - w).abs().max()) < 1e-12
