"""Which way a call goes: what the caller chose, what pays, and what has to run on autograd."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn

import gradkern
from gradkern.dispatch import first_use, state
from gradkern.dispatch.request import Request
from gradkern.dispatch.route import decide
from gradkern.dispatch.targets import jacobian_choice
from gradkern.frontend import verify
from gradkern.frontend.capture import GraphCache
from gradkern.runtime import ops
from gradkern.util import options
from gradkern.util.options import ENGINES, BadValue, GradkernWarning
from tests.cases import CASES, net
from tests.support import oracle

pytestmark = pytest.mark.real_export


def test_engine_choice(monkeypatch):
    monkeypatch.delenv(options.ENVIRONMENT, raising=False)
    assert options.engine() == "auto"
    monkeypatch.setenv(options.ENVIRONMENT, "reference")
    assert options.engine() == "reference"
    with gradkern.use("autograd"):
        assert options.engine() == "autograd"
        assert options.engine("kernel") == "kernel"
        with gradkern.use(memory_budget=5):
            assert options.engine() == "autograd"
            assert options.memory_budget() == 5
    assert options.engine() == "reference"
    assert options.memory_budget() == options.DEFAULT_MEMORY_BUDGET
    monkeypatch.setenv(options.ENVIRONMENT, "fast")
    model, (x,) = net()
    with pytest.raises(BadValue, match=r"GRADKERN_ENGINE: got 'fast', expected one of 'auto'"):
        gradkern.jacobian(model, x)
    with pytest.raises(BadValue, match="engine="):
        gradkern.jacobian(model, x, engine="cuda")
    with pytest.raises(BadValue), gradkern.use("nothing"):
        pass
    with pytest.raises(BadValue), gradkern.use(memory_budget=0):
        pass


def known(model, x):
    route = decide(Request(model, (x,), (0,), jacobian_choice(None)))
    return route.bound or route.refusal


def test_each_engine_traces_as_it_says(monkeypatch):
    monkeypatch.setattr(first_use, "capture_cost", lambda: 1e9)
    model, (x,) = net()
    for engine in ("autograd", "auto"):
        gradkern.jacobian(model, x, engine=engine)
        assert known(model, x) is None
    for engine in ("kernel", "reference"):
        fresh, _ = net()
        gradkern.jacobian(fresh, x, engine=engine)
        assert known(fresh, x).program is not None


def test_auto_traces_once_it_pays(monkeypatch):
    model, (x,) = net(n=6)
    gradkern.jacobian(model, x, engine="autograd")  # warm
    monkeypatch.setattr(first_use, "capture_cost", lambda: 1e9)
    for _ in range(3):
        gradkern.jacobian(model, x)
    assert known(model, x) is None
    monkeypatch.setattr(first_use, "capture_cost", lambda: 1e-9)
    gradkern.jacobian(model, x)  # by now it would have paid
    assert known(model, x).program is not None


def test_auto_traces_in_the_midst_of_a_large_call(monkeypatch):
    model, (x,) = net(n=64)
    want = gradkern.jacobian(model, x, engine="autograd")
    monkeypatch.setattr(first_use, "capture_cost", lambda: 1e-9)
    with gradkern.use(memory_budget=100_000):
        got = gradkern.jacobian(model, x)
    assert known(model, x).program is not None
    torch.testing.assert_close(got, want)


def test_prepare_traces_now_and_only_once(monkeypatch):
    model, (x,) = net()
    prepared = gradkern.prepare(model, x)
    assert prepared.program is not None
    program = prepared.program
    assert program.output_shape == (3,)
    assert gradkern.prepare(model.forward, x).program is program
    monkeypatch.setattr(GraphCache, "capture", None)  # any further capture would fail
    gradkern.jacobian(model, x, engine="kernel")
    gradkern.jacobian(model, x[:1])


@pytest.mark.slow
def test_deleted_model_leaves_no_state():
    import gc

    model, (x,) = net()
    gradkern.prepare(model, x)
    assert model in state.models
    count = len(state.models)
    del model
    gc.collect()
    assert len(state.models) < count


@pytest.mark.parametrize("name", [c.name for c in CASES.values() if not c.traceable])
def test_untraceable_models_run_on_autograd_with_one_warning(name):
    model, inputs = net(name)
    with pytest.warns(GradkernWarning, match=type(model).__name__) as caught:
        first, second = (gradkern.jacobian(model, inputs, engine="kernel") for _ in range(2))
    (warning,) = [w for w in caught if w.category is GradkernWarning]
    assert warning.filename == __file__
    _, want = oracle.jacobian(model, inputs)
    for got in (first, second):
        for g, w in zip(got, want, strict=True):
            assert oracle.relative_error(g.reshape(w.shape), w) < 1e-10


def test_in_debug_mode_a_refusal_is_raised(monkeypatch):
    monkeypatch.setenv(options.DEBUG, "1")
    model, inputs = net("resnet1d_custom")
    with pytest.raises(RuntimeError, match="custom autograd"):
        gradkern.jacobian(model, inputs, engine="kernel")


def test_opaque_steps_are_named_in_one_warning():
    case = CASES["resnet1d_opaque"]
    model, inputs = case.build(dtype=torch.float64), case.inputs(dtype=torch.float64)
    with pytest.warns(GradkernWarning, match="logcumsumexp") as caught:
        [gradkern.jacobian(model, inputs, engine="kernel") for _ in range(2)]
    assert len([w for w in caught if w.category is GradkernWarning]) == 1


def test_plain_callables_run_on_every_engine():
    model, (x,) = net(n=20)
    want = gradkern.jacobian(model, x, engine="autograd")
    for engine in ENGINES:
        gradkern.reset()
        with gradkern.use(engine, memory_budget=50_000):
            torch.testing.assert_close(gradkern.jacobian(lambda t: model(t) * 2.0, x), want * 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_wrapped_models(engine):
    """TorchScript, compiled, data-parallel, with keyword arguments, with a counter: all give the model's Jacobian."""

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls, self.lock = inner, 0, threading.Lock()

        def forward(self, x, mask=None, *, flag=False):
            self.calls += 1
            with self.lock:
                return self.inner(x)

    model, (x,) = net(n=20)
    want = gradkern.jacobian(model, x, engine="autograd")
    wrapped = (torch.jit.script(model), torch.compile(model, backend="eager"), nn.DataParallel(model), Wrapped(model))
    for other in wrapped:
        with warnings.catch_warnings(), gradkern.use(engine, memory_budget=100_000):
            warnings.simplefilter("ignore", GradkernWarning)
            torch.testing.assert_close(gradkern.jacobian(other, x), want)


def test_autocast_runs_on_autograd_and_says_so():
    model, (x,) = net(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(GradkernWarning, match="autocast"):
        got = gradkern.jacobian(model, x, engine="kernel")
    assert got.dtype == torch.float32
    _, (want,) = oracle.jacobian(model, (x,))
    assert 1e-4 < oracle.relative_error(got, want) < 0.2  # in bfloat16, as autocast says


def test_precision_by_torchs_newer_switches():
    """`torch.get_float32_matmul_precision` raises where they were used."""
    assert ops.precision() == "highest"
    try:
        for switch, name in (("tf32", "high"), ("ieee", "highest")):
            torch.backends.cuda.matmul.fp32_precision = switch
            assert ops.precision() == name
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_tf32_may_do_to_a_comparison():
    """On a GPU, convolutions are in TF32 by default, by one kernel for one sample and by another for several."""
    gpu, before = torch.device("cuda", 0), torch.backends.cudnn.allow_tf32
    try:
        for allowed, same in ((True, False), (False, True)):
            torch.backends.cudnn.allow_tf32 = allowed
            for dtype in (torch.float32, torch.float64):
                found = verify._tolerance(dtype, gpu) == verify._tolerance(dtype, torch.device("cpu"))
                assert found == (same or dtype == torch.float64)
    finally:
        torch.backends.cudnn.allow_tf32 = before
