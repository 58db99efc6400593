"""Runs that are killed, that fill the disk, that are given another model: nothing finished is ever lost or wrong."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import gradkern
from gradkern.cli.main import main
from gradkern.data import DiskFull, Mismatch, Results, merge, run
from gradkern.data import methods as data_methods
from gradkern.data.runs import probe
from gradkern.data.runs.task import Task
from tests.cases import CASES
from tests.support import forks, kill_runs
from tests.support.stores import assert_same

ROOT = Path(__file__).parents[2]


build = functools.cache(CASES["cnn1d_strided"].build)  # a network that is the same object is captured once


def small(seed: int = 0, samples: int = 40) -> tuple[torch.nn.Module, torch.Tensor]:
    return build(seed), CASES["cnn1d_strided"].inputs(samples)[0]


@pytest.mark.parametrize(
    ("kills", "at_work", "samples"), [(5, 2, 800), pytest.param(22, 5, kill_runs.SAMPLES, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_ends_bit_equal(kills, at_work, samples, tmp_path):
    said = kill_runs.kill_runs(str(tmp_path / "killed.zarr"), samples, kills, 7)
    assert said["killed"] == kills
    assert said["status"] == 0
    finished = said["finished"]
    assert finished == sorted(finished), "a kill has undone finished chunks"
    assert 0 < finished[-1] < samples // kill_runs.CHUNK
    assert len(set(finished)) >= at_work, "the kills did not hit runs at work"
    model, x = kill_runs.problem(samples)
    whole = run(model, x, tmp_path / "whole.zarr", **kill_runs.OPTIONS)
    assert_same(tmp_path / "killed.zarr", tmp_path / "whole.zarr")
    assert whole.about["exact"]
    assert torch.equal(whole.maps(0, len(x)), gradkern.jacobian(model, x, engine="kernel").abs())
    assert not list((tmp_path / "killed.zarr").rglob("*.partial"))
    assert len(list(tmp_path.glob(".killed*"))) <= said["unmade"]  # each kill while the store was made leaves a folder


def test_continuing_computes_only_what_is_missing(tmp_path, monkeypatch):
    model, x = small()
    computed: list[int] = []
    compute = Task.compute

    def counting(task, chunk, upload):
        computed.append(chunk)
        if stop and len(computed) == 4:
            raise KeyboardInterrupt
        return compute(task, chunk, upload)

    monkeypatch.setattr(Task, "compute", counting)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run(model, x, tmp_path / "a.zarr", chunk=8)
    finished = Results.open(tmp_path / "a.zarr").ledger.finished()
    assert 0 < len(finished) <= 3
    stop = False
    for missing in (sorted(set(range(5)) - finished), []):
        computed.clear()
        run(model, x, tmp_path / "a.zarr", chunk=8)
        assert computed == missing


def test_full_disk_keeps_what_is_finished(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        model, x = small(samples=512)  # 1.3 MB of maps
        with pytest.raises(DiskFull, match=r"chunks finished. They are kept: free some space and run the same again"):
            run(model, x, disk / "a.zarr", chunk=32, reductions=["mean_abs"])
        kept = Results.open(disk / "a.zarr").ledger.finished()
        assert 0 < len(kept) < 16
        times = {c: (disk / f"a.zarr/attributions/c.{c}.0.0.0").stat().st_mtime_ns for c in kept}
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        run(model, x, disk / "a.zarr", chunk=32, reductions=["mean_abs"])
        for c, at in times.items():
            assert (disk / f"a.zarr/attributions/c.{c}.0.0.0").stat().st_mtime_ns == at
        run(model, x, tmp_path / "b.zarr", chunk=32, reductions=["mean_abs"])
        assert_same(disk / "a.zarr", tmp_path / "b.zarr")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": build(3)}, "the model has other weights"),
        ({"model": CASES["cnn1d"].build()}, "computes something else"),
        ({"method": "jacobian"}, "method differs: the store has saliency, this call jacobian"),
        ({"targets": [0]}, "targets differs"),
        ({"reductions": ["mean"]}, "reductions differs"),
        ({"source": torch.zeros(40, 1, 224)}, "the source has other content"),
        ({"source": torch.zeros(41, 1, 224)}, "another number of samples: the store has 40, this call 41"),
        ({"dtype": "float16"}, "dtype differs"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(tmp_path, change, words):
    model, x = small()
    run(model, x, tmp_path / "a.zarr", chunk=16)
    before = {p: p.read_bytes() for p in sorted((tmp_path / "a.zarr").rglob("*")) if p.is_file()}
    given = {"model": model, "source": x, **change}
    with pytest.raises(Mismatch, match=words):
        run(given.pop("model"), given.pop("source"), tmp_path / "a.zarr", **given)
    assert before == {p: p.read_bytes() for p in sorted((tmp_path / "a.zarr").rglob("*")) if p.is_file()}


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    model, x = small()
    with pytest.raises(ValueError, match="exists but is not a zarr store"):
        run(model, x, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_what_pins_the_bits_holds_on_resume(tmp_path, monkeypatch):
    model, x = small()
    threads = []
    original = data_methods.METHODS["saliency"]

    def looking(batch):
        threads.append(torch.get_num_threads())
        return original(batch)

    monkeypatch.setitem(data_methods.METHODS, "saliency", looking)
    first = run(model, x, tmp_path / "a.zarr", chunk=8, threads=2, shard=(0, 2))
    assert first.about["pinned"]["threads"] == 2
    assert not first.about["finished"]
    second = run(model, x, tmp_path / "a.zarr")
    assert set(threads[2:4]) == {2}
    assert set(threads[4:]) == {2}
    assert torch.get_num_threads() == 1
    assert second.about["finished"]
    assert second.chunk == 8


@pytest.mark.slow
def test_another_instruction_set_is_equal_within_a_tolerance_and_says_so(tmp_path):
    program = (
        "import sys; from tests.data.test_resume import small; from gradkern.data import run; import torch\n"
        "torch.set_num_threads(1); model, x = small()\n"
        "for out in sys.argv[2:]: run(model, x, out, chunk=8, shard=(int(sys.argv[1]), 2), method='jacobian')\n"
    )

    def start(isa: str | None, shard: int, *outs: str) -> subprocess.Popen:
        environment = {**os.environ, **({"GRADKERN_ISA": isa} if isa else {})}
        if isa is None:
            environment.pop("GRADKERN_ISA", None)
        command = [sys.executable, "-c", program, str(shard), *(str(tmp_path / out) for out in outs)]
        return subprocess.Popen(command, cwd=ROOT, env=environment)

    assert start("portable", 0, "pinned.zarr", "mixed.zarr").wait() == 0
    machine = gradkern.runtime.ops.machine()
    several = bool(machine) and machine.isa != "portable"
    rest = [start(None, 1, "pinned.zarr")]  # the store's instruction set is taken up again
    rest += [start(machine.isa, 1, "mixed.zarr")] if several else []
    assert [r.wait() for r in rest] == [0] * len(rest)
    pinned = Results.open(tmp_path / "pinned.zarr")
    assert pinned.about["pinned"]["isa"] == "portable"
    assert pinned.about["exact"]
    if not several:
        pytest.skip("this machine has one instruction set only")
    mixed = Results.open(tmp_path / "mixed.zarr")
    assert not mixed.about["exact"]
    assert mixed.about["notes"] == [f"isa {machine.isa} instead of portable"]
    a, b = (r.maps(0, 40) for r in (pinned, mixed))
    assert float((a - b).abs().max()) <= mixed.about["tolerance"] * float(a.abs().max())


def test_out_of_memory_backs_off_and_says_so(tmp_path, monkeypatch):
    model, x = small()
    original = data_methods.METHODS["jacobian"]

    def hungry(batch):
        if len(batch.inputs[0]) > 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return original(batch)

    whole = run(model, x, tmp_path / "a.zarr", method="jacobian", chunk=16, reductions=["mean_abs"])
    monkeypatch.setitem(data_methods.METHODS, "jacobian", hungry)
    found = run(model, x, tmp_path / "b.zarr", method="jacobian", chunk=16, reductions=["mean_abs"])
    assert found.about["notes"] == ["batches were halved for lack of memory"]
    assert not found.about["exact"]
    near = found.about["tolerance"] * float(whole.maps(0, 40).abs().max())
    assert float((whole.maps(0, 40) - found.maps(0, 40)).abs().max()) <= near
    np.testing.assert_allclose(found.reduction("mean_abs"), whole.reduction("mean_abs"), atol=near)

    def hopeless(batch):
        raise MemoryError

    monkeypatch.setitem(data_methods.METHODS, "jacobian", hopeless)
    with pytest.raises(MemoryError):
        run(model, x, tmp_path / "c.zarr", method="jacobian")


def test_four_shards_in_four_processes_make_one_run(tmp_path):
    model, x = small(samples=100)
    given = {"chunk": 7, "reductions": ["mean_abs", "mean", "variance", "max_abs", "ranks", "importance"]}
    run(model, x, tmp_path / "whole.zarr", **given)
    out = tmp_path / "shards.zarr"
    shards = [forks.start(lambda i=i: run(model, x, out, shard=(i, 4), **given)) for i in range(4)]
    assert [forks.end(s) for s in shards] == [0, 0, 0, 0]
    merge(out)
    assert_same(out, tmp_path / "whole.zarr")


def test_shards_in_stores_of_their_own_merge_to_one_run(tmp_path):
    model, x = small(samples=100)
    options = {"chunk": 7, "reductions": ["mean_abs", "variance"], "top_features": 3}
    parts = [tmp_path / f"part{i}.zarr" for i in range(3)]
    for i, part in enumerate(parts):
        run(model, x, part, shard=(i, 3), **options)
    with pytest.raises(ValueError, match=r"10 of 15 chunks are not finished \(the first is 5, samples 35 on\)"):
        merge(parts[0])
    merged = merge(parts[0], parts[1:])
    assert merged.about["finished"]
    run(model, x, tmp_path / "whole.zarr", **options)
    assert_same(parts[0], tmp_path / "whole.zarr")
    other = tmp_path / "other.zarr"
    run(small(3)[0], x, other, **options)
    with pytest.raises(Mismatch, match="other weights"):
        merge(parts[0], [other])


def test_stores_that_measured_another_way_say_so(tmp_path, monkeypatch):
    """Kernels and autograd round differently: a store records which it took, and merging compares that."""
    model, x = small(samples=100)
    options = {"chunk": 20, "engine": "auto", "threads": 1}
    for way in ("kernels", "loop"):
        monkeypatch.setattr(probe, "faster_way", lambda *given, way=way: way)
        run(model, x, tmp_path / f"{way}.zarr", **options)
    monkeypatch.undo()
    assert "way            loop" in CliRunner().invoke(main, ["info", str(tmp_path / "loop.zarr")]).output
    stores = [Results.open(tmp_path / f"{way}.zarr") for way in ("kernels", "loop")]
    assert stores[0].array("predictions")[...].tobytes() != stores[1].array("predictions")[...].tobytes()
    run(model, x, tmp_path / "a.zarr", shard=(0, 2), chunk=20)
    run(model, x, tmp_path / "b.zarr", shard=(1, 2), chunk=20, threads=2)
    part = run(model, x, tmp_path / "c.zarr", shard=(0, 6), chunk=20).place  # a shard without a chunk
    merged = merge(tmp_path / "a.zarr", [tmp_path / "b.zarr"])
    assert (merged.about["exact"], merged.about["notes"]) == (False, ["threads 2 instead of 1"])
    said = CliRunner().invoke(main, ["merge", str(part), str(tmp_path / "loop.zarr")]).output
    assert "equal within 1e-04, not to the last bit: way loop instead of kernels" in said


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"chunk": 20}, "chunk 8, this call asks for 20"),
        ({"batch": 2}, "batch 8, this call asks for 2"),
        ({"threads": 3}, "threads 1, this call asks for 3"),
        ({"engine": "autograd"}, "engine kernel, this call asks for autograd"),
        ({"nonfinite": "keep"}, "nonfinite skip, this call asks for keep"),
    ],
)
def test_settings_of_a_begun_run_are_kept_and_other_ones_refused(tmp_path, asked, words):
    model, x = small()
    given = {"chunk": 8, "reductions": ["mean_abs"]}
    run(model, x, tmp_path / "a.zarr", shard=(0, 2), nonfinite="skip", **given)
    with pytest.raises(Mismatch, match=words):
        run(model, x, tmp_path / "a.zarr", **{**given, **asked})
    same = {"batch": 100, "threads": 1, "engine": "kernel", "nonfinite": "skip"}
    assert run(model, x, tmp_path / "a.zarr", **given, **same).about["exact"]


@pytest.mark.parametrize("shard", [(0, 0), (2, 2), (-1, 2), 3, (0.0, 2)])
def test_a_shard_that_makes_no_sense(tmp_path, shard):
    model, x = small()
    with pytest.raises(ValueError, match="shard"):
        run(model, x, tmp_path / "a.zarr", shard=shard)
    assert not (tmp_path / "a.zarr").exists()
