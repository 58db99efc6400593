"""Kernels or autograd: the choice by measurement, on a fake clock."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import gradkern
from gradkern.dispatch import eager, ways
from gradkern.planner.timing import TIE, Timing
from gradkern.runtime import executor, whole_chain
from tests.cases import net

pytestmark = pytest.mark.real_export


@pytest.fixture(autouse=True)
def no_other_timings():
    """Timings are remembered by plan: none of an earlier test, nor for a later one."""
    ways.timings.clear()
    yield
    ways.timings.clear()


@pytest.fixture
def taken(monkeypatch):
    """What ran, in order: "kernels" or (samples, seeds together), after the model has been measured."""
    runs: list = []
    real_kernels, real_chain, real_autograd = executor.jacobian, whole_chain.WholeChain.__call__, eager.fill
    real_repeat = whole_chain.WholeChain.repeat

    def kernels(*args, **kwargs):
        runs.append("kernels")
        return real_kernels(*args, **kwargs)

    def chain(*args):
        runs.append("kernels")
        return real_chain(*args)

    def repeated(*args):  # None: the weights have changed, and `__call__` follows
        results = real_repeat(*args)
        runs.extend(["kernels"] * (results is not None))
        return results

    def autograd(request, partial, start, stop, together=None):
        runs.append((stop - start, together))
        return real_autograd(request, partial, start, stop, together)

    monkeypatch.setattr(executor, "jacobian", kernels)
    monkeypatch.setattr(whole_chain.WholeChain, "__call__", chain)
    monkeypatch.setattr(whole_chain.WholeChain, "repeat", repeated)
    monkeypatch.setattr(eager, "fill", autograd)
    return runs


@pytest.fixture
def decided(monkeypatch):
    """Lets a test say which way is the fastest; returns the sizes that were measured."""
    sizes: list[int] = []

    def decide(fastest, slower=2.0):
        def measure(request, found, seeds, profile):
            sizes.append(request.samples)
            return Timing(
                request.samples, {way: 1.0 if way == fastest else slower for way in ("kernels", "loop", "batched")}
            )

        monkeypatch.setattr(ways, "measure", measure)
        return sizes

    return decide


def test_ties_go_to_the_kernels():
    assert Timing(8, {"kernels": TIE, "loop": 1.0}).way == "kernels"
    assert Timing(8, {"kernels": 1.01 * TIE, "loop": 1.0}).way == "loop"
    assert Timing(8, {"kernels": 2.0, "loop": 1.5, "batched": 1.0}).way == "batched"
    shown = Timing(8, {"kernels": 3.1e-3, "loop": 2.2e-3, "batched": 4e-3}).text()
    assert shown.startswith("measured on 8 samples: kernels 3.1 ms, autograd 2.2 ms: calls take autograd (one backward")


@pytest.mark.parametrize(("fastest", "ran"), [("kernels", "kernels"), ("loop", (5, 1)), ("batched", (5, 3))])
def test_calls_take_the_faster_way(fastest, ran, decided, taken):
    model, (x,) = net(n=5)
    gradkern.prepare(model, x)
    want = gradkern.jacobian(model, x, engine="kernel")
    decided(fastest)
    taken.clear()
    for targets in (None, [2, 0, 1], gradkern.TopK(3)):
        got = gradkern.jacobian(model, x, targets)
        assert taken == [ran]
        taken.clear()
        if targets is None:
            torch.testing.assert_close(got, want)
    assert str(gradkern.explain(model, x, show=False)).splitlines()[-1].startswith("measured on 5 samples: ")
    gradkern.jacobian(model, x, engine="kernel")
    assert taken == ["kernels"]


def test_parts_of_a_call_go_the_way_of_the_whole(decided, taken):
    model, (x,) = net(n=11)
    gradkern.prepare(model, x)
    sizes = decided("loop")
    whole = gradkern.jacobian(model, x)
    assert sizes == [11]
    decided("kernels")  # for what has not been measured yet: calls of one sample
    parts = list(gradkern.iter_jacobian(model, x, chunk=5))  # the last has one sample
    assert torch.equal(torch.cat(parts), whole)
    assert "kernels" not in taken
    assert sizes == [11]
    gradkern.jacobian(model, x[:1])
    assert taken[-1] == "kernels"


def test_points_of_a_path_go_one_way(decided, taken):
    model, (x,) = net(n=3)
    gradkern.prepare(model, x)
    decided("loop")
    method = gradkern.attr.IntegratedGradients(model)
    with gradkern.use(memory_budget=100_000):
        got = method.attribute_all(x, n_steps=70)
        assert len(taken) > 1
        assert "kernels" not in taken
        with gradkern.use("kernel"):
            torch.testing.assert_close(got, method.attribute_all(x, n_steps=70))


@pytest.mark.measured_ways
@pytest.mark.parametrize(("n", "targets"), [(1, None), (3, None), (40, [1]), (5, torch.arange(250).view(5, 50) % 3)])
def test_a_measurement_runs_every_way_and_warms_up_first(n, targets, monkeypatch, taken):
    clock = itertools.count(1)

    def seconds_of(work, device):
        work()
        return 1e-4 * next(clock)

    monkeypatch.setattr(ways, "seconds_of", seconds_of)
    model, (x,) = net(n=n)
    gradkern.prepare(model, x)
    timing = gradkern.explain(model, x, targets, show=False).timing
    assert timing.samples == min(n, ways.MOST_SAMPLES)
    seeds = 3 if targets is None else np.shape(targets)[-1]
    assert list(timing.seconds) == ["kernels", "loop", "batched"][: 2 + (seeds > 1)]
    assert taken[:2] == ["kernels", (min(n, 2), 1)]
    assert ("kernels" in taken[3:]) and (min(n, 32), 1) in taken[2:]
    first = len(taken)
    assert gradkern.explain(model, x, targets, show=False).timing is timing
    assert len(taken) == first


@pytest.mark.measured_ways
@pytest.mark.parametrize(("scale", "samples", "large", "way"), [(1.0, 32, 2, "loop"), (10.0, 8, 0, "kernels")])
def test_large_weights_count_less_in_large_calls(scale, samples, large, way, monkeypatch):
    """Torch reads them once for all samples, so eight samples say little of a call of 32."""
    ran: list[tuple[str, int]] = []  # the way and the number of samples of each piece of work

    def seconds_of(work, device):
        work()
        way, n = ran[-1]
        return scale * (0.02 * n if way == "kernels" else 0.15 + 0.006 * n)

    monkeypatch.setattr(whole_chain.WholeChain, "__call__", lambda *args: ran.append(("kernels", len(args[-1][0]))))
    monkeypatch.setattr(eager, "run_as_measured", lambda part, *args, **options: ran.append(("loop", part.samples)))
    monkeypatch.setattr(ways, "seconds_of", seconds_of)
    model, (x,) = net(n=40)
    gradkern.prepare(model, x)
    timing = gradkern.explain(model, x, [1], show=False).timing
    assert timing.samples == samples
    assert min(timing.seconds, key=timing.seconds.get) == way
    sizes = [n for _, n in ran]
    assert sizes.count(8) == 2
    assert sizes.count(32) == large


@pytest.mark.measured_ways
def test_one_chain_is_timed_as_it_is_called(monkeypatch):
    """On the way of other networks, a call of one sample takes much longer."""
    monkeypatch.setattr(ways.batching, "run", None)
    model, (x,) = net(n=1)
    gradkern.prepare(model, x)
    assert "kernels" in gradkern.explain(model, x, show=False).timing.seconds


@pytest.mark.measured_ways
def test_a_way_that_torch_cannot_run_is_not_taken(monkeypatch):
    def fill(request, partial, start, stop, together=None):
        if together != 1:
            raise RuntimeError("vmap: no batching rule")
        return real(request, partial, start, stop, together)

    real = eager.fill
    monkeypatch.setattr(eager, "fill", fill)
    model, (x,) = net(n=2)
    gradkern.prepare(model, x)
    assert list(gradkern.explain(model, x, show=False).timing.seconds) == ["kernels", "loop"]


def test_seeds_that_do_not_fit_in_memory_go_in_groups(decided, taken):
    model, (x,) = net(n=9)
    gradkern.prepare(model, x)
    want = gradkern.jacobian(model, x, engine="kernel")
    decided("batched")
    taken.clear()
    with gradkern.use(memory_budget=30_000):
        got = gradkern.jacobian(model, x)
    torch.testing.assert_close(got, want)
    assert "kernels" not in taken
    assert len(taken) > 1


@pytest.mark.parametrize("way", ["loop", "kernels"])
def test_a_store_records_the_way_and_a_resumed_run_reads_it(way, decided, taken, tmp_path):
    model, (x,) = net(n=20)
    decided(way)
    options = {"method": "jacobian", "chunk": 8}
    results = gradkern.run(model, x, tmp_path / "maps.zarr", **options)
    assert results.about["pinned"]["way"] == way
    decided("batched")
    ways.timings.clear()  # what was measured for the first store
    del taken[:]
    partial = gradkern.run(model, x, tmp_path / "shards.zarr", shard=(0, 2), **options)
    assert partial.about["pinned"]["way"] is None
    assert set(taken) == {"kernels"}  # shards may have stores of their own
    again = gradkern.run(model, x, tmp_path / "again.zarr", **options)
    assert again.about["pinned"]["way"] == "batched"


def test_the_pinned_way_is_taken_whatever_is_measured(decided, taken):
    model, (x,) = net(n=4)
    gradkern.prepare(model, x)
    sizes = decided("kernels")
    with ways.pinned("batched"), gradkern.use("kernel"):
        gradkern.jacobian(model, x)
    assert taken == [(4, 3)]
    assert not sizes


def test_inputs_that_are_not_reached_are_not_measured(decided):
    class First(torch.nn.Module):
        def forward(self, a, b):
            return a * 2

    x = torch.randn(3, 2)
    sizes = decided("loop")
    assert gradkern.explain(First(), (x, x), show=False).timing is None
    assert not sizes
