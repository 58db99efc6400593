"""Every row belongs to the sample of its number, whatever the source, chunks, workers, shards and kills."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from gradkern.data import Mismatch, Outcome, merge, open_source, run, verify
from gradkern.data import methods as data_methods
from gradkern.data.sources import datasets, registry
from tests.support.sources import MAKERS, TABLES, Items, X

KINDS = [*MAKERS, *TABLES, lambda folder: DataLoader(Items(), batch_size=5, num_workers=2, collate_fn=list_of_pairs)]


def list_of_pairs(items):
    return default_collate(items)


class Kill(BaseException):
    """Not an Exception: nothing in between may catch it, as nothing catches a kill."""


@pytest.fixture
def mirror(monkeypatch):
    """A method whose maps are the samples themselves; it dies at the call of a given number."""
    state = {"calls": 0, "dies": None}

    def mirrored(batch):
        state["calls"] += 1
        if state["calls"] == state["dies"]:
            raise Kill
        (x,) = batch.inputs
        return Outcome((x[:, None].clone(),), batch.model(x).detach())

    monkeypatch.setitem(data_methods.METHODS, "mirror", mirrored)
    return state


def test_every_registered_kind_is_among_those_tried(tmp_path):
    tried = {type(open_source(make(folder_of(tmp_path, i)))) for i, make in enumerate(KINDS)}
    ours = {kind for kind in registry.SOURCE_KINDS if kind.__module__.startswith("gradkern.")}
    assert ours <= tried, "a new kind of source needs an entry in MAKERS of tests/support/sources.py"


def folder_of(path, name):
    folder = path / str(name)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_every_row_belongs_to_the_sample_of_its_number(mirror, tmp_path, number):
    rng = random.Random(f"rows {number}")
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 2)).eval()
    given = {"method": "mirror", "engine": "autograd", "chunk": rng.randint(1, 9), "reductions": ["mean"]}
    given["input_dtype"] = torch.float32  # numbers in a csv have no dtype
    shards = rng.choice([1, 1, 2, 3])
    order = rng.sample(range(shards), shards)
    apart = shards > 1 and rng.random() < 0.5  # each shard to a store of its own
    outs = [tmp_path / (f"{i}.zarr" if apart else "0.zarr") for i in range(shards)]
    source = KINDS[number](folder_of(tmp_path, "source"))
    for shard in order:
        mirror |= {"calls": 0, "dies": rng.choice([None, 1, 2, 3, 4, 5])}
        try:
            run(model, source, outs[shard], shard=(shard, shards), **given)
        except Kill:
            mirror["dies"] = None
            run(model, source, outs[shard], shard=(shard, shards), **given)
    results = merge(outs[0], outs[1:] if apart else [])
    np.testing.assert_array_equal(results.array("attributions")[...].reshape(X.shape), X)
    np.testing.assert_allclose(results.array("predictions")[...], model(torch.tensor(X)).detach(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(results.reduction("mean").reshape(X.shape[1:]), X.mean(0), rtol=1e-5, atol=1e-6)
    assert results.about["exact"]
    assert verify(outs[0]).ok


# ---------------------------------------------------------------------------------------------------------------
# Sources whose rows are not their samples are refused, and the sample is named


def dropping(items):
    return default_collate([item for item in items if item[1] != 2])


def doubling(items):
    return default_collate([item for item in items for _ in range(1 + (item[0][0, 0] == X[7, 0, 0]))])


def balanced(items):
    """Drops one record and doubles another, so that their number is right again in a whole chunk."""
    return doubling([item for item in items if item[0][0, 0] != X[3, 0, 0]])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("collate", "words"),
    [
        (dropping, "sample 2 could not be collated"),
        (doubling, "sample 7 gave 2 rows"),
        (balanced, "sample 3 could not"),
    ],
)
def test_a_collate_function_that_drops_or_doubles_records(collate, words, workers):
    source = open_source(DataLoader(Items(), batch_size=4, num_workers=workers, collate_fn=collate))
    with pytest.raises(ValueError, match=words):
        list(source.stream([(0, 12), (12, 23)]))


def scaled_by_the_batch(items):
    x, label = default_collate(items)
    return x / x.abs().amax(), label


def scaled_by_a_number(items):
    x, label = default_collate(items)
    return x / 3.0, label


def test_a_collate_function_whose_rows_depend_on_the_batch_is_refused():
    with pytest.raises(ValueError, match="other rows for the samples 0 and 1 together than for each alone"):
        open_source(DataLoader(Items(), batch_size=4, collate_fn=scaled_by_the_batch))
    open_source(DataLoader(Items(), batch_size=4, collate_fn=scaled_by_a_number))


class Broken(Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, i):
        if i == 14:
            raise OSError("no such file")
        return None if i == 20 else X[i]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("span", "words"), [((12, 17), "sample 14 could not be read .OSError: no such"), ((17, 23), "sample 20")]
)
def test_a_sample_that_cannot_be_read_is_named(span, words, workers):
    source = open_source(DataLoader(Broken(), num_workers=workers))
    with pytest.raises(ValueError, match=words):
        list(source.stream([(0, 12), span]))


def test_workers_end_well_whatever_thread_starts_them():
    """A worker that ended with an error made torch print "exited unexpectedly" now and then."""
    with ThreadPoolExecutor(1) as pool:
        batches = pool.submit(datasets._started, DataLoader(Items(), num_workers=1)).result()
        next(batches)
        workers = batches._workers
        batches._shutdown_workers()
    assert [worker.exitcode for worker in workers] == [0]


class Batched(Dataset):
    """Fetches several items at once, in the wrong order from the fifth on."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i]

    def __getitems__(self, indices):
        return [X[i] for i in (indices if len(indices) < 5 else [*indices[:-2], indices[-1], indices[-2]])]


class Augmented(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + np.float32(random.random())


@pytest.mark.parametrize("source", [Batched(), Augmented()])
def test_rows_that_are_not_their_samples_are_seen_while_reading(mirror, source, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 2)).eval()
    with pytest.raises(ValueError, match=r"sample \d+ read alone is not row \d+ of the samples 0 … 7"):
        run(model, source, tmp_path / "a.zarr", method="mirror", engine="autograd", chunk=8)
    run(model, source, tmp_path / "b.zarr", method="mirror", engine="autograd", chunk=8, trust_source=True)


@pytest.mark.parametrize("changed", [5, 22])
def test_a_source_that_changed_is_seen_before_a_chunk_is_skipped(mirror, tmp_path, changed):
    model, x = nn.Linear(10, 2).eval(), np.random.default_rng(0).standard_normal((200, 10)).astype(np.float32)
    given = {"method": "mirror", "engine": "autograd", "chunk": 8}
    run(model, x, tmp_path / "a.zarr", shard=(0, 2), **given)
    y = x.copy()
    y[changed] += 1
    for shard in ((0, 2), (0, 1)):
        with pytest.raises(Mismatch, match=rf"samples {changed // 8 * 8} … {changed // 8 * 8 + 7} have changed"):
            run(model, y, tmp_path / "a.zarr", shard=shard, **given)
    run(model, y, tmp_path / "a.zarr", trust_source=True, **given)  # whoever vouches for it
    with pytest.raises(Mismatch, match="have changed"):
        run(model, y, tmp_path / "a.zarr", **given)  # a finished store too


# ---------------------------------------------------------------------------------------------------------------
# Lists of different lengths


def parquet_of(folder, column):
    import pyarrow as arrow
    import pyarrow.parquet as pq

    pq.write_table(arrow.table({"x": column}), folder / "x.parquet", row_group_size=4)
    return open_source(str(folder / "x.parquet"), columns="x")


def kinds_of_lists():
    import pyarrow as arrow

    f = arrow.float32()
    return {"list": arrow.list_(f), "large": arrow.large_list(f), "view": arrow.list_view(f)}


@pytest.mark.parametrize("kind", ["list", "large"])
def test_ragged_lists_are_never_cut_anew(tmp_path, kind):
    import pyarrow as arrow

    rows = [[1.0] * (2 + i % 3) for i in range(12)]  # 36 numbers, and 12 samples
    source = parquet_of(tmp_path, arrow.array(rows, kinds_of_lists()[kind]))
    with pytest.raises(ValueError, match=r"sample 3 has \[2\], sample 4 has \[3\]"):
        source.read(3, 9)
    assert source.read(4, 5)[0].shape == (1, 3)


@pytest.mark.parametrize("outer", [True, False])
def test_ragged_nested_lists(tmp_path, outer):
    import pyarrow as arrow

    rows = [[[1.0, 2.0], [3.0, 4.0]] for _ in range(6)]
    rows[4] = [[1.0, 2.0, 3.0, 4.0]] if outer else [[1.0, 2.0, 3.0], [4.0]]
    source = parquet_of(tmp_path, arrow.array(rows, arrow.list_(arrow.list_(arrow.float32()))))
    with pytest.raises(ValueError, match="sample 4"):
        source.read(0, 6)
    assert source.read(0, 4)[0].shape == (4, 2, 2)


@pytest.mark.parametrize("fixed", [True, False])
def test_missing_values_are_named(tmp_path, fixed):
    import pyarrow as arrow

    kind = arrow.list_(arrow.float32(), 2) if fixed else arrow.list_(arrow.float32())
    source = parquet_of(tmp_path, arrow.array([[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0]], kind))
    with pytest.raises(ValueError, match=r"no value for some samples \(the first: 1\)"):
        source.read(0, 4)
    assert source.read(2, 4)[0].tolist() == [[3.0, 4.0], [5.0, 6.0]]
    integers = parquet_of(tmp_path, arrow.array([1, 2, None]))
    with pytest.raises(ValueError, match="the first: 2"):
        integers.read(0, 3)


class Ragged(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return np.ones(3 + (i > 3), np.float32)


def ragged_hdf5(folder):
    import h5py

    with h5py.File(folder / "x.h5", "w") as file:
        data = file.create_dataset("x", (6,), dtype=h5py.vlen_dtype(np.float32))
        for i in range(6):
            data[i] = Ragged()[i]
    return f"{folder}/x.h5:x"


def ragged_huggingface(folder):
    import datasets

    return datasets.Dataset.from_dict({"x": [Ragged()[i].tolist() for i in range(6)]})


@pytest.mark.parametrize(
    "make",
    [lambda folder: Ragged(), lambda folder: DataLoader(Ragged(), num_workers=1), ragged_hdf5, ragged_huggingface],
)
def test_ragged_samples_of_any_source_are_named(tmp_path, make):
    source = open_source(make(tmp_path), columns="x" if make is ragged_huggingface else None)
    with pytest.raises(ValueError, match=r"sample 2 has \[3\], sample 4 has \[4\]"):
        list(source.stream([(2, 6)]))


@pytest.mark.parametrize("rows", [[[]] + [[1.0] * 6] * 7, [[1.0] * 6] * 7 + [[]], [[1.0] * 3, [1.0] * 9] * 4])
def test_a_run_names_samples_of_other_lengths_before_the_model_sees_them(tmp_path, rows):
    import pyarrow as arrow

    source = parquet_of(tmp_path, arrow.array(rows, arrow.list_(arrow.float32())))
    with pytest.raises(ValueError, match=r"different shapes: sample 0 has \[\d\], sample \d has \[\d\].*pad="):
        run(nn.Linear(6, 2), source, tmp_path / "a.zarr")


def test_one_array_of_an_npz_is_read_without_the_others(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", x=X, y=np.zeros(3), z=np.array([{}], dtype=object))
    read = []
    original = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, k: read.append(k) or original(self, k))
    assert open_source(f"{tmp_path}/x.npz:x").samples == 23
    assert open_source(f"{tmp_path}/x.npz", columns="x").samples == 23
    assert set(read) == {"x"}
