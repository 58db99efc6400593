"""Arguments of any shape, dtype, stride and value reach the compiled ops: an error, or the right result."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradkern
from gradkern.codegen import lowering
from gradkern.codegen.encoding import HEADER, layout_of, width_of
from gradkern.codegen.records import KINDS, WindowT
from gradkern.runtime import ops
from tests.support.op_arguments import arguments

ops.extension()  # registers them
G = torch.ops.gradkern
ERRORS = (RuntimeError, IndexError, TypeError, NotImplementedError)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.bool]
SIZES = st.integers(0, 4)
ANY = st.builds(
    lambda shape, dtype, turned: _tensor(shape, dtype, turned),
    st.lists(SIZES, max_size=4), st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
examples = settings(max_examples=100, deadline=None)
INTEGERS = st.one_of(st.integers(-3, 8), st.sampled_from([-(2**63), 2**63 - 1, 2**31, -(2**31)]))


def _tensor(shape: list[int], dtype: torch.dtype, turned: bool) -> Tensor:
    x = torch.arange(4**4 if not shape else max(1, torch.Size(shape).numel())).remainder(7).to(dtype)
    x = x[: torch.Size(shape).numel()].reshape(shape)
    return x.transpose(0, -1) if turned and len(shape) > 1 else x


@functools.cache
def _once() -> dict[str, Any]:
    found = arguments()
    G.chain_vjp(*found.values())
    return found


def fresh() -> dict[str, Any]:
    """Right arguments, of which every list may be changed."""
    return {name: list(value) if isinstance(value, list) else value for name, value in _once().items()}


@examples
@given(st.lists(INTEGERS, max_size=4), st.sampled_from([None, 1, 2]))
def test_targets_out_of_range_write_nothing_elsewhere(values: list[int], rows: int | None) -> None:
    found = fresh()
    n, outputs = found["inputs"][0].shape[0], found["outputs"][0].shape[1]
    targets = torch.tensor(values, dtype=torch.int64)
    if rows is not None:  # of every sample its own, or of one sample too many
        targets = targets.expand(n if rows == 1 else n + 1, len(values)).contiguous()
    wanted, found["targets"] = found["results"], targets
    found["seed_rows"] = found["seed_rows"][targets.clamp(0, outputs - 1)]
    found["results"] = [r.new_zeros(n, len(values), *r.shape[2:]) for r in wanted]
    if rows == 2 or not all(0 <= v < outputs for v in values):
        with pytest.raises(ERRORS):
            G.chain_vjp(*found.values())
        return
    G.chain_vjp(*found.values())
    for got, all_of_them in zip(found["results"], wanted, strict=True):
        torch.testing.assert_close(got, all_of_them[:, values])


@examples
@given(st.sampled_from(["inputs", "targets", "seed_rows", "outputs", "forward", "backward"]), ANY, INTEGERS)
def test_ops_survive_tensors_of_any_shape_and_dtype(name: str, value: Tensor, tile: int) -> None:
    found = fresh()
    found[name] = [value] if isinstance(found[name], list) else value
    found["seed_tile"] = min(tile, 0)  # an error in any case
    with pytest.raises(ERRORS):
        G.chain_vjp(*found.values())


@examples
@given(st.integers(1, 3), st.integers(1, 3), st.lists(INTEGERS, min_size=1, max_size=3), st.integers(1, 4))
def test_groups_of_statistics(n: int, size: int, groups: list[int], count: int) -> None:
    maps, into = torch.ones(n, size), torch.zeros(count, size, dtype=torch.float64)
    of = torch.tensor(groups, dtype=torch.int64)
    fits = len(groups) == n and all(0 <= g < count for g in groups)
    if not fits:
        with pytest.raises(ERRORS):
            G.accumulate(maps, of, [*[torch.empty(0)] * 4, into])
        assert not into.any()
        return
    G.accumulate(maps, of, [*[torch.empty(0)] * 4, into])
    wanted = torch.zeros_like(into).index_add_(0, of, maps.double().abs())
    assert torch.equal(into, wanted)


@examples
@given(ANY, ANY, ANY, ANY)
def test_statistics_of_any_tensors(maps: Tensor, total: Tensor, largest: Tensor, group: Tensor) -> None:
    groups = torch.zeros(maps.shape[0] if maps.dim() else 0, dtype=torch.int64)
    for place, statistic in ((0, total), (3, largest), (4, group)):
        sums = [torch.empty(0)] * 5
        sums[place] = statistic
        try:
            G.accumulate(maps, groups, sums)
        except ERRORS:
            continue


@examples
@given(st.lists(st.integers(-1, 5), min_size=9, max_size=11), st.tuples(*[st.integers(1, 5)] * 4), st.booleans())
def test_pools_of_any_geometry(pool: list[int], shape: tuple[int, int, int, int], relu: bool) -> None:
    z = torch.randn(shape)
    try:
        result = ops.rescale(z, torch.randn(1, *shape[1:]), pool, relu, 1e-10)
    except ERRORS:
        return
    assert result.shape == (pool[0] * pool[1], *shape[:2], pool[8], pool[9])


@functools.cache
def _chain(name: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "MOST_LIVE_SHARE", 2.0)  # local seeds wherever they are possible
        patch.setattr(lowering, "FEW_SEEDS", 1)
        gradkern.reset()
        found = arguments(name)
    gradkern.reset()
    G.chain_vjp(*found.values())
    return found


CHAINS = ("maxpool1d", "conv1d_groups", "view_channels", "matmul", "softmax", "avgpool2d", "residual")
PARTS = ("forward", "backward", "tables", "sizes", "packed", "seed_rows", "inputs", "outputs", "results")


@settings(examples, max_examples=300)
@given(st.sampled_from(CHAINS), st.sampled_from(PARTS), st.data())
def test_numbers_of_records_at_random(name: str, part: str, data: st.DataObject) -> None:
    """An error or an end; `make sanitize ARGS=--cpu` tries many more of them under the sanitizers."""
    found = {key: list(v) if isinstance(v, list) else v for key, v in _chain(name).items()}
    value = found[part]
    if part == "sizes":
        found[part][data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(-1, 1 << 16))
    elif part in ("forward", "backward", "tables"):
        found[part] = value.clone()
        at = data.draw(st.integers(0, value.numel() - 1))
        small = st.integers(-70, 70)
        change = data.draw(st.one_of(small, small.map(lambda k: int(value.view(-1)[at]) + k), INTEGERS))
        kept = max(min(change, 2**31 - 1), -(2**31)) if part == "tables" else change
        found[part].view(-1)[at] = kept
    elif isinstance(value, list):
        found[part][0] = value[0][..., : data.draw(st.integers(0, value[0].shape[-1] - 1))].contiguous()
    elif value is not None:
        found[part] = value[..., : data.draw(st.integers(0, value.shape[-1] - 1))].contiguous()
    try:
        G.chain_vjp(*found.values())
    except ERRORS:
        return


def merged(backward: Tensor) -> Tensor:
    """Windows whose rows of weights no list names."""
    names = [*HEADER, *(name for name, t in layout_of(WindowT) for _ in range(width_of(t)))]
    windows = backward[:, 0] == KINDS.index(WindowT)
    assert windows.any()
    backward[windows, names.index("merged")], backward[windows, names.index("pattern") + 1] = 1, 0
    return backward


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("seed_rows", lambda rows: None, "reads the rows of the last weight, and none are given"),
        ("inputs", lambda xs: [x[..., :-1].contiguous() for x in xs], "numbers of each sample in input 0, got"),
        ("tables", lambda t: t[:-1], "of the tables"),
        ("packed", lambda w: w[:100], "reads weights up to"),
        ("forward", lambda f: torch.cat([f, f[:1].fill_(99)]), "unknown kind 99"),
        ("backward", merged, "merges the taps of no pattern"),
    ],
)  # fmt: skip
def test_records_and_tensors_of_different_plans(part: str, change: Any, said: str) -> None:
    found = fresh()
    found[part] = change(found[part].clone() if isinstance(found[part], Tensor) else found[part])
    with pytest.raises(RuntimeError, match=said):
        G.chain_vjp(*found.values())


def test_no_samples_at_a_time_on_two_threads() -> None:
    """Which share the seeds of one sample; a division by zero ends the process."""
    found = arguments("lenet5", 1)
    found["sizes"] = [*found["sizes"][:5], 0, *found["sizes"][6:]]  # CpuSizes.block
    torch.set_num_threads(2)
    try:
        G.chain_vjp(*found.values())
    finally:
        torch.set_num_threads(1)


def test_more_slots_than_the_table_holds() -> None:
    """An error before memory is taken for them."""
    found = dict(_chain("softmax"))
    at = found["sizes"][6] - 1  # CpuSizes.local
    assert at >= 0
    found["tables"] = found["tables"].clone()
    found["tables"][at] = 2**31 - 1
    with pytest.raises(RuntimeError, match="has rules up to"):
        G.chain_vjp(*found.values())
