"""The estimates that a GPU's plan is chosen by: numbers worked out by hand, and what has to cost more."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from gradkern.codegen import limits, records
from gradkern.codegen.cuda import clock_model
from gradkern.codegen.cuda.clock_model import RunPrice, Work
from gradkern.codegen.cuda.lowering import Device, lower_device
from gradkern.codegen.records import Bands, Place, ScatterAlgorithm, ScatterT
from gradkern.codegen.scratch import Buffer
from gradkern.ir.program import Step, View
from tests.support.case_runs import program_of
from tests.support.programs import RELU, conv, linear, pool, program

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BANDS = [Bands(1, 8, 1, 2), Bands(1, 1, 1, 5)]
WORK = Work(warps=8, resident=4, block=16, tile=5, itemsize=4, band_options={0: BANDS})
HERE = Place(Buffer(4096, base=0), 0, 64, 4)
SCATTER = ScatterT(
    src=HERE, seed_rows=False, dst=HERE, O=16, pattern=None, weights=0, row_length=24, window_table=0,
    H=1, W=64, C=4, groups=1, merged=False, window_elements=20, algorithm=ScatterAlgorithm.Walk,
)  # fmt: skip
DENSE = records.DenseT(
    src=HERE, seed_rows=False, dst=HERE, O=64, pattern=None, weights=0, row_length=256, window_table=0,
    window_elements=256, joined=True, assign=True, whole_block=True,
)  # fmt: skip
MATMUL = records.MatMul(HERE, HERE, HERE, 1, 1, matrices=2, rows=16, columns=16, terms=8)


def rises(prices: list[float]) -> bool:
    return all(a < b for a, b in pairwise(prices))


# ---- every kind


def filled(cls: type) -> Any:
    """A record, or a part of one, with 1 in every number and the smallest of every enumeration."""
    hints, values = get_type_hints(cls), {}
    for f in fields(cls):
        kind = next((t for t in get_args(hints[f.name]) if t is not type(None)), hints[f.name])
        if kind is Place:
            values[f.name] = HERE
        elif is_dataclass(kind):
            values[f.name] = filled(kind)
        else:
            values[f.name] = next(iter(kind)) if issubclass(kind, IntEnum) else kind(1)
    return cls(**values)


@pytest.mark.parametrize("kind", records.KINDS)
def test_every_kind_has_a_price_or_is_listed(kind):
    """A kind of the CPU alone has none; those in the list cost the step to the next record, the others more."""
    op, step = filled(kind), clock_model.BARRIER / WORK.block
    work = replace(WORK, resident=WORK.block, band_options={1: BANDS})  # for the weights of `filled`
    if kind is records.WindowT:
        with pytest.raises(TypeError, match="WindowT has no price"):
            work.clocks(op, False)
    elif kind in clock_model.BARRIERS:
        assert work.clocks(op, False) == step
    else:
        assert work.clocks(op, False) > step


# ---- by hand


def test_a_loop_waits_for_its_instructions_or_for_its_loads():
    """Four instructions and one wavefront per clock, at the share of that which loops reach."""
    assert clock_model.loop(12, 1) * clock_model.PACE == pytest.approx(3)
    assert clock_model.loop(4, 6) * clock_model.PACE == pytest.approx(6)


def test_busy_share_of_workers_counts_the_idle_last_round():
    assert clock_model.busy(16, 8) == 1
    assert clock_model.busy(9, 8) == 9 / 16
    assert clock_model.busy(1, 8) == 1 / 8


def test_even_tiles_have_no_small_remainder():
    assert [clock_model.even(count, 5) for count in (1, 5, 6, 7, 10, 11)] == [1, 5, 3, 4, 5, 4]


@pytest.mark.parametrize(
    ("elements", "lanes"), [(1, 4), (4, 4), (5, 4), (20, 4), (24, 8), (33, 8), (48, 16), (80, 16), (81, 32), (160, 32)]
)
def test_workers_are_small_and_leave_no_lane_idle(elements, lanes):
    """The smallest workers that have at most five elements per lane, where larger ones idle no less."""
    assert clock_model.worker_lanes(elements) == lanes


def test_the_share_of_workers_that_are_busy():
    """Eight warps of eight workers; 64 positions of four samples in bands of eight: 32 bands, in two colours."""
    assert clock_model.busy_bands(1, 64, BANDS[0], copies=4, workers=64) == pytest.approx(32 / 64 / 2)
    # Single positions, every fifth of one colour: 13 of four samples at most, where 64 workers wait.
    assert clock_model.busy_bands(1, 64, BANDS[1], copies=4, workers=64) == pytest.approx(256 / (64 * 5))


# ---- what has to cost more


def test_more_seeds_cost_more():
    """In full visits: thirteen seeds are three visits of five, and may take longer than sixteen in four of four."""
    for op in (SCATTER, DENSE, MATMUL, records.Zero(HERE, 4096)):
        assert rises([replace(WORK, tile=n).clocks(op, forward=False) for n in (5, 10, 20, 40)]), type(op).__name__
    for planes in (1, 2):
        assert rises(
            [clock_model.walk_clocks(20, 16, True, n, planes, True) for n in range(1, limits.WALK_SEEDS.float32 + 1)]
        )
        for prices in (
            [clock_model.narrow_clocks(8, 16, n, planes, 4)[0] for n in range(1, 24)],
            [clock_model.quad_clocks(5, 16, n, planes, True, 8, 4)[0] for n in range(1, 24)],
        ):
            assert prices == sorted(prices) and prices[0] < prices[-1] / 5  # a visit has room for a few of them


def test_more_channels_cost_more():
    for algorithm in ScatterAlgorithm:
        op = replace(SCATTER, algorithm=algorithm, window_elements=8)
        assert rises([WORK.clocks(replace(op, O=n), forward=False) for n in (16, 32, 64, 128)]), algorithm


def test_the_forward_pass_does_not_depend_on_the_seeds():
    op = records.Window(HERE, HERE, 1, 64, 4, 16, 1, 1, 20, 0, 0, 0)
    assert len({replace(WORK, tile=n).clocks(op, forward=True) for n in (1, 5, 20)}) == 1


def test_a_linear_layer_is_cheaper_for_more_samples():
    """Its weight is read from L2 once for all samples of a block."""
    prices = [replace(WORK, block=n, tile=1).clocks(DENSE, forward=False) for n in (1, 2, 4, 8, 16)]
    assert rises(prices[::-1])


def test_doubles_are_visited_more_often():
    """Three quads a lane: registers for 18 sums hold six seeds of them, and for 4 sums one."""
    visits = [clock_model.quad_clocks(12, 16, 6, 1, False, 4, itemsize)[1] for itemsize in (4, 8)]
    assert visits == [1, 6]
    assert [clock_model.narrow_clocks(8, 16, 5, 1, itemsize)[1] for itemsize in (4, 8)] == [1, 2]
    assert replace(WORK, itemsize=8).transposed(SCATTER) > WORK.transposed(SCATTER)  # five seeds: one walk, or three


# ---- what is chosen


@pytest.mark.parametrize("algorithm", ScatterAlgorithm)
def test_workers_are_of_documented_sizes(algorithm):
    _, lanes, bands = WORK.transposed(replace(SCATTER, algorithm=algorithm, window_elements=8))
    documented = {
        ScatterAlgorithm.Walk: (4,),
        ScatterAlgorithm.Quads: clock_model.QUAD_LANES,
        ScatterAlgorithm.Narrow: (limits.NARROW_LANES,),
    }
    assert lanes in documented[algorithm]
    assert bands in BANDS


def test_the_cheaper_bands_are_taken():
    both = [WORK.transposed(SCATTER)[0]]
    alone = [replace(WORK, band_options={0: [bands]}).transposed(SCATTER)[0] for bands in BANDS]
    assert both == [min(alone)] and len(set(alone)) == 2


def test_a_run_takes_the_number_of_samples_that_is_cheapest():
    run = RunPrice(False, WORK)
    run.add(SCATTER, forward=False, times=2)
    for block in (1, 5, 12, 16):
        best = [run.best(block, most) for most in range(1, 13)]
        prices = {n: clock_model.in_steps(lambda m: run.price(m, 0), block, n) for n in clock_model.even_steps(block)}
        for most, (price, resident) in enumerate(best, 1):
            assert resident <= most
            assert price == prices[resident] == min(prices[n] for n in prices if n <= most)
    assert run.price(1, 0) == 2 * replace(WORK, resident=1, block=0).clocks(SCATTER, forward=False)


def test_a_ragged_last_step_has_its_own_price():
    """Seven samples, three at a time: two steps of three, and one of a single sample, at twice the price each."""
    assert clock_model.even_steps(7) == (1, 2, 3, 4, 7)
    assert clock_model.in_steps({3: 10.0, 1: 24.0}.__getitem__, 7, 3) == (2 * 3 * 10 + 24) / 7
    assert clock_model.in_steps({3: 10.0}.__getitem__, 6, 3) == 10


def test_numbers_on_their_way_in_and_out_cost_time():
    work = replace(WORK, resident=16)
    load = filled(records.Load)
    wider = replace(load, extent=replace(load.extent, W=101))
    assert work.clocks(wider, True) - work.clocks(load, True) == pytest.approx(100 * clock_model.LOADED)
    store = filled(records.StoreT)
    wider = replace(store, extent=replace(store.extent, W=101))
    assert work.clocks(wider, False) - work.clocks(store, False) == pytest.approx(5 * 100 * clock_model.STORED)


@pytest.mark.parametrize("net", ["cnn1d", "lenet5", "mlp"])
def test_the_price_is_near_what_an_h200_took(net):
    """Within a third, for the whole network; the measured times are those of the committed run, launch included."""
    measured = json.loads((RESULTS / "gpu-h200-records.json").read_text())[net]
    samples = {"cnn1d": 194109, "lenet5": 60000, "mlp": 194109}[net]
    program, machine = program_of(net), Device("cuda", 16)
    chain = lower_device(program, list(range(len(program.steps))), [program.output], machine, 4, program.outputs, (0,))
    predicted = machine.milliseconds(sum(chain.clocks), samples)
    assert predicted == pytest.approx(sum(row["measured"] for row in measured), rel=0.33)


NET = program(
    Step(conv(5, padding=2, name="a"), (0,), (16, 64)),
    Step(RELU, (1,), (16, 64)),
    Step(pool(2), (2,), (16, 32)),
    Step(conv(5, padding=2, name="b"), (3,), (32, 32)),
    Step(RELU, (4,), (32, 32)),
    Step(pool(2), (5,), (32, 16)),
    Step(View(), (6,), (512,)),
    Step(linear(), (7,), (10,)),
    inputs=((1, 64),),
)


def clocks(kib: int, seeds: int) -> float:
    chain = lower_device(NET, list(range(8)), [8], Device("cuda", 16, shared_bytes=kib << 10), 4, seeds, (0,))
    assert chain.scratch <= kib << 10
    return sum(chain.clocks)


def test_a_chain_is_no_slower_with_more_memory_and_dearer_with_more_seeds():
    prices = {kib: [clocks(kib, seeds) for seeds in (1, 3, 10)] for kib in (32, 64, 227)}
    assert all(rises(row) for row in prices.values())
    for small, large in ((32, 64), (64, 227)):
        assert all(a >= b for a, b in zip(prices[small], prices[large], strict=True))
