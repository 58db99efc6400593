"""The benchmarks measure what they say: peers agree with the oracle, operations are counted right, JSON is whole."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import (
    accuracy,
    call_table,
    ceilings,
    few_inputs,
    full_set,
    kernels,
    measure,
    operations,
    questions,
    scaling,
)
from benchmarks import run as benchmark
from benchmarks.baselines import PEERS, run
from benchmarks.problems import PROBLEMS, batch_sizes
from tests.cases import CASES
from tests.support import oracle

TINY = ("loop_classes", "grads_batched")


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", [name for name in PEERS if name != "compiled"])
@pytest.mark.parametrize("net", ["cnn1d", "lenet5"])
def test_peers_agree_with_the_oracle(net: str, name: str, batch: int) -> None:
    model = CASES[net].build(dtype=torch.float64).requires_grad_(False)
    (x,) = CASES[net].inputs(5, dtype=torch.float64)
    y, (want,) = oracle.jacobian(model, x)
    outputs = y.shape[1]
    # `grads_batched` makes its seeds in the default type and casts them, so float64 goes through every peer.
    got = run(PEERS[name], PEERS[name].make(model, outputs), x, batch, outputs)
    assert got.shape == want.shape
    assert oracle.relative_error(got, want) <= 1e-12


@pytest.mark.slow
def test_the_compiled_peer_pads_a_ragged_chunk() -> None:
    model = CASES["mlp"].build().requires_grad_(False)
    (x,) = CASES["mlp"].inputs(5)
    with measure.quiet():
        got = run(PEERS["compiled"], PEERS["compiled"].make(model, 10), x, 4, 10)
    checked = accuracy.compare(model, x, got)
    assert checked.wrong == 0
    assert checked.samples == 5


@pytest.mark.parametrize(
    ("net", "needed", "dense"),
    [("cnn1d", 1.7, 3.4), ("cnn1d_strided", 1.35, 2.1), ("lenet5", 2.8, 9.1), ("mlp", 1.5, 2.7), ("fcn", 410, 710)],
)
def test_operations_of_the_measured_networks(net: str, needed: float, dense: float) -> None:
    problem = PROBLEMS[net]
    x = problem.fresh(2 if net == "fcn" else 16, torch.Generator().manual_seed(3), torch.float64)
    counted = operations.count(problem.model().double(), x)
    assert counted.dense / 1e6 == pytest.approx(dense, rel=0.05)
    assert counted.needed / 1e6 == pytest.approx(needed, rel=0.08)


def test_operations_by_hand() -> None:
    """Two layers, half of the hidden units dead: forward 7·6 + 6·4; backward 3 alive units · 7 for each of 4."""
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, -1, 1, -1, 1, -1]))
    counted = operations.count(model, torch.randn(5, 7, dtype=torch.float64))
    assert counted.forward == 2 * (7 * 6 + 6 * 4)
    assert counted.dense == 2 * 5 * (7 * 6 + 6 * 4)
    assert counted.needed == counted.forward + 4 * 2 * 3 * 7
    with pytest.raises(TypeError, match="float64"):
        operations.count(model.float(), torch.randn(5, 7))


def test_a_sample_on_a_kink_is_seen_and_a_wrong_result_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    x = torch.tensor([[1.0, -1.0], [1e-9, 1.0], [0.7, 0.3]])
    assert accuracy.near_kink(model.double(), x.double()).tolist() == [False, True, False]
    _, (right,) = oracle.jacobian(model, x)
    assert accuracy.compare(model, x, right.float()).wrong == 0
    checked = accuracy.compare(model, x, right.float() + torch.tensor([0.0, 0.0, 1e-3])[:, None, None])
    assert checked.wrong == 1
    assert checked.max_error > 1e-4
    assert checked.share_near_kink == pytest.approx(1 / 3)
    assert accuracy.compare(model, x, right.float() * torch.nan).wrong == 2
    with pytest.raises(ValueError, match="shape"):
        accuracy.compare(model, x, right.float()[:, :1])


def test_near_pool_ties_are_kinks_only_where_they_carry_a_gradient() -> None:
    pool = nn.Sequential(nn.ReLU(), nn.MaxPool1d(2)).double()
    x = torch.tensor([[[1.0, 1.0 + 1e-9, 3.0, 0.5]], [[-1.0, -2.0, 3.0, 0.5]], [[2.0, 1.0, 3.0, 0.5]]])
    assert accuracy.near_kink(pool, x.double()).tolist() == [True, False, False]


def test_batch_sizes_and_screening() -> None:
    assert batch_sizes(100) == [8, 16, 32, 64, 100]
    assert batch_sizes(5) == [5]
    sizes = batch_sizes(2048)
    assert sorted(measure.probe_order(sizes)) == sizes
    assert measure.probe_order(sizes)[0] == 128
    rows = [measure.Screened("a", 8, 10.0), measure.Screened("a", 16, 9.0), measure.Screened("b", 8, 13.0),
            measure.Screened("c", 8, 14.0), measure.Screened("d", 8, None, "no rule")]  # fmt: skip
    assert [(r.peer, r.batch) for r in measure.finalists(rows)] == [("a", 16), ("b", 8), ("a", 8)]
    with pytest.raises(RuntimeError, match="no rule"):
        measure.finalists(rows[-1:])
    ratio = measure.paired_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert ratio["median"] == 2.0
    assert ratio["low"] <= 2.0 <= ratio["high"]


def test_a_run_writes_whole_json_and_a_picture(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.json"
    words = ["--quick", "--samples", "9", "--threads", "1", "--nets", "mlp", "cnn1d_strided", "--engine", "kernel"]
    assert benchmark.main([*words, "--peers", *TINY, "--out", str(path)]) == 0
    content = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert content["machine"]["threads"] == 1
    assert content["machine"]["torch"] == torch.__version__
    assert [r["net"] for r in content["results"]] == ["mlp", "cnn1d_strided"]
    for result in content["results"]:
        assert result["samples"] == 9
        assert result["best_peer"]["name"] in TINY
        assert {row["peer"] for row in result["screening"]} == {"gradkern", *TINY}
        assert {row["batch"] for row in result["screening"]} == {8, 9}
        assert len(result["gradkern"]["seconds"]) == 3
        assert result["gradkern"]["us"] > 0
        assert result["gradkern"]["fused_share"] == 1.0
        assert math.isfinite(result["ratio"]["median"])
        assert all(row["accuracy"]["wrong"] == 0 for row in [result["gradkern"], *result["rivals"]])
    assert path.with_suffix(".png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "cnn1d_strided" in printed
    assert "max error" in printed


@pytest.mark.slow
def test_the_full_set_in_small(tmp_path) -> None:
    options = full_set.arguments(["--samples", "300", "--threads", "1", "--calls", "1", "--engine", "kernel"])
    figures = full_set.spawn(options, "gradkern", 300)
    assert figures["wrong"] == 0
    assert figures["result_mib"] == pytest.approx(300 * 3 * 224 * 4 / 2**20)
    assert figures["samples_per_second"] > 0
    assert figures["over_result_mib"] < 2000
    with pytest.raises(RuntimeError, match="status"):
        full_set.spawn(options, "nobody", 8)


@pytest.mark.slow
def test_the_two_questions_in_small(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "questions.json"
    assert questions.main(["--quick", "--samples", "300", "--threads", "1", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    answers = json.loads(path.read_text())["answers"]
    assert [a["goal"] for a in answers] == [10.0, 1e-3]
    assert all(a["seconds"] > 0 and a["peer_seconds"] > 0 and a["wrong"] == 0 for a in answers)
    assert "300 samples" in printed
    assert "784×10 Jacobian" in printed


def test_a_goal_is_printed_beside_the_figure() -> None:
    answers = [
        questions.Answer("a", 1.8, 10.0, "class loop at 256", 9.0, 0),
        questions.Answer("b", 2e-3, 1e-3, "c", 1e-3, 0),
    ]
    met, missed = questions.table(answers).splitlines()[2:]
    assert met.split() == ["a", "1.8", "s", "10.0", "s", "met", "class", "loop", "at", "256", "9.0", "s", "5.0"]
    assert missed.split()[:6] == ["b", "2.00", "ms", "1.00", "ms", "MISSED"]


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.arguments(["--rounds", "0"])
    assert "from 1 up" in capsys.readouterr().err


@pytest.mark.slow
def test_kernels_and_scaling_in_quick_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--steps", "relu", "chain", "--threads", "1"]
    assert kernels.main(["--quick", *steps, "--out", str(tmp_path / "k.json")]) == 0
    rows = json.loads((tmp_path / "k.json").read_text())["results"]
    assert [r["step"] for r in rows] == ["relu", "chain"]
    assert rows[0]["operations"] == 0 < rows[1]["operations"] < 11 * 2 * (16 * 256 * 27 + 16 * 64 * 144)
    assert (tmp_path / "k.png").stat().st_size > 1000
    assert scaling.main(["--quick", "--nets", "mlp", "--out", str(tmp_path / "s.json")]) == 0
    parts = [r["part"] for r in json.loads((tmp_path / "s.json").read_text())["results"]]
    assert list(dict.fromkeys(parts)) == list(scaling.PARTS)


def test_shares_of_a_matrix_product() -> None:
    options = argparse.Namespace(quick=True, rounds=1)
    found = ceilings.measure_net("mlp", "avx2", options, lambda text: None)
    assert found["share"] == pytest.approx(found["mflop_needed"] / found["us"] * 1e3 / found["gemm_gflops"])
    assert found["met"] == (found["share"] >= found["goal"] == 0.75)
    assert len(ceilings.row(json.loads(json.dumps(found, allow_nan=False)))) == len(ceilings.HEAD)


def test_calls_of_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that cannot do a network, or would take too long at the next size, is left out, and the table says why."""
    monkeypatch.setattr(call_table, "SAMPLES", (1, 2))
    monkeypatch.setattr(call_table, "SLOWEST", 1e-9)

    def fails(*_: object) -> call_table.Call:
        raise TypeError("no twin of this network")

    every = call_table.makers
    monkeypatch.setattr(call_table, "makers", lambda compiled: [*every(compiled), ("JAX", fails)])
    said: list[str] = []
    one, two = call_table.rows(PROBLEMS["mlp"], 2, False, said.append)
    assert {call_table.HANDLE, call_table.PLAIN, "class loop", "vmap(jacrev)"} <= one.us.keys()
    assert one.left_out == {"JAX": "TypeError: no twin of this network"}
    assert set(two.us) == {call_table.HANDLE, call_table.PLAIN}
    assert "would take" in two.left_out["class loop"] and two.left_out["JAX"] == one.left_out["JAX"]
    assert any("class loop" in text for text in said)
    table = call_table.table([one, two])
    assert "mlp, 1: no JAX: TypeError" in table and "handle first" in table


def test_a_slow_way_leaves_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_table, "SECONDS", 0.0)
    taken = {"quick": 0, "slow": 0}

    def way(name: str) -> call_table.Call:
        def call(x: torch.Tensor) -> torch.Tensor:
            taken[name] += 1
            return x

        return call

    row = call_table.Row("mlp", 1)
    call_table._time(row, {name: way(name) for name in taken}, PROBLEMS["mlp"], 50, lambda text: None)
    assert set(row.us) == {"quick", "slow"} and max(taken.values()) == call_table.LEAST


@pytest.mark.slow
def test_few_inputs_in_a_quick_run(tmp_path: Path) -> None:
    assert few_inputs.main(["--quick", "--threads", "1", "--out", str(tmp_path / "f.json")]) == 0
    rows = json.loads((tmp_path / "f.json").read_text())["few_inputs"]
    assert [row["net"] for row in rows] == ["decoder", "emulator"]
    assert all(row["error"] < 1e-12 and row["forward_macs"] < row["reverse_macs"] for row in rows)
