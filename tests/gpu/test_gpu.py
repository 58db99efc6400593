"""The CUDA kernels on a GPU: every network of the table against the oracle, and what only a GPU can show."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import gradkern
from gradkern import attr
from gradkern.runtime import executor, ops, reference
from gradkern.runtime.parameters import PlanWeights
from tests.cases import CASES
from tests.support import capturing, oracle
from tests.support.case import Case
from tests.support.networks import NETWORKS
from tests.support.pieces import NETS, settle
from tests.support.pools import POOLS, equal, numbers, with_counts
from tests.support.products import BOUND as PRODUCT_BOUND
from tests.support.products import SHAPES, product

pytestmark = pytest.mark.real_export
CUDA = torch.device("cuda", 0)
TRACEABLE = [case for case in CASES.values() if case.traceable]
MEASURED = ("cnn1d", "cnn1d_strided", "lenet5", "mlp", "fcn")


@pytest.fixture(autouse=True)
def pinned():
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def on_gpu(case: Case, n: int, dtype: torch.dtype):
    model = case.build(dtype=dtype).to(CUDA)
    inputs = tuple(x.to(CUDA) for x in case.inputs(n, dtype=dtype))
    with torch.no_grad():
        program = capturing.to_program(model, inputs)
        return model, inputs, program, capturing.bind(program, model)


@pytest.mark.parametrize("case", TRACEABLE, ids=repr)
@pytest.mark.parametrize("n", [1, 7])
def test_agrees_with_the_oracle_in_float64(case: Case, n: int) -> None:
    model, inputs, program, params = on_gpu(case, n, torch.float64)
    y, got = executor.jacobian(program, params, inputs)
    want_y, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(y, want_y) < 1e-11
    for f, w in zip(got, want, strict=True):
        assert f.device == CUDA
        assert oracle.relative_error(f, w) < 1e-10


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("n", [1, 131, 1000])
def test_measured_networks_in_float32_on_a_gpu(name: str, n: int) -> None:
    model, inputs, program, params = on_gpu(CASES[name], n, torch.float32)
    _, got = executor.jacobian(program, params, inputs)
    assert torch.isfinite(got[0]).all()
    few = [x[-16:] for x in inputs]
    _, want = oracle.jacobian(model, few)
    assert oracle.disagreeing(got[0][-16:], want[0]) <= 0.2


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_precision_is_as_good_as_its_name(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        model, inputs, program, params = on_gpu(CASES["mlp"], 300, torch.float32)
        y, _ = executor.jacobian(program, params, inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    want, _ = oracle.jacobian(model, [x[:50] for x in inputs])
    assert oracle.relative_error(y[:50], want) < {"high": 1e-5, "medium": 2e-2}[precision]


def test_equal_calls_give_equal_bits() -> None:
    _, inputs, program, params = on_gpu(CASES["cnn1d"], 500, torch.float32)
    first = executor.jacobian(program, params, inputs)[1][0].clone()
    for _ in range(5):
        assert torch.equal(first, executor.jacobian(program, params, inputs)[1][0])


def test_every_number_is_written() -> None:
    _, inputs, program, params = on_gpu(CASES["lenet5"], 77, torch.float32)
    out = torch.full((len(inputs[0]), 10, 1, 28, 28), float("nan"), device=CUDA)
    executor.jacobian(program, params, inputs, out=[out])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("shape", [(2,), (33, 4)])
def test_targets_on_a_gpu_equal_the_oracle(shape: tuple[int, ...]) -> None:
    model, inputs, program, params = on_gpu(CASES["mlp"], 33, torch.float64)
    targets = torch.randint(10, shape, generator=torch.Generator().manual_seed(0))
    _, got = executor.jacobian(program, params, inputs, targets.to(CUDA))
    _, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(got[0], oracle.pick(want[0], targets.to(CUDA))) < 1e-10


def test_the_public_call_follows_the_weights() -> None:
    model = CASES["cnn1d"].build().to(CUDA)
    x = CASES["cnn1d"].inputs(64)[0].to(CUDA)
    before = gradkern.jacobian(model, x, engine="kernel").clone()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    after = gradkern.jacobian(model, x, engine="kernel")
    assert after.device == CUDA
    assert not torch.allclose(before, after)
    _, want = oracle.jacobian(model, x[:16])
    assert oracle.disagreeing(after[:16], want[0]) <= 0.2


def test_streams_and_threads() -> None:
    _, inputs, program, params = on_gpu(CASES["cnn1d"], 256, torch.float32)
    want = executor.jacobian(program, params, inputs)[1][0]
    torch.cuda.synchronize()
    got: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                got[i] = executor.jacobian(program, params, inputs)[1][0]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(want, f) for f in got.values())


def test_a_cuda_graph_captures_the_launch() -> None:
    _, inputs, program, params = on_gpu(CASES["cnn1d"], 300, torch.float32)
    used = executor.plan_for(program, 3, torch.float32, CUDA)
    chain = used.chain(0, 3, (0,), True)
    packed = PlanWeights(used, params, inputs[0]).packed(chain)
    targets = torch.arange(3, device=CUDA)
    rows = packed.seed_rows(targets, 3)
    x, out = inputs[0].clone(), torch.empty(300, 3, 1, 224, device=CUDA)
    executor.call(packed, [x], targets, rows, [], [out])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        executor.call(packed, [x], targets, rows, [], [out])
    x.copy_(inputs[0].flip(0))
    graph.replay()
    torch.cuda.synchronize()
    want = executor.jacobian(program, params, [inputs[0].flip(0)])[1][0]
    assert torch.equal(out, want)


# ---- matrix products of two values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_matrix_products_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    program = product(name)
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(300, *s, generator=generator, dtype=torch.float64) for s in program.inputs]
    targets = torch.randint(program.outputs, (300, 7), generator=generator)
    on_device = [x.to(CUDA, dtype) for x in xs]
    y, got = executor.jacobian(program, {}, on_device, targets.to(CUDA))
    assert executor.plan_for(program, 7, dtype, CUDA).single_chain
    want_y, want = reference.jacobian(program, {}, xs, targets)
    bound = PRODUCT_BOUND[dtype]
    assert oracle.relative_error(y.cpu(), want_y) < bound
    for f, w in zip(got, want, strict=True):
        assert oracle.relative_error(f.cpu(), w) < bound


@pytest.mark.parametrize("size", ["small", "full"])
def test_a_vision_transformer(size: str) -> None:
    """The small one is one chain; the full one is chains beside ATen."""
    case = getattr(NETWORKS["vit"], size)
    model, inputs, program, params = on_gpu(case, 200 if size == "small" else 9, torch.float32)
    _, got = executor.jacobian(program, params, inputs)
    used = executor.plan_for(program, program.outputs, torch.float32, CUDA)
    assert used.single_chain == (size == "small")
    _, want = oracle.jacobian(model, inputs)
    assert oracle.disagreeing(got[0], want[0], 1e-4) == 0


# ---- networks that fit no chain


def small(shared: int):
    """The GPU as a machine whose blocks have little shared memory, so that contractions go to ATen."""
    real = ops.machine

    def machine(device=None):
        got = real(device)
        return got if device is None or device.type == "cpu" else replace(got, shared_bytes=shared)

    return mock.patch.object(ops, "machine", machine)


@pytest.mark.parametrize("shared", [256, 3072])
@pytest.mark.parametrize("name", NETS)
def test_networks_in_pieces_on_a_gpu_equal_the_oracle(name: str, shared: int) -> None:
    make, shape = NETS[name]
    torch.manual_seed(3)
    model = settle(make().double(), torch.Generator().manual_seed(7)).to(CUDA)
    x = torch.randn(65, *shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(CUDA)
    with torch.no_grad(), small(shared):
        program = capturing.to_program(model, (x,))
        y, (got,) = executor.jacobian(program, capturing.bind(program, model), [x])
        used = executor.plan_for(program, got.shape[1], torch.float64, CUDA)
    if shared == 256:
        assert not used.single_chain
    want_y, (want,) = oracle.jacobian(model, x)
    assert oracle.relative_error(y, want_y) < 1e-11
    assert oracle.relative_error(got, want) < 1e-10


def test_fcn_in_pieces() -> None:
    """Real sizes: layers of half a megabyte for one sample."""
    model, inputs, program, params = on_gpu(CASES["fcn"], 70, torch.float32)
    _, got = executor.jacobian(program, params, inputs)
    assert not executor.plan_for(program, 5, torch.float32, CUDA).single_chain
    _, want = oracle.jacobian(model, [x[:12] for x in inputs])
    assert oracle.disagreeing(got[0][:12], want[0]) <= 0.2


# ---- half precision, rules, hashes, several GPUs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cnn1d", "lenet5", "mlp", "residual"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model, inputs = case.build(dtype=dtype).to(CUDA), tuple(x.to(CUDA) for x in case.inputs(40, dtype=dtype))
    got = gradkern.jacobian(model, inputs, engine="kernel")
    got = got[0] if isinstance(got, tuple) else got
    _, want = oracle.jacobian(model, inputs)
    assert got.dtype == dtype
    bound = {torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert oracle.disagreeing(got.reshape(want[0].shape), want[0], bound) <= 0.5
    assert "is cast to float32" in str(gradkern.explain(model, inputs, show=False))


@pytest.mark.parametrize("name", ["cnn1d", "lenet5", "residual", "maxpool1d_overlap_pad"])
@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution", "DeepLift", "LRP"])
def test_rules_on_a_gpu_equal_the_reference(name: str, method: str) -> None:
    case = CASES[name]
    model = case.build(dtype=torch.float64).to(CUDA)
    x = case.inputs(30, dtype=torch.float64)[0].to(CUDA)
    fast, plain = (getattr(attr, method)(model, engine=e).attribute_all(x) for e in ("kernel", "reference"))
    assert oracle.relative_error(fast, plain) < 1e-10


@pytest.mark.parametrize("shared", [256, 3072])
@pytest.mark.parametrize("method", ["DeepLift", "LRP"])
def test_rules_in_pieces(method: str, shared: int) -> None:
    case = CASES["maxpool2d"]
    model = case.build(dtype=torch.float64).to(CUDA)
    x = case.inputs(30, dtype=torch.float64)[0].to(CUDA)
    with small(shared):
        fast = getattr(attr, method)(model, engine="kernel").attribute_all(x)
    assert oracle.relative_error(fast, getattr(attr, method)(model, engine="reference").attribute_all(x)) < 1e-10


@pytest.mark.parametrize("name", ["cnn1d", "lenet5", "mlp"])
def test_deep_lift_as_on_the_cpu(name: str) -> None:
    """References per row and shared ones, each sample's own targets, float32."""
    case = CASES[name]
    model, x, base = case.build(), case.inputs(300)[0], case.inputs(300, 7)[0]
    targets = torch.randint(3, (300, 2), generator=torch.Generator().manual_seed(0))
    for start in (base, base[:1]):
        want = attr.DeepLift(model.double(), engine="reference").attribute_all(
            x.double(), start.double(), targets=targets
        )
        own = attr.DeepLift(model.float().to(CUDA), engine="kernel")
        got = own.attribute_all(x.to(CUDA), start.to(CUDA), targets=targets.to(CUDA))
        model.cpu()
        assert got.device == CUDA
        assert oracle.disagreeing(got.cpu(), want, 1e-3) <= 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_multipliers_on_a_gpu_equal_the_cpus_to_the_bit(name: str, dtype: torch.dtype) -> None:
    plane, geometry = POOLS[name]
    pool = with_counts(plane, geometry)
    for relu in (True, False) if pool else (True,):
        for rows in (1, 700):
            z, reference = (numbers((n, 9, *plane), dtype) for n in (700, rows))
            z[torch.rand(z.shape) < 0.02] = float("nan")
            got = ops.rescale(z.to(CUDA), reference.to(CUDA), pool, relu, 1e-10).cpu()
            equal(got, ops.rescale(z, reference, pool, relu, 1e-10))


def test_multipliers_on_another_stream_and_device_checks() -> None:
    z = torch.randn(64, 8, 6, 8, device=CUDA)
    pool = with_counts(*POOLS["squares"])
    want = ops.rescale(z, z[:1].contiguous(), pool, True, 1e-10)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = ops.rescale(z, z[:1].contiguous(), pool, True, 1e-10)
    stream.synchronize()
    assert torch.equal(got, want)
    assert ops.rescale(z[:0], z[:0], pool, True, 1e-10).shape == (4, 0, 8, 3, 4)
    with pytest.raises(RuntimeError, match="its reference on cpu"):
        ops.rescale(z, z[:1].cpu(), pool, True, 1e-10)


def test_hash_on_a_gpu_sees_every_change() -> None:
    a = torch.randn(1000, device=CUDA)
    b = torch.arange(7, dtype=torch.uint8, device=CUDA)
    own = ops.content_hash([a, b])
    assert own == ops.content_hash([a.clone(), b.clone()])
    assert own == ops.content_hash([a, torch.arange(8, dtype=torch.uint8, device=CUDA)[:7]])
    changed, swapped = a.clone(), a.clone()
    changed[999] += 1
    swapped[[0, 1]] = a[[1, 0]]
    others = [[changed, b], [swapped, b], [b, a], [a], [a, b + 1], [a[:500], a[500:], b], [a, b[1:]]]
    assert len({own, *map(ops.content_hash, others)}) == 1 + len(others)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_at_once() -> None:
    """Each device's stream, weights and attributes are its own, whichever device is current."""
    _, inputs, program, params = on_gpu(CASES["cnn1d"], 300, torch.float32)
    want = executor.jacobian(program, params, inputs)[1][0].cpu()
    other = torch.device("cuda", 1)
    there = {k: v.to(other) for k, v in params.items()}
    got: dict[int, torch.Tensor] = {}

    def work(device: int) -> None:
        use, xs = ((params, inputs), (there, [x.to(other) for x in inputs]))[device]
        for _ in range(5):
            got[device] = executor.jacobian(program, use, xs)[1][0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[1].device == other
    assert all(torch.equal(f.cpu(), want) for f in got.values())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("device", range(torch.cuda.device_count()))
def test_the_inputs_device_is_honoured(device: int) -> None:
    where = torch.device("cuda", device)
    model = CASES["mlp"].build().to(where)
    x = CASES["mlp"].inputs(40)[0].to(where)
    assert gradkern.jacobian(model, x, engine="kernel").device == where


def test_the_plan_says_cuda() -> None:
    model = CASES["cnn1d"].build().to(CUDA)
    x = CASES["cnn1d"].inputs(4)[0].to(CUDA)
    table = gradkern.explain(model, x, show=False)
    assert "kernel cuda" in str(table)
    assert table.native_share == 1.0
    assert ops.machine(CUDA).shared_bytes >= 99 * 1024


def test_a_float32_model_is_traced_in_tf32() -> None:
    """torch's own default for convolutions: one sample and several then differ by more than float32's rounding."""
    torch.backends.cudnn.allow_tf32 = True
    for name in ("cnn1d", "lenet5", "fcn"):
        model, x = CASES[name].build().to(CUDA), CASES[name].inputs(64)[0].to(CUDA)
        with warnings.catch_warnings():
            warnings.simplefilter("error", gradkern.GradkernWarning)
            gradkern.jacobian(model, x, engine="kernel")


def test_copies_to_the_gpu_and_back() -> None:
    # gradkern.data wants libraries that this needs nothing of.
    path = Path(gradkern.__file__).parent / "data" / "runs" / "transfer.py"
    spec = importlib.util.spec_from_file_location("transfer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    transfer = module.Transfer(CUDA)
    given = [torch.randn(1000, 17), torch.arange(1000), torch.randn(17, 1000).T]
    for _ in range(20):
        moved = transfer.upload(given)()
        assert all(x.device == CUDA for x in moved)
        back = transfer.download([x * 2 for x in moved])()
        assert all(torch.equal(b, 2 * x) for b, x in zip(back, given, strict=True))
