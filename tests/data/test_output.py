"""``output=`` in dataset runs and on the command line: a model that returns several tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import gradkern
from gradkern.cli.main import main
from gradkern.data import Mismatch, Results, run

N = 20


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.hidden(x).relu()
        return {"hidden": h, "logits": self.head(h)}


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Several().eval(), torch.randn(N, 6, generator=torch.Generator().manual_seed(0))


def logits(result: Any) -> Tensor:
    return result["logits"]


@pytest.mark.parametrize("output", ["logits", logits])
@pytest.mark.parametrize("method", ["jacobian", "saliency", "DeepLift"])
def test_runs_and_their_continuation(problem: Any, method: str, output: Any, tmp_path: Path) -> None:
    model, x = problem
    place = tmp_path / "maps.zarr"
    results = run(model, x, place, method=method, chunk=8, output=output)
    assert results.maps(0, N).shape == (N, 3, 6)
    if method == "jacobian":
        torch.testing.assert_close(results.maps(0, N), gradkern.jacobian(model, x, output=output))
    torch.testing.assert_close(results.maps(0, N, "predictions"), model(x)["logits"])
    again = run(model, x, place, method=method, chunk=8, output=output)
    assert again.about["finished"]
    for other in ("hidden", None):
        with pytest.raises((Mismatch, TypeError), match=r"another run|output="):
            run(model, x, place, method=method, chunk=8, output=other)


def test_importance_of_a_chosen_output(problem: Any) -> None:
    model, x = problem
    ranking = gradkern.importance(model, x, output="logits", progress=False)
    assert ranking.scores.shape == (3, 6)
    assert ranking.curve is not None


def test_run_without_a_choice_of_output_is_an_error_that_names_them(problem: Any, tmp_path: Path) -> None:
    model, x = problem
    with pytest.raises(TypeError, match=r"the names 'hidden', 'logits'.*output="):
        run(model, x, tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="'nothing', but the model returned"):
        run(model, x, tmp_path / "a.zarr", output="nothing")
    with pytest.raises(TypeError, match=r"output: got 1\.5"):
        run(model, x, tmp_path / "a.zarr", output=1.5)  # type: ignore[arg-type]
    assert not Results.exists(tmp_path / "a.zarr")


@pytest.mark.parametrize("name", ["targets", "out", "wrt", "engine", "inputs"])
def test_arguments_that_belong_to_the_run(problem: Any, name: str, tmp_path: Path) -> None:
    model, x = problem
    with pytest.raises(ValueError, match=f"arguments: got '{name}'"):
        run(model, x, tmp_path / "a.zarr", "DeepLift", output="logits", arguments={name: 1})


def call(*words: Any) -> str:
    done = CliRunner().invoke(main, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_output_option_on_the_command_line(problem: Any, tmp_path: Path) -> None:
    model, x = problem
    free = ({0: torch.export.Dim("N")},)
    net, data, store = tmp_path / "net.pt2", tmp_path / "x.npy", tmp_path / "maps.zarr"
    torch.export.save(torch.export.export(model, (x[:2],), dynamic_shapes=free), net)
    np.save(data, x.numpy())
    call("run", net, data, store, "--output", "logits", "--reduce", "importance", "--method", "jacobian")
    torch.testing.assert_close(Results.open(store).maps(0, N), gradkern.jacobian(model, x, output="logits"))
    assert "Contract" in call("explain", net, data, "--output", "logits")
    found = json.loads(call("importance", net, data, "--json", "--output", "logits"))
    assert len(found["top"]) == 3
    assert "gradkern is" in call("bench", net, data, "--repeats", "1", "--output", "logits")
    page = Path(call("report", store, "--model", net, "--source", data).strip())
    assert "What the ranking is worth" in page.read_text()  # its curves need the model's predictions
