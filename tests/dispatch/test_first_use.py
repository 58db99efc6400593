"""When a model is captured, on a fake clock: by what autograd takes, against the cost of a capture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkern
from gradkern.dispatch import autograd_call, eager, first_use, program_call, state
from gradkern.dispatch.first_use import AutogradWork
from gradkern.planner.timing import Timing
from gradkern.runtime import whole_chain

pytestmark = pytest.mark.real_export
COST, KERNEL = 1.0, 0.1  # seconds of a capture; of a call on kernels, as a share of one on autograd


def seconds(calls: int, each: float, pieces: int = 1) -> tuple[float, int]:
    """Seconds of so many equal calls, by the rule, and the number of calls that ran on autograd to their end."""
    work, spent = AutogradWork(output_shape=None), 0.0
    for call in range(calls):
        left = pieces if work.output_shape is not None else 0
        if work.capture_pays(left):
            return spent + COST + (calls - call) * KERNEL * each, call
        for piece in range(pieces):
            work.add(1, each / pieces)
            spent += each / pieces
            rest = pieces - piece - 1
            if rest and work.capture_pays(rest):
                return spent + COST + (rest / pieces + calls - call - 1) * KERNEL * each, call
        work.calls, work.output_shape = work.calls + 1, (1,)
    return spent, calls


@pytest.fixture(autouse=True)
def _cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "capture_cost", lambda: COST)


@pytest.mark.parametrize("each", [0.001, 0.01, 0.05, 0.09, 0.11, 0.15, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("pieces", [1, 8])
def test_ten_calls_cost_little_more_than_the_better_way_in_hindsight(each: float, pieces: int) -> None:
    took, _ = seconds(10, each, pieces)
    better = min(10 * each, COST + 10 * KERNEL * each)
    worst = 1.3 if pieces > 1 or each <= 0.3 else 1.0 + each / better  # a first call in one piece cannot be left
    assert took <= worst * better


@pytest.mark.parametrize("calls", [1, 2, 5, 20, 100, 1000])
@pytest.mark.parametrize("each", [0.001, 0.02, 0.09, 0.11, 0.3, 0.9])
def test_no_number_of_calls_costs_much_more_than_twice_the_better_way(calls: int, each: float) -> None:
    took, _ = seconds(calls, each)
    better = min(calls * each, COST + calls * KERNEL * each)
    assert took <= 2.2 * better or took <= COST + 2 * each + calls * KERNEL * each  # a second call foresees ten


def test_a_second_call_of_some_length_is_captured_at_its_beginning() -> None:
    assert seconds(6, 0.13)[1] == 1
    assert seconds(6, 0.05)[1] == 6


@pytest.mark.parametrize("pieces", [2, 3, 10])
def test_a_call_whose_rest_takes_twice_the_cost_switches_within(pieces: int) -> None:
    each = 2.01 * COST * pieces / (pieces - 1)  # what is left after the first piece takes twice the cost
    assert seconds(1, each, pieces)[1] == 0


def test_short_passes_say_little_about_long_ones() -> None:
    work = AutogradWork(calls=3)
    work.add(1, 1e-3)  # one sample: mostly overhead
    assert not work.capture_pays(1000)
    work.add(600, 0.1)
    assert work.capture_pays(1000)


class Clock:
    """Time that passes on autograd only, 1 ms per sample and seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.passes = 0.0, []
        real, chain = eager.fill, whole_chain.WholeChain.__call__

        def fill(request, partial, start, stop, together=None):
            results = real(request, partial, start, stop, together)
            self.now += 1e-3 * (stop - start) * results.seeds.count
            self.passes.append(stop - start)
            return results

        def kernels(*args):
            self.passes.append("kernels")
            return chain(*args)

        monkeypatch.setattr(eager, "fill", fill)
        monkeypatch.setattr(whole_chain.WholeChain, "__call__", kernels)
        monkeypatch.setattr(whole_chain.WholeChain, "repeat", lambda *args: None)  # as if the weights had changed
        for module in (autograd_call, program_call, state):
            monkeypatch.setattr(module, "clock", lambda: self.now)
        monkeypatch.setattr(program_call.ways, "measure", lambda *args: Timing(1, {"kernels": 1.0, "loop": 2.0}))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def test_calls_that_are_repeated_are_on_kernels_from_the_second_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(monkeypatch), network()
    for call in range(3):
        x = torch.randn(60, 4, dtype=torch.float64)  # 0.12 s with two seeds
        got = gradkern.jacobian(model, x)
        torch.testing.assert_close(got, gradkern.jacobian(model, x, engine="autograd"))
        assert clock.passes == [60 if call == 0 else "kernels", 60]
        clock.passes.clear()


def test_more_seeds_make_a_capture_worthwhile_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(monkeypatch), network()
    for _ in range(2):  # 0.06 s each with one seed
        gradkern.jacobian(model, torch.randn(60, 4, dtype=torch.float64), 1)
    assert clock.passes == [60] * 2
    gradkern.jacobian(model, torch.randn(60, 4, dtype=torch.float64))  # 0.12 s, and as many again
    assert clock.passes == [60] * 2 + ["kernels"]
