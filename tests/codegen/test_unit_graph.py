"""Which steps one kernel does together, and where values lie: small programs, their units written down by hand."""

from __future__ import annotations

import pytest

from gradkern.codegen.unit_graph import GraphBuilder
from gradkern.codegen.units import POINT, Pattern, Unit, UnitGraph
from gradkern.ir.program import Index, LowRank, Part, Program, Select, Step, Sum, View, Windows
from tests.support.programs import GUIDED, RELU, TANH, conv, linear, norm, pool, program, transpose


def grouped(p: Program, live_out: list[int] | None = None) -> UnitGraph:
    return GraphBuilder(p, list(range(len(p.steps))), live_out or [p.output]).build()


def kind(unit: Unit) -> str:
    return type(unit).__name__.lower()


def units(p: Program, live_out: list[int] | None = None) -> list[tuple[str, list[int]]]:
    return [(kind(unit), list(unit.steps)) for unit in grouped(p, live_out).units]


def test_a_classifier():
    """The norm is folded into the convolution, ReLU and pool are one pattern, and flattening is no work."""
    p = program(
        Step(conv(), (0,), (4, 8)),
        Step(norm(), (1,), (4, 8)),
        Step(RELU, (2,), (4, 8)),
        Step(pool(2), (3,), (4, 4)),
        Step(View(), (4,), (16,)),
        Step(linear(), (5,), (3,)),
        inputs=((1, 8),),
    )
    assert units(p) == [("load", []), ("window", [0, 1]), ("pattern", [2, 3]), ("window", [5])]
    _, first, pattern, last = grouped(p).units
    assert [fold.form for fold in first.folds] == [norm()]
    assert (pattern.relu, pattern.pool) == (True, Windows((2,), (2,), ((0, 0),), (1,)))
    assert last.reads == (pattern.out,) and last.dense and not first.dense


def test_a_pool_takes_the_relu_behind_it_too():
    p = program(Step(conv(), (0,), (4, 8)), Step(pool(2), (1,), (4, 4)), Step(RELU, (2,), (4, 4)))
    assert units(p) == [("load", []), ("window", [0]), ("pattern", [1, 2])]
    assert grouped(p).units[-1].relu


def test_what_somebody_else_reads_is_a_unit_of_its_own():
    p = program(Step(conv(), (0,), (4, 8)), Step(RELU, (1,), (4, 8)), Step(pool(2), (2,), (4, 4)))
    assert units(p, [2, 3]) == [("load", []), ("window", [0]), ("pattern", [1]), ("pattern", [2])]
    residual = program(Step(conv(), (0,), (4, 8)), Step(norm(), (1,), (4, 8)), Step(Sum(), (1, 2), (4, 8)))
    assert units(residual) == [("load", []), ("window", [0]), ("stencil", [1]), ("add", [2])]


@pytest.mark.parametrize(
    ("select", "positions", "patterns"),
    [(pool(2), 4, [[1, 2]]), (pool(3, 1), 6, [[1], [2]])],
    ids=["windows apart", "windows overlap"],
)
def test_a_guided_relu_rectifies_before_windows_are_added_up(select: Select, positions: int, patterns: list[list[int]]):
    p = program(Step(conv(), (0,), (4, 8)), Step(GUIDED, (1,), (4, 8)), Step(select, (2,), (4, positions)))
    made = [unit for unit in grouped(p).units if isinstance(unit, Pattern)]
    assert [list(unit.steps) for unit in made] == patterns
    assert [unit.rectify for unit in made] == [True, False][: len(made)]


def test_depthwise_convolutions_are_channelwise_maps():
    p = program(Step(conv(groups=4), (0,), (4, 8)))
    assert units(p) == [("load", []), ("stencil", [0])]
    twice = program(Step(conv(groups=4), (0,), (8, 8)))  # two results per channel: every channel is copied first
    assert units(twice) == [("load", []), ("move", []), ("stencil", [0])]
    assert [(node.C, node.W) for node in (unit.out for unit in grouped(twice).units)] == [(4, 8), (8, 8), (8, 8)]
    halves = program(Step(conv(groups=2), (0,), (6, 8)))
    assert units(halves) == [("load", []), ("window", [0])]


def test_steps_that_no_wanted_value_needs_are_left_out():
    p = program(Step(conv(), (0,), (4, 8)), Step(TANH, (1,), (4, 8)), Step(RELU, (1,), (4, 8)))
    assert units(p) == [("load", []), ("window", [0]), ("pattern", [2])]


def test_a_sum_of_three_is_two_units():
    p = program(Step(Sum(), (0, 1, 2), (4, 8)), inputs=((4, 8),) * 3)
    assert units(p) == [("load", [])] * 3 + [("add", [0]), ("add", [0])]


def test_after_a_concatenation_norms_fold_and_relus_stay_patterns():
    left, right = (
        Part((0, 1), (((0, 4, 1), (-1, 2, 0)), ((0, 8, 1),))),
        Part((0, 1), (((-1, 4, 0), (0, 2, 1)), ((0, 8, 1),))),
    )
    p = program(
        Step(conv(name="a"), (0,), (4, 8)),
        Step(conv(name="b"), (0,), (2, 8)),
        Step(Index((left, right)), (1, 2), (6, 8)),
        Step(norm(), (3,), (6, 8)),
        Step(RELU, (4,), (6, 8)),
        inputs=((1, 8),),
    )
    windows, patterns = [("window", [0]), ("window", [1])], [("pattern", [4]), ("pattern", [4])]
    assert units(p) == [("load", []), *windows, *patterns, ("move", [2, 3, 4])]
    _, a, b, *_ = grouped(p).units
    assert [fold.first for fold in a.folds] == [0]
    assert [fold.first for fold in b.folds] == [4]  # its channels follow the four of the first


# ---- where values lie


def test_tokens_lie_with_their_features_as_channels():
    """A linear layer on the last axis is a window of one position; nothing is copied."""
    p = program(Step(linear(), (0,), (6, 5)), Step(LowRank("softmax", 1), (1,), (6, 5)), inputs=((6, 4),))
    assert units(p) == [("load", []), ("window", [0]), ("lines", [1])]
    graph = grouped(p)
    _, window, softmax = graph.units
    assert window.form.map == POINT
    assert (window.out.C, window.out.W, softmax.along) == (5, 6, "C")
    assert graph.row_major == {0, 2}


def test_a_transpose_behind_a_convolution_costs_nothing():
    p = program(
        Step(conv(), (0,), (4, 8)),
        Step(transpose((4, 8)), (1,), (8, 4)),
        Step(linear(), (2,), (8, 3)),
        inputs=((2, 8),),
    )
    assert units(p) == [("load", []), ("window", [0]), ("window", [2])]
    assert grouped(p).row_major == {3}


def test_factors_along_the_positions_are_read_from_a_copy():
    """A norm of the last axis cannot be folded into a convolution, whose channels come first."""
    p = program(Step(conv(), (0,), (4, 8)), Step(norm(axis=1), (1,), (4, 8)))
    assert units(p) == [("load", []), ("window", [0]), ("move", []), ("stencil", [1])]
    assert [(unit.out.C, unit.out.W) for unit in grouped(p).units[1:]] == [(4, 8), (8, 4), (8, 4)]


def test_a_softmax_of_positions_works_along_the_columns():
    p = program(Step(conv(), (0,), (4, 8)), Step(LowRank("softmax", 1), (1,), (4, 8)))
    assert units(p) == [("load", []), ("window", [0]), ("lines", [1])]
    assert grouped(p).units[-1].along == "W"


@pytest.mark.parametrize(
    ("convolutions", "halo"),
    [
        ([(conv(3), 8)], [0, 0, 1, 1]),
        ([(conv(3), 8), (conv(5, padding=2), 8)], [0, 0, 2, 2]),
        ([(conv(3, stride=2), 4)], [0, 0, 1, 0]),  # the last window, from 5 to 7, stays inside
        ([(conv(3, padding=0), 6)], [0, 0, 0, 0]),
    ],
    ids=["padding", "the wider of two", "a stride that stops short", "no padding"],
)
def test_padding_is_a_border_of_what_is_read(convolutions, halo):
    steps = [Step(form, (0,), (4, length)) for form, length in convolutions]
    p = program(*steps, inputs=((1, 8),))
    assert grouped(p, list(range(1, 1 + len(steps)))).inputs[0].halo == halo


def test_a_relu_writes_over_what_nobody_else_reads():
    p = program(Step(conv(), (0,), (4, 8)), Step(RELU, (1,), (4, 8)))
    first, relu = (unit.out for unit in grouped(p).units[1:])
    assert relu.memory == first.memory
    first, relu = (unit.out for unit in grouped(p, [1, 2]).units[1:])
    assert relu.memory != first.memory  # the caller wants both
    loaded, relu = (unit.out for unit in grouped(program(Step(RELU, (0,), (4, 8)))).units)
    assert relu.memory != loaded.memory  # the input's storage is loaded again
