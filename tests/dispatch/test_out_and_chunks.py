"""`gradkern.jacobian` into the caller's memory, in chunks, and within a budget; `gradkern.iter_jacobian`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.dispatch import eager, profile
from gradkern.dispatch.request import Request, allocate
from gradkern.dispatch.targets import jacobian_choice
from gradkern.runtime import executor
from gradkern.util.options import ENGINES, BadValue
from tests.cases import net
from tests.support import oracle

pytestmark = pytest.mark.real_export


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
    ("name", "wrt"), [("maxpool1d", None), ("decoder", None), ("two_inputs", (1, 0)), ("two_inputs", (1,))]
)
def test_a_warm_call_fills_out_by_the_kernels_alone(name, wrt, monkeypatch):
    model, inputs = net(name)
    inputs = inputs if len(inputs) > 1 else inputs[0]

    def call(**given):
        got = gradkern.jacobian(model, inputs, wrt=wrt, engine="kernel", **given)
        return got if isinstance(got, tuple) else (got,)

    def filled():
        out = tuple(torch.full_like(w, torch.nan) for w in want)
        assert all(a is b for a, b in zip(call(out=out if len(out) > 1 else out[0]), out, strict=True))
        return out

    want = call()
    with monkeypatch.context() as patch:
        patch.setattr(executor, "jacobian", None)  # which goes through the steps
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(filled(), want, strict=True))
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    every = oracle.jacobian(model, inputs)[1]
    exact = [every[w] for w in wrt or range(len(every))]
    assert oracle.largest_error([o.view(e.shape) for o, e in zip(filled(), exact, strict=True)], exact) <= 1e-12


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
        allocate(Request(nn.Identity(), (x,), (0,), jacobian_choice(None)), (1 << 10,))


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
    real = eager.fill

    def watching(request, known, start, stop, **kwargs):
        meter = profile._SavedBytes(request.module)
        with meter:
            results = real(request, known, start, stop, **kwargs)
        seen.append((stop - start, meter.bytes))
        return results

    eager.fill = watching
    try:
        with gradkern.use("autograd", memory_budget=budget):
            gradkern.jacobian(model, x)
    finally:
        eager.fill = real
    assert sum(n for n, _ in seen) == 64
    assert len(seen) > 1
    assert max(b for _, b in seen) <= budget


@pytest.mark.parametrize(
    ("stop", "chunk", "spans"),
    [
        (10, 3, [(0, 2), (2, 5), (5, 7), (7, 10)]),
        (257, 256, [(0, 128), (128, 257)]),
        (5, 100, [(0, 5)]),
        (0, 4, []),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_spans_are_even(stop, chunk, spans):
    assert list(eager.spans(0, stop, chunk)) == spans


@pytest.mark.parametrize("engine", ENGINES)
def test_iter_jacobian(engine):
    model, (x,) = net(n=11)
    want = gradkern.jacobian(model, x, engine=engine)
    for chunk, sizes in ((1, [1] * 11), (np.int64(4), [3, 4, 4]), (11, [11]), (50, [11]), (None, [11])):
        parts = list(gradkern.iter_jacobian(model, x, chunk=chunk, engine=engine))
        assert [len(p) for p in parts] == sizes
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
