"""How steps are cut into groups: by hand for small programs, and with a GPU that holds so many steps at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gradkern.codegen.machine import Device, Machine, TooLarge
from gradkern.ir.program import Call, Opaque, Program, Step, Sum, Value, View
from gradkern.planner.groups import Chains, Group, Partition
from tests.support.programs import RELU, conv, program

CUMSUM = Opaque(Call("aten.cumsum.default", (Value(0), 2)), "a running sum has no form")
CPU, GPU = Machine("portable", 16), Device("cuda", 16)


def partition(chains: Chains, wanted: tuple[int, ...] | None = None) -> Partition:
    p = chains.program
    chained = [not isinstance(step.form, Opaque) for step in p.steps]
    return Partition(chains, 3, list(range(len(p.steps))), wanted or (p.output,), chained)


def cut(p: Program, wanted: tuple[int, ...] | None = None) -> list[tuple[bool, tuple[int, ...]]]:
    return [(g.native, g.steps) for g in partition(Chains(p, CPU, 4), wanted).groups()]


def test_branches_of_one_kind_run_together():
    """conv → cumsum and relu of it → sum: the ReLU need not wait for torch."""
    p = program(
        Step(conv(), (0,), (4, 8)),
        Step(CUMSUM, (1,), (4, 8)),
        Step(RELU, (1,), (4, 8)),
        Step(Sum(), (2, 3), (4, 8)),
    )
    assert cut(p) == [(True, (0, 2)), (False, (1,)), (True, (3,))]
    first, torchs, last = partition(Chains(p, CPU, 4)).groups()
    assert (first.live_in, first.live_out) == ((0,), (1, 3))
    assert (torchs.live_in, torchs.live_out) == ((1,), (2,))
    assert (last.live_in, last.live_out) == ((2, 3), (4,))


def test_steps_of_torchs_own_on_two_branches_are_one_group():
    p = program(
        Step(CUMSUM, (0,), (4, 8)),
        Step(CUMSUM, (0,), (4, 8)),
        Step(RELU, (1,), (4, 8)),
        Step(CUMSUM, (3,), (4, 8)),
        Step(Sum(), (2, 4), (4, 8)),
    )
    assert cut(p) == [(False, (0, 1)), (True, (2,)), (False, (3,)), (True, (4,))]


def test_views_alone_need_no_kernel():
    p = program(Step(CUMSUM, (0,), (4, 8)), Step(View(), (1,), (32,)), Step(CUMSUM, (2,), (32,)))
    assert cut(p) == [(False, (0,)), (False, (1,)), (False, (2,))]


def test_what_nothing_reads_needs_no_kernel():
    p = program(Step(CUMSUM, (0,), (4, 8)), Step(RELU, (1,), (4, 8)), output=1)
    assert cut(p) == [(False, (0,)), (False, (1,))]
    assert cut(p, wanted=(1, 2)) == [(False, (0,)), (True, (1,))]


def test_wanted_values_leave_their_group():
    p = program(Step(conv(), (0,), (4, 8)), Step(RELU, (1,), (4, 8)))
    assert [g.live_out for g in partition(Chains(p, CPU, 4), (1, 2)).groups()] == [(1, 2)]
    assert [g.live_out for g in partition(Chains(p, CPU, 4)).groups()] == [(2,)]


# ---- a GPU


class Limited(Chains):
    """Chains for a GPU that holds what ``fits`` says of the steps; none is really lowered."""

    def __init__(self, p: Program, fits: Callable[[tuple[int, ...]], bool]) -> None:
        super().__init__(p, GPU, 4)
        self.fits, self.lowered = fits, []

    def _lower(self, group: Group, seeds: int, wrt: tuple[int, ...], onehot: bool):
        self.lowered.append(group.steps)
        return object() if self.fits(group.steps) else TooLarge(300 << 10, 227 << 10)


def relus(count: int) -> Program:
    return program(*(Step(RELU, (i,), (4, 8)) for i in range(count)))


@pytest.mark.parametrize(
    ("most", "pieces"),
    [(7, [(0, 1, 2, 3, 4, 5, 6)]), (3, [(0, 1, 2), (3, 4, 5), (6,)]), (1, [(i,) for i in range(7)])],
)
def test_the_longest_runs_that_fit(most, pieces):
    chains = Limited(relus(7), lambda steps: len(steps) <= most)
    assert [g.steps for g in partition(chains).groups()] == pieces
    assert len(chains.lowered) == len(set(chains.lowered))  # none twice


def test_a_step_that_fits_nowhere_says_so_and_parts_its_neighbours():
    chains = Limited(relus(5), lambda steps: 2 not in steps)
    cutting = partition(chains)
    assert [(g.native, g.steps) for g in cutting.groups()] == [(True, (0, 1)), (False, (2,)), (True, (3, 4))]
    assert cutting.too_large == {2: "needs 300 KiB of shared memory for one sample, of 227"}


def test_chains_are_lowered_once_whether_they_fit_or_not():
    chains = Limited(relus(2), lambda steps: len(steps) == 1)
    small, large = Group(True, (0,), (0,), (1,)), Group(True, (0, 1), (0,), (2,))
    assert chains.get(small, 3, (0,), False) is chains.get(small, 3, (0,), False)
    for _ in range(2):
        with pytest.raises(TooLarge, match="needs 300 KiB"):
            chains.get(large, 3, (0,), False)
    assert chains.lowered == [(0,), (0, 1)]
    chains.get(small, 4, (0,), False)  # for other seeds it is another chain
    chains.retain([large])
    chains.get(small, 3, (0,), False)
    assert chains.lowered == [(0,), (0, 1), (0,), (0,)]
