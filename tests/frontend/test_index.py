"""Copies of values with many axes, as copies of three."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gradkern
from gradkern.codegen.tables import strided
from gradkern.frontend.lowerings import arithmetic
from gradkern.frontend.lowerings.index import merge_neighbours
from gradkern.ir.indexing import identity_runs, indices, runs
from gradkern.ir.program import Part, Shape
from tests.support import oracle
from tests.support.capturing import to_program

pytestmark = pytest.mark.real_export


@st.composite
def copies(draw: st.DrawFn) -> tuple[Shape, Part]:
    """All, one or any of the indices of each axis, zeros among them."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=4, max_size=6)))
    order = draw(st.permutations(range(len(shape))) | st.just(range(len(shape))))
    maps = [
        st.just(identity_runs(n)) | st.integers(0, n - 1).map(lambda i: runs([i]))
        | st.lists(st.integers(-1, n - 1), min_size=1, max_size=4).map(runs)
        for n in (shape[a] for a in order)
    ]  # fmt: skip
    return shape, Part(tuple(order), tuple(draw(m) for m in maps))


def copied(part: Part, x: Tensor) -> Tensor:
    x = x.permute(part.order)
    for axis, rows in enumerate(part.axes):
        index = torch.tensor(indices(rows))
        kept = (index >= 0).view([-1 if a == axis else 1 for a in range(x.dim())])
        x = x.index_select(axis, index.clamp(min=0)) * kept
    return x


@settings(deadline=None, max_examples=300, derandomize=True)
@given(copies())
def test_the_same_elements_with_neighbours_merged(copy: tuple[Shape, Part]) -> None:
    shape, part = copy
    x = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)
    fewer, merged = merge_neighbours(shape, part)
    want = copied(part, x)
    assert torch.equal(copied(fewer, x.view(merged)).reshape(want.shape), want)


def test_queries_keys_and_values_of_one_layer_stay_in_the_chain() -> None:
    """As vision transformers cut them: five axes with the batch, permuted, and one index of the first."""

    class Attention(nn.Module):
        def __init__(self, heads_first: bool) -> None:
            super().__init__()
            self.qkv, self.heads_first = nn.Linear(8, 24), heads_first

        def forward(self, x: Tensor) -> Tensor:  # [N, 5, 8]
            each = self.qkv(x).reshape(-1, 5, 2, 3, 4) if self.heads_first else self.qkv(x).reshape(-1, 5, 3, 2, 4)
            q, k, v = each.permute(3, 0, 2, 1, 4) if self.heads_first else each.permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)

    for heads_first in (False, True):
        program = to_program(Attention(heads_first).eval(), (torch.randn(2, 5, 8),))
        assert max(len(step.shape) for step in program.steps) <= 3, program


class Windowed(nn.Module):
    """Attention with heads inside of shifted windows, with a bias per head and a mask per window."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 3)
        self.bias = nn.Parameter(torch.randn(2, 4, 4))
        self.register_buffer("mask", torch.randn(6, 4, 4))

    def forward(self, x: Tensor) -> Tensor:  # [N, 4, 6, 4]
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(-1, 2, 2, 3, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4)
        q, k, v = self.qkv(y).reshape(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1) + self.bias.unsqueeze(0)).view(-1, 6, 2, 4, 4) + self.mask[None, :, None]
        y = (scores.view(-1, 2, 4, 4).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 4)
        y = y.view(-1, 2, 3, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6, 4)
        return self.out(x + y).mean((1, 2))


class CrissCross(nn.Module):
    """Attention along either of two axes, joined with what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 5, 4]
        across = x.transpose(1, 2).reshape(-1, 3, 4)
        across = self.columns(across, across, across, need_weights=False)[0].view(-1, 5, 3, 4).transpose(1, 2)
        along = x.reshape(-1, 5, 4)
        along = self.rows(along, along, along, need_weights=False)[0].view(-1, 3, 5, 4)
        y = torch.cat([x + across, F.gelu(along.unflatten(3, (2, 2))).flatten(3)], dim=2)
        return self.out(y).mean((1, 2))


@pytest.mark.parametrize(
    ("net", "shape", "channels"),
    [(Windowed, (4, 6, 4), 1 << 16), (Windowed, (4, 6, 4), 100), (CrissCross, (3, 5, 4), 1 << 16)],
)
def test_attention_within_parts_of_a_sample_is_one_chain(
    net: type[nn.Module], shape: Shape, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``channels``: the most that a kernel has, beyond which a bias of all heads is repeated per window."""
    monkeypatch.setattr(arithmetic, "MAX_CHANNELS", channels)
    model, x = net().eval().double(), torch.randn(3, *shape, dtype=torch.float64)
    assert [group.native for group in gradkern.explain(model, x, show=False).groups] == [True]
    assert oracle.relative_error(gradkern.jacobian(model, x, engine="kernel"), oracle.jacobian(model, x)[1][0]) < 1e-12


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 1, 1, 2, 5])), max_size=12), st.randoms())
def test_runs_hold_every_pair_once(steps: list[tuple[int, int]], shuffled: random.Random) -> None:
    places = list(accumulate(gap for _, gap in steps))
    pairs = [(read, write) for (read, _), write in zip(steps, places, strict=True)]
    shuffled.shuffle(pairs)
    table = strided(*torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1))
    held = [(r + k * a, w + k * b) for r, w, n, a, b in zip(*[iter(table)] * 5, strict=True) for k in range(n)]
    assert held == sorted(pairs, key=lambda pair: pair[1])
