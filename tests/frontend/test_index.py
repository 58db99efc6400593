"""Copies of values with many axes, as copies of three."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gradkern.frontend.lowerings.index import neighbours_merged
from gradkern.ir.indexing import identity_runs, indices, runs
from gradkern.ir.program import Part, Shape
from tests.support.capturing import to_program


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
    fewer, merged = neighbours_merged(shape, part)
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
