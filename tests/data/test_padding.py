"""Samples of different lengths: padded on request, with the mask kept and given to the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import gradkern
from gradkern.data import merge, open_source, repair, run, verify
from tests.support.stores import assert_same

N, LONGEST = 13, 7


def sample(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal((2, 3 + i % 5)).astype(np.float32)


class Ragged(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return sample(i)


class Mean(nn.Module):
    """The mean over the steps of a signal, by one of the arguments that say which are data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 3)

    def of(self, x, mask):
        return self.linear((x * mask[:, None]).sum(-1) / mask.sum(1)[:, None]).tanh()


class ByLengths(Mean):
    def forward(self, x, lengths):
        return self.of(x, torch.arange(x.shape[-1]) < lengths[:, None])


class ByMask(Mean):
    def forward(self, x, mask=None):
        return self.of(x, mask)


class ByPaddingMask(Mean):
    def forward(self, x, key_padding_mask):
        return self.of(x, ~key_padding_mask)


class Blind(nn.Sequential):
    """Takes all steps alike."""

    def __init__(self, length=LONGEST) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(2 * length, 3), nn.Tanh())


def lists(folder):
    import pyarrow as arrow
    import pyarrow.parquet as pq

    kind = arrow.list_(arrow.list_(arrow.float32()))
    for k, part in enumerate((range(5), range(5, N))):
        column = arrow.array([sample(i).tolist() for i in part], kind)
        pq.write_table(arrow.table({"x": column}), folder / f"{k}.parquet", row_group_size=3)
    return str(folder)


def files(folder):
    """A file per length, and so another order: the lengths are sorted."""
    for i in range(N):
        np.save(folder / f"{i}.npy", sample(i)[None])
    return f"{folder}/*.npy"


SOURCES = [
    lambda folder: Ragged(),
    lambda folder: DataLoader(Ragged(), num_workers=1, batch_size=3),
    lists,
    files,
    lambda folder: [sample(i).tolist() for i in range(N)],
]


@pytest.mark.parametrize("make", SOURCES)
def test_every_row_is_its_sample_and_then_padding(make, tmp_path):
    source = open_source(make(tmp_path), dtype=torch.float32, pad=-2.0)
    assert source.padding.lengths[:, 0].tolist() == [3 + i % 5 for i in range(N)]
    for start, stop in ((0, N), (3, 4), (4, 9), (5, 6)):
        (rows,) = next(source.stream([(start, stop)]))
        assert rows.shape == (stop - start, 2, LONGEST)
        for row, i in zip(rows.numpy(), range(start, stop), strict=True):
            np.testing.assert_array_equal(row[:, : 3 + i % 5], sample(i))
            assert (row[:, 3 + i % 5 :] == -2).all()


@pytest.mark.parametrize("kind", [ByLengths, ByMask, ByPaddingMask, Blind])
def test_padding_changes_no_sample_and_the_mask_is_kept(kind, tmp_path):
    model = kind().eval()
    given = {"method": "jacobian", "pad": 0.0, "reductions": ["mean_abs"], "engine": "autograd"}
    results = run(model, Ragged(), tmp_path / "a.zarr", chunk=4, **given)
    for i in range(N):
        alone = torch.from_numpy(sample(i))[None]
        size = alone.shape[-1]
        x = nn.functional.pad(alone, (0, LONGEST - size))
        more = {ByLengths: torch.tensor([size]), ByMask: torch.arange(LONGEST)[None] < size,
                ByPaddingMask: torch.arange(LONGEST)[None] >= size}.get(kind)  # fmt: skip
        leaf = x.requires_grad_()
        y = model(leaf) if more is None else model(leaf, more)
        expected = torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0][0] for v in y[0]])
        expected[..., size:] = 0
        torch.testing.assert_close(results.maps(i, i + 1)[0], expected)
        torch.testing.assert_close(results.maps(i, i + 1, "predictions")[0], y[0].detach())
        assert results.mask(i, i + 1)[0].tolist() == [[k < size for k in range(LONGEST)]] * 2
    assert verify(tmp_path / "a.zarr").ok


def test_shards_repairs_and_importance(tmp_path):
    model = ByLengths().eval()
    given = {"pad": 0.0, "chunk": 4, "engine": "autograd", "reductions": ["mean_abs"]}
    whole, out, part = (tmp_path / name for name in ("whole.zarr", "out.zarr", "part.zarr"))
    run(model, Ragged(), whole, **given)
    for place, shard in ((out, (0, 2)), (part, (1, 2))):
        run(model, Ragged(), place, shard=shard, **given)
    merge(out, [part])
    (out / "attributions/c.1.0.0.0").unlink()
    (out / "lengths/c.0.0").write_bytes(b"")
    assert not verify(out).ok
    repair(out, model, Ragged())  # which knows from the store how samples were padded
    assert_same(out, whole)
    found = gradkern.importance(model, Ragged(), pad=0.0, engine="autograd", curve_samples=4)
    assert found.scores.shape == (3, 2, LONGEST)


@pytest.mark.parametrize(
    ("source", "pad", "words"),
    [
        (Ragged(), True, "pad: got True, expected a number"),
        (Ragged(), (0.0, 0), r"pad: got \(0.0, 0\)"),
        (Ragged(), (0.0, 5), "sample 3 is 6 long, and 3 others are longer"),
        ([[1.0, 2.0], [[1.0]]], 0.0, "sample 0 has the shape"),
        (np.ones((4, 2, 3), np.float32), (0.0, 5), "all samples have one shape"),
        ([[1.0, [2.0]], [1.0]], 0.0, "lists of different lengths"),
    ],
)
def test_what_cannot_be_padded_is_refused(source, pad, words):
    with pytest.raises(ValueError, match=words):
        open_source(source, pad=pad)


def test_a_given_length_and_two_ragged_axes(tmp_path):
    results = run(Blind(9).eval(), Ragged(), tmp_path / "a.zarr", pad=(0.0, 9), engine="autograd")
    assert results.array("attributions").shape == (N, 3, 2, 9)
    images = [np.ones((1 + i % 2, 2 + i % 3)).tolist() for i in range(6)]
    source = open_source(images, pad=0)
    assert source.read(0, 6)[0].sum((1, 2)).tolist() == [(1 + i % 2) * (2 + i % 3) for i in range(6)]
    with pytest.raises(ValueError, match="differ in 2 axes"):
        source.for_model(ByLengths()).read(0, 1)
