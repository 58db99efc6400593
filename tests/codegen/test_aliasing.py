"""Which cotangents have a buffer of their own, and which are another one: small networks, decided by hand."""

from __future__ import annotations

from gradkern.codegen.aliasing import Cotangent, Cotangents
from gradkern.codegen.unit_graph import GraphBuilder
from gradkern.codegen.units import Node, UnitGraph
from gradkern.ir.program import Program, Step, Sum
from tests.support.programs import GUIDED, TANH, classifier, conv, pool, program


def cotangents(p: Program, *, onehot: bool = True, live_out: list[int] | None = None, wrt: tuple[int, ...] = (0,)):
    graph = GraphBuilder(p, list(range(len(p.steps))), live_out or [p.output]).build()
    return graph, Cotangents(graph, wrt, onehot)


def result_of(graph: UnitGraph, step: int) -> Node:
    (node,) = (unit.out for unit in graph.units if step in unit.steps)
    return node


def test_one_hot_seeds_need_no_first_cotangent():
    """They are rows of the last weight, and the convolution reads those through the ReLU's bits."""
    graph, made = cotangents(classifier())
    _, _, relu, last = graph.units
    assert made.seed_rows_unit is last
    assert made.of(result_of(graph, 3)) is None
    assert made.of(relu.out) == Cotangent(relu.out, seed_rows=True)
    assert made.of(result_of(graph, 0)) == Cotangent(relu.out, seed_rows=True, pattern=relu)
    assert made.of(graph.inputs[0]) == Cotangent(graph.inputs[0])


def test_seeds_of_the_caller_need_a_first_cotangent():
    graph, made = cotangents(classifier(), onehot=False)
    _, _, relu, last = graph.units
    assert made.seed_rows_unit is None
    assert made.of(last.out) == Cotangent(last.out)
    assert made.of(relu.out) == Cotangent(relu.out)
    assert made.of(result_of(graph, 0)) == Cotangent(relu.out, pattern=relu)


def test_rows_are_copied_where_a_function_multiplies_them():
    """tanh works in place on a cotangent, and the weight must stay as it is."""
    graph, made = cotangents(classifier(TANH))
    tanh = result_of(graph, 1)
    assert made.of(tanh) == Cotangent(tanh)
    assert made.of(result_of(graph, 0)) == Cotangent(tanh)


def test_only_contractions_read_through_a_pattern():
    """Of two pools in a row, the first has a buffer: it has no list of live channels to walk."""
    p = program(Step(conv(), (0,), (4, 8)), Step(pool(3, 1), (1,), (4, 6)), Step(pool(2), (2,), (4, 3)))
    graph, made = cotangents(p)
    first, second = result_of(graph, 1), result_of(graph, 2)
    assert made.of(second) == Cotangent(second)
    assert made.of(first) == Cotangent(first)
    assert made.of(result_of(graph, 0)) == Cotangent(first, pattern=first.producer)


def test_both_sides_of_a_sum_have_its_cotangent():
    p = program(
        Step(conv(name="a"), (0,), (4, 8)),
        Step(conv(name="b"), (0,), (4, 8)),
        Step(Sum(), (1, 2), (4, 8)),
        inputs=((1, 8),),
    )
    graph, made = cotangents(p)
    total = result_of(graph, 2)
    assert made.of(result_of(graph, 0)) == made.of(result_of(graph, 1)) == Cotangent(total)
    assert made.of(graph.inputs[0]) == Cotangent(graph.inputs[0])  # two convolutions add to it


def test_value_with_two_readers_has_the_sum_of_their_cotangents():
    p = program(
        Step(conv(name="a"), (0,), (4, 8)),
        Step(conv(name="b"), (1,), (4, 8)),
        Step(Sum(), (1, 2), (4, 8)),
    )
    graph, made = cotangents(p)
    shared, branch = result_of(graph, 0), result_of(graph, 1)
    assert made.of(shared) == Cotangent(shared)
    assert made.of(branch) == Cotangent(result_of(graph, 2))


def test_outputs_have_buffers_for_the_callers_seeds():
    graph, made = cotangents(classifier(), onehot=False, live_out=[2, 4])
    relu = result_of(graph, 1)
    assert made.of(relu) == Cotangent(relu)
    assert cotangents(classifier(), live_out=[4, 2])[1].seed_rows_unit is None  # rows are for a single output


def test_only_wanted_inputs_have_cotangents():
    p = program(
        Step(conv(name="a"), (0,), (4, 8)),
        Step(conv(name="b"), (1,), (4, 8)),
        Step(Sum(), (2, 3), (4, 8)),
        inputs=((1, 8), (1, 8)),
    )
    graph, made = cotangents(p, wrt=(1,))
    assert made.of(graph.inputs[0]) is None and made.of(result_of(graph, 0)) is None
    assert made.of(graph.inputs[1]) == Cotangent(graph.inputs[1])
    assert made.of(result_of(graph, 1)) == Cotangent(result_of(graph, 2))


def test_a_guided_relu_rectifies_a_copy_in_front_of_a_sum():
    """Its negative part goes; the sum's other side keeps its own."""
    p = program(
        Step(conv(name="a"), (0,), (4, 8)),
        Step(GUIDED, (1,), (4, 8)),
        Step(conv(name="b"), (0,), (4, 8)),
        Step(Sum(), (2, 3), (4, 8)),
        inputs=((1, 8),),
    )
    graph, made = cotangents(p)
    guided, total = result_of(graph, 1), result_of(graph, 3)
    assert made.of(guided) == Cotangent(guided)
    assert made.of(result_of(graph, 2)) == Cotangent(total)
