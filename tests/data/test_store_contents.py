"""The store: readable without gradkern, exact in every dtype, its statistics those of the maps."""

from __future__ import annotations

import mmap
import random
import warnings

import numpy as np
import pytest
import torch
import xarray
import zarr

import gradkern
from gradkern.data import REDUCTIONS, Results, methods, run, statistics
from gradkern.data.store import durable
from gradkern.data.store.ledger import ChunkRecord, Ledger
from tests.cases import CASES

CASE = CASES["lenet5"]


@pytest.fixture(scope="module")
def problem():
    model, x = CASE.build(), CASE.inputs(21)[0]
    return model, x, gradkern.jacobian(model, x, engine="kernel")


def test_opens_in_plain_zarr_and_xarray_without_a_warning(problem, tmp_path):
    model, x, jacobian = problem
    run(model, x, tmp_path / "a.zarr", method="jacobian", chunk=8, reductions=list(REDUCTIONS), top_features=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")
        names = {name for name, _ in group.members()}
        data = xarray.open_zarr(tmp_path / "a.zarr", chunks=None)
    assert names == {"attributions", "predictions", "targets", "top_features", "chunks", "reductions"}
    np.testing.assert_array_equal(group["attributions"][...], jacobian.numpy())
    assert group.metadata.zarr_format == 3
    assert data["attributions"].dims[:2] == ("sample", "target")
    np.testing.assert_array_equal(data["attributions"].values, jacobian.numpy())
    np.testing.assert_array_equal(data["predictions"].values.argmax(1), model(x).argmax(1).numpy())
    np.testing.assert_array_equal(group["targets"][...], np.arange(10))
    np.testing.assert_array_equal(group["chunks"][...], [[0, 8], [8, 16], [16, 21]])
    top = jacobian.abs().flatten(2).topk(4).indices
    np.testing.assert_array_equal(group["top_features"][...], top.numpy())
    assert set(group["reductions"]) == set(REDUCTIONS)


@pytest.mark.parametrize("compression", ["none", "zstd", "blosc", "zstd:5"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_dtypes_and_compression(problem, tmp_path, dtype, compression):
    model, x, jacobian = problem
    results = run(model, x, tmp_path / "a.zarr", method="jacobian", chunk=16, dtype=dtype, compression=compression)
    found = results.maps(0, 21)
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, jacobian.to(found.dtype))


def test_reductions_are_those_of_the_maps(problem, tmp_path):
    model, x, jacobian = problem
    results = run(
        model, x, tmp_path / "a.zarr", method="jacobian", chunk=8, batch=4, maps=False, reductions=list(REDUCTIONS)
    )
    assert "attributions" not in results
    wide = jacobian.double()
    expected = {
        "mean_abs": wide.abs().mean(0),
        "mean": wide.mean(0),
        "variance": wide.var(0, unbiased=False),
        "max_abs": wide.abs().amax(0),
        "importance": wide.abs().mean(0) * x.double().std(0, unbiased=False),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(results.reduction(name), value.numpy(), rtol=1e-9, atol=1e-12, err_msg=name)
    flat = jacobian.abs().flatten(2).numpy()
    place = np.argsort(np.argsort(-flat, axis=2, kind="stable"), axis=2, kind="stable")
    counts = np.stack([(place * 10 // 784 == b).sum(0) for b in range(10)], axis=-1)
    np.testing.assert_array_equal(results.reduction("ranks").reshape(10, 784, 10), counts)


def test_kernel_and_plain_statistics_agree(monkeypatch):
    maps = torch.randn(50, 3, 40, dtype=torch.float64)
    maps[7, 1, 5] = float("nan")
    group = torch.arange(50) % 32
    both = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(gradkern.runtime.ops, "accumulate", lambda *given: False)
        sums = [torch.zeros(3, 40, dtype=torch.float64) for _ in range(3)]
        largest, groups = torch.zeros(3, 40), torch.zeros(32, 3, 40, dtype=torch.float64)
        statistics.add(maps, group, *sums, largest, groups)
        both.append([*sums, largest, groups])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("shape", ["shared", "own", "topk"])
def test_targets(problem, tmp_path, shape):
    model, x, jacobian = problem
    rows = torch.randint(0, 10, (21, 2), generator=torch.Generator().manual_seed(0))
    targets = {"shared": [3, -1], "own": rows, "topk": gradkern.TopK(2)}[shape]
    results = run(
        model,
        x,
        tmp_path / "a.zarr",
        method="jacobian",
        targets=targets,
        chunk=8,
        reductions=["mean_abs", "importance"],
    )
    if shape == "topk":
        rows = model(x).topk(2).indices
    picked = jacobian[:, [3, 9]] if shape == "shared" else jacobian[torch.arange(21)[:, None], rows]
    torch.testing.assert_close(results.maps(0, 21), picked, rtol=1e-4, atol=1e-6)  # another number of seeds
    expected = gradkern.jacobian(model, x, targets, engine="kernel")
    assert torch.equal(results.maps(0, 21), expected[0] if shape == "topk" else expected)
    stored = np.asarray(results.array("targets")[...])
    np.testing.assert_array_equal(stored, [3, 9] if shape == "shared" else rows.numpy())
    mean, picked = results.reduction("mean_abs"), results.maps(0, 21)
    if shape == "shared":
        np.testing.assert_allclose(mean, picked.double().abs().mean(0).numpy(), atol=1e-12)
        return
    assert mean.shape == (10, 1, 28, 28)
    for c in range(10):
        mine = picked[rows == c].double().abs()
        expected = mine.mean(0).numpy() if len(mine) else np.full((1, 28, 28), np.nan)
        np.testing.assert_allclose(mean[c], expected, atol=1e-12)


def test_methods(problem, tmp_path, monkeypatch):
    model, x, jacobian = problem
    found = run(model, x, tmp_path / "a.zarr", method="input_x_gradient", chunk=16).maps(0, 21)
    assert torch.equal(found, jacobian * x[:, None])

    @methods.register_method("halves")
    def halves(batch):
        found = methods.gradients(batch)
        return methods.Outcome(tuple(m / 2 for m in found.maps), found.outputs, None, found.outputs * 0)

    monkeypatch.setitem(methods.METHODS, "halves", halves)
    mine = run(model, x, tmp_path / "b.zarr", method="halves")
    assert torch.equal(mine.maps(0, 21), jacobian / 2)
    assert np.all(mine.array("deltas")[...] == 0)
    monkeypatch.delitem(methods.METHODS, "halves")
    named = run(model, x, tmp_path / "c.zarr", method="Saliency", chunk=8, arguments={"abs": False}, targets=[2])
    assert torch.equal(named.maps(0, 21), gradkern.jacobian(model, x, [2], engine="kernel"))
    with pytest.raises(ValueError, match=r"method: got 'halves', expected one of saliency|jacobian"):
        run(model, x, tmp_path / "d.zarr", method="halves")
    with pytest.raises(ValueError, match="takes none"):
        run(model, x, tmp_path / "d.zarr", arguments={"steps": 3})


def test_classes_of_attr_by_name(problem, tmp_path):
    model, x, _ = problem
    integrated = run(model, x, tmp_path / "a.zarr", method="integrated_gradients", chunk=8, arguments={"n_steps": 8})
    expected, deltas = gradkern.attr.IntegratedGradients(model).attribute_all(
        x, n_steps=8, return_convergence_delta=True
    )
    torch.testing.assert_close(integrated.maps(0, 21), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(integrated.array("deltas")[...]), deltas, rtol=1e-3, atol=1e-4)
    names = gradkern.data.methods.method_names()
    assert {"IntegratedGradients", "DeepLift"} <= set(names)
    assert not {"NoiseTunnel", "LayerGradCam"} & set(names)
    with pytest.raises(ValueError, match="method: got 'LayerGradCam'"):
        run(model, x, tmp_path / "b.zarr", method="LayerGradCam")


def test_random_methods_draw_by_sample_so_that_they_resume(problem, tmp_path, monkeypatch):
    model, x, jacobian = problem

    class Noisy(gradkern.attr.Saliency):
        def attribute_all(self, inputs, targets=None, return_convergence_delta=False):
            noise = torch.randn(inputs.shape) * np.random.rand()
            maps = gradkern.jacobian(self.forward_func, inputs + noise, targets, engine="kernel")
            return maps, torch.ones(maps.shape[:2])

    monkeypatch.setattr(gradkern.attr, "Noisy", Noisy, raising=False)
    state = torch.get_rng_state()
    whole = run(model, x, tmp_path / "a.zarr", method="noisy", chunk=8)
    run(model, x, tmp_path / "b.zarr", method="noisy", chunk=8, shard=(1, 2))
    parts = run(model, x, tmp_path / "b.zarr", method="noisy", chunk=8)
    assert torch.equal(whole.maps(0, 21), parts.maps(0, 21))
    assert not torch.equal(whole.maps(0, 21), jacobian)
    assert np.all(parts.array("deltas")[...] == 1)
    assert torch.equal(state, torch.get_rng_state())


def test_autograd_models_and_those_whose_samples_mix(tmp_path):
    case = CASES["resnet1d_custom"]  # a custom backward, which no trace sees
    model, x = case.build(), case.inputs(11)[0]
    with pytest.warns(gradkern.GradkernWarning, match="runs on autograd"):
        results = run(model, x, tmp_path / "a.zarr", method="jacobian", chunk=4)
    expected = gradkern.jacobian(model, x, engine="autograd")
    torch.testing.assert_close(results.maps(0, 11), expected, rtol=1e-4, atol=1e-5)
    assert results.about["pinned"]["engine"] == "autograd"
    mixing = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4)).train()
    with pytest.raises(ValueError, match=r"depend on the chunk that it is in. Use model.eval\(\)"):
        run(mixing, torch.randn(11, 6), tmp_path / "b.zarr")
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"compression": "rar"}, "compression: got 'rar'"),
        ({"reductions": ["median"]}, "reductions: got 'median', expected some of mean_abs"),
        ({"chunk": 0}, "chunk: got 0"),
        ({"maps": False}, "nothing but predictions is left"),
        ({"top_features": 1000}, "a sample has 784 features"),
        ({"targets": torch.zeros(3, 2, dtype=torch.int64)}, "got 3 rows, expected one for each of 21 samples"),
        ({"targets": [99]}, "got index 99"),
    ],
)
def test_arguments_that_do_not_fit(problem, tmp_path, options, words):
    model, x, _ = problem
    with pytest.raises(ValueError, match=words):
        run(model, x, tmp_path / "a.zarr", **options)
    assert not (tmp_path / "a.zarr").exists()


def test_a_run_that_is_not_complete_says_so(problem, tmp_path):
    model, x, _ = problem
    results = run(model, x, tmp_path / "a.zarr", chunk=8, shard=(0, 3), reductions=["mean_abs"])
    assert (results.finished_chunks, results.chunks) == (1, 3)
    with pytest.raises(ValueError, match="1 of 3 chunks are finished"):
        results.reduction("mean_abs")
    assert np.isnan(results.array("attributions")[8:]).all()
    with pytest.raises(ValueError, match="there is no store"):
        Results.open(tmp_path / "b.zarr")


def test_a_forecast_comes_before_the_run(problem, tmp_path, capsys, caplog):
    model, x, _ = problem
    with caplog.at_level("INFO", logger="gradkern.data"):
        run(model, x, tmp_path / "a.zarr", chunk=8, progress=True)
    said = capsys.readouterr().err
    assert "21 samples in 3 chunks of 8 (batches of 8): 643 KiB to write" in said
    assert "100%" in said
    events = [r.getMessage().split()[0] for r in caplog.records if r.name == "gradkern.data"]
    assert events == ["event=start", "event=end"]
    run(model, x, tmp_path / "b.zarr", chunk=8)
    assert capsys.readouterr().err == ""


def test_large_chunks_written_around_the_page_cache(tmp_path, monkeypatch):
    case = CASES["cnn1d_strided"]
    model, x = case.build(), case.inputs(1700)[0]
    chunk = 407  # 1,094,016 bytes of maps: large enough for direct writes, and no whole number of blocks
    assert chunk * 3 * 224 * 4 > durable.DIRECT
    assert chunk * 3 * 224 * 4 % durable.BLOCK
    opened, ended = [], []
    original, through = durable._open, durable._through_cache
    monkeypatch.setattr(durable, "_open", lambda *a: opened.append(a) or original(*a))
    monkeypatch.setattr(durable, "_through_cache", lambda n: ended.append(n) or through(n))
    results = run(model, x, tmp_path / "a.zarr", method="jacobian", chunk=chunk, threads=1)
    expected = gradkern.jacobian(model, x, engine="kernel")
    assert torch.equal(results.maps(0, 1700), expected)  # memory is used again: every chunk must be its own
    np.testing.assert_array_equal(zarr.open_group(str(tmp_path / "a.zarr"))["attributions"][...], expected.numpy())
    sizes = [(tmp_path / f"a.zarr/attributions/c.{i}.0.0.0").stat().st_size for i in range(5)]
    assert sizes == [chunk * 3 * 224 * 4] * 5
    assert opened
    assert ended


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (1 << 20) + 4096])
@pytest.mark.parametrize("aligned", [True, False])
def test_files_are_written_byte_for_byte(tmp_path, size, aligned):
    memory = np.frombuffer(mmap.mmap(-1, size + 8192), dtype=np.uint8)
    memory[:] = np.random.default_rng(size).integers(0, 256, len(memory), dtype=np.uint8)
    content = memory[0 if aligned else 3 :][:size]
    for place in (tmp_path, tmp_path / "deep" / "down"):
        durable.write_file(place / "file", content)
        assert (place / "file").read_bytes() == content.tobytes()
        assert [p.name for p in place.iterdir() if p.is_file()] == ["file"]


def test_an_address_that_fsspec_knows(problem, tmp_path):
    model, x, jacobian = problem
    place = f"memory://{tmp_path.name}/a.zarr"
    first = run(model, x, place, method="jacobian", chunk=8, shard=(0, 2), reductions=["mean_abs"])
    assert (first.finished_chunks, first.finished) == (1, False)
    results = run(model, x, place, method="jacobian", reductions=["mean_abs"])
    assert results.about["exact"]
    assert torch.equal(results.maps(0, 21), jacobian)
    np.testing.assert_allclose(results.reduction("mean_abs"), jacobian.double().abs().mean(0).numpy(), atol=1e-12)
    with pytest.raises(gradkern.data.Mismatch):
        run(CASE.build(5), x, place, method="jacobian", reductions=["mean_abs"])


# ---------------------------------------------------------------------------------------------------------------
# The ledger


def record(i: int) -> ChunkRecord:
    rng = np.random.default_rng(i)
    sums = {"a/sum_abs": rng.standard_normal(5) * 10.0 ** rng.integers(-8, 8), "a/max_abs": rng.random(3, np.float32)}
    sums |= {"a/count": np.array([i % 3]), "a/sum": rng.standard_normal((1, 4)) * (i % 3)}
    sums |= {"a/deviations": rng.random((1, 4)) * (i % 3)}
    return ChunkRecord(sums, {"samples": 1, "seconds": 0.0, "batches": [1], "notes": []})


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 8, 13, 21])
def test_statistics_merge_to_the_same_bits_in_any_order(tmp_path, chunks):
    rng = random.Random(chunks)
    seen = set()
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        store = durable.DurableStore(folder)
        cut = rng.randint(0, chunks)
        owned = [range(0, cut), range(cut, chunks)]  # two processes
        ledgers = [Ledger(store, chunks) for _ in owned]
        order = [(0 if c < cut else 1, c) for c in range(chunks)]
        if attempt:
            rng.shuffle(order)
        for who, chunk in order:
            if rng.random() < 0.3:  # killed, and started again
                ledgers[who] = Ledger(store, chunks)
                ledgers[who].adopt(owned[who])
            assert (ledgers[who].total() is None) == (len(ledgers[who].finished()) < chunks)
            ledgers[who].add(chunk, record(chunk))
        total = Ledger(store, chunks).total()
        assert total is not None
        assert total.facts["samples"] == chunks
        seen.add(b"".join(total.sums[k].tobytes() for k in sorted(total.sums)))
        assert len(list((folder / "chunks/finished").iterdir())) <= 2 * chunks.bit_length()
    assert len(seen) == 1


def test_the_total_while_another_process_joins_records(tmp_path, monkeypatch):
    """Records that vanish between the listing and the reading, because their parent is there by now."""
    store = durable.DurableStore(tmp_path)
    writer, reader = Ledger(store, 8), Ledger(store, 8)
    for chunk in (7, 0, 2, 4, 6, 1, 5):
        writer.add(chunk, record(chunk))
    read = reader.read

    def late(node):
        if not writer.own_records.get((3, 0)):
            writer.add(3, record(3))  # all eight become one record
        return read(node)

    monkeypatch.setattr(reader, "read", late)
    total = reader.total()
    assert total is not None
    assert total.facts["samples"] == 8


def test_a_record_that_is_lost_is_an_error(tmp_path, monkeypatch):
    store = durable.DurableStore(tmp_path)
    ledger = Ledger(store, 4)
    ledger.add(1, record(1))
    monkeypatch.setattr(ledger, "nodes", lambda: {(0, 1), (0, 2)})
    with pytest.raises(FileNotFoundError, match=r"the record .*00\.00000002\S* is missing"):
        ledger.total()
