"""Matrix products of two values in the GPU's chains, run on the host, against the reference and the oracle."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkern
from gradkern.codegen.chain import Chain
from gradkern.codegen.cuda.lowering import lower_device
from gradkern.codegen.encoding import CudaSizes
from gradkern.codegen.machine import Device, TooLarge
from gradkern.codegen.records import MatMul, MatMulT, Move, MoveT
from gradkern.ir.indexing import along
from gradkern.ir.program import Index, Program, Step
from gradkern.passes import direction
from gradkern.planner import plan
from gradkern.planner.plan import Plan
from gradkern.runtime import executor, reference
from tests.cases import CASES
from tests.support import capturing, oracle
from tests.support.case import Case
from tests.support.host_device import HostDevice, installed, run
from tests.support.networks import NETWORKS, ViT
from tests.support.products import BOUND, PRODUCT, SHAPES, product
from tests.support.properties import FAST, FUZZ, agrees, questions
from tests.support.random_programs import Grower, Network, programs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++")]
N, SEEDS = 5, 7


@pytest.fixture(autouse=True)
def reverse_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These networks have few inputs, and the kernels of the way back are what is tested."""
    gradkern.reset()
    monkeypatch.setattr(direction, "FORWARD_WORTHWHILE", math.inf)
    yield
    gradkern.reset()


def inputs(program: Program, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(N, *s, generator=generator, dtype=torch.float64).to(dtype) for s in program.inputs]


def least(program: Program, machine: Device, itemsize: int) -> int:
    """Bytes of shared memory that a sample and a seed take."""
    steps, wrt = list(range(len(program.steps))), tuple(range(len(program.inputs)))
    with pytest.raises(TooLarge) as error:
        lower_device(program, steps, [program.output], replace(machine, shared_bytes=16), itemsize, SEEDS, wrt)
    return error.value.bytes


def lowered(used: Plan) -> Chain:
    return used.chain(0, SEEDS, tuple(range(len(used.program.inputs))), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("room", ["tight", "ample"])
@pytest.mark.parametrize("name", SHAPES)
def test_matrix_products_on_the_device_equal_the_reference(name: str, room: str, dtype: torch.dtype) -> None:
    """All seeds at once, or, where a block has hardly any memory, a few at a time."""
    program = product(name)
    xs = inputs(program, dtype)
    device = HostDevice(blocks=2, threads=32 if room == "tight" else 128)
    if room == "tight":
        device.machine = replace(device.machine, shared_bytes=least(program, device.machine, dtype.itemsize) + 64)
    targets = torch.randint(program.outputs, (N, SEEDS), generator=torch.Generator().manual_seed(2))
    with installed(device):
        y, got = executor.jacobian(program, {}, xs, targets)
        used = executor.plan_for(program, SEEDS, dtype)
    want_y, want = reference.jacobian(program, {}, [x.double() for x in xs], targets)
    assert used.single_chain
    assert device.launches
    assert (lowered(used).seed_tile < SEEDS) == (room == "tight")
    assert oracle.relative_error(y, want_y) < BOUND[dtype]
    for f, w in zip(got, want, strict=True):
        assert oracle.relative_error(f, w) < BOUND[dtype]


def test_several_samples_and_tiles_of_seeds() -> None:
    """The shapes above are run with more than one sample of scratch at a time, and with more than one tile of seeds."""
    chains = []
    for name in SHAPES:
        program = product(name)
        device = HostDevice()
        for more in (64, 1 << 17):
            machine = replace(device.machine, shared_bytes=least(program, device.machine, 4) + more)
            steps = list(range(len(program.steps)))
            chains.append(lower_device(program, steps, [program.output], machine, 4, SEEDS, (0, 1, 2)))
    assert {c.sizes.samples for c in chains if isinstance(c.sizes, CudaSizes)} >= {1, 2}
    assert len({c.seed_tile for c in chains}) > 2
    kinds = {type(op) for c in chains for op in (*c.forward, *c.backward)}
    assert {MatMul, MatMulT} <= kinds
    assert Move not in kinds  # the right side is read as it lies


@pytest.mark.parametrize("name", ["odd", "fours", "long_terms"])
def test_matrix_products_of_a_sample_alone_and_in_a_batch_are_bit_equal(name: str) -> None:
    """Bit-equal alone and among others, whatever tiles the kernel chooses."""
    program = product(name)
    xs = inputs(program, torch.float32)
    targets = torch.arange(SEEDS)
    with installed(HostDevice(threads=32, blocks=1)):
        y, got = executor.jacobian(program, {}, xs, targets)
        for m in range(N):
            own_y, own = executor.jacobian(program, {}, [x[m : m + 1] for x in xs], targets)
            assert torch.equal(own_y[0], y[m])
            assert all(torch.equal(a[0], b[m]) for a, b in zip(own, got, strict=True))


@pytest.mark.parametrize("size", [6, 8])
@pytest.mark.parametrize("turn", [False, True])
def test_product_of_a_value_with_itself_has_both_cotangents(turn: bool, size: int) -> None:
    """Both sides are one value, whose cotangent gets both parts."""
    square = (size, size)
    steps = (Step(PRODUCT, (0, 0), square), Step(PRODUCT, (1, 0) if turn else (0, 1), square))
    program = Program((square,), steps, 2)
    xs = inputs(program, torch.float64)
    device = HostDevice()
    with installed(device):
        y, got = executor.jacobian(program, {}, xs)
    want_y, want = reference.jacobian(program, {}, xs)
    assert device.launches
    assert oracle.relative_error(y, want_y) < 1e-13
    assert oracle.relative_error(got[0], want[0]) < 1e-13


@pytest.mark.parametrize(("wanted", "apart"), [([2, 0, 3, 1], True), ([1, 3], True), ([0, 1, 1, 2], False)])
def test_runs_of_a_copy_share_warps_only_where_nothing_is_read_twice(wanted: list[int], apart: bool) -> None:
    """A transpose around a product is many runs; two of them must not add to one number at once."""
    shape = (4, 6)
    steps = (Step(Index((along(shape, 0, wanted),)), (0,), (len(wanted), 6)),)
    chain = lower_device(Program((shape,), steps, 1), [0], [1], HostDevice().machine, 8, SEEDS, (0,))
    assert [op.distinct for op in chain.backward if isinstance(op, MoveT)] == [apart]


# ---- whole networks


@pytest.mark.parametrize("shared", [232448, 12 << 10, 5 << 10, 2 << 10])
@pytest.mark.parametrize("case", [CASES["attention"], NETWORKS["vit"].small], ids=repr)
def test_attention_on_the_device_is_exact(case: Case, shared: int) -> None:
    """One chain where a block has the memory, and chains beside ATen where it has not."""
    device = HostDevice(shared_bytes=shared, threads=32)
    model, xs, y, got, used = run(case, torch.float64, 3, device)
    want_y, want = oracle.jacobian(model, xs)
    assert device.launches
    assert used.single_chain == (shared > 1 << 17)
    assert oracle.relative_error(y, want_y) < 1e-12
    assert oracle.relative_error(got[0], want[0]) < 1e-11


def test_attention_in_float32() -> None:
    device = HostDevice(threads=64)
    model, xs, y, got, used = run(NETWORKS["vit"].small, torch.float32, 4, device)
    want_y, want = oracle.jacobian(model, xs)
    assert used.single_chain
    assert oracle.relative_error(y, want_y) < 1e-5
    assert oracle.disagreeing(got[0], want[0], 2e-5) == 0


def test_matrix_product_too_large_for_shared_memory_names_the_reason() -> None:
    """65 tokens by four heads: softmax of 66 KiB, once as a result and once for the way back, fits no block."""
    program = capturing.to_program(ViT(10, 32, 4, 64, 1, 4).eval(), [torch.zeros(2, 3, 32, 32)])
    # All tokens, not only the one that the head reads: the plan prunes the others.
    head = next(i for i, step in enumerate(program.steps) if step.op == "aten.select.int")
    program = replace(program, steps=program.steps[:head], output=program.steps[head].inputs[0])
    made = plan.plan(program, 10, machine=HostDevice().machine)
    assert not made.single_chain
    left = {s.form.split("(")[0] for s in made.steps if s.path == "aten, seeds folded"}
    assert left == {"LowRank"}
    assert all("KiB of shared memory" in s.why for s in made.steps if s.path == "aten, seeds folded")


# ---- random networks


class Multiplier(Grower):
    """Grows networks of which every third step or so is a matrix product."""

    def step(self) -> None:
        wide = [v for v in range(self.last + 1) if len(self.shape(v)) > 1]
        if wide and self.pick(0, 2) == 0:
            self.matmul(self.choose(wide))
        else:
            super().step()


@st.composite
def products(draw) -> Network:
    def pick(low: int, high: int) -> int:
        return draw(st.integers(low, high)) if high > low else low

    return Multiplier(pick, False).grow(pick(2, 8))


def multiplies(net: Network) -> bool:
    return any(s.form == PRODUCT for s in net.program.steps)


@settings(FAST, max_examples=FUZZ or 60, derandomize=not FUZZ)
@given(questions(products().filter(multiplies)), st.sampled_from([2048, 8192, 1 << 17]), st.sampled_from([1, 2]))
def test_random_programs_with_products(question, shared, blocks):
    with installed(HostDevice(shared_bytes=shared, threads=32, blocks=blocks)):
        agrees(*question)


@settings(FAST, max_examples=FUZZ // 2 or 25, derandomize=not FUZZ)
@given(questions(products().filter(multiplies)), st.sampled_from([4096, 1 << 17]))
def test_random_programs_with_products_in_float32(question, shared):
    """Against float64, as far from it as torch's own float32 says that these numbers are."""
    net, n, targets, wrt, seed, _ = question
    params, xs = net.params(seed, torch.float32), net.inputs(n, seed + 1, torch.float32)
    with torch.no_grad(), installed(HostDevice(shared_bytes=shared, threads=32)):
        _, found = executor.jacobian(net.program, params, xs, targets, wrt)
    wide = {k: v.double() for k, v in params.items()}
    _, want = reference.jacobian(net.program, wide, [x.double() for x in xs], targets, wrt)
    _, plain = reference.jacobian(net.program, params, xs, targets, wrt)
    for got, right, torch_own in zip(found, want, plain, strict=True):
        scale = max(float(right.abs().max()) if right.numel() else 0.0, 1e-2)
        for m in range(n):
            mine, theirs = ((j[m].double() - right[m]).abs().max() / scale for j in (got, torch_own))
            assert mine <= max(1e-5, 20 * theirs), (m, float(mine), float(theirs))


def test_random_programs_have_products() -> None:
    """The table's own strategy makes them too; this one makes them every time."""
    got: list[bool] = []

    @settings(FAST, max_examples=300)
    @given(programs())
    def count(net: Network) -> None:
        got.append(multiplies(net))

    count()
    assert any(got)
