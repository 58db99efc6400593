"""What the lowering decides about a chain as a whole, on small networks, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradkern.codegen import records
from gradkern.codegen.chain import Chain
from gradkern.codegen.lowering import live_lists, lower_to_chain
from gradkern.codegen.machine import Machine
from gradkern.ir.program import Program, Scale, Step, Sum, View
from tests.support.programs import classifier, conv, linear, program

CPU = Machine("portable", 16)  # four floats per vector


def chain(p: Program, *, seeds: int = 3, live_out: tuple[int, ...] | None = None, **options: object) -> Chain:
    live_out = (p.output,) if live_out is None else live_out
    wrt = options.pop("wrt", tuple(range(len(p.inputs))))
    return lower_to_chain(p, list(range(len(p.steps))), list(live_out), CPU, 4, seeds, wrt, **options)


def content(made: Chain) -> tuple[object, ...]:
    """All that the kernels get of a chain."""
    return made.encoded_forward, made.encoded_backward, made.tables, made.sizes, made.layouts, made.seed_rows


def test_equal_arguments_give_equal_chains():
    assert content(chain(classifier())) == content(chain(classifier()))
    assert content(chain(classifier())) != content(chain(classifier(channels=2)))


def test_a_chain_names_its_external_values_by_the_numbers_of_the_program():
    """Two inputs, of which one is wanted, and two results: all 4·8 numbers of a tanh, and three of a linear layer."""
    p = program(
        Step(Sum(), (0, 1), (4, 8)), Step(Scale("tanh"), (2,), (4, 8)), Step(View(), (3,), (32,)),
        Step(linear(), (4,), (3,)), inputs=((4, 8), (4, 8)),
    )  # fmt: skip
    made = chain(p, wrt=(1,), live_out=(3, 5), onehot=False)
    assert (made.inputs, made.wrt, made.outputs, made.output_sizes) == ((0, 1), (1,), (3, 5), (32, 3))
    assert [r.output for r in made.forward if isinstance(r, records.Store)] == [0, 1]
    assert [r.result for r in made.backward if isinstance(r, records.StoreT)] == [0]


def test_without_seeds_there_is_no_backward_pass():
    made = chain(classifier(), seeds=0)
    assert (made.backward, made.encoded_backward, made.seed_tile) == ((), (), 1)
    assert len(made.encoded_forward) == len(made.forward) == 5


def test_one_hot_seeds_are_rows_of_the_last_layers_backward_weights():
    """Three outputs over 4·8 inputs: rows of 32 elements, at the place of that layer's backward layout."""
    made = chain(classifier())
    offset, row_length = made.seed_rows
    (rows,) = (x for x in made.layouts if x.weights == offset)
    assert (row_length, rows.O, rows.size) == (32, 3, 96)
    assert made.rectify_seed_rows is False
    assert chain(classifier(), onehot=False).seed_rows is None


@pytest.mark.parametrize(("positions", "outputs", "entries"), [(8, 4, 9 * 16 + 64), (8, 20, 9 * 32 + 64)])
def test_lists_of_live_channels_have_room_for_every_channel_of_every_position(positions, outputs, entries):
    """One list per position and one that is shared, of output channels in whole sixteens, and a vector's slack."""
    (op,) = (
        r for r in chain(program(Step(conv(), (0,), (outputs, positions)))).backward if isinstance(r, records.WindowT)
    )
    assert live_lists([replace(op, sweep=positions)]) == (entries, 64)
    assert live_lists([]) == (64, 64)


def test_every_buffer_lies_within_the_scratch_of_its_kind():
    made = chain(classifier())
    for record in (*made.forward, *made.backward):
        for buffer in record.buffers():
            tile = made.seed_tile if buffer.cotangent else 1
            low, room = (made.sizes.shared, made.sizes.sample) if buffer.per_sample else (0, made.sizes.shared)
            assert low <= buffer.base <= buffer.base + buffer.elements * tile <= low + room
