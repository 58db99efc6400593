"""The records that a chain is made of: small networks, their records and the numbers in them worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gradkern.codegen import records
from gradkern.codegen.chain import Chain
from gradkern.codegen.cuda.lowering import Device, lower_device
from gradkern.codegen.lowering import lower_to_chain
from gradkern.codegen.machine import Machine
from gradkern.codegen.records import Along, Extent, LineFunction, Record
from gradkern.ir.program import LowRank, Product, Program, Scale, Step, Sum
from tests.support.programs import RELU, classifier, conv, program

CPU = Machine("portable", 16)  # four floats per vector
GPU = Device("cuda", 16)
SEEDS = 3


def chain(p: Program, *, wrt: tuple[int, ...] | None = None, onehot: bool = True) -> Chain:
    wrt = tuple(range(len(p.inputs))) if wrt is None else wrt
    return lower_to_chain(p, list(range(len(p.steps))), [p.output], CPU, 4, SEEDS, wrt, onehot)


def kinds(ops: Sequence[Record]) -> list[str]:
    return [type(op).__name__ for op in ops]


def one(ops: Sequence[Record], kind: type[Record]) -> Record:
    (op,) = (op for op in ops if type(op) is kind)
    return op


CLASSIFIER = classifier(channels=2)


def test_a_classifier_with_one_hot_seeds():
    """One contraction is left of the backward pass: it reads the last weight's rows through the ReLU's bits."""
    made = chain(CLASSIFIER)
    assert kinds(made.forward) == ["Load", "Window", "Pattern", "Window", "Store"]
    assert kinds(made.backward) == ["Zero", "WindowT", "StoreT"]
    back = made.backward[1]
    assert (back.seed_rows, back.src.buffer, back.whole_block) == (True, None, False)
    assert (back.H, back.W, back.O, back.C, back.pattern.taps) == (1, 8, 4, 2, 1)
    assert made.seed_rows is not None


def test_a_classifier_with_cotangents_of_the_caller():
    made = chain(CLASSIFIER, onehot=False)
    assert kinds(made.backward) == ["Zero", "SeedDense", "WindowT", "Zero", "WindowT", "StoreT"]
    dense, back = made.backward[2], made.backward[4]
    assert (dense.whole_block, dense.assign, dense.seed_rows, dense.pattern) == (True, True, False, None)
    assert (back.whole_block, back.assign, back.pattern.taps) == (False, False, 1)
    assert back.src.buffer is dense.dst.buffer
    assert made.seed_rows is None


@pytest.mark.parametrize(
    ("form", "shape", "numbers"),
    [  # runs per window, their length, channels per group, outputs per group, from window to window
        (conv(3), (6, 8), (1, 12, 4, 6, 4)),
        (conv(3, stride=2), (6, 4), (1, 12, 4, 6, 8)),
        (conv(3, groups=2), (6, 8), (3, 2, 2, 3, 4)),
    ],
    ids=["plain", "stride", "groups"],
)
def test_convolution_reads_its_window_in_contiguous_runs(form, shape, numbers):
    """Channels last, four of them: a window of three positions is one run of twelve elements; of a group, three."""
    op = one(chain(program(Step(form, (0,), shape))).forward, records.Window)
    assert (op.runs, op.run_length, op.C, op.O, op.src.position) == numbers
    assert (op.H, op.W, op.groups) == (1, shape[1], form.map.groups)
    assert op.src.offset == 0  # the first window begins in the border
    assert (op.dst.offset, op.dst.position) == (0, 6)


def test_a_residual_block_adds_once():
    """The sum hands its cotangent on as it is; what two steps read is zeroed and added to."""
    p = program(
        Step(conv(name="a"), (0,), (4, 8)),
        Step(RELU, (1,), (4, 8)),
        Step(conv(name="b"), (2,), (4, 8)),
        Step(Sum(), (3, 1), (4, 8)),
    )
    made = chain(p)
    assert kinds(made.forward) == ["Load", "Window", "Pattern", "Window", "Add", "Store"]
    seeds, skip, branch = ["Zero", "SeedOneHot"], ["Zero", "Accumulate"], ["Zero", "WindowT", "PatternT"]
    assert kinds(made.backward) == [*seeds, *skip, *branch, "Zero", "WindowT", "StoreT"]
    add, second = made.backward[3], made.backward[5]
    assert second.src.buffer is add.src.buffer is made.backward[1].dst.buffer
    assert made.backward[6].dst.buffer is add.dst.buffer


@pytest.mark.parametrize(
    ("gate", "channel", "position"),
    [((1, 8), 0, 1), ((4, 1), 1, 0), ((4, 8), 1, 4)],
    ids=["channel", "position", "none"],
)
def test_products_stretch_by_strides_of_zero(gate, channel, position):
    p = program(Step(Product(), (0, 1), (4, 8)), inputs=((4, 8), gate))
    made = chain(p)
    op = one(made.forward, records.Multiply)
    assert (op.left.position, op.left_channel, op.right.position, op.right_channel) == (4, 1, position, channel)
    left, right = (op for op in made.backward if isinstance(op, records.MultiplyT))
    assert (left.dst.position, left.dst_channel, left.other.position, left.other_channel) == (4, 1, position, channel)
    assert (right.dst.position, right.dst_channel, right.other.position, right.other_channel) == (
        position,
        channel,
        4,
        1,
    )


def test_a_square_has_two_cotangents():
    made = chain(program(Step(Product(), (0, 0), (4, 8))))
    assert kinds(made.backward) == ["Zero", "SeedOneHot", "Zero", "MultiplyT", "MultiplyT", "StoreT"]


PRODUCT = program(Step(Product("matmul"), (0, 1), (2, 5)), inputs=((2, 3), (3, 5)))


def test_matrix_product_emits_a_record_for_each_side():
    made = chain(PRODUCT)
    op = one(made.forward, records.MatMul)
    assert (op.matrices, op.rows, op.columns, op.terms, op.left_term, op.right_column) == (1, 2, 5, 3, 1, 1)
    left, right = (op for op in made.backward if isinstance(op, records.MatMulT))
    assert (left.rows, left.columns, left.terms, left.assign) == (2, 3, 5, True)
    assert (right.rows, right.columns, right.terms, right.assign) == (3, 5, 2, True)


def test_the_right_matrix_is_transposed_where_somebody_reads_it_so():
    assert kinds(chain(PRODUCT).forward) == ["Load", "Load", "MatMul", "Move", "Store"]
    assert kinds(chain(PRODUCT, wrt=(1,)).forward) == ["Load", "Load", "MatMul", "Store"]
    on_gpu = lower_device(PRODUCT, [0], [2], GPU, 4, SEEDS, (0, 1))  # its kernel reads in any steps
    assert kinds(on_gpu.forward) == ["Load", "Load", "MatMul", "Store"]
    left = next(op for op in on_gpu.backward if isinstance(op, records.MatMulT))
    assert left.right_column == 5


@pytest.mark.parametrize(("axis", "extent"), [(0, Extent(4, 1, 8)), (1, Extent(8, 1, 4))])
def test_a_softmax_keeps_what_its_backward_pass_needs(axis, extent):
    """An input is loaded with the axis of the softmax as its channels."""
    made = chain(program(Step(LowRank("log_softmax", axis), (0,), (4, 8))))
    forward, backward = one(made.forward, records.Lines).lines, one(made.backward, records.LinesT).lines
    assert forward == backward
    assert (forward.extent, forward.along, forward.function) == (extent, Along.Channels, LineFunction.LogSoftmax)
    assert forward.deviations == 4 * 8  # they lie behind the probabilities


def test_functions_go_by_number_with_three_parameters():
    """The order and the parameters of csrc/elementwise.h."""
    elu = one(chain(program(Step(Scale("elu", (1.5, 1.0, 2.0)), (0,), (4, 8)))).forward, records.Elementwise)
    leaky = one(chain(program(Step(Scale("leaky_relu", (0.1,)), (0,), (4, 8)))).forward, records.Elementwise)
    assert (elu.function, elu.p0, elu.p1, elu.p2) == (2, 1.5, 1.0, 2.0)
    assert (leaky.function, leaky.p0, leaky.p1, leaky.p2) == (1, 0.1, 0.0, 0.0)


@pytest.mark.parametrize(("channels", "sweep"), [(4, 8), (64, 64)])
def test_large_weights_are_swept_over_more_positions(channels, sweep):
    """64·64·3 floats are 48 KiB, more than half of an L1; 4·4·3 are not."""
    p = program(Step(conv(), (0,), (channels, 8)), Step(conv(), (1,), (channels, 8)), inputs=((channels, 8),))
    assert {op.sweep for op in chain(p).backward if isinstance(op, records.WindowT)} == {sweep}


def test_what_no_input_of_interest_depends_on_has_no_backward_records():
    p = program(Step(conv(name="a"), (0,), (4, 8)), Step(Sum(), (2, 1), (4, 8)), inputs=((4, 8), (4, 8)))
    assert kinds(chain(p, wrt=(1,)).backward) == ["Zero", "SeedOneHot", "StoreT"]
