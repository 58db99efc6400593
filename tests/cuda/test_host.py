"""The CUDA kernels, run on the host, against the oracle: every network of the table that a chain covers."""

from __future__ import annotations

import ctypes
import math
import shutil

import pytest
import torch

import gradkern
from gradkern.planner import plan
from gradkern.runtime import executor, reference
from tests.cases import CASES
from tests.support import capturing, oracle
from tests.support.case import Case
from tests.support.host_device import HostDevice, installed, library, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++")]
COVERED = [case for case in CASES.values() if case.traceable and not case.opaque and case.name != "identity"]
HEAVY = ("cnn1d", "cnn1d_strided", "lenet5", "mlp", "fcn")  # their own test, in float32


@pytest.mark.parametrize("case", [c for c in COVERED if c.name not in HEAVY], ids=repr)
def test_cuda_kernels_on_the_host_equal_the_oracle(case: Case) -> None:
    device = HostDevice(blocks=2)
    model, inputs, y, got, used = run(case, torch.float64, 3, device)
    assert device.launches > 0
    assert used.native
    want_y, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(y, want_y) < 1e-12
    for f, w in zip(got, want, strict=True):
        assert oracle.relative_error(f, w) < 1e-11


@pytest.mark.parametrize("name", [n for n in HEAVY if n != "fcn"])
def test_measured_networks_in_float32_on_the_host(name: str) -> None:
    device = HostDevice(blocks=1, threads=32)
    model, inputs, y, got, used = run(CASES[name], torch.float32, 2, device)
    assert used.single_chain
    want_y, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(y, want_y) < 1e-5
    assert oracle.disagreeing(got[0], want[0]) <= 0.5


def test_what_is_too_large_is_said_and_goes_to_aten() -> None:
    case = CASES["fcn"]
    model = case.build()
    inputs = case.inputs(2)
    program = capturing.to_program(model, inputs)
    made = plan.plan(program, 5, machine=HostDevice().machine)
    assert not made.single_chain
    assert any("KiB of shared memory" in s.why for s in made.steps)
    assert {g.native for g in made.groups} == {True, False}


@pytest.mark.parametrize("kib", [6, 12, 24])
def test_small_shared_memory_splits_the_chain(kib: int) -> None:
    device = HostDevice(shared_bytes=kib * 1024)
    model, inputs, y, got, _ = run(CASES["maxpool2d"], torch.float64, 5, device)
    want_y, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(y, want_y) < 1e-12
    assert oracle.relative_error(got[0], want[0]) < 1e-11


@pytest.mark.parametrize("shape", [(2,), (5, 7)])
@pytest.mark.parametrize("name", ["conv1d_stride_pad", "linear_nobias", "conv_output", "log_softmax"])
def test_targets_on_the_host_equal_the_oracle(name: str, shape: tuple[int, ...]) -> None:
    case, generator = CASES[name], torch.Generator().manual_seed(3)
    outputs = math.prod(case.build()(*case.inputs(1)).shape[1:])
    targets = torch.randint(outputs, shape, generator=generator)
    model, inputs, _, got, _ = run(case, torch.float64, 5, HostDevice(), targets)
    _, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(got[0], oracle.pick(want[0], targets)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [232448, 1200])
@pytest.mark.parametrize("name", ["maxpool2d", "residual", "two_inputs", "bn_linear"])
def test_half_precision_is_cast_at_the_border(name: str, shared: int, dtype: torch.dtype) -> None:
    """As right as torch's own half precision, or better; the model's parameters are halves too."""
    case = CASES[name]
    model, inputs = case.build(dtype=dtype), case.inputs(4, dtype=dtype)
    device = HostDevice(shared_bytes=shared, threads=32)
    with torch.no_grad():
        program = capturing.to_program(model, inputs)
        params = capturing.bind(program, model)
        with installed(device):
            y, got = executor.jacobian(program, params, inputs)
            used = executor.plan_for(program, got[0].shape[1], dtype)
        plain_y, plain = reference.jacobian(program, params, inputs)
    assert device.launches > 0
    assert f"{str(dtype).removeprefix('torch.')} is cast to float32" in str(used)
    assert all(t.isfinite().all() for t in (plain_y, *plain))
    want_y, want = oracle.jacobian(model, inputs)
    floor = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert y.dtype == dtype
    assert oracle.relative_error(y, want_y) <= max(oracle.relative_error(plain_y, want_y), floor)
    for f, p, w in zip(got, plain, want, strict=True):
        assert f.dtype == dtype
        bound = 3 * floor
        assert oracle.disagreeing(f, w, bound) <= max(oracle.disagreeing(p, w, bound), 0.25)  # a pattern flips


def test_half_precision_by_the_public_call() -> None:
    case = CASES["maxpool1d"]
    model, (x,) = case.build(dtype=torch.bfloat16), case.inputs(5, dtype=torch.bfloat16)
    device = HostDevice()
    with installed(device):
        got = gradkern.jacobian(model, x, engine="kernel")
        table = str(gradkern.explain(model, x, show=False))
    assert device.launches > 0
    assert "kernel cuda" in table
    assert "bfloat16 is cast to float32" in table
    _, (want,) = oracle.jacobian(model, x)
    assert got.dtype == torch.bfloat16
    assert oracle.disagreeing(got.reshape(want.shape), want, 3e-2) <= 0.2


def test_what_torch_runs_keeps_half_precision_out() -> None:
    case = CASES["resnet1d_opaque"]
    program = capturing.to_program(case.build(), case.inputs(2))
    made = plan.plan(program, 3, torch.bfloat16, machine=HostDevice().machine)
    assert made.cast_dtype is None
    assert any("not bfloat16" in s.why for s in made.steps)


def test_the_hash_sees_every_word_and_its_place() -> None:
    """However many blocks share the work, the hash is one; every change of a word, a place or a start is another."""
    run = library().gk_hash
    words = torch.randint(-(2**31), 2**31, (700,), generator=torch.Generator().manual_seed(0)).to(torch.int32)

    def value(x: torch.Tensor, first: int = 1, blocks: int = 2) -> int:
        total = torch.zeros(1, dtype=torch.int64)
        run(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), ctypes.c_uint64(first),
            ctypes.c_void_p(total.data_ptr()), blocks)  # fmt: skip
        return int(total)

    own = value(words)
    assert own == value(words, blocks=1) == value(words, blocks=3)
    swapped, changed = words.clone(), words.clone()
    swapped[[3, 699]] = words[[699, 3]]
    changed[255] ^= 1
    others = [value(swapped), value(changed), value(words, first=2), value(words[:-1]), value(torch.zeros_like(words))]
    assert len({own, *others}) == 6
