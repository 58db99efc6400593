"""`gradkern.jacobian` and its companions: results, shapes, memory, modes, and which way a call goes."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern import autograd, cache, options
from gradkern.job import Job, jacobian_choice
from gradkern.options import BadValue, GradkernWarning
from tests import oracle
from tests.cases import CASES

ENGINES = ("auto", "autograd", "reference", "kernel")
SOME = ("relu_inplace", "maxpool1d", "elu", "residual", "bn_after_conv", "softmax_axis", "two_inputs", "scalar_output")


def net(name="relu_inplace", n=5, dtype=torch.float64):
    case = CASES[name]
    return case.build(dtype=dtype), case.inputs(n, dtype=dtype)


class Mixing(nn.Module):
    """Every sample's output depends on the others."""

    def forward(self, x):
        return (x - x.mean(0)).square()[:, :3]


class DetachedMixing(nn.Module):
    """The same, out of sight of the gradient."""

    def forward(self, x):
        return (x - x.mean(0).detach()).square()[:, :3]


# ---------------------------------------------------------------------------------------------------------------
# Values and shapes


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SOME)
def test_agrees_with_the_oracle(name, engine):
    model, inputs = net(name)
    y, want = oracle.jacobian(model, inputs)
    got = gradkern.jacobian(model, inputs, engine=engine)
    assert isinstance(got, tuple)
    for g, w, x in zip(got, want, inputs, strict=True):
        assert g.shape == (*y.shape, *x.shape[1:])
        assert oracle.relative_error(g.reshape(w.shape), w) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_one_tensor_or_a_tuple(engine):
    model, (x,) = net()
    alone = gradkern.jacobian(model, x, engine=engine)
    assert isinstance(alone, torch.Tensor)
    (wrapped,) = gradkern.jacobian(model, (x,), engine=engine)
    (listed,) = gradkern.jacobian(model, [x], engine=engine)
    assert torch.equal(alone, wrapped)
    assert torch.equal(alone, listed)


@pytest.mark.parametrize("engine", ENGINES)
def test_wrt_chooses_inputs(engine):
    model, inputs = net("two_inputs")
    both = gradkern.jacobian(model, inputs, engine=engine)
    torch.testing.assert_close(gradkern.jacobian(model, inputs, wrt=1, engine=engine), both[1])
    (last,) = gradkern.jacobian(model, inputs, wrt=[-1], engine=engine)
    torch.testing.assert_close(last, both[1])
    swapped = gradkern.jacobian(model, inputs, wrt=(1, 0), engine=engine)
    torch.testing.assert_close(swapped[0], both[1])
    for wrong in (2, -3, [], [0.5]):
        with pytest.raises(BadValue, match="wrt"):
            gradkern.jacobian(model, inputs, wrt=wrong, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_integer_input_beside_a_floating_one(engine):
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x, ids):
            return self.last(torch.tanh(x) * self.table(ids))

    torch.manual_seed(0)
    model, x, ids = Embeds().double().eval(), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    with gradkern.use(engine), pytest.warns() if engine in ("reference", "kernel") else _nothing():
        got = gradkern.jacobian(model, (x, ids), wrt=0)
    w = model.last.weight  # [2, 4]
    want = w[None] * (model.table(ids) * (1 - torch.tanh(x) ** 2))[:, None]
    torch.testing.assert_close(got, want.detach())
    with pytest.raises(TypeError, match="int64"):
        gradkern.jacobian(model, (x, ids), engine=engine)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, engine):
    model, (x,) = net(dtype=dtype, n=4)
    got = gradkern.jacobian(model, x, engine=engine)
    assert got.dtype == dtype
    _, (want,) = oracle.jacobian(model, (x,))
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert oracle.relative_error(got, want) < bound


@pytest.mark.parametrize("engine", ENGINES)
def test_one_sample_and_none(engine):
    model, (x,) = net()
    full = gradkern.jacobian(model, x, engine=engine)
    torch.testing.assert_close(gradkern.jacobian(model, x[:1], engine=engine), full[:1])
    empty = gradkern.jacobian(model, x[:0], engine=engine)
    assert empty.shape == (0, *full.shape[1:])
    assert empty.dtype == x.dtype
    assert gradkern.jacobian(model, x[:0], [1, 0], engine=engine).shape == (0, 2, *full.shape[2:])
    jac, index = gradkern.jacobian(model, x[:0], gradkern.TopK(2), engine=engine)
    assert jac.shape == (0, 2, *full.shape[2:])
    assert index.shape == (0, 2)


# ---------------------------------------------------------------------------------------------------------------
# out=, chunks, memory


@pytest.mark.parametrize("engine", ENGINES)
def test_out_tensor(engine):
    model, (x,) = net()
    want = gradkern.jacobian(model, x, engine=engine)
    out = torch.full_like(want, torch.nan)
    assert gradkern.jacobian(model, x, out=out, engine=engine) is out
    torch.testing.assert_close(out, want)
    strided = torch.full((*want.shape, 2), torch.nan, dtype=want.dtype)[..., 0]
    gradkern.jacobian(model, x, out=strided, engine=engine)
    torch.testing.assert_close(strided, want)
    half = torch.empty(want.shape, dtype=torch.float16)
    gradkern.jacobian(model, x, out=half, engine=engine)
    torch.testing.assert_close(half, want.half())


@pytest.mark.parametrize("engine", ENGINES)
def test_out_memory_map(tmp_path, engine):
    model, (x,) = net(n=40)
    want = gradkern.jacobian(model, x, engine=engine)
    mapped = np.memmap(tmp_path / "j.bin", dtype=np.float64, mode="w+", shape=tuple(want.shape))
    with gradkern.use(memory_budget=50_000):
        assert gradkern.jacobian(model, x, out=mapped, engine=engine) is mapped
    mapped.flush()
    again = np.memmap(tmp_path / "j.bin", dtype=np.float64, mode="r", shape=tuple(want.shape))
    torch.testing.assert_close(torch.from_numpy(np.array(again)), want)
    with pytest.raises(BadValue, match="read-only"):
        gradkern.jacobian(model, x, out=again, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_out_of_several_inputs_and_axes(engine):
    model, inputs = net("two_inputs")
    want = gradkern.jacobian(model, inputs, engine=engine)
    out = tuple(torch.empty_like(w) for w in want)
    gradkern.jacobian(model, inputs, out=out, engine=engine)
    torch.testing.assert_close(out, want)
    model, (x,) = net("softmax_axis")
    want = gradkern.jacobian(model, x, engine=engine)
    out = torch.empty_like(want)
    gradkern.jacobian(model, x, out=out, engine=engine)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        (torch.empty(5, 3, 2, 15), ValueError, r"got shape \[5, 3, 2, 15\]"),
        ((torch.empty(1), torch.empty(1)), ValueError, "got 2 tensors, expected 1"),
        ("full-int", TypeError, "int64"),
        ("full-grad", ValueError, "requires grad"),
        ([[1.0]], TypeError, "list"),
    ],
)
def test_bad_out(out, error, words):
    model, (x,) = net()
    shape = (5, 3, *x.shape[1:])
    if out == "full-int":
        out = torch.empty(shape, dtype=torch.long)
    elif isinstance(out, str):
        out = torch.empty(shape, requires_grad=True)
    with pytest.raises(error, match=words):
        gradkern.jacobian(model, x, out=out, engine="autograd")


def test_a_result_beyond_the_machine_is_refused_with_a_forecast():
    x = torch.zeros(1, 1).expand(1 << 20, 1 << 20)  # no memory
    with pytest.raises(MemoryError, match=r"GiB.*iter_jacobian"):
        Job(nn.Identity(), (x,), (0,), jacobian_choice(None)).open((1 << 10,))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("budget", [1, 40_000, 1 << 20])
def test_chunks_change_nothing(engine, budget):
    model, (x,) = net("maxpool1d", n=37)
    want = gradkern.jacobian(model, x, engine="autograd")
    with gradkern.use(engine, memory_budget=budget):
        torch.testing.assert_close(gradkern.jacobian(model, x), want)
        per_sample = torch.arange(37 * 2).view(37, 2) % 3
        got = gradkern.jacobian(model, x, per_sample)
    torch.testing.assert_close(got, torch.stack([want[n, per_sample[n]] for n in range(37)]))


def test_autograd_stays_within_its_budget():
    """The bytes that one forward saves for the backward pass never exceed the budget."""
    model, (x,) = net("lenet5", n=64, dtype=torch.float32)
    budget = 2 << 20
    seen = []
    real = autograd.fill

    def watching(job, start, stop, *args, **kwargs):
        with autograd._saved_bytes(job.module) as meter:
            real(job, start, stop, *args, **kwargs)
        seen.append((stop - start, meter.bytes))

    autograd.fill = watching
    try:
        with gradkern.use("autograd", memory_budget=budget):
            gradkern.jacobian(model, x)
    finally:
        autograd.fill = real
    assert sum(n for n, _ in seen) == 64
    assert len(seen) > 1
    assert max(b for _, b in seen) <= budget


@pytest.mark.parametrize(("stop", "chunk"), [(10, 3), (257, 256), (5, 100), (0, 4), (7, 1)])
def test_spans_are_even(stop, chunk):
    parts = list(autograd.spans(0, stop, chunk))
    assert [a for a, _ in parts] == [0, *[b for _, b in parts]][: len(parts)]
    assert sum(b - a for a, b in parts) == stop
    assert not parts or max(b - a for a, b in parts) <= chunk
    assert not parts or max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1


@pytest.mark.parametrize("engine", ENGINES)
def test_iter_jacobian(engine):
    model, (x,) = net(n=11)
    want = gradkern.jacobian(model, x, engine=engine)
    for chunk in (1, 4, 11, 50, None):
        parts = list(gradkern.iter_jacobian(model, x, chunk=chunk, engine=engine))
        assert chunk is None or max(len(p) for p in parts) <= chunk
        torch.testing.assert_close(torch.cat(parts), want)
    with gradkern.use(memory_budget=want[0].nbytes * 3):
        assert len(list(gradkern.iter_jacobian(model, x, engine=engine))) == 4
    per_sample = torch.arange(11)[:, None] % 3
    parts = list(gradkern.iter_jacobian(model, x, per_sample, chunk=4, engine=engine))
    torch.testing.assert_close(torch.cat(parts), want[torch.arange(11), per_sample[:, 0]][:, None])
    pairs = list(gradkern.iter_jacobian(model, (x,), gradkern.TopK(1), chunk=4, engine=engine))
    index = torch.cat([i for _, i in pairs])
    assert torch.equal(index[:, 0], model(x).argmax(1))
    torch.testing.assert_close(torch.cat([j for (j,), _ in pairs])[:, 0], want[torch.arange(11), index[:, 0]])
    with pytest.raises(BadValue, match="chunk"):
        gradkern.iter_jacobian(model, x, chunk=0)  # at once, not at the first piece


# ---------------------------------------------------------------------------------------------------------------
# What J means where samples mix


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", [Mixing(), DetachedMixing()], ids=["mixing", "detached"])
@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_mixed_samples_go_through_one_forward(engine, model):
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, (want,) = oracle.jacobian(model, (x,))
    with gradkern.use(engine, memory_budget=1):
        torch.testing.assert_close(gradkern.jacobian(model, x), want)
        torch.testing.assert_close(torch.cat(list(gradkern.iter_jacobian(model, x, chunk=7))), want)


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_training_mode_is_one_forward_with_buffers_and_randomness_as_after_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    want = torch.stack([torch.autograd.grad(y[:, c].sum(), leaf, retain_graph=True)[0] for c in range(3)], dim=1)
    state = torch.get_rng_state()
    model.load_state_dict(before)
    for engine in ENGINES:
        torch.manual_seed(7)
        with gradkern.use(engine, memory_budget=1):
            torch.testing.assert_close(gradkern.jacobian(model, x), want)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert model.training


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_random_draws_of_a_custom_module_are_found():
    class Noisy(nn.Module):
        def forward(self, x):
            return x * torch.rand_like(x)

    x = torch.randn(9, 4)
    torch.manual_seed(3)
    want = torch.diag_embed(torch.rand_like(x))
    state = torch.get_rng_state()
    for engine in ENGINES:
        torch.manual_seed(3)
        with gradkern.use(engine, memory_budget=1):
            torch.testing.assert_close(gradkern.jacobian(Noisy(), x), want)
        assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------
# Nothing of the caller's is touched


@pytest.mark.parametrize("engine", ENGINES)
def test_leaves_everything_as_it_was(engine):
    model, (x,) = net("bn_after_conv")
    model.requires_grad_(True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x.requires_grad_()
    x.grad = torch.full_like(x, 2.0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    values = x.detach().clone()
    jac = gradkern.jacobian(model, x, engine=engine)
    assert not jac.requires_grad
    assert jac.grad_fn is None
    assert x.requires_grad
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert torch.equal(x.detach(), values)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_every_grad_mode(engine, mode):
    model, (x,) = net()
    want = gradkern.jacobian(model, x, engine="autograd")
    with mode():
        made_inside = x * 1.0  # an inference tensor under inference_mode
        torch.testing.assert_close(gradkern.jacobian(model, x, engine=engine), want)
        torch.testing.assert_close(gradkern.jacobian(model, made_inside, engine=engine), want)
        out = torch.empty_like(want)
        gradkern.jacobian(model, x, out=out, engine=engine)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(gradkern.jacobian(model, made_inside, engine=engine), want)


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_of_every_layout(engine):
    model, (x,) = net()
    want = gradkern.jacobian(model, x, engine="autograd")
    strided = torch.stack([x, x], dim=-1)[..., 0]
    torch.testing.assert_close(gradkern.jacobian(model, strided, engine=engine), want)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(gradkern.jacobian(model, turned, engine=engine), want)
    one = x[:1].expand(6, *x.shape[1:])
    got = gradkern.jacobian(model, one, engine=engine)
    torch.testing.assert_close(got, want[:1].expand_as(got))
    torch.testing.assert_close(gradkern.jacobian(model, nn.Parameter(x), engine=engine), want)


def test_a_model_that_works_in_place_on_its_input():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(3.0).relu_()

    x = torch.tensor([[1.0, -1.0]])
    kept = x.clone()
    for engine in ENGINES:
        got = gradkern.jacobian(InPlace(), x, engine=engine)
        torch.testing.assert_close(got, torch.tensor([[[3.0, 0.0], [0.0, 0.0]]]))
        assert torch.equal(x, kept)


def test_create_graph():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert not gradkern.jacobian(model, x).requires_grad  # detached, though the input requires grad
    jac = gradkern.jacobian(model, x, create_graph=True)
    torch.testing.assert_close(jac.detach(), gradkern.jacobian(model, x))
    (second,) = torch.autograd.grad(jac.square().sum(), x)
    assert second.abs().max() > 0
    for engine in ("kernel", "reference"):
        with pytest.raises(BadValue, match="create_graph"):
            gradkern.jacobian(model, x, create_graph=True, engine=engine)
    with pytest.raises(BadValue, match="create_graph"), torch.no_grad():
        gradkern.jacobian(model, x, create_graph=True)
    with pytest.raises(BadValue, match="out="):
        gradkern.jacobian(model, x, create_graph=True, out=torch.empty(3, 2, 4))


# ---------------------------------------------------------------------------------------------------------------
# Which way a call goes


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
    return cache.entry(model).verdict(cache.key_of(model, (x,)))


def test_each_engine_traces_as_it_says(monkeypatch):
    monkeypatch.setattr(cache, "trace_cost", lambda: 1e9)
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
    monkeypatch.setattr(cache, "trace_cost", lambda: 1e9)
    for _ in range(3):
        gradkern.jacobian(model, x)
    assert known(model, x) is None
    monkeypatch.setattr(cache, "trace_cost", lambda: 1e-9)
    gradkern.jacobian(model, x)  # by now it would have paid
    assert known(model, x).program is not None


def test_auto_traces_in_the_midst_of_a_large_call(monkeypatch):
    model, (x,) = net(n=64)
    want = gradkern.jacobian(model, x, engine="autograd")
    monkeypatch.setattr(cache, "trace_cost", lambda: 1e-9)
    with gradkern.use(memory_budget=100_000):
        got = gradkern.jacobian(model, x)
    assert known(model, x).program is not None
    torch.testing.assert_close(got, want)


def test_prepare_traces_now_and_only_once(monkeypatch):
    model, (x,) = net()
    program = gradkern.prepare(model, x)
    assert program is not None
    assert program.output_shape == (3,)
    assert gradkern.prepare(model.forward, x) is program
    monkeypatch.setattr(cache.trace, "trace", None)  # any further trace would fail
    gradkern.jacobian(model, x, engine="kernel")
    gradkern.jacobian(model, x[:1])


def test_forgets_a_model_with_the_model():
    import gc

    model, (x,) = net()
    gradkern.prepare(model, x)
    number = id(model)
    assert number in cache._entries
    del model
    gc.collect()
    assert number not in cache._entries


@pytest.mark.parametrize("name", [c.name for c in CASES.values() if not c.traceable])
def test_untraceable_models_run_on_autograd_with_one_warning(name):
    model, inputs = net(name)
    with pytest.warns(GradkernWarning, match=type(model).__name__) as caught:
        got = next(gradkern.jacobian(model, inputs, engine="kernel") for _ in range(2))
    (warning,) = [w for w in caught if w.category is GradkernWarning]
    assert warning.filename == __file__
    _, want = oracle.jacobian(model, inputs)
    for g, w in zip(got, want, strict=True):
        assert oracle.relative_error(g.reshape(w.shape), w) < 1e-10


def test_opaque_steps_are_named_in_one_warning():
    case = CASES["resnet1d_cumsum"]
    model, inputs = case.build(dtype=torch.float64), case.inputs(dtype=torch.float64)
    with pytest.warns(GradkernWarning, match="cumsum") as caught:
        [gradkern.jacobian(model, inputs, engine="kernel") for _ in range(2)]
    assert len([w for w in caught if w.category is GradkernWarning]) == 1


def test_plain_callables_run_on_autograd():
    model, (x,) = net(n=20)
    want = gradkern.jacobian(model, x, engine="autograd")
    cache._warned.clear()
    with pytest.warns(GradkernWarning, match="neither"), gradkern.use(memory_budget=50_000):
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


# ---------------------------------------------------------------------------------------------------------------
# check and explain


def test_check():
    model, (x,) = net(dtype=torch.float32)
    result = gradkern.check(model, x)
    assert result.outputs == ("0", "1", "2")
    assert result.samples == 5
    assert result.worst < 1e-5
    assert "float64" in str(result)
    assert len(str(result).splitlines()) == 5
    assert gradkern.check(model, x, [2, 0]).outputs == ("2", "0")
    assert gradkern.check(model, x, gradkern.TopK(1)).worst < 1e-5
    deep, (z,) = net("softmax_axis", dtype=torch.float32)
    assert gradkern.check(deep, z, [(1, 2)]).outputs == ("(1, 2)",)
    assert gradkern.check(deep, z).worst < 1e-5


def test_check_sees_an_error(monkeypatch):
    from gradkern import api

    model, (x,) = net(dtype=torch.float32)
    real = api.jacobian
    wrong = torch.tensor([1.0, 1.01, 1.0])[:, None, None]
    monkeypatch.setattr(api, "jacobian", lambda *a, **k: tuple(j * wrong for j in real(*a, **k)))
    result = gradkern.check(model, x)
    assert result.relative[0] < 1e-5 < 5e-3 < result.relative[1]
    assert result.off_share[1] == 1.0


@pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")
def test_check_without_a_float64_copy():
    class Own(nn.Module):
        def forward(self, x):
            return x @ torch.ones(4, 2)  # float32 whatever the model is

    result = gradkern.check(Own(), torch.randn(3, 4))
    assert "float32" in result.against
    assert result.worst == 0.0


def test_explain(capsys):
    model, (x,) = net("maxpool1d")
    plan = gradkern.explain(model, x)
    assert str(plan) in capsys.readouterr().out
    assert len(plan.steps) >= len(gradkern.prepare(model, x).steps) - 4
    assert 0.0 <= plan.native_share <= plan.fused_share <= 1.0
    gradkern.explain(model, x, [0], show=False)
    assert capsys.readouterr().out == ""


def test_explain_of_a_model_on_autograd():
    model, (x,) = net()
    model[0].register_forward_hook(lambda *a: None)
    plan = gradkern.explain(model, x, show=False)
    assert "hook" in str(plan)
    assert plan.fused_share == plan.native_share == 0.0
    assert len(plan.steps) == 0
