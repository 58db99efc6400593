"""Runs with references per sample: bit-equal however they are computed; sums over windows; the export to TF-MoDISco."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.attr import DeepLiftShap
from gradkern.attr.references import seed_of
from gradkern.data import Mismatch, merge, to_modisco
from gradkern.util.options import BadValue

N, R, LENGTH = 11, 3, 10


def shuffled(inputs: Tensor, n: int = 20, random_state: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(random_state or 0)
    return torch.stack([inputs[..., torch.randperm(inputs.shape[-1], generator=g)] for _ in range(n)], 1)


class Profile(nn.Module):
    """One-hot sequences ``[N, 4, length]`` to a profile ``[N, length]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv1d(5, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Profile().eval()


@pytest.fixture
def x() -> np.ndarray:
    letters = np.random.default_rng(0).integers(0, 4, (N, LENGTH))
    return np.eye(4, dtype=np.float32)[letters].transpose(0, 2, 1).copy()


ARGUMENTS = {"baselines": shuffled, "n_references": R, "hypothetical": True, "random_state": 5}


def run(net: nn.Module, x: np.ndarray, out: Path, **settings: Any) -> Any:
    options: dict[str, Any] = {"arguments": ARGUMENTS, "targets": [0, 4], "chunk": 4, "engine": "kernel"} | settings
    return gradkern.run(net, x, out, "deep_lift_shap", **options)


def test_resumed_sharded_and_in_other_batches_it_is_the_same(net: nn.Module, x: np.ndarray, tmp_path: Path) -> None:
    whole = run(net, x, tmp_path / "whole").maps(0, N)
    drawn = torch.cat([shuffled(torch.from_numpy(x[i : i + 1]), R, seed_of(5, i)) for i in range(N)])
    direct = DeepLiftShap(net, engine="kernel").attribute_all(
        torch.from_numpy(x), drawn, targets=[0, 4], hypothetical=True
    )
    assert torch.equal(whole, direct)

    for i in range(2):
        run(net, x, tmp_path / "parts", shard=(i, 2))
    merge(tmp_path / "parts")
    assert torch.equal(whole, gradkern.data.open_store(tmp_path / "parts").maps(0, N))

    class Killed(Exception):
        pass

    reads = 0

    class Source(np.ndarray):
        def __getitem__(self, key: Any) -> Any:
            nonlocal reads
            reads += 1
            if kills and reads > 6:
                raise Killed
            return np.asarray(super().__getitem__(key))

    for kills in (2, 1, 0):
        reads = 0
        try:
            run(net, x.view(Source), tmp_path / "resumed", batch=3)
        except ValueError as error:  # which names the sample
            assert kills and isinstance(error.__cause__, Killed)
    assert torch.equal(whole, gradkern.data.open_store(tmp_path / "resumed").maps(0, N))

    given = {"baselines": drawn, "hypothetical": True}
    assert torch.equal(whole, run(net, x, tmp_path / "given", arguments=given).maps(0, N))
    with pytest.raises(Mismatch, match="arguments differs"):
        run(net, x, tmp_path / "whole", arguments=ARGUMENTS | {"random_state": 6})


def test_functions_by_name(net: nn.Module, x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("some_shuffles")
    module.shuffled = shuffled  # type: ignore[attr-defined]
    module.other = lambda inputs: inputs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_shuffles", module)
    named = ARGUMENTS | {"baselines": "some_shuffles:shuffled"}
    assert torch.equal(run(net, x, tmp_path / "a").maps(0, N), run(net, x, tmp_path / "b", arguments=named).maps(0, N))
    for bad, words in (
        ("some_shuffles:none", "cannot be imported"),
        ("some_shuffles:other", r"\(inputs, n, random_state\)"),
        ("shuffles", "expected dinucleotide-shuffle or shuffle, or module:function"),
    ):
        with pytest.raises(BadValue, match=words):
            run(net, x, tmp_path / "c", arguments=ARGUMENTS | {"baselines": bad})
    with pytest.raises(BadValue, match="takes no references"):
        gradkern.run(net, x, tmp_path / "d", "integrated_gradients", arguments={"baselines": shuffled})


def test_windows_of_a_profile_as_targets(net: nn.Module, x: np.ndarray, tmp_path: Path) -> None:
    inputs, sums = torch.from_numpy(x), gradkern.Sums([(0, 4), (4, LENGTH)])
    every = gradkern.jacobian(net, inputs, engine="kernel")
    grouped = gradkern.jacobian(net, inputs, output=sums, engine="kernel")
    torch.testing.assert_close(grouped, torch.stack([every[:, :4].sum(1), every[:, 4:].sum(1)], 1))
    stored = run(net, x, tmp_path / "a", targets=None, output=sums)
    assert stored.maps(0, N).shape == (N, 2, 4, LENGTH)
    with pytest.raises(Mismatch):
        run(net, x, tmp_path / "a", targets=None, output=gradkern.Sums([(0, 4), (4, 9)]))
    for bad in ([], [(3, 3)], [(-1, 2)], 5):
        with pytest.raises(BadValue, match="expected pairs"):
            gradkern.Sums(bad)  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="at least 11 positions"):
        gradkern.jacobian(net, inputs, output=gradkern.Sums([(0, 11)]), engine="autograd")


def test_export_to_modisco(net: nn.Module, x: np.ndarray, tmp_path: Path) -> None:
    x[2, :, 3] = 0  # N
    x[4, :, 5:7] = 0.25
    store = run(net, x, tmp_path / "store")
    names = [f"chr{i}:{i}-{i + LENGTH}" for i in range(N)]
    sequences, contributions = to_modisco(store, x, tmp_path / "out", target=1, names=names)
    letters, maps = np.load(sequences), np.load(contributions)
    known = (x == 1).any(1, keepdims=True)
    assert letters["arr_0"].dtype == np.int8
    np.testing.assert_array_equal(letters["arr_0"], x * known)
    np.testing.assert_array_equal(maps["arr_0"], store.maps(0, N)[:, 1].numpy() * known)
    assert list(letters["names"]) == list(maps["names"]) == names
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["contributions.npz", "sequences.npz"]

    plain = run(net, x, tmp_path / "plain", arguments={"baselines": shuffled, "n_references": R})
    with pytest.raises(BadValue, match="no hypothetical contributions"):
        to_modisco(plain, x, tmp_path / "out")
    with pytest.raises(BadValue, match=r"source: got 3 samples"):
        to_modisco(store, x[:3], tmp_path / "out")
    with pytest.raises(BadValue, match="names: got 1"):
        to_modisco(store, x, tmp_path / "out", names=["a"])
    with pytest.raises(BadValue, match="target: got 2"):
        to_modisco(store, x, tmp_path / "out", target=2)
    with pytest.warns(DeprecationWarning, match="output= is now target="):
        old = to_modisco(store, x, tmp_path / "old", output=1)  # type: ignore[call-arg]
    np.testing.assert_array_equal(np.load(old[1])["arr_0"], maps["arr_0"])
