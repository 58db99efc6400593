"""The layouts of a chain's packed weights: when they are made, where they lie, and which of two is cheaper."""

from __future__ import annotations

from gradkern.codegen.layouts import Layouts
from gradkern.codegen.machine import Machine
from gradkern.codegen.spec import ChainSpec
from gradkern.codegen.weights import align
from gradkern.ir.program import Program, Step
from tests.support.programs import classifier, conv, pool, program, units_of

CPU = Machine("portable", 16)  # four floats per vector


def layouts_of(p: Program, seeds: int = 3) -> Layouts:
    return Layouts(ChainSpec(units_of(p), CPU, 4, seeds, (0,), onehot=True, linear=False))


def test_layouts_are_made_once_and_lie_one_after_another():
    layouts = layouts_of(classifier())
    convolution, linear = layouts.spec.graph.units[1], layouts.spec.graph.units[3]
    first = layouts.window(convolution)
    assert (first.weights, layouts.size) == (0, first.size)
    second, back = layouts.window(linear), layouts.scatter(convolution, None)
    assert (second.weights, back.weights) == (first.size, first.size + second.size)
    assert layouts.window(convolution) is first
    assert layouts.size == first.size + second.size + back.size
    assert [x.size for x in layouts.made.values()] == [align(x.size) for x in layouts.made.values()]


def test_a_narrow_window_before_a_pool_covers_all_taps_and_a_wide_one_does_not():
    """A kernel of three, merged, is four wide.  Of one channel that is one vector either way; of eight channels eight
    vectors in place of six, which each live one of 32 outputs is multiplied with."""
    for channels, outputs, merged in ((1, 4, True), (8, 32, False)):
        p = program(
            Step(conv(), (0,), (outputs, 8)), Step(pool(2), (1,), (outputs, 4)), inputs=((channels, 8),)
        )  # fmt: skip
        layouts = layouts_of(p)
        convolution, pattern = layouts.spec.graph.units[1:]
        assert layouts.scatter(convolution, pattern).merged == merged


def test_rows_are_interleaved_only_by_a_merged_layout_of_an_image():
    layouts = layouts_of(classifier())
    load, convolution = layouts.spec.graph.units[:2]
    assert layouts.interleaved_rows(load.out) == 1
    layouts.scatter(convolution, None)
    assert layouts.interleaved_rows(load.out) == 1
