"""Runs on a local Ray cluster: the store is that of a run without Ray, also where a worker is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradkern
from gradkern.data import run
from tests.cases import CASES
from tests.support.kill_runs import OPTIONS, problem
from tests.support.stores import assert_same

ROOT = Path(__file__).parents[2]
pytest.importorskip("ray", reason="Ray is not installed")


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.support.ray_run", str(tmp_path / "ray.zarr")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert 10 <= said["finished"] < said["chunks"], "no worker was killed in the middle"
    assert said["done"] == said["chunks"]
    model, x = problem()
    run(model, x, tmp_path / "alone.zarr", threads=1, **OPTIONS)
    assert_same(tmp_path / "ray.zarr", tmp_path / "alone.zarr")


def test_map_batches_callable():
    from gradkern.data.ray import Attribute

    case = CASES["lenet5"]
    model, x = case.build(), case.inputs(5)[0]
    attribute = Attribute(model, targets=[3, 1], columns="image", engine="kernel")
    found = attribute({"image": x.numpy(), "label": np.arange(5)})
    assert set(found) == {"image", "label", "attributions", "predictions"}
    expected = gradkern.jacobian(model, x, [3, 1], engine="kernel").abs()
    assert torch.equal(torch.from_numpy(found["attributions"]), expected)
    np.testing.assert_allclose(found["predictions"], model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'baselines' has 5 rows, expected one"):
        Attribute(model, "IntegratedGradients", arguments={"baselines": x})
    with pytest.raises(ValueError, match=r"got \['image'\], but the batch has \['label'\]"):
        attribute({"label": np.arange(5)})


class Cluster:
    """Ray as far as `check_shared` uses it, with workers that see other folders than the driver."""

    def __init__(self, monkeypatch, worker) -> None:
        import ray
        from ray.util import scheduling_strategies

        self.worker, self.strategies = worker, []
        nodes = [{"Alive": True, "NodeID": str(i), "NodeManagerHostname": f"host{i}"} for i in range(2)]
        nodes.append({"Alive": False, "NodeID": "2", "NodeManagerHostname": "gone"})
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "remote", lambda **given: lambda function: self)
        monkeypatch.setattr(ray, "get", lambda values: values)
        monkeypatch.setattr(scheduling_strategies, "NodeAffinitySchedulingStrategy", lambda node, soft: node)

    def options(self, scheduling_strategy):
        self.strategies.append(scheduling_strategy)
        return self

    def remote(self, file, answer):
        return self.worker(file, answer, int(self.strategies[-1]))


def test_machines_that_do_not_share_the_disk_are_refused_by_name(tmp_path, monkeypatch):
    from gradkern.data.ray import check_shared, sees

    place = str(tmp_path / "deep" / "a.zarr")
    Cluster(monkeypatch, lambda file, answer, node: sees(file, answer))
    check_shared(place)

    def elsewhere(file, answer, node):
        """The second machine has a folder of the same name, which is not this one."""
        return True if node else sees(file, answer)

    def blind(file, answer, node):
        return sees(file, answer) if node else sees(f"/nowhere{file}", answer)

    for worker, host in ((elsewhere, "host1"), (blind, "host0")):
        Cluster(monkeypatch, worker)
        with pytest.raises(ValueError, match=f"out: {host} cannot see or write"):
            check_shared(place)
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    check_shared("s3://bucket/a.zarr")
