"""Many threads on one model: concurrent calls, and calls while another thread uses the model itself."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captum import attr as captum_attr
from torch import nn

import gradkern
from gradkern.attr import Saliency
from gradkern.dispatch import state
from gradkern.runtime import ops
from tests.cases import CASES
from tests.support import oracle
from tests.support.case_runs import EXACT, exact, parts, run

THREADS = 4
SMALL = ("maxpool1d", "maxpool2d_mixed", "conv1d_groups", "residual", "elu", "bn_linear", "softmax", "two_inputs")
pytestmark = [pytest.mark.real_export, pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")]


def together(*jobs):
    """Start all jobs at the same moment, and give their results."""
    barrier = threading.Barrier(len(jobs))

    def run(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(run, job) for job in jobs]]


def net(name="maxpool1d", n=8):
    case = CASES[name]
    model, (x,) = case.build(dtype=torch.float64), case.inputs(n, dtype=torch.float64)
    return model, x, gradkern.jacobian(model, x, engine="autograd")


@pytest.mark.parametrize("engine", ["auto", "kernel", "reference", "autograd"])
def test_concurrent_calls_on_a_fresh_model(engine):
    model, x, want = net()
    jobs = [lambda: [gradkern.jacobian(model, x, engine=engine) for _ in range(5)]] * THREADS
    for results in together(*jobs):
        for got in results:
            torch.testing.assert_close(got, want)
    assert len(state.models.of(model).entries) <= 1


def test_concurrent_calls_on_several_models_trace_each_once():
    nets = [net(name) for name in ("maxpool1d", "elu", "residual", "bn_after_conv")]
    jobs = [lambda n=n: gradkern.jacobian(n[0], n[1], engine="kernel") for n in nets]
    for got, (_, _, want) in zip(together(*jobs), nets, strict=True):
        torch.testing.assert_close(got, want)


def test_tracing_while_another_thread_uses_the_model():
    model, x, want = net("bn_after_conv")
    y = model(x).detach()
    stop = threading.Event()
    wrong = []

    def use():
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(model(x), y):
                    wrong.append("forward")
            leaf = x.clone().requires_grad_()
            model(leaf)[:, 0].sum().backward()
            if not torch.allclose(leaf.grad, want[:, 0]):
                wrong.append("backward")

    def calls():
        try:
            for _ in range(3):
                state.models.forget(model)  # as if it had never been seen: traced again
                for engine in ("kernel", "reference", "auto"):
                    torch.testing.assert_close(gradkern.jacobian(model, x, engine=engine), want)
        finally:
            stop.set()

    together(use, use, calls)
    assert wrong == []


def test_engine_choice_is_the_threads_own():
    from gradkern.util import options

    inside = threading.Event()
    done = threading.Event()

    def holds():
        with gradkern.use("reference"):
            inside.set()
            done.wait(10)
            return options.engine()

    def looks():
        inside.wait(10)
        found = options.engine()
        done.set()
        return found

    assert together(holds, looks) == ["reference", "auto"]


def test_training_mode_restores_the_buffers_with_several_callers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(10, 6, dtype=torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    want = gradkern.jacobian(model, x)
    for got in together(*[lambda: gradkern.jacobian(model, x)] * THREADS):
        torch.testing.assert_close(got, want)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.filterwarnings("ignore:Input Tensor")
def test_captum_classes_in_several_threads():
    model, x, _ = net()
    want = captum_attr.Saliency(model).attribute(x.clone(), target=1)
    with gradkern.use("kernel"):
        gradkern.prepare(model, x)
    saliency = Saliency(model, engine="kernel")
    for got in together(*[lambda: saliency.attribute(x.clone(), target=1)] * THREADS):
        torch.testing.assert_close(got, want)


def test_a_thread_that_was_started_under_inference_mode_is_not_affected():
    model, x, want = net()
    with torch.inference_mode():
        (got,) = together(lambda: gradkern.jacobian(model, x, engine="autograd"))
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------------------------------------
# The kernels alone


def test_other_threads_run_while_the_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op gives the GIL back: a second Python thread counts on."""
    _, inputs, program, params = parts("fcn", 8, torch.float32)
    xs = tuple(x.repeat(24, 1, 1) for x in inputs)
    run(program, params, inputs)  # packed, planned and compared
    count, counted_meanwhile, stop = 0, 0, threading.Event()
    op = ops.chain_vjp

    def watched(*args):
        nonlocal counted_meanwhile
        before = count
        result = op(*args)
        counted_meanwhile += count - before
        return result

    def counting() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(0.001)

    monkeypatch.setattr(ops, "chain_vjp", watched)
    thread = threading.Thread(target=counting)
    thread.start()
    try:
        run(program, params, xs)
    finally:
        stop.set()
        thread.join()
    assert counted_meanwhile


def test_the_engine_in_many_threads_at_once():
    """Plans, chains, packs and scratch are shared by threads that ask for different things."""
    jobs = [(name, parts(name, 5)[1:], exact(name, 5)[1]) for name in SMALL]
    wrong: list[str] = []

    def work(k: int) -> None:
        for r in range(12):
            name, (inputs, program, params), want = jobs[(k + r) % len(jobs)]
            if oracle.largest_error(run(program, params, inputs)[1], want) > EXACT:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
