"""Every kind of source gives the same samples, whole and in ranges; what cannot resume is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import gradkern
from gradkern.data import Source, open_source, register_source, run
from gradkern.data.sources import registry
from tests.cases import CASES
from tests.support.sources import MAKERS, Items, X, hdf5, memmap, npy, parquet, zarr_path


@pytest.mark.parametrize("make", MAKERS)
def test_sources_give_the_same_samples(make, tmp_path):
    source = open_source(make(tmp_path))
    assert source.samples == 23
    for start, stop in ((0, 23), (3, 11), (22, 23)):
        (rows,) = source.read(start, stop)
        assert rows.dtype == torch.float32
        np.testing.assert_array_equal(rows.numpy(), X[start:stop])
    parts = [rows for (rows,) in source.stream([(0, 8), (8, 16), (20, 23)])]
    np.testing.assert_array_equal(torch.cat(parts).numpy(), np.concatenate([X[:16], X[20:]]))


@pytest.mark.parametrize("make", [memmap, hdf5, zarr_path, parquet, npy])
def test_sources_on_disk_travel_as_places(make, tmp_path):
    source = open_source(make(tmp_path))
    source.read(0, 2)
    content = pickle.dumps(source)
    assert len(content) < 1500 + X.nbytes // 4
    (rows,) = pickle.loads(content).read(5, 9)
    np.testing.assert_array_equal(rows.numpy(), X[5:9])


def test_a_slice_of_a_memory_map_travels(tmp_path):
    part = memmap(tmp_path)[7:]
    (rows,) = pickle.loads(pickle.dumps(open_source(part))).read(0, 4)
    np.testing.assert_array_equal(rows.numpy(), X[7:11])


def test_columns_and_casts(tmp_path):
    both = open_source({"x": X, "y": X[:, 0]}, columns=("y", "x"))
    first, second = both.read(2, 4)
    assert (first.shape, second.shape) == ((2, 5), (2, 2, 5))
    (wide,) = open_source(X.astype(np.float64), dtype=torch.float32).read(0, 2)
    assert wide.dtype == torch.float32
    (pixels,) = open_source(np.arange(12, dtype=np.uint8).reshape(3, 4), dtype=torch.float32).read(0, 3)
    assert pixels.dtype == torch.float32
    (big,) = open_source(X.astype(">f4")).read(0, 23)
    np.testing.assert_array_equal(big.numpy(), X)
    with pytest.raises(ValueError, match=r"Say which: columns="):
        open_source({"x": X, "y": X})
    with pytest.raises(ValueError, match=r"got columns=\('z',\), but the group holds \['x'\]"):
        open_source({"x": X}, columns=("z",))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


class Iterates:
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Stream(), "no random access"),
        (DataLoader(Stream()), "no random access"),
        (DataLoader(Iterates(), batch_size=None), "no random access"),
        ("memory://nowhere/x.npy", "cannot be read .* Copy it to this machine"),
        (DataLoader(Items(), shuffle=True), "Use shuffle=False"),
        (3, "expected a tensor, a numpy array"),
        (X[:0], "expected at least one"),
        ((X, X[:5]), "has 5 samples and number 0 has 23"),
        ("nothing.npy", "there is no 'nothing.npy'"),
        ("data.xyz", "expected one that ends in"),
        ("data.csv", "there is no 'data.csv'"),
        (np.array(["a", "b"]), "expected numbers"),
    ],
)
def test_object_that_is_no_source_is_refused(source, words):
    with pytest.raises((ValueError, TypeError), match=words):
        open_source(source).read(0, 1)


def test_unequal_lists_in_parquet(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as pq

    pq.write_table(arrow.table({"x": [[1.0, 2.0], [3.0]]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"sample 0 has \[2\], sample 1 has \[1\]"):
        open_source(str(tmp_path / "x.parquet")).read(0, 2)


def test_two_inputs_make_two_arrays(tmp_path):
    case = next(c for c in CASES.values() if len(c.shapes) == 2 and c.traceable and not c.opaque)
    model, inputs = case.build(), case.inputs(9)
    results = run(model, inputs, tmp_path / "a.zarr", chunk=4, reductions=["mean_abs"])
    for i, x in enumerate(inputs):
        maps = results.maps(0, 9, f"attributions_{i}")
        assert maps.shape[2:] == x.shape[1:]
        np.testing.assert_allclose(results.reduction("mean_abs", input=i), maps.double().mean(0).numpy(), atol=1e-12)


class Scaled(nn.Module):
    def forward(self, x, age):
        return torch.stack([x.sum(1) * age, age**2], 1)


def test_an_input_that_is_one_number_per_sample(tmp_path):
    x, age = torch.randn(9, 4), torch.rand(9)
    names = ["mean_abs", "variance", "ranks", "importance"]
    place = tmp_path / "a.zarr"
    results = run(Scaled(), (x, age), place, "jacobian", chunk=4, engine="autograd", reductions=names, top_features=1)
    expected = gradkern.jacobian(Scaled(), (x, age), engine="autograd")[1]
    assert torch.equal(results.maps(0, 9, "attributions_1"), expected)
    np.testing.assert_allclose(results.reduction("mean_abs", input=1), expected.double().abs().mean(0), atol=1e-7)
    assert results.reduction("ranks", input=1)[:, 0].tolist() == [9, 9]
    with pytest.raises(ValueError, match="got 2, expected the index of an input, below 2"):
        results.reduction("mean_abs", input=2)


@pytest.mark.parametrize("source", [X[:, 0], (X[:, 0], X[:, 0, 0], X)])
def test_another_number_of_inputs_than_the_model_takes(source, tmp_path):
    with pytest.raises(ValueError, match=r"of shape .* but Scaled.forward takes \(x, age\)"):
        run(Scaled(), source, tmp_path / "a.zarr", engine="autograd")


def test_a_zarr_array_without_the_suffix(tmp_path):
    zarr.open_group(tmp_path / "g.zarr", mode="w").create_array("x", data=X)
    np.testing.assert_array_equal(open_source(tmp_path / "g.zarr" / "x").read(0, 23)[0].numpy(), X)


# ---------------------------------------------------------------------------------------------------------------
# A source of one's own: one class


class Sensor:
    """An object that no class of gradkern's takes: no length, no items."""

    def __init__(self, rows: np.ndarray) -> None:
        self.readings = rows


@pytest.fixture
def registered(monkeypatch):
    """The recipe: `Readings` reads a `Sensor`, and files of numbers in text."""
    monkeypatch.setattr(registry, "SOURCE_KINDS", list(registry.SOURCE_KINDS))

    @register_source
    class Readings(Source):
        about, suffixes = "a Sensor", (".txt",)

        def __init__(self, rows: np.ndarray) -> None:
            super().__init__(len(rows))
            self.readings = rows

        @classmethod
        def accepts(cls, data):
            return isinstance(data, Sensor)

        @classmethod
        def of(cls, data, columns):
            return cls(data.readings)

        @classmethod
        def at(cls, path, name, columns):
            return cls(np.loadtxt(path, dtype=np.float32))

        def rows(self, start, stop):
            return (torch.tensor(self.readings[start:stop]),)

    return Readings


def test_a_registered_class_is_all_that_a_new_source_takes(registered, tmp_path):
    model, rows = torch.nn.Linear(10, 2).eval(), X.reshape(23, 10)
    np.savetxt(tmp_path / "x.txt", rows, fmt="%.9g")
    expected = run(model, rows, tmp_path / "a.zarr", method="jacobian")
    for i, source in enumerate((Sensor(rows), str(tmp_path / "x.txt"))):
        assert isinstance(open_source(source), registered)
        results = run(model, source, tmp_path / f"{i}.zarr", method="jacobian")
        assert torch.equal(results.maps(0, 23), expected.maps(0, 23))
        assert results.about["fingerprint"] == expected.about["fingerprint"]
    with pytest.raises(TypeError, match=r"got int, expected .*, a Sensor, .* that ends in .*\.txt"):
        open_source(3)


def test_workers_cast_as_one_process_does():
    pixels = TensorDataset(torch.arange(24, dtype=torch.uint8).view(6, 4))
    for workers in (0, 1):
        source = open_source(DataLoader(pixels, batch_size=2, num_workers=workers), dtype=torch.float32)
        (rows,) = next(source.stream([(0, 3)]))
        assert rows.dtype == torch.float32
