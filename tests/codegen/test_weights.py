"""Packed weights of small layers, worked out by hand: four lanes, channels last, zeros where nothing is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradkern.codegen import units
from gradkern.codegen.weights import Layout, ScatterLayout, StencilLayout, WindowLayout, mergeable, tiles
from gradkern.ir.program import Contract, Positions, Program, Select, Step, View
from tests.support.programs import conv, linear, norm, pool, program, units_of

LANES = 4


def unit_of(p: Program, number: int = 1) -> units.Unit:
    """A unit of a program; number 0 loads the input."""
    return units_of(p).units[number]


def filled(layout: Layout, **params: list) -> Tensor:
    """The packed weights in rows of four."""
    layout.weights = 0
    packed = torch.zeros(layout.size)
    layout.fill(packed, {name.replace("_", "."): torch.tensor(value) for name, value in params.items()})
    return packed.view(-1, LANES)


#: Two channels read, two written, three taps: weight ``[O, C, taps]``.
WEIGHT = [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[7.0, 8.0, 9.0], [10.0, 11.0, 12.0]]]
TWO_CHANNELS = program(Step(conv(), (0,), (2, 4)), inputs=((2, 4),))


def test_forward_weights_are_rows_of_output_channels_in_the_order_of_the_window():
    layout = WindowLayout.of(unit_of(TWO_CHANNELS), LANES)
    packed = filled(layout, w_weight=WEIGHT, w_bias=[0.5, 0.25])
    assert (layout.R, layout.L, layout.K, layout.row_length) == (1, 6, 6, 4)
    assert layout.origin == -2  # the first window begins one position of two channels before the interior
    assert packed[:6].tolist() == [
        [1, 7, 0, 0], [4, 10, 0, 0],  # tap 0, channels 0 and 1
        [2, 8, 0, 0], [5, 11, 0, 0],
        [3, 9, 0, 0], [6, 12, 0, 0],
    ]  # fmt: skip
    assert layout.bias == 32  # 24 elements, in whole pieces of 16
    assert packed[8].tolist() == [0.5, 0.25, 0, 0]


def test_a_batch_norm_after_a_convolution_scales_its_weights_and_its_bias():
    p = program(Step(conv(), (0,), (2, 4)), Step(norm(), (1,), (2, 4)), inputs=((2, 4),))
    layout = WindowLayout.of(unit_of(p), LANES)
    packed = filled(layout, w_weight=WEIGHT, w_bias=[1.0, 2.0], n_scale=[10.0, 100.0], n_shift=[0.5, 0.25])
    assert packed[0].tolist() == [10, 700, 0, 0]
    assert packed[8].tolist() == [10.5, 200.25, 0, 0]
    assert layout.names() == ["w.weight", "w.bias", "n.scale", "n.shift"]


def test_output_channels_beyond_one_vector_are_packed_tile_by_tile():
    p = program(Step(conv(1, padding=0), (0,), (6, 4)), inputs=((2, 4),))
    layout = WindowLayout.of(unit_of(p), LANES)
    packed = filled(layout, w_weight=[[[10.0 * o], [10.0 * o + 1]] for o in range(6)], w_bias=[0.0] * 6)
    assert packed[:4].tolist() == [
        [0, 10, 20, 30], [1, 11, 21, 31],  # the first vector of outputs, both channels
        [40, 50, 0, 0], [41, 51, 0, 0],
    ]  # fmt: skip


def test_a_linear_layer_reads_its_flattened_input_with_channels_last():
    p = program(Step(View(), (0,), (6,)), Step(linear(), (1,), (2,)), inputs=((2, 3),))
    layout = WindowLayout.of(unit_of(p), LANES)
    weight = torch.arange(12.0).view(2, 6)  # the columns of channel 0 are 0, 1, 2, those of channel 1 are 3, 4, 5
    assert layout.columns(weight).tolist() == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]
    assert (layout.runs, layout.L) == ([0], 6)


def test_backward_weights_are_a_row_per_output_channel_cut_into_vectors():
    layout = ScatterLayout.of(unit_of(TWO_CHANNELS), LANES)
    packed = filled(layout, w_weight=WEIGHT, w_bias=[0.0, 0.0])
    assert layout.window == [0, 4, 4, 2]  # (offset, live lanes): six elements are a whole vector and half of one
    assert packed.tolist() == [[1, 4, 2, 5], [3, 6, 0, 0], [7, 10, 8, 11], [9, 12, 0, 0]]
    assert layout.step == (12, 2)  # a row of four positions with a halo of one on either side; one position


def test_taps_of_a_pool_share_a_window_by_shifted_rows():
    """A kernel of three in front of a pool of two: four positions, and the weight at the first three or the last."""
    p = program(Step(conv(), (0,), (1, 6)), Step(pool(2), (1,), (1, 3)), inputs=((1, 6),))
    convolution, pattern = units_of(p).units[1:]
    assert mergeable(convolution, pattern)
    layout = ScatterLayout.merge(convolution, LANES, pattern.pool, fold=1)
    packed = filled(layout, w_weight=[[[1.0, 2.0, 3.0]]], w_bias=[0.0])
    assert (layout.taps, layout.extent, layout.step) == ([(0, 0), (0, 1)], (1, 4), (8, 2))
    assert packed[:2].tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("form", "pooled", "positions"), [(conv(groups=2), pool(2), 4), (conv(), pool(1), 8)], ids=["groups", "one tap"]
)
def test_taps_of_a_pool_share_no_window_where_it_cannot_pay(form: Contract, pooled: Select, positions: int):
    p = program(Step(form, (0,), (4, 8)), Step(pooled, (1,), (4, positions)))
    convolution, pattern = units_of(p).units[1:]
    assert not mergeable(convolution, pattern)


def test_a_depthwise_convolution_is_a_stencil_of_one_weight_per_channel_and_tap():
    p = program(Step(conv(groups=2), (0,), (2, 3)), inputs=((2, 3),))
    layout = StencilLayout.of(unit_of(p))
    packed = filled(layout, w_weight=[[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]], w_bias=[7.0, 8.0])
    rows = packed.view(4, 16)[:, :2]
    assert rows.tolist() == [[1, 4], [2, 5], [3, 6], [7, 8]]  # three taps, then the bias
    assert layout.entries == [
        [(0, 1), (2, 2)],  # the first position: no tap in the padding before it
        [(0, 0), (2, 1), (4, 2)],
        [(2, 0), (4, 1)],
    ]


def test_a_mean_of_positions_is_a_stencil_of_constant_rows():
    halves = Contract(Positions((((0, (0.5, 0.5)), (2, (0.5, 0.5))),)))
    layout = StencilLayout.of(unit_of(program(Step(halves, (0,), (3, 2)), inputs=((3, 4),))))
    packed = filled(layout)
    assert layout.entries == [[(0, 0), (3, 0)], [(6, 0), (9, 0)]]  # pairs of positions of three channels
    assert packed.view(2, 16)[:, :3].tolist() == [[0.5] * 3, [0] * 3]  # one row of coefficients; no bias


def test_tiles_are_even_and_at_most_as_large_as_asked():
    assert tiles(5, 2) == [(0, 2), (2, 2), (4, 1)]
    assert tiles(7, 3) == [(0, 3), (3, 2), (5, 2)]
    assert tiles(3, 8) == [(0, 3)]
