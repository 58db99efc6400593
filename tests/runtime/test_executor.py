"""The engine against the oracle: every traceable network, every way to ask, every way to cut the work."""

from __future__ import annotations

import math

import pytest
import torch

from gradkern.codegen import emitters, scratch
from gradkern.ir.program import Program, Scale, Step
from gradkern.runtime import executor
from tests.cases import BENCH, CASES, TRACEABLE
from tests.support import oracle
from tests.support.case_runs import EXACT, exact, parts, program_of, run

NAMES = [case.name for case in TRACEABLE]
SMALL = ("maxpool1d", "maxpool2d_mixed", "conv1d_groups", "residual", "elu", "bn_linear", "softmax", "two_inputs")
SOME = (*SMALL, "cnn1d_strided", "lenet5", "resnet1d_opaque")


# ---------------------------------------------------------------------------------------------------------------
# Every network


@pytest.mark.parametrize("name", NAMES)
def test_float64_equals_the_oracle(name):
    _, inputs, program, params = parts(name, 3)
    y, jacobians = run(program, params, inputs)
    want_y, want = exact(name, 3)
    assert oracle.relative_error(y, want_y) <= EXACT
    assert oracle.largest_error(jacobians, want) <= EXACT


@pytest.mark.parametrize("name", [n for n in NAMES if not CASES[n].opaque])
def test_float32_equals_the_oracle_where_the_pattern_agrees(name):
    n = 4 if CASES[name].bench else 20
    _, inputs, program, params = parts(name, n, torch.float32)
    y, jacobians = run(program, params, inputs)
    # The weights and samples of a float64 case are not those of the float32 one rounded: widen the very same.
    case = CASES[name]
    want_y, want = oracle.jacobian(case.build(), inputs)
    assert oracle.relative_error(y, want_y) <= 1e-5
    for got, right in zip(jacobians, want, strict=True):
        assert oracle.disagreeing(got, right) <= 0.1


# ---------------------------------------------------------------------------------------------------------------
# Every way to ask


def targets_for(outputs: int, n: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "one":
        return torch.tensor([outputs - 1])
    if kind == "shared":  # unordered, repeated
        return torch.tensor([outputs - 1, 0, outputs - 1, outputs // 2, 0])
    if kind == "many":  # more than any tile holds
        return torch.randint(outputs, (37,), generator=generator)
    return torch.randint(outputs, (n, 3), generator=generator)


@pytest.mark.parametrize("kind", ["one", "shared", "many", "each"])
@pytest.mark.parametrize("name", SOME)
def test_shared_and_per_sample_targets_equal_the_oracle(name, kind):
    n = 4
    _, inputs, program, params = parts(name, n)
    targets = targets_for(program.outputs, n, kind)
    _, jacobians = run(program, params, inputs, targets)
    assert oracle.largest_error(jacobians, [oracle.pick(j, targets) for j in exact(name, n)[1]]) <= EXACT


@pytest.mark.parametrize("wrt", [(0,), (1,), (1, 0)])
def test_jacobian_of_some_inputs_equals_the_oracle(wrt):
    _, inputs, program, params = parts("two_inputs", 4)
    _, jacobians = run(program, params, inputs, None, wrt)
    assert oracle.largest_error(jacobians, [exact("two_inputs", 4)[1][w] for w in wrt]) <= EXACT


def test_an_input_that_nothing_reads_has_zeros():
    program = Program(((3,), (2,)), (Step(Scale("tanh"), (0,), (3,)),), 2)
    xs = (torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64))
    _, (_, unread) = run(program, {}, xs)
    assert unread.shape == (4, 3, 2)
    assert not unread.any()
    _, (alone,) = run(program, {}, xs, None, (1,))
    assert not alone.any()


@pytest.mark.parametrize("name", ["maxpool1d", "two_inputs", "resnet1d_opaque"])
def test_executor_with_one_sample_and_with_none(name):
    _, inputs, program, params = parts(name, 1)
    assert oracle.largest_error(run(program, params, inputs)[1], exact(name, 1)[1]) <= EXACT
    y, jacobians = run(program, params, tuple(x[:0] for x in inputs))
    assert y.shape == (0, *program.output_shape)
    assert y.dtype == torch.float64
    assert [j.shape for j in jacobians] == [(0, program.outputs, *x.shape[1:]) for x in inputs]


def test_executor_without_targets_returns_the_output_alone():
    _, inputs, program, params = parts("maxpool1d", 3)
    y, (jac,) = run(program, params, inputs, torch.zeros(0, dtype=torch.int64))
    assert jac.shape == (3, 0, *inputs[0].shape[1:])
    assert oracle.relative_error(y, exact("maxpool1d", 3)[0]) <= EXACT


@pytest.mark.parametrize("name", ["lenet5", "softmax", "residual"])
@pytest.mark.parametrize("bad", [[-1], [10_000]])
def test_targets_out_of_range_touch_no_memory(name, bad):
    _, inputs, program, params = parts(name, 2)
    with pytest.raises(IndexError, match="out of"):
        run(program, params, inputs, torch.tensor(bad))


@pytest.mark.parametrize("name", ["maxpool2d", "residual"])
def test_layouts_of_inputs_and_outputs(name):
    _, (x,), program, params = parts(name, 4)
    want = exact(name, 4)[1]
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert not strided.is_contiguous()
    assert oracle.largest_error(run(program, params, (strided,))[1], want) <= EXACT
    wide = torch.full((4, 2 * program.outputs, *x.shape[1:]), math.nan, dtype=torch.float64)
    out = wide[:, ::2]
    executor.jacobian(program, params, (x,), out=(out,))
    assert oracle.largest_error((out,), want) <= EXACT
    assert wide[:, 1::2].isnan().all()
    halves = torch.empty(4, program.outputs, *x.shape[1:], dtype=torch.float32)
    executor.jacobian(program, params, (x,), out=(halves,))
    assert oracle.largest_error((halves,), want) <= 1e-6
    expanded = x[:1].expand(4, *x.shape[1:])
    assert oracle.largest_error(run(program, params, (expanded,))[1], [w[:1].expand_as(w) for w in want]) <= EXACT


# ---------------------------------------------------------------------------------------------------------------
# Every way to cut the work


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["lenet5", "bn_linear", "residual", "maxpool1d_ceil"])
def test_batches_at_block_boundaries_equal_the_oracle(name, threads):
    """One sample more and less than a block, for any number of threads; every sample as if it were alone."""
    _, inputs, program, params = parts(name, 66)
    want_y, want = exact(name, 66)
    p = executor.plan_for(program, program.outputs, torch.float64)
    block = p.chain(0, program.outputs, (0,), True).sizes.block
    torch.set_num_threads(threads)
    for n in {1, block - 1, block, block + 1, 2 * block - 1, 2 * block + 1} & set(range(1, 67)):
        y, jacobians = run(program, params, tuple(x[:n] for x in inputs))
        assert oracle.relative_error(y, want_y[:n]) <= EXACT
        assert oracle.largest_error(jacobians, [w[:n] for w in want]) <= EXACT


@pytest.mark.parametrize(
    "constants", [{"SEED_BYTES": 1}, {"BLOCK_BYTES": 1}, {"L1_BYTES": 0}, {"MAX_BLOCK": 1}, {"L1_BYTES": 1 << 30}]
)
@pytest.mark.parametrize("name", [*SMALL, "lenet5", "conv_output"])
def test_small_scratch_changes_no_result(name, constants, monkeypatch, fresh):
    for key, value in constants.items():
        monkeypatch.setattr(emitters if key == "L1_BYTES" else scratch, key, value)
    _, inputs, program, params = parts(name, 9)
    targets = targets_for(program.outputs, 9, "many")
    _, jacobians = run(program, params, inputs, targets)
    assert oracle.largest_error(jacobians, [oracle.pick(j, targets) for j in exact(name, 9)[1]]) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cnn1d", "lenet5", "bn_linear", "elu", "maxpool2d_mixed", "softmax"])
def test_a_permuted_batch_gives_permuted_bits(name, dtype):
    _, inputs, program, params = parts(name, 21, dtype)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(5))
    y, jacobians = run(program, params, inputs)
    moved_y, moved = run(program, params, tuple(x[order].contiguous() for x in inputs))
    assert torch.equal(moved_y, y[order])
    for a, b in zip(moved, jacobians, strict=True):
        assert torch.equal(a, b[order])
    assert all(torch.equal(a, b) for a, b in zip(run(program, params, inputs)[1], jacobians, strict=True))


def test_every_bench_network_is_one_chain():
    for case in BENCH:
        program = program_of(case.name)
        assert executor.plan_for(program, program.outputs, torch.float32).single_chain
