"""The launchers of csrc/cuda, run on the host: their checks, arguments and block counts around the kernels' twins."""

from __future__ import annotations

import ctypes
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gradkern.codegen.encoding import CudaSizes
from gradkern.runtime import executor, ops
from tests.cases import CASES
from tests.support import capturing, op_arguments, oracle
from tests.support.host_device import Launchers, installed, launchers, library, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="the launchers are the extension's own here"),
]
FEW = [
    *("conv1d_stride_pad", "conv1d_groups", "conv2d_uneven", "maxpool2d", "maxpool1d_overlap_pad", "residual"),
    *("two_inputs", "softmax", "bn_first", "layer_norm", "view_channels", "linear_only", "conv_output", "elu"),
]


def right(model, inputs, y, got, error: float = 1e-11) -> None:
    want_y, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(y, want_y) < error
    for f, w in zip(got, want, strict=True):
        assert oracle.relative_error(f, w) < error


# ---- chains


@pytest.mark.parametrize("processors", [2, 132])
@pytest.mark.parametrize("name", FEW)
def test_launchers_equal_the_oracle(name: str, processors: int) -> None:
    device = Launchers(processors)
    model, inputs, y, got, used = run(CASES[name], torch.float64, 5, device)
    assert device.launches == 1
    assert used.single_chain
    right(model, inputs, y, got)
    assert device.gpu.guards == 0


@pytest.mark.parametrize("name", ["conv1d_dilated", "residual", "two_inputs", "linear_only"])
def test_launchers_in_float32(name: str) -> None:
    device = Launchers()
    model, inputs, y, got, _ = run(CASES[name], torch.float32, 4, device)
    want_y, want = oracle.jacobian(model, inputs)
    assert device.launches == 1
    assert oracle.relative_error(y, want_y) < 1e-6
    for f, w in zip(got, want, strict=True):
        assert oracle.disagreeing(f, w, 1e-5) <= 0.25


@pytest.mark.parametrize("shape", [(2,), (5, 7)])
@pytest.mark.parametrize("name", ["conv1d_stride_pad", "linear_nobias", "conv_output", "log_softmax"])
def test_launchers_take_shared_and_per_sample_targets(name: str, shape: tuple[int, ...]) -> None:
    case, generator = CASES[name], torch.Generator().manual_seed(3)
    outputs = math.prod(case.build()(*case.inputs(1)).shape[1:])
    targets = torch.randint(outputs, shape, generator=generator)
    model, inputs, _, got, _ = run(case, torch.float64, 5, Launchers(), targets)
    _, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(got[0], oracle.pick(want[0], targets)) < 1e-11


@pytest.mark.parametrize("kib", [6, 12])
def test_dense_cotangents(kib: int) -> None:
    """Shared memory so small that a chain is split: a forward of its own, and cotangents from one to the next."""
    device = Launchers(shared_bytes=kib * 1024)
    model, inputs, y, got, used = run(CASES["maxpool2d"], torch.float64, 5, device)
    assert not used.single_chain
    assert any(given["cotangents"] for given in device.vjps())
    assert "chain_forward" in dict(device.calls)
    right(model, inputs, y, got)


def test_several_tiles_of_seeds() -> None:
    """Little shared memory, but enough for one seed after the other."""
    seeds, tile = 0, 0
    for shared in range(2048, 65536, 1024):
        device = Launchers(shared_bytes=shared)
        model, inputs, y, got, used = run(CASES["conv_output"], torch.float64, 2, device)
        if used.single_chain and device.vjps():
            given = device.vjps()[-1]
            seeds, tile = given["targets"].shape[-1], given["seed_tile"]
            break
    assert 0 < tile < seeds
    right(model, inputs, y, got)


def test_launchers_run_the_measured_networks_in_float32() -> None:
    for name in ("cnn1d", "lenet5", "mlp"):
        device = Launchers()
        model, inputs, y, got, used = run(CASES[name], torch.float32, 2, device)
        assert used.single_chain
        want_y, want = oracle.jacobian(model, inputs)
        assert oracle.relative_error(y, want_y) < 1e-5
        assert oracle.disagreeing(got[0], want[0]) <= 0.5


@pytest.mark.parametrize(("n", "processors"), [(1, 132), (5, 132), (40, 3), (1000, 3)])
def test_small_batch_is_spread_over_all_multiprocessors(n: int, processors: int) -> None:
    """A small batch is spread over all multiprocessors; a large one gives each its own block."""
    device = Launchers(processors)
    model, inputs, y, got, _ = run(CASES["linear_nobias"], torch.float64, n, device)
    planned = CudaSizes(*device.vjps()[-1]["sizes"]).block
    block = min(planned, -(-n // processors))
    assert device.gpu.blocks == min(-(-n // block), processors)
    few = [x[-3:] for x in inputs]
    right(model, few, y[-3:], [f[-3:] for f in got])


@pytest.mark.parametrize("group", [False, True])
def test_an_empty_batch(group: bool) -> None:
    given, device = arguments(group=group, n=0), Launchers()
    given["sizes"] = CudaSizes(*given["sizes"])
    with installed(device):
        (y,) = ops.chain_forward(*op_arguments.forward_arguments(given))
        assert y.shape == (0, 3)
        assert [y.shape for y in ops.chain_vjp(*named(given))] == [(0, 3)]
    assert device.gpu.launches == 0


# ---- checks


def arguments(n: int = 3, **how):
    """`op_arguments.arguments` as a GPU's chain."""
    with installed(Launchers()):
        return op_arguments.arguments(n=n, **how)


def named(given: dict) -> list:
    """For `ops.chain_vjp`, which makes the outputs."""
    return [[y.shape[1] for y in v] if k == "outputs" else v for k, v in given.items()]


@pytest.mark.parametrize("message", [*op_arguments.WRONG_CHAIN, *op_arguments.WRONG_SEEDS])
def test_launchers_refuse_wrong_arguments(message: str) -> None:
    given, device = arguments(), Launchers()
    (op_arguments.WRONG_CHAIN | op_arguments.WRONG_SEEDS)[message](given)
    with pytest.raises((RuntimeError, IndexError), match=message.replace("expected.*", "targets must be .*")):
        device.redispatched("chain_vjp", *given.values())


@pytest.mark.parametrize("message", op_arguments.WRONG_COTANGENTS)
def test_launchers_refuse_wrong_cotangents(message: str) -> None:
    given, device = arguments(group=True), Launchers()
    op_arguments.WRONG_COTANGENTS[message](given)
    with pytest.raises(RuntimeError, match=message):
        device.redispatched("chain_vjp", *given.values())


def elsewhere(given: dict, key: str) -> None:
    given[key] = [x.to("meta") for x in given[key]] if isinstance(given[key], list) else given[key].to("meta")


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ("on meta, the weights on cpu", "inputs"),
        ("on one device", "tables"),
        ("records must be .*on the weights' device", "backward"),
        ("all tensors on cpu, got one on meta", "outputs"),
        ("all tensors on cpu, got one on meta", "results"),
        ("targets must be .*on the weights' device", "targets"),
        ("seed_rows must be contiguous Double on cpu, .*on meta", "seed_rows"),
    ],
)
def test_tensors_on_another_device(message: str, key: str) -> None:
    given = arguments()
    elsewhere(given, key)
    with pytest.raises(RuntimeError, match=message):
        Launchers().redispatched("chain_vjp", *given.values())


def test_other_dtypes_and_too_many_ports() -> None:
    given, device = arguments(), Launchers()
    halves = dict(given, inputs=[x.half() for x in given["inputs"]], packed=given["packed"].half())
    with pytest.raises(RuntimeError, match="take float32 or float64, got Half"):
        device.redispatched("chain_forward", *op_arguments.forward_arguments(halves))
    many = dict(given, inputs=given["inputs"] * 17)
    with pytest.raises(RuntimeError, match="at most 16 inputs and outputs, got 17"):
        device.redispatched("chain_vjp", *many.values())


def test_an_arena_too_large_is_said_and_leaves_nothing_behind() -> None:
    given, device = arguments(), Launchers()
    large = dict(given, sizes=replace(CudaSizes(*given["sizes"]), bytes=1 << 20).integers)
    with pytest.raises(RuntimeError, match="could not be launched with 1048576 bytes of shared memory: invalid arg"):
        device.redispatched("chain_vjp", *large.values())
    device.redispatched("chain_vjp", *given.values())
    assert device.gpu.guards == 0


def test_a_small_chain_takes_nothing_from_a_large_one() -> None:
    """What a kernel may have of shared memory is one number per process: another thread must not lower it between a
    larger chain's two calls."""
    device = Launchers()
    given = arguments()
    assert CudaSizes(*given["sizes"]).bytes < device.gpu.shared_bytes
    device.redispatched("chain_vjp", *given.values())
    assert device.gpu.allowed == device.gpu.shared_bytes


@pytest.mark.parametrize("capturing", [False, True])
def test_the_allocator_knows_the_stream_that_reads_cached_tensors(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, tables and two lists of records; nothing while a CUDA graph is being captured, which is not allowed."""
    told = []
    tensors = [SimpleNamespace(is_cuda=True, device="cuda:1", record_stream=told.append) for _ in range(4)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.ops.gradkern, "chain_vjp", lambda *arguments: None, raising=False)
    ops.chain_vjp([torch.zeros(1)], *tensors, CudaSizes(*range(6)), [3], None, None, [], 1, [])
    assert told == ([] if capturing else 4 * ["stream of cuda:1"])


def test_a_first_launch_may_be_captured() -> None:
    """A kernel is loaded at its first use, which is not allowed while a graph is being captured: asking for the device
    loads them all."""
    given, device = arguments(), Launchers()
    library().gk_unload()
    device.gpu.capturing = 1
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        device.redispatched("chain_vjp", *given.values())
    device.gpu.capturing = 0
    facts = (ctypes.c_int64 * 4)()
    launchers().gk_describe_device(0, facts)
    assert list(facts) == [device.gpu.shared_bytes, device.gpu.processors, 1755000, 90]
    assert device.gpu.loaded == 9
    device.gpu.capturing = 1
    device.redispatched("chain_vjp", *given.values())
    device.gpu.capturing = 0


# ---- the hash


def test_hash_launcher_sees_every_change() -> None:
    with installed(Launchers()) as device:
        a, b = torch.randn(1000), torch.arange(7, dtype=torch.uint8)
        own = ops.content_hash([a, b])
        assert own == ops.content_hash([a.clone(), b.clone()])
        assert own == ops.content_hash([a.view(50, 20), torch.arange(8, dtype=torch.uint8)[:7]])
        assert own == ops.content_hash([a.view(50, 20).T.contiguous().T, b])
        assert own == ops.content_hash([a, torch.arange(-1, 7, dtype=torch.int8)[1:].view(torch.uint8)])  # unaligned
        changed, swapped = a.clone(), a.clone()
        changed[999] += 1
        swapped[[0, 1]] = a[[1, 0]]
        others = [[changed, b], [swapped, b], [b, a], [a], [a, b + 1], [a[:500], a[500:], b], [a, b[1:]]]
        others += [[a, b, torch.zeros(0)], [a, b, torch.zeros(1)]]
        assert len({own, *map(ops.content_hash, others)}) == 1 + len(others)
        odd = [torch.tensor(True), torch.zeros(0, 3), torch.randn(3, requires_grad=True), torch.zeros(5).bfloat16()]
        assert ops.content_hash(odd) == ops.content_hash([x.detach().clone() for x in odd])
        assert ops.content_hash([]) == 0
        with pytest.raises(RuntimeError, match="tensors on cpu and on meta"):
            ops.content_hash([a, b.to("meta")])
    assert device.calls
    assert device.gpu.guards == 0


def test_launchers_pack_new_weights_again() -> None:
    device = Launchers()
    for factor in (1.0, -2.0):
        case = CASES["maxpool1d"]
        model, inputs = case.build(dtype=torch.float64), case.inputs(2, dtype=torch.float64)
        with torch.no_grad(), installed(device):
            next(model.parameters()).mul_(factor)
            program = capturing.to_program(model, inputs)
            y, got = executor.jacobian(program, capturing.bind(program, model), inputs)
            assert executor.plan_for(program, program.outputs, torch.float64).single_chain
        right(model, inputs, y, got)


# ---- DeepLift's multipliers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relu", [False, True])
def test_rescale_as_on_the_cpu(relu: bool, dtype: torch.dtype) -> None:
    device, generator = Launchers(), torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 6, 8, generator=generator, dtype=dtype)
    for ref in (z.flip(0), z[:1] / 2):
        for pool in ([2, 2, 2, 2, 0, 0, 1, 1, 3, 4], *([[]] if relu else [])):
            got = device.redispatched("rescale", z, ref.contiguous(), pool, relu, 1e-10)
            want = device.ops["rescale"](z, ref.contiguous(), pool, relu, 1e-10)
            assert torch.allclose(got, want, rtol=1e-5, atol=0)
    assert device.gpu.guards == 0
