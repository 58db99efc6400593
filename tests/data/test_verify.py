"""Damage to any file of a store is seen and named, and repaired to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gradkern.data import Damaged, Mismatch, Results, Settings, repair, run, verify
from gradkern.data.runs import verify as runs_verify
from gradkern.data.store import durable
from gradkern.data.store.ledger import Ledger
from tests.support.stores import assert_same
from tests.support.tiny import net, samples

STORES = Path(__file__).with_name("stores")
OPTIONS = {"method": "jacobian", "reductions": ["mean_abs", "importance"], "top_features": 2, "chunk": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "a.zarr"
    run(net(), samples(), out, **OPTIONS, compression="zstd")
    return out


@pytest.fixture
def store(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "a.zarr"))


def flip(content: bytes, at: float) -> bytes:
    place = min(int(len(content) * at), len(content) - 1)
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes(), 0.4)),
}
FILES = [
    "attributions/c.1.0.0", "predictions/c.0.0", "top_features/c.2.0.0", "reductions/mean_abs/c.0.0",
    "reductions/importance/c.0.0", "chunks/finished/03.00000000.npz", "chunks/c.0.0", "chunks/created.json",
    "targets/c.0", "attributions/zarr.json", "reductions/mean_abs/zarr.json", "zarr.json",
]  # fmt: skip


def test_a_store_as_it_was_written(store):
    verdict = verify(store)
    assert verdict.ok, verdict
    assert "everything that is finished is as it was written" in str(verdict)


@pytest.mark.parametrize("file", ["attributions/c.1.0.0", "chunks/finished/03.00000000.npz", "chunks/lock"])
def test_an_empty_folder_in_the_place_of_a_file(whole, store, file):
    (store / file).unlink()
    (store / file).mkdir()
    assert verify(store).ok == (file == "chunks/lock")
    repair(store, net(), samples())
    assert_same(store, whole)


def test_a_folder_with_something_in_it_is_left_alone(store):
    place = store / "attributions/c.1.0.0"
    place.unlink()
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    assert verify(store).spans == ((8, 16),)
    with pytest.raises(Damaged, match="Move it away"):
        repair(store, net(), samples())
    with pytest.raises(Damaged, match="verify"):
        run(net(), samples(), store, **OPTIONS, compression="zstd")
    assert (place / "notes.txt").exists()


@pytest.mark.parametrize(
    "gone", ["attributions", "reductions/mean_abs", "chunks", "zarr.json", "reductions/mean_abs/c.0.0"]
)
def test_whole_arrays_that_are_gone(whole, store, gone):
    shutil.rmtree(store / gone) if (store / gone).is_dir() else (store / gone).unlink()
    assert not verify(store).ok
    with pytest.raises(Damaged, match="verify"):
        run(net(), samples(), store, **OPTIONS, compression="zstd")
    repair(store, net(), samples())
    assert verify(store).ok
    assert_same(store, whole)


def test_a_file_that_goes_while_a_folder_is_listed_hides_no_other(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/c.0").write_bytes(b"12345678")
    (tmp_path / "a/c.1.partial").symlink_to("gone")
    assert durable.DurableStore(tmp_path).sizes("a") == {"c.0": 8}


def test_records_that_a_run_joins_while_they_are_read(store, monkeypatch):
    listed, nodes = [{(0, 0), (0, 1)}], Ledger.nodes
    monkeypatch.setattr(Ledger, "nodes", lambda self: listed.pop() if listed else nodes(self))
    assert not runs_verify._records(Results.open(store))[1]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_is_found_and_repaired_to_the_same_bits(whole, store, damage):
    for file in FILES:
        DAMAGE[damage](store / file)
        verdict = verify(store)
        assert not verdict.ok, (damage, file)
        assert str(store) in str(verdict)
        if "/c.1" in file:
            assert verdict.spans == ((8, 16),)
            assert "samples to recompute: 8 … 15" in str(verdict)
        repaired = repair(store, net(), samples())
        assert verify(store).ok, (damage, file)
        assert repaired.about["exact"]
        assert_same(store, whole)


def test_random_bits_in_random_files(whole, store):
    """A flip may be harmless (in a file's padding); then everything reads the same, and else it is found."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        files = sorted(p for p in store.rglob("*") if p.is_file() and p.stat().st_size and "holders" not in p.parts)
        file = files[rng.integers(len(files))]
        before = file.read_bytes()
        file.write_bytes(flip(before, rng.random()))
        if verify(store).ok:
            assert_same(store, whole)
        file.write_bytes(before)
    assert verify(store).ok


def test_several_damages_at_once_in_an_unfinished_store(whole, tmp_path):
    out = tmp_path / "a.zarr"
    run(net(), samples(), out, **OPTIONS, compression="zstd", shard=(0, 2))
    for file in ("attributions/c.0.0.0", "predictions/c.1.0", "zarr.json"):
        DAMAGE["flipped"](out / file)
    DAMAGE["truncated"](next(out.glob("chunks/finished/*.npz")))
    assert not verify(out).ok
    assert not repair(out, net(), samples()).about["finished"], "the other shard is not ours to compute"
    assert verify(out).ok
    run(net(), samples(), out, **OPTIONS, compression="zstd")
    assert_same(out, whole)


def test_another_model_or_source_repairs_nothing(store):
    DAMAGE["deleted"](store / "attributions/c.1.0.0")
    with pytest.raises(Mismatch, match="other weights"):
        repair(store, net(1), samples())
    other = samples()
    other[9] += 1  # none of those that are read alone
    with pytest.raises(Mismatch):
        repair(store, net(), other)
    assert not (store / "attributions/c.1.0.0").exists()


def test_a_run_is_not_continued_over_a_hole(store):
    DAMAGE["deleted"](store / "predictions/c.1.0")
    with pytest.raises(Damaged, match=r"1 files of finished chunks .* predictions of the samples 8 … 15"):
        run(net(), samples(), store, **OPTIONS, compression="zstd")


def test_settings_of_which_the_store_has_a_hash_only(tmp_path):
    rows = torch.randint(0, 3, (40, 2), generator=torch.Generator().manual_seed(0))
    run(net(), samples(), tmp_path / "a.zarr", targets=rows, chunk=8)
    shutil.copytree(tmp_path / "a.zarr", tmp_path / "b.zarr")
    DAMAGE["emptied"](tmp_path / "b.zarr/targets/c.1.0")
    with pytest.raises(ValueError, match=r"only a hash .* settings=gradkern.data.Settings"):
        repair(tmp_path / "b.zarr", net(), samples())
    repair(tmp_path / "b.zarr", net(), samples(), settings=Settings(targets=rows))
    assert (tmp_path / "a.zarr/targets/c.1.0").read_bytes() == (tmp_path / "b.zarr/targets/c.1.0").read_bytes()


def test_a_store_of_an_earlier_version_is_read_at_least(tmp_path):
    shutil.copytree(STORES / "finished.zarr", tmp_path / "a.zarr")
    verdict = verify(tmp_path / "a.zarr")
    assert verdict.ok, verdict
    assert verdict.unchecked == 5
    DAMAGE["truncated"](tmp_path / "a.zarr/attributions/c.1.0.0.0")
    DAMAGE["flipped"](next((tmp_path / "a.zarr/chunks/finished").glob("*.npz")))
    assert not verify(tmp_path / "a.zarr").ok
    assert Results.open(tmp_path / "a.zarr").short_files()


@pytest.mark.parametrize("key", ["../out.txt", "/etc/x", "a/../../zarr.json", "attributions/c.1.0.0"])
def test_a_copy_that_leads_out_of_the_store_is_no_copy(store, key):
    from gradkern.data.store import checks, durable

    place = durable.store_at(str(store))
    files = checks.read_backup(place)
    assert files is not None
    (store.parent / "out.txt").write_bytes(b"mine")
    content = json.dumps({key: "", "zarr.json": ""})
    durable.put(place, checks.BACKUP, json.dumps({"checksum": checks._of_text(content), "files": content}).encode())
    assert checks.read_backup(place) is None
    repair(store, net(), samples())
    assert (store.parent / "out.txt").read_bytes() == b"mine"
    assert set(checks.read_backup(place)) == set(files)
    DAMAGE["emptied"](store / "zarr.json")
    repair(store, net(), samples())
    assert verify(store).ok


def test_the_copy_and_a_description_are_restored_from_the_root(whole, store):
    for damage in DAMAGE.values():
        damage(store / "chunks/created.json")
        damage(store / "attributions/zarr.json")
        assert not verify(store).ok
        repair(store, net(), samples())
        assert verify(store).ok
        assert_same(store, whole)
    for file in ("chunks/created.json", "zarr.json"):
        DAMAGE["emptied"](store / file)
    assert not verify(store).ok
    with pytest.raises(Damaged, match=r"has no copy. Make the store again elsewhere"):
        repair(store, net(), samples())


def test_a_store_is_completed_in_one_write(tmp_path, monkeypatch):
    """A kill between two would leave a complete store whose root lacks the descriptions of its arrays."""
    run(net(), samples(), tmp_path / "a.zarr", **OPTIONS, shard=(0, 2))
    written, put = [], durable.put

    def recorded(store, key, content):
        put(store, key, content)
        written.append(key)
        if key == "zarr.json":
            assert verify(tmp_path / "a.zarr").ok

    monkeypatch.setattr(durable, "put", recorded)
    run(net(), samples(), tmp_path / "a.zarr", **OPTIONS)
    assert written.count("zarr.json") == 1
