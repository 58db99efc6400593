"""Every tiling and scatter algorithm that a chain can have on a GPU, each forced, on the host, against the oracle.

The planner takes what it expects to be fastest; these tests take all that fits.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import gradkern
from gradkern.codegen.chain import Chain
from gradkern.codegen.cuda import emitters, slices
from gradkern.codegen.cuda.weights import DeviceScatter, DeviceWindow
from gradkern.codegen.records import PooledWindow, Record, ScatterAlgorithm, ScatterT, Window
from gradkern.codegen.spec import ChainSpec
from gradkern.ir.program import Contract, Param, Program, Scale, Select, Step, View, Windows
from gradkern.planner import plan
from gradkern.runtime import executor
from tests.support import capturing, oracle
from tests.support.host_device import HostDevice, installed, library
from tests.support.programs import windows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++")]


def pooled(inputs: int, kernel: int, pool: int, seeds: int, stride: int = 1) -> nn.Module:
    """Two convolutions with pools behind them and two linear layers: what slices, quads and narrow windows are for."""
    return nn.Sequential(
        nn.Conv1d(inputs, 16, kernel, padding="same" if stride == 1 else 1, stride=stride), nn.ReLU(),
        nn.MaxPool1d(pool) if pool > 1 else nn.Identity(),
        nn.Conv1d(16, 24, 5, padding=2), nn.ReLU(), nn.MaxPool1d(pool) if pool > 1 else nn.Identity(),
        nn.Flatten(), nn.LazyLinear(20), nn.ReLU(), nn.Linear(20, seeds),
    )  # fmt: skip


def planes(channels: int, pool: int, seeds: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(pool) if pool > 1 else nn.Identity(),
        nn.Conv2d(channels, 12, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, seeds),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pool2": (lambda: pooled(1, 5, 2, 3), (1, 52)),
    "pool2, 4 inputs": (lambda: pooled(4, 3, 2, 5), (4, 40)),
    "pool4": (lambda: pooled(1, 3, 4, 7), (1, 80)),
    "no pool": (lambda: pooled(1, 4, 1, 2), (1, 24)),
    "stride": (lambda: pooled(1, 8, 1, 4, stride=2), (1, 50)),
    "2-D, 8 channels": (lambda: planes(8, 2, 10), (1, 18, 22)),
    "2-D, 6 channels": (lambda: planes(6, 2, 3), (1, 18, 20)),
    "2-D, 5 channels": (lambda: planes(5, 2, 10), (1, 12, 10)),
    "2-D, no first pool": (lambda: planes(4, 1, 1), (1, 12, 10)),
}


def prefer(monkeypatch: pytest.MonkeyPatch, algorithm: ScatterAlgorithm) -> None:
    """Transposed convolutions use that algorithm wherever it fits."""
    before = emitters.scatter_clocks

    def clocks(spec: ChainSpec, layout: DeviceScatter, taps: int, pattern: bool) -> float:
        return before(spec, layout, taps, pattern) * (1e-6 if layout.algorithm == algorithm else 1.0)

    monkeypatch.setattr(emitters, "scatter_clocks", clocks)


def slice_by(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """That many slices; 1: the wide layer whole."""

    def variants(backward: list[Record], tables: Sequence[int]) -> list[list[Record]]:
        return [backward if count == 1 else slices.slice_linear(backward, tables, count) or backward]

    monkeypatch.setattr(slices, "variants", variants)


def solve(name: str, dtype: torch.dtype = torch.float64, n: int = 3, **options):
    """The network's values and Jacobian on the host device, the oracle's, and the records of its only chain."""
    make, shape = NETS[name]
    model = make().eval()
    model(torch.zeros(1, *shape))  # settles the lazy layer
    model, x = model.to(dtype), torch.randn(n, *shape, dtype=torch.float64).to(dtype)
    gradkern.reset()
    with torch.no_grad():
        program = capturing.to_program(model, (x,))
        params = capturing.bind(program, model)
        with installed(HostDevice(**options)):
            y, (got,) = executor.jacobian(program, params, (x,))
            chain = only_chain(program, got.shape[1], dtype)
    want_y, (want,) = oracle.jacobian(model, (x,))
    return y, got, want_y, want, chain


def only_chain(program: Program, seeds: int, dtype: torch.dtype) -> Chain:
    """The chain that the whole network is."""
    made = executor.plan_for(program, seeds, dtype)
    assert made.single_chain
    return made.chain(0, seeds, (0,), True)


def algorithms_of(chain: Chain) -> set[ScatterAlgorithm]:
    return {op.algorithm for op in chain.backward if isinstance(op, ScatterT)}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ScatterAlgorithm)
@pytest.mark.parametrize("name", NETS)
def test_transposed_convolutions(
    name: str, algorithm: ScatterAlgorithm, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, algorithm)
    slice_by(monkeypatch, count)
    y, got, want_y, want, chain = solve(name)
    assert oracle.relative_error(y, want_y) < 1e-12
    assert oracle.relative_error(got, want) < 1e-11
    # Narrow windows are short and in one piece; quads want channels in fours.
    if (
        algorithm == ScatterAlgorithm.Walk
        or (algorithm == ScatterAlgorithm.Quads and name != "2-D, 5 channels")
        or name in ("pool2", "no pool", "stride")
    ):
        assert algorithm in algorithms_of(chain)


@pytest.mark.parametrize("name", ["pool2", "pool4", "2-D, 8 channels"])
def test_in_float32_with_many_seeds_and_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six quads a lane, several seeds a visit, and eight positions a thread are float's alone."""
    prefer(monkeypatch, ScatterAlgorithm.Quads)
    y, got, want_y, want, _ = solve(name, torch.float32, 9, blocks=2)
    assert oracle.relative_error(y, want_y) < 1e-5
    assert oracle.disagreeing(got, want) <= 0.25  # a pattern flips


def test_slices_take_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    for count in (1, 2, 4):
        slice_by(monkeypatch, count)
        *_, chain = solve("pool2")
        wide = [op for op in chain.backward if op.whole_block]
        kept.append(chain.sizes.sample)
        assert len(wide) >= count
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_slices_behind_groups(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of several groups reaches as far as its last group, into a border that nobody reads."""
    slice_by(monkeypatch, 3)
    model = nn.Sequential(
        nn.Conv1d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 16, 5, padding=4, groups=groups), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip
    monkeypatch.setitem(NETS, "groups", (lambda: model, (1, 24)))
    _, got, _, want, chain = solve("groups")
    assert sum(op.whole_block for op in chain.backward) == 3
    assert oracle.relative_error(got, want) < 1e-11


def test_what_cannot_be_sliced() -> None:
    """No wide layer, a cotangent with two readers, fewer positions than slices."""
    assert slices.slice_linear([], [], 2) is None
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 2, 3))
    x = torch.randn(2, 1, 4)
    program = capturing.to_program(model.eval(), (x,))
    made = plan.plan(program, 3, machine=HostDevice().machine)
    assert made.single_chain


@pytest.mark.parametrize("count", [2, 4, 8])
def test_slices_that_meet_only_a_border(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind wide padding, the first and last positions read nothing but zeros."""
    slice_by(monkeypatch, count)
    model = nn.Sequential(
        nn.Conv2d(1, 8, (5, 3), padding=(2, 1)), nn.ReLU(), nn.Conv2d(8, 12, (2, 3), padding=(5, 1)), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 2),
    )  # fmt: skip
    monkeypatch.setitem(NETS, "border", (lambda: model, (1, 7, 5)))
    _, got, _, want, chain = solve("border")
    assert any(op.whole_block for op in chain.backward)
    assert oracle.relative_error(got, want) < 1e-11


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_pool_of_padding_alone(channels: int, relu: bool) -> None:
    """The taps of a dilated pool may all lie outside: the largest of no numbers."""
    conv = Step(Contract(windows(3, padding=1), Param("w")), (0,), (channels, 1))
    pool = Step(Select(Windows((2,), (4,), ((1, 1),), (2,))), (1,), (channels, 1))
    last = Step(Scale("relu"), (2,), (channels, 1)) if relu else Step(View(), (2,), (channels,))
    program = Program(((1, 1),), (conv, pool, last), 3)
    params = {"w": torch.randn(channels, 1, 3, dtype=torch.float64)}
    with torch.no_grad(), installed(HostDevice()):
        y, (got,) = executor.jacobian(program, params, (torch.randn(2, 1, 1, dtype=torch.float64),))
    assert torch.equal(y.flatten(1), torch.full((2, channels), 0.0 if relu else -torch.inf, dtype=torch.float64))
    assert not got.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("threads", "samples"), [(32, 7), (128, 7), (256, 7), (256, 60)])
def test_warps_share_the_sums_of_a_small_layer(threads: int, samples: int, dtype: torch.dtype, monkeypatch) -> None:
    """As many as have twelve terms each; where a sum's terms do not fit at once, for every piece of them."""
    model = nn.Sequential(
        nn.Linear(9, 40), nn.ReLU(), nn.Linear(40, 101), nn.Tanh(), nn.Linear(101, 50), nn.ReLU(), nn.Linear(50, 3)
    )
    monkeypatch.setitem(NETS, "small", (lambda: model, (9,)))
    got, want = solve("small", dtype, samples, threads=threads)[1:4:2]
    if dtype == torch.float64:
        assert oracle.relative_error(got, want) < 1e-12
    assert oracle.disagreeing(got, want) <= 0.15  # a pattern flips in float32


def test_a_group_of_two_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four channels lie on 16 bytes, and those of a group do not."""
    model = nn.Sequential(nn.Conv1d(4, 32, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 9, 3))
    monkeypatch.setitem(NETS, "groups", (lambda: model, (4, 9)))
    y, _, want_y, _, _ = solve("groups", torch.float32)
    assert oracle.relative_error(y, want_y) < 1e-5


def test_rows_asked_for_ahead_of_time_are_there() -> None:
    """Without a backward pass, no other weights lie behind those of the last linear layer."""
    model = nn.Linear(64, 1000).eval()
    program = capturing.to_program(model, (torch.zeros(3, 64),))
    made = plan.plan(program, 0, machine=HostDevice().machine)
    chain = made.chain(0, 0, (), False)
    (layout,) = chain.layouts
    assert isinstance(layout, DeviceWindow)
    assert layout.weights + (layout.K + 4) * layout.row_length <= chain.packed_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("pool", "relu"),
    [
        *((pool, relu) for relu in (True, False) for pool in map(nn.MaxPool1d, (2, 4, 3), (2, 4, 3))),
        *((nn.MaxPool1d(2, 1), relu) for relu in (True, False)),
        (nn.Identity(), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [8, 7, 3])
def test_ties_and_nan_in_joined_pools(channels: int, pool: nn.Module, relu: bool, dtype: torch.dtype) -> None:
    """Whole numbers, so that maxima meet and activations are exactly zero; a sample with a NaN."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv1d(2, channels, 3, padding=1), nn.ReLU() if relu else nn.Identity(), pool, nn.Flatten(), nn.LazyLinear(3)
    ).eval()
    x = torch.randint(-1, 2, (4, 2, 21)).to(dtype)
    model(torch.zeros(1, 2, 21))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    model = model.to(dtype)
    x[3, 0, 5] = float("nan")
    gradkern.reset()
    with torch.no_grad():
        program = capturing.to_program(model, (x[:3],))
        with installed(HostDevice()):
            y, (got,) = executor.jacobian(program, capturing.bind(program, model), (x,))
            chain = only_chain(program, 3, dtype)
    joined = {1: 1, 2: 2, 4: 4}.get(pool.kernel_size if pool.__class__ is nn.MaxPool1d else 1)
    overlaps = getattr(pool, "stride", 1) != getattr(pool, "kernel_size", 1)
    window = next(op for op in chain.forward if isinstance(op, Window))
    assert isinstance(window, PooledWindow) == (joined is not None and not overlaps)
    rows = x.detach().clone().requires_grad_(True)
    want_y = model(rows)
    want = torch.stack([torch.autograd.grad(want_y[:, s].sum(), rows, retain_graph=True)[0] for s in range(3)], 1)
    assert torch.equal(torch.isnan(y), torch.isnan(want_y))
    assert torch.equal(y[:3], want_y[:3].detach())
    assert torch.equal(got, want)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 48, 1000, 65535, 65536, 46341, 2**30 + 1, 2**31 - 1])
def test_division_by_a_number_that_stays(divisor: int) -> None:
    edges = [0, 1, divisor - 1, divisor, min(2 * divisor, 2**31 - 1), 2**31 - 1, 2**31 - 2]
    near = [min(max(k * divisor + d, 0), 2**31 - 1) for k in (3, 1000, 46340) for d in (-1, 0, 1)]
    drawn = torch.randint(2**31 - 1, (5000,)).tolist()
    numbers = [min(n, 2**31 - 1) for n in edges + near + drawn]
    made, quotients, rests = ((ctypes.c_int * len(numbers))() for _ in range(3))
    made[:] = numbers
    library().gk_divide(made, len(numbers), divisor, quotients, rests)
    assert list(quotients) == [n // divisor for n in numbers]
    assert list(rests) == [n % divisor for n in numbers]


def test_the_time_of_every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks.gpu_records`: a row per record, with what the planner expects; the last launch is the whole chain."""
    from benchmarks import gpu_records

    model = pooled(1, 5, 2, 3)
    model(torch.zeros(1, 1, 52))
    x = torch.randn(3, 1, 52)
    device = HostDevice(threads=32)
    with installed(device):
        rows = gpu_records.records(model.eval().requires_grad_(False), x, device.machine, seconds=0.0)
    assert {r.part for r in rows} == {"forward", "backward"}
    assert [r.kind for r in rows][-1] == "StoreT"
    assert all(r.expected > 0 for r in rows)
    text = gpu_records.table("net", len(x), rows)
    assert len(text) == len(rows) + 3
    assert f"{sum(r.measured for r in rows):.3f}" in text[-1]
