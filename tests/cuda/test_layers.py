"""The step kernel, run on the host: layers that fit no chain, forward and backward, against torch and the oracle."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradkern.codegen.cuda import gemm as layered
from gradkern.codegen.cuda.lowering import BF16, PLAIN, STEPS, TF32, TF32X3
from gradkern.frontend import tracer
from gradkern.ir.program import Contract, Dense, Param, Program, Scale, Step, Sum, View, Windows
from gradkern.planner import plan
from gradkern.runtime import binding, executor, reference
from gradkern.runtime import gemm as layerrun
from gradkern.util import options
from tests import oracle
from tests.cases import CASES
from tests.host_device import HostDevice, installed
from tests.random_programs import programs
from tests.runtime.test_random_programs import FAST, FUZZ, agrees, questions

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++")
N, S = 2, 3
BOUND = {PLAIN: 1e-6, TF32: 3e-3, BF16: 2e-2, TF32X3: 2e-6}


def window(kernel, stride=1, padding=0, dilation=1, groups=1) -> Windows:
    rank = len(kernel)
    pads = padding if isinstance(padding, tuple) else ((padding, padding),) * rank
    return Windows(kernel, (stride,) * rank, pads, (dilation,) * rank, groups)


def convolution(w: Windows, source: tuple[int, ...], out: int) -> tuple[Program, dict[str, Tensor]]:
    """A Program of one convolution, and random parameters."""
    generator = torch.Generator().manual_seed(hash((w.kernel, w.stride, source, out)) % 1000)
    weight = torch.randn(out, source[0] // w.groups, *w.kernel, generator=generator, dtype=torch.float64)
    params = {"w": weight, "b": torch.randn(out, generator=generator, dtype=torch.float64)}
    spatial = tuple(
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(source[1:], w.padding, w.dilation, w.kernel, w.stride, strict=True)
    )
    step = Step(Contract(w, Param("w"), Param("b")), (0,), (out, *spatial))
    return Program((source,), (step,), 1), params


GEOMETRIES = {
    "conv1d": (window((5,), padding=2), (6, 30), 20),
    "same_even": (window((4,), padding=((1, 2),)), (3, 17), 5),
    "stride": (window((3,), stride=2, padding=1), (18, 21), 9),
    "stride_beyond_kernel": (window((2,), stride=3), (4, 20), 7),
    "dilated": (window((3,), dilation=3, padding=2), (5, 26), 8),
    "groups": (window((3,), padding=1, groups=2), (8, 15), 6),
    "conv2d": (window((3, 3), padding=1), (4, 7, 9), 18),
    "conv2d_stride": (window((3, 2), stride=2, padding=1), (5, 9, 8), 6),
    "pointwise": (window((1, 1)), (20, 5, 4), 33),
    "one_place": (window((3, 3), padding=1), (17, 1, 1), 5),
    "from_one_place": (window((3, 3)), (4, 3, 3), 20),
}


def run_both(program: Program, params: dict[str, Tensor], math: int, dtype: torch.dtype, narrow: bool | None = None):
    """Value and all-seed cotangent of a single contraction by the step kernel, and by float64 torch."""
    device, generator = HostDevice(), torch.Generator().manual_seed(5)
    x = torch.randn(N, *program.inputs[0], generator=generator, dtype=torch.float64)
    g = torch.randn(N, S, *program.output_shape, generator=generator, dtype=torch.float64)
    want_y = reference.forward_step(program, 0, [x], params)
    (want,) = reference.vjp_step(program, 0, [x], want_y, g, params)
    found = layered.Finder(program, [(False, (0,))]).layer(0)
    assert found is not None
    if narrow is not None:
        found = replace(found, **{n: Forced.of(getattr(found, n), narrow) for n in ("forward", "backward")})
    cast = {k: v.to(dtype) for k, v in params.items()}
    pack = layerrun.LayerPack(program, (found,), cast, x.to(dtype))
    with installed(device):
        y = layerrun.run_forward(program, found, pack.of[0], math, x.to(dtype), None)
        back = layerrun.run_backward(program, found, pack.of[0], math, g.to(dtype), None, {})
    assert device.steps == 2
    return (y, want_y), (back, want)


class Forced(layered.Matrix):
    """A matrix whose shape of tile is given."""

    narrow = False

    @classmethod
    def of(cls, m: layered.Matrix, narrow: bool) -> layered.Matrix:
        kind = type("Forced", (cls,), {"narrow": narrow})
        return kind(**{k: getattr(m, k) for k in m.__dataclass_fields__})


@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_in_float64(name: str) -> None:
    for got, want in run_both(*convolution(*GEOMETRIES[name]), PLAIN, torch.float64):
        assert oracle.relative_error(got, want) < 1e-13


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("math", [PLAIN, TF32, BF16, TF32X3])
@pytest.mark.parametrize("name", ["stride", "conv2d", "groups"])
def test_every_arithmetic_and_tile(name: str, math: int, narrow: bool) -> None:
    for got, want in run_both(*convolution(*GEOMETRIES[name]), math, torch.float32, narrow):
        assert oracle.relative_error(got, want) < BOUND[math]


@pytest.mark.parametrize(("k", "o", "lead"), [(7, 5, ()), (40, 70, ()), (33, 12, (4,)), (16, 64, (2, 3))])
@pytest.mark.parametrize("math", [PLAIN, TF32X3])
def test_linear_layers(k: int, o: int, lead: tuple[int, ...], math: int) -> None:
    generator = torch.Generator().manual_seed(k)
    params = {
        "w": torch.randn(o, k, generator=generator, dtype=torch.float64),
        "b": torch.randn(o, generator=generator, dtype=torch.float64),
    }
    step = Step(Contract(Dense(), Param("w"), Param("b")), (0,), (*lead, o))
    program = Program(((*lead, k),), (step,), 1)
    for got, want in run_both(program, params, math, torch.float32):
        assert oracle.relative_error(got, want) < BOUND[math]


# ---- whole networks -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with norms, and a strided way around it."""

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.way = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.own = nn.Identity() if stride == 1 and inside == out else self.way

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.a(x)) + self.own(x))


def resnet() -> nn.Module:
    head = [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*head, Block(6, 6, 1), Block(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def vgg() -> nn.Module:
    first = [nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(8 * 4, 10), nn.ReLU(), nn.Linear(10, 4))


def wide_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3)
    )


def flattened() -> nn.Module:
    """A ReLU behind which the linear layer's mask is found through a flatten."""
    return nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12, 9), nn.ReLU(), nn.Linear(9, 2))


class Skip(nn.Module):
    """A ReLU with several readers, one of them the output: only the last cotangent may be masked."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return torch.relu(self.b(x) + x) + self.c(x)


NETS = {
    "resnet": (resnet, (2, 9, 10)),
    "vgg": (vgg, (1, 9, 8)),  # 9 rows: the pool leaves one out
    "wide_mlp": (wide_mlp, (20,)),
    "flattened": (flattened, (2, 14)),
    "skip": (Skip, (2, 8)),
}


def settle(model: nn.Module, generator: torch.Generator) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator))
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
            with torch.no_grad():
                m.weight.copy_(torch.randn(m.weight.shape, generator=generator))
    return model.eval().requires_grad_(False)


def solve(model: nn.Module, x: Tensor, device: HostDevice, targets: Tensor | None = None):
    with torch.no_grad(), installed(device):
        program = tracer.trace(model, (x,))
        params = binding.bind(program, model)
        y, (found,) = executor.jacobian(program, params, [x], targets)
        return y, found, executor.plan_for(program, found.shape[1], x.dtype)


@pytest.mark.parametrize("kib", [0.25, 1, 3])
@pytest.mark.parametrize("name", NETS)
def test_networks_of_layers(name: str, kib: float) -> None:
    """Shared memory so small that contractions run by layers, alone or beside chains."""
    make, shape = NETS[name]
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(7)
    model = settle(make().double(), generator)
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    device = HostDevice(shared_bytes=int(kib * 1024), steps="kernel", threads=32)
    y, found, used = solve(model, x, device)
    want_y, (want,) = oracle.jacobian(model, x)
    assert oracle.relative_error(y, want_y) < 1e-12
    assert oracle.relative_error(found, want) < 1e-11
    assert device.steps >= 2 * len(used.layers)
    if kib < 1:
        contractions = [s for s in used.steps if s.form.startswith(("Contract(Dense", "Contract(k"))]
        assert [s.path for s in contractions] == [plan.LAYER] * len(contractions)
        assert used.native_share > 0.8


def test_what_is_done_on_the_way(monkeypatch) -> None:
    """No pass over cotangents of its own for a ReLU, a sum or a pool, but where an average pool or a flatten stands
    between."""
    for name, layers, passes in (("resnet", 7, ["Contract", "Scale", "Sum", "Sum", "View"]), ("vgg", 5, ["Select"])):
        make, shape = NETS[name]
        model = settle(make().double(), torch.Generator().manual_seed(0))
        seen = []
        real = reference.vjp_step

        def noting(program, i, *args, seen=seen, real=real):
            seen.append(type(program.steps[i].form).__name__)
            return real(program, i, *args)

        monkeypatch.setattr(reference, "vjp_step", noting)
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        device = HostDevice(shared_bytes=256, steps="kernel")
        _, _, used = solve(model, x, device)
        assert len(used.layers) == layers
        assert device.steps == 2 * layers
        assert sorted(seen) == passes
        sums = {i for i, s in enumerate(used.program.steps) if isinstance(s.form, Sum)}
        assert sums <= {i for x in used.layers for i in x.behind}


@pytest.mark.parametrize("name", ["cnn1d_strided", "maxpool2d", "residual", "shared_conv", "two_inputs"])
def test_cases_by_layers(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(dtype=torch.float64), case.inputs(2, dtype=torch.float64)
    device = HostDevice(shared_bytes=400, steps="kernel", threads=32)
    with torch.no_grad(), installed(device):
        program = tracer.trace(model, inputs)
        y, found = executor.jacobian(program, binding.bind(program, model), inputs)
    want_y, want = oracle.jacobian(model, inputs)
    assert device.steps
    assert oracle.relative_error(y, want_y) < 1e-12
    for f, w in zip(found, want, strict=True):
        assert oracle.relative_error(f, w) < 1e-11


def test_targets_of_each_sample() -> None:
    model = settle(vgg().double(), torch.Generator().manual_seed(1))
    x = torch.randn(3, 1, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    targets = torch.tensor([[0, 3], [2, 2], [1, 0]])
    _, found, _ = solve(model, x, HostDevice(shared_bytes=256, steps="kernel"), targets)
    _, (want,) = oracle.jacobian(model, x)
    assert oracle.relative_error(found, oracle.pick(want, targets)) < 1e-11


def test_weights_that_are_not_finite_go_by_reference() -> None:
    model = settle(wide_mlp().double(), torch.Generator().manual_seed(1))
    model[0].weight[3, 4] = float("inf")
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    device = HostDevice(shared_bytes=256, steps="kernel")
    solve(model, x, device)
    assert device.steps == 0


def test_nan_inputs_pass_masks_as_torch_has_it() -> None:
    model = settle(vgg().double(), torch.Generator().manual_seed(1))
    x = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[1, 0, 4, 4] = float("nan")
    y, found, _ = solve(model, x, HostDevice(shared_bytes=256, steps="kernel"))
    want_y, (want,) = oracle.jacobian(model, x)
    assert torch.equal(torch.isnan(y), torch.isnan(want_y))
    assert torch.allclose(found, want, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_the_plan_chooses_by_cost() -> None:
    """What is bound by memory pays with its mask done on the way; what is bound by arithmetic stays with ATen."""
    base = HostDevice(shared_bytes=256).machine

    def paths(channels: int, kernel: int, machine) -> list[str]:
        w = window((kernel,), padding=kernel // 2)
        conv = Step(Contract(w, Param("w"), None), (0,), (channels, 64))
        steps = [conv, Step(Scale("relu"), (1,), (channels, 64)), replace(conv, inputs=(2,))]
        steps += [Step(View(), (3,), (channels * 64,)), Step(Contract(Dense(), Param("f"), None), (4,), (3,))]
        made = plan.plan(Program(((channels, 64),), tuple(steps), 5), 3, machine=machine)
        return [made.steps[i].path for i in (0, 2)]

    assert paths(16, 1, base)[1] == plan.LAYER
    assert paths(512, 5, base) == ["aten, seeds folded"] * 2
    assert paths(512, 5, replace(base, steps="kernel")) == [plan.LAYER] * 2
    assert paths(16, 1, replace(base, steps="aten")) == ["aten, seeds folded"] * 2


def test_large_weights_leave_their_chain() -> None:
    """A chain would read them for a few samples at a time."""
    machine = HostDevice().machine
    for width, whole in ((256, True), (1024, False)):
        hidden = [Step(Contract(Dense(), Param(f"w{i}")), (2 * i,), (width,)) for i in range(2)]
        relus = [Step(Scale("relu"), (2 * i + 1,), (width,)) for i in range(2)]
        steps = (hidden[0], relus[0], hidden[1], relus[1], Step(Contract(Dense(), Param("h")), (4,), (5,)))
        program = Program(((width,),), steps, 5)
        made = plan.plan(program, 5, machine=machine)
        assert made.single_chain == whole
        assert any("million weights" in s.why for s in made.steps) != whole
        if not whole:
            assert made.steps[4].path == "kernel cuda"
            forced = plan.plan(program, 5, machine=replace(machine, steps="kernel"))
            assert [s.path for s in forced.steps] == [plan.LAYER, "folded", plan.LAYER, "kernel cuda", "kernel cuda"]


def test_new_weights_are_packed_again() -> None:
    model = settle(vgg().double(), torch.Generator().manual_seed(1))
    x = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    device = HostDevice(shared_bytes=3072, steps="kernel", threads=32)
    for layer in (0, 2, 5, 9, 11):
        model[layer].weight.data[0].mul_(-2)
        _, found, used = solve(model, x, device)
        assert used.layers
        _, (want,) = oracle.jacobian(model, x)
        assert oracle.relative_error(found, want) < 1e-11


def test_a_gpus_budget(monkeypatch) -> None:
    """A sixteenth of its memory, unless the caller chose."""
    known = type("Properties", (), {"total_memory": 160 << 30})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    assert options.memory_budget() == options.memory_budget(torch.device("cpu")) == 128 << 20
    assert options.memory_budget(torch.device("cuda", 0)) == 10 << 30
    with options.use(memory_budget=5):
        assert options.memory_budget(torch.device("cuda", 0)) == 5


def test_what_a_grid_cannot_hold_is_no_layer() -> None:
    program, _ = convolution(window((1,), stride=300, groups=300), (300, 600), 300)
    assert layered.Finder(program, [(False, (0,))]).layer(0) is None


@settings(FAST, max_examples=FUZZ or 50, derandomize=not FUZZ)
@given(
    questions(programs()),
    st.sampled_from([256, 512, 1024, 4096, 1 << 17]),
    st.sampled_from(STEPS),
)
def test_random_programs_on_a_device(question, shared, steps):
    """Chains, layers and ATen mixed as it comes."""
    with installed(HostDevice(shared_bytes=shared, steps=steps, threads=32, blocks=1)):
        agrees(*question)
