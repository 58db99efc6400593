"""The table that a plan prints, written out in full for a small network, and its parts."""

from __future__ import annotations

from dataclasses import replace

from gradkern.codegen.machine import Machine, NoKernels
from gradkern.ir.program import Step
from gradkern.planner import plan
from gradkern.planner.plan import Plan
from gradkern.planner.table import WIDEST
from tests.support.programs import classifier, conv, program

MACHINE = Machine("portable", 16)
TABLE = """\
value  layer  form               shape  path             MMAC
-----  -----  -----------------  -----  ---------------  --------
v1            Contract(k3 p1)    4×8    kernel portable  0.000384
v2            Scale('relu')      4×8    kernel portable  0.000128
v3            View()             32     view             0
v4            Contract(Dense())  3      kernel portable  0.000384
MMAC: million multiply-adds per sample, forward and backward (counts by mode: backward). Paths: \
kernel: gradkern's own kernel; view: no work.
reverse mode from 3 outputs: 0.000384 million multiply-adds (forward mode from 8 inputs: 0.00179 million multiply-adds)
3 seeds, 1 group, fused 100.0 % of the operations, own kernels 100.0 %"""


def small() -> Plan:
    return plan.plan(classifier(), 3, machine=MACHINE)


def test_a_table_has_a_row_per_step_a_legend_the_direction_and_a_summary():
    assert str(small()) == TABLE


def test_multiply_adds_of_a_convolution_are_counted_forward_and_for_each_seed():
    """Four channels, eight positions, three taps of one channel: 96 multiply-adds, four times over."""
    assert small().steps[0].macs == 4 * 8 * 3 * (1 + 3)


def test_one_seed_and_one_group_are_singular():
    assert repr(plan.plan(classifier(), 1, machine=MACHINE)).startswith("<Plan: 1 seed, 1 group, ")
    assert repr(small()).startswith("<Plan: 3 seeds, 1 group, ")


def test_steps_that_share_a_reason_are_named_once_and_the_rest_counted():
    p = program(*(Step(conv(name=f"w{i}"), (i,), (4, 8)) for i in range(5)))
    lines = str(plan.plan(p, 3, machine=NoKernels())).splitlines()
    (refused,) = (line for line in lines if "the compiled extension is missing" in line)
    assert refused.startswith("v1 (), v2 (), v3 () and 2 more: ")


def test_long_names_of_layers_keep_their_end_and_long_forms_their_beginning():
    p = classifier()
    deep = replace(p.steps[0], module="encoder." * 10 + "conv")
    row = str(plan.plan(replace(p, steps=(deep, *p.steps[1:])), 3, machine=MACHINE)).splitlines()[2]
    shown = row.split()[1]
    assert len(shown) == WIDEST
    assert shown.startswith("…")
    assert shown.endswith("encoder.conv")
