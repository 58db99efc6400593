"""The CUDA kernels on a GPU: every network of the table against the oracle, and what only a GPU can show."""

from __future__ import annotations

import threading

import pytest
import torch

import gradkern
from gradkern import binding, engine, ops, plan, trace
from tests import oracle
from tests.cases import CASES
from tests.recipes import Case

CUDA = torch.device("cuda", 0)
TRACEABLE = [case for case in CASES.values() if case.traceable]
MEASURED = ("cnn1d", "cnn1d_strided", "lenet5", "mlp", "fcn")


@pytest.fixture(autouse=True)
def pinned():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def on_gpu(case: Case, n: int, dtype: torch.dtype):
    model = case.build(dtype=dtype).to(CUDA)
    inputs = tuple(x.to(CUDA) for x in case.inputs(n, dtype=dtype))
    with torch.no_grad():
        program = trace.trace(model, inputs)
        return model, inputs, program, binding.bind(program, model)


@pytest.mark.parametrize("case", TRACEABLE, ids=repr)
@pytest.mark.parametrize("n", [1, 7])
def test_agrees_with_the_oracle_in_float64(case: Case, n: int) -> None:
    model, inputs, program, params = on_gpu(case, n, torch.float64)
    y, found = engine.jacobian(program, params, inputs)
    want_y, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(y, want_y) < 1e-11
    for f, w in zip(found, want, strict=True):
        assert f.device == CUDA
        assert oracle.relative_error(f, w) < 1e-10


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("n", [1, 131, 1000])
def test_measured_networks_in_float32(name: str, n: int) -> None:
    model, inputs, program, params = on_gpu(CASES[name], n, torch.float32)
    _, found = engine.jacobian(program, params, inputs)
    assert torch.isfinite(found[0]).all()
    few = [x[-16:] for x in inputs]
    _, want = oracle.jacobian(model, few)
    assert oracle.disagreeing(found[0][-16:], want[0]) <= 0.2


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_precision_is_as_good_as_its_name(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        model, inputs, program, params = on_gpu(CASES["mlp"], 300, torch.float32)
        y, _ = engine.jacobian(program, params, inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    want, _ = oracle.jacobian(model, [x[:50] for x in inputs])
    assert oracle.relative_error(y[:50], want) < {"high": 1e-5, "medium": 5e-3}[precision]


def test_equal_calls_give_equal_bits() -> None:
    _, inputs, program, params = on_gpu(CASES["cnn1d"], 500, torch.float32)
    first = engine.jacobian(program, params, inputs)[1][0].clone()
    for _ in range(5):
        assert torch.equal(first, engine.jacobian(program, params, inputs)[1][0])


def test_every_number_is_written() -> None:
    _, inputs, program, params = on_gpu(CASES["lenet5"], 77, torch.float32)
    out = torch.full((77, 10, 1, 28, 28), float("nan"), device=CUDA)
    engine.jacobian(program, params, inputs, out=[out])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("shape", [(2,), (33, 4)])
def test_targets(shape: tuple[int, ...]) -> None:
    model, inputs, program, params = on_gpu(CASES["mlp"], 33, torch.float64)
    targets = torch.randint(10, shape, generator=torch.Generator().manual_seed(0))
    _, found = engine.jacobian(program, params, inputs, targets.to(CUDA))
    _, want = oracle.jacobian(model, inputs)
    assert oracle.relative_error(found[0], oracle.pick(want[0], targets.to(CUDA))) < 1e-10


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
    want = engine.jacobian(program, params, inputs)[1][0]
    torch.cuda.synchronize()
    found: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                found[i] = engine.jacobian(program, params, inputs)[1][0]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(want, f) for f in found.values())


def test_a_cuda_graph_captures_the_launch() -> None:
    _, inputs, program, params = on_gpu(CASES["cnn1d"], 300, torch.float32)
    used = plan.cached_plan(program, 3, torch.float32, CUDA)
    chain = plan.chain_of(used, 0, 3, (0,), True)
    packed = engine.packed_for(chain, params, inputs[0])
    targets = torch.arange(3, device=CUDA)
    rows = packed.seed_rows(targets, 3)
    x, out = inputs[0].clone(), torch.empty(300, 3, 1, 224, device=CUDA)
    engine.call(packed, [x], targets, rows, [], [out])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.call(packed, [x], targets, rows, [], [out])
    x.copy_(inputs[0].flip(0))
    graph.replay()
    torch.cuda.synchronize()
    want = engine.jacobian(program, params, [inputs[0].flip(0)])[1][0]
    assert torch.equal(out, want)


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
