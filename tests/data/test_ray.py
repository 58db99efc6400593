"""Runs on a local Ray cluster: the store is that of a run without Ray, also where a worker is killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradkern
from tests.cases import CASES
from tests.support.stores import assert_same

ROOT = Path(__file__).parents[2]
pytest.importorskip("ray", reason="Ray is not installed")


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.support.ray_run", *(str(tmp_path / n) for n in ("ray.zarr", "alone.zarr"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert 10 <= said["finished"] < said["chunks"], "no worker was killed in the middle"
    assert said["done"] == said["chunks"]
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

    def remote(self, *given):
        return self.worker(int(self.strategies[-1]), *given)


def test_machines_that_do_not_share_the_disk_are_refused_by_name(tmp_path, monkeypatch):
    from gradkern.data.ray import check_shared, sees

    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir(), other.mkdir()
    place = str(mine / "deep" / "a.zarr")
    Cluster(monkeypatch, lambda node, *given: sees(*given))
    check_shared(place)

    def elsewhere(node, folder, *keys):
        """The second machine has a folder of the same name, which is not this one."""
        return sees(str(other if node else folder), *keys)

    def absent(node, folder, *keys):
        return sees(folder if node else f"/nowhere{folder}", *keys)

    def read_only(node, folder, *keys):
        with monkeypatch.context() as patch:
            if node:
                patch.setattr("gradkern.data.store.durable.write_file", full)
            return sees(folder, *keys)

    def copied(node, folder, *keys):
        """The second machine works on a copy, whose writes do not come back."""
        if node:
            shutil.copytree(folder, other, dirs_exist_ok=True)
        return sees(str(other if node else folder), *keys)

    def full(*given):
        raise OSError(30, "Read-only file system")

    for worker, host in ((elsewhere, "host1"), (absent, "host0"), (read_only, "host1"), (copied, "host1")):
        Cluster(monkeypatch, worker)
        with pytest.raises(ValueError, match=f"out: {host} cannot see or write"):
            check_shared(place)
    assert not list(mine.iterdir()), "nothing is left behind"


def test_an_address_that_every_process_has_for_itself_is_refused(monkeypatch):
    """``memory://`` names another place in every process: all work would be lost."""
    from gradkern.data.ray import FillChunks, check_shared, sees

    Cluster(monkeypatch, lambda node, *given: sees(*given))
    check_shared("memory://here/a.zarr")
    Cluster(monkeypatch, lambda node, place, *keys: sees(f"{place}{node}", *keys))
    with pytest.raises(ValueError, match=r"out: host0, host1 cannot see or write memory://here/a\.zarr"):
        check_shared("memory://here/a.zarr")
    with pytest.raises(ValueError, match="does not see memory://late"):
        FillChunks(None, "memory://late/a.zarr", None)
