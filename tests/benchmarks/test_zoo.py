"""The zoo's command on networks of torch alone, and its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo import table
from benchmarks.zoo.network import batched, class_loop, cpu_seconds, flat_output, interval, kind
from benchmarks.zoo.networks import Apply, build, names, randomized

ROOT = Path(__file__).resolve().parents[2]
TIME = {"seconds": {}, "peer": "batched", "ratio": 2.0, "low": 1.9, "high": 2.1, "rounds": 5}


def result(name: str, kind: str, ratio: float, **more: object) -> dict:
    times = {"8": TIME | {"ratio": ratio, "high": ratio}}
    same = {"threads": 1, "error": 1e-15, "fused": 1.0, "first_call": 0.5, "by_autograd": [], "ways": {"8": "kernels"}}
    return {"name": name, "kind": kind, "times": times} | same | more


def test_the_page_sums_up_by_kind() -> None:
    results = [
        result("a/one", "convolutional", 4.0),
        result("a/two", "convolutional", 1.0),
        result("b/three", "recurrent", 0.5, reason="a hook"),
        {"name": "b/four", "threads": 1, "failed": "took longer than 600 s"},
    ]
    summary = table.summary(results[:3]).splitlines()[2:]
    assert summary == [
        "| convolutional | 2 | 2.50× | 2.00× | 0 | 0 |",
        "| recurrent | 1 | 0.50× | 0.50× | 1 | 1 |",
        "| all | 3 | 1.00× | 1.26× | 1 | 1 |",
    ]
    about = {"busy": True, "packages": {"a": "1.0"}, "commit": "c", "cpu": "x", "cores": 2, "threads": 1, "isa": "y"}
    about |= {"networks": 9, "chosen": "drawn at random"}
    page = " ".join(table.page([(about | {"torch": "2"}, results)]).split())
    assert "other work" in page
    assert "Of 9 networks, 4 were tried, drawn at random." in page
    assert "b/four, 1 threads: took longer" in page
    assert "Commit: c." in page
    older = table.page([(about | {"torch": "2"}, [results[0] | {"commit": "b"}, *results[1:]])])
    assert "Commits: c (3 results), b (1 results)." in older
    assert "| b/three | 0.50× (1.90–0.50) | 1e-15 | 100% | kernels | 0.5 | a hook |" in page


def test_peers_agree_and_the_interval_holds_the_median() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.allclose(class_loop(net, x, [2, 0]), batched(net, x, [2, 0]))
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert low <= 3.0 <= high


def test_a_clock_that_stands_still_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 1.0, 1.0, 1.5, 1.5])
    monkeypatch.setattr(time, "process_time", lambda: next(ticks))
    calls: list[int] = []
    assert cpu_seconds(lambda: calls.append(1), times=1) == 0.5 / 3
    assert len(calls) == 3


def test_outputs_are_flattened_and_kinds_are_told_apart() -> None:
    y = torch.zeros(2, 3, 4)
    assert flat_output((y, None)).shape == flat_output({"out": [y]}).shape == (2, 12)
    built = {name: build(name) for name in names(["torch"])}
    assert {
        name: kind(net) for name, (net, _) in built.items() if name.endswith(("mlp", "cnn1d", "encoder", "gru"))
    } == {
        "torch/mlp": "other",
        "torch/cnn1d": "convolutional",
        "torch/transformer-encoder": "transformer",
        "torch/gru": "recurrent",
    }
    for net, shape in built.values():
        assert flat_output(Apply(randomized(net))(torch.randn(2, *shape))).shape == (2, 4)


def test_what_was_measured_before_the_time_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SimpleNamespace(seconds=1.0, limit=60.0)
    half = result("a/large", "convolutional", 4.0)
    whole = result("a/small", "convolutional", 2.0)
    whole["times"]["32"] = whole["times"]["8"]
    for printed, want in ((json.dumps(half) + "\n", half), ("", "took longer than 60 s of processor time")):
        ended = subprocess.CompletedProcess([], -signal.SIGXCPU, printed, "")
        monkeypatch.setattr(subprocess, "run", lambda *args, ended=ended, **given: ended)
        got = zoo.run("a/large", 1, options)
        assert got == want or got["failed"] == want
    large, small = table.networks([whole, half]).splitlines()[2:]
    assert large.count("4.00×") == 1
    assert "| - |" in large
    assert small.count("2.00×") == 2


@pytest.mark.slow
def test_quick_run_of_the_zoo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.zoo", "--quick", "--threads", "1", "--seconds", "0.1"]
    command += [
        "--out",
        str(tmp_path / "out"),
        "--json",
        str(tmp_path / "zoo.json"),
        "--page",
        str(tmp_path / "zoo.md"),
    ]
    about = {"cpu": "another", "isa": "none", "busy": False, "packages": {}, "networks": 1, "cores": 1, "threads": 1}
    about |= {"torch": "2", "commit": "c"}
    elsewhere = {"machine": about, "results": [result("a/one", "convolutional", 4.0)]}
    (tmp_path / "zoo.json").write_text(json.dumps([elsewhere]))
    for _ in range(2):  # the second time, everything is there
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
    other, here = json.loads((tmp_path / "zoo.json").read_text())
    assert other == elsewhere
    results = here["results"]
    assert not [r for r in results if "failed" in r]
    assert [r["name"] for r in results] == ["torch/cnn1d", "torch/mlp"]
    assert all(r["error"] < 1e-12 and r["fused"] == 1.0 for r in results)
    page = (tmp_path / "zoo.md").read_text()
    assert "torch/cnn1d" in page and "## another, none" in page
