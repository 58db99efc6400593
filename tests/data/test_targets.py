"""The highest outputs of each sample, by every method; and outputs and inputs of unusual shapes and dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradkern
from gradkern.cli.main import main
from gradkern.data import open_source, run
from gradkern.data.methods import method_names
from gradkern.report.dataset import report

X = torch.randn(6, 1, 10, generator=torch.Generator().manual_seed(0))
BASELINES = {"DeepLiftShap", "GradientShap"}


def two_by_two_outputs() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 2, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4), nn.Unflatten(1, (2, 2))
    ).eval()


NET = two_by_two_outputs()
FLAT = NET[:-1]


@pytest.mark.parametrize("net", [FLAT, NET], ids=["[N, C]", "[N, 2, 2]"])
@pytest.mark.parametrize("engine", ["kernel", "autograd"])
@pytest.mark.parametrize("method", method_names())
def test_the_highest_outputs_with_every_method(method: str, engine: str, net: nn.Module, tmp_path) -> None:
    if method == "LRP" and engine == "autograd":
        pytest.skip("Captum has no rule for Conv1d")
    arguments = {"baselines": torch.zeros(2, 1, 10)} if method in BASELINES else {}
    options = {"method": method, "arguments": arguments, "chunk": 4, "engine": engine}
    top = run(net, X, tmp_path / "top.zarr", targets=gradkern.TopK(2), reductions=["mean_abs"], **options)
    every = run(net, X, tmp_path / "all.zarr", **options)
    rows = torch.from_numpy(np.asarray(top.array("targets")[...]))
    outputs = torch.from_numpy(np.asarray(top.array("predictions")[...])).flatten(1)
    assert torch.equal(rows, outputs.topk(2).indices)
    torch.testing.assert_close(top.maps(0, 6), every.maps(0, 6)[torch.arange(6)[:, None], rows])


def test_the_highest_output_on_the_command_line(tmp_path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    words = ["run", "tests.data.test_targets:FLAT", tmp_path / "x.npy", tmp_path / "a.zarr"]
    done = CliRunner().invoke(main, [*map(str, words), "--targets", "top1", "--method", "IntegratedGradients"])
    assert done.exit_code == 0, done.output


class OnePerSample(nn.Module):
    """An output ``[N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[:, 0]


class Looked(nn.Module):
    """A floating input and an index."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(4, 3), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1)) * self.table(index)


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) * y.flatten(1))[:, :3]


@pytest.mark.parametrize(
    ("net", "source"),
    [(OnePerSample(), X), (Looked(), (X, torch.arange(6) % 4))],
    ids=["[N]", "an index beside"],
)
def test_importance_and_report(net: nn.Module, source, tmp_path) -> None:
    net.eval()
    ranking = gradkern.importance(net, source, tmp_path / "a.zarr", engine="autograd")
    assert ranking.curve is not None
    assert sorted(ranking.ranking[0].tolist()) == list(range(10))
    results = run(
        net, source, tmp_path / "b.zarr", method="jacobian", reductions=["importance", "mean_abs"], engine="autograd"
    )
    page = report(results, tmp_path / "a.html", model=net, source=open_source(source)).read_text()
    assert "What the ranking is worth" in page


def test_importance_of_two_inputs_is_refused_before_the_run(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the source has 2 floating inputs, expected one"):
        gradkern.importance(Two(), (X, X), tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()
    results = run(Two(), (X, X), tmp_path / "b.zarr", reductions=["importance"], engine="autograd")
    report(results, tmp_path / "a.html")


WHOLE = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool", "float16", "float64", ">i4"]


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("kind", ["array", "tensor", "loader", "workers", "file"])
def test_every_dtype_is_cast(kind: str, dtype: str, tmp_path) -> None:
    x = (np.arange(24).reshape(6, 4) % 2).astype(dtype)
    if kind == "file":
        np.save(tmp_path / "x.npy", x)
        source = str(tmp_path / "x.npy")
    elif kind == "array":
        source = x
    else:
        tensors = TensorDataset(torch.from_numpy(x.astype(x.dtype.newbyteorder("="))))
        workers = 1 if kind == "workers" else 0
        source = tensors.tensors[0] if kind == "tensor" else DataLoader(tensors, batch_size=2, num_workers=workers)
    opened = open_source(source, dtype=torch.float32)
    (rows,) = next(iter(opened.stream([(1, 4)])))
    assert rows.dtype == torch.float32
    np.testing.assert_array_equal(rows.numpy(), x[1:4].astype(np.float32))


def test_indices_beside_floating_inputs_stay() -> None:
    x, index = open_source((X.double(), torch.arange(6)), dtype=torch.float32).read(0, 6)
    assert (x.dtype, index.dtype) == (torch.float32, torch.int64)
