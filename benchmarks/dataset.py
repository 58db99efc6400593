"""A whole data set to disk, end to end: 194109×1×224 -> 3 (``cnn1d``, random data) with `gradkern.run`.

Each run is a process of its own that reads a memory map from disk and writes a zarr store: maps and predictions in
float32, uncompressed and with zstd; float16; and ``mean |J|`` alone.  Beside it, in the same process and on the same
machine: the engine's own rate (`gradkern.jacobian` on samples in memory, result in memory), and the disk's rate for
files of the store's chunk size, written the way the store writes them (forced to disk and renamed).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine, report
from benchmarks.full_set import MIB, NET, SAMPLES, peak, reset_peak, resident
from benchmarks.problems import PROBLEMS
from benchmarks.run import RESULTS, positive

RUNS: dict[str, dict[str, Any]] = {
    "maps": {},
    "maps, zstd": {"compression": "zstd"},
    "maps, float16": {"dtype": "float16"},
    "mean |J| alone": {"maps": False, "reductions": ("mean_abs",)},
}
ENGINE_SHARE, DISK_SHARE = 0.7, 0.8
"""What the maps' run should reach: of the engine's own rate, or of the disk's own, whichever binds first."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=positive, default=SAMPLES, help=f"samples (default: {SAMPLES})")
    parser.add_argument("--threads", type=positive, default=2, help="threads for computing (default: 2)")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--folder", type=Path, help="where data and stores go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/dataset-<threads>t.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(words)


# ---------------------------------------------------------------------------------------------------------------
# The measured process


def engine_rate(model: torch.nn.Module, x: np.ndarray) -> float:
    """Samples per second of the engine alone, into memory that is there: the best of three."""
    import gradkern

    inputs = torch.from_numpy(np.array(x[:32768]))
    out = torch.zeros(len(inputs), 3, 1, 224)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        gradkern.jacobian(model, inputs, out=out, engine="kernel")
        times.append(time.perf_counter() - begin)
    return len(inputs) / min(times[1:])


def disk_rate(folder: Path, size: int, count: int) -> float:
    """Bytes per second of ``count`` files of ``size`` bytes, two at a time, forced to disk as the store does it."""
    from concurrent.futures import ThreadPoolExecutor

    from gradkern.data.store.durable import write_file

    content = np.random.default_rng(0).bytes(size)
    place = folder / "disk"
    begin = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: write_file(place / f"c.{i}", content), range(count)))
    seconds = time.perf_counter() - begin
    shutil.rmtree(place)
    return size * count / seconds


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One run, measured; the engine and the disk right before and after it."""
    import gradkern

    torch.set_num_threads(options.threads)
    model, x = PROBLEMS[NET].model(), np.load(options.folder / "x.npy", mmap_mode="r")
    gradkern.prepare(model, torch.from_numpy(np.array(x[:8])))
    store = options.folder / "store.zarr"
    shutil.rmtree(store, ignore_errors=True)
    chunk_bytes = 4096 * 3 * 224 * 4
    engines, disks = [engine_rate(model, x)], [disk_rate(options.folder, chunk_bytes, 16)]
    os.sync()
    before, exact = resident(), reset_peak()
    begin = time.perf_counter()
    results = gradkern.run(model, options.folder / "x.npy", store, "jacobian", **RUNS[options.child])
    seconds = time.perf_counter() - begin
    top = peak()
    engines.append(engine_rate(model, x))
    disks.append(disk_rate(options.folder, chunk_bytes, 16))
    written = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
    total = results.ledger.total()
    assert total is not None
    assert results.about["exact"]
    return {
        "seconds": seconds,
        "samples_per_second": len(x) / seconds,
        "engine_samples_per_second": statistics.mean(engines),
        "disk_bytes_per_second": statistics.mean(disks),
        "computing_seconds": total.facts["seconds"],
        "written_bytes": written,
        "peak_over_start_mib": (top - before) / MIB,
        "peak_mib": top / MIB,
        "peak_reset": exact,
        "chunk": results.chunk,
        "batch": results.about["pinned"]["batch"],
    }


# ---------------------------------------------------------------------------------------------------------------
# The process that starts the others


def spawn(options: argparse.Namespace, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.dataset", "--child", name, "--folder", str(options.folder)]
    command += ["--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"the process for {name!r} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median time, and its shares of the engine's and of the disk's own rate."""
    middle = dict(sorted(runs, key=lambda f: f["seconds"])[(len(runs) - 1) // 2])
    engine_share = middle["samples_per_second"] / middle["engine_samples_per_second"]
    disk_share = middle["written_bytes"] / middle["seconds"] / middle["disk_bytes_per_second"]
    return middle | {
        "engine_share": engine_share,
        "disk_share": disk_share,
        "all_seconds": [f["seconds"] for f in runs],
        "met": engine_share >= ENGINE_SHARE or disk_share >= DISK_SHARE,
    }


HEADER = ("", "seconds", "samples/s", "of the engine", "of the disk", "written", "peak over start")


def row(name: str, f: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{f['seconds']:.2f}",
        f"{f['samples_per_second']:,.0f}",
        f"{f['engine_share']:.0%}",
        f"{f['disk_share']:.0%}",
        f"{f['written_bytes'] / MIB:,.0f} MiB",
        f"{f['peak_over_start_mib']:,.0f} MiB",
    )


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    if options.child:
        print(json.dumps(child(options)))
        return 0
    facts = machine.describe(options.threads)
    print(report.one_line(facts), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="gradkern-dataset-") as folder:
        options.folder = Path(folder)
        x = np.lib.format.open_memmap(options.folder / "x.npy", "w+", np.float32, (options.samples, 1, 224))
        generator = np.random.default_rng(0)
        for first in range(0, len(x), 8192):
            x[first : first + 8192] = generator.standard_normal(x[first : first + 8192].shape, np.float32)
        x.flush()
        del x
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
        for _ in range(options.repeats):
            for name in RUNS:
                measured[name].append(spawn(options, name))
    rows = {name: summary(f) for name, f in measured.items()}
    print(f"{NET}, {options.samples}×1×224 -> 3, from a memory map to a zarr store\n")
    print("\n".join(report.align([HEADER, *(row(n, f) for n, f in rows.items())])))
    maps = rows["maps"]
    goal = f"{ENGINE_SHARE:.0%} of the engine or {DISK_SHARE:.0%} of the disk"
    print(f"\nmaps: {'met' if maps['met'] else 'MISSED'}: {goal}")
    path = options.out or RESULTS / f"dataset-{options.threads}t.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "net": NET, "samples": options.samples, "runs": rows}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
