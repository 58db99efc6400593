"""A run over many regions, killed, resumed and sharded: ``python -m tests.support.region_runs REGIONS KILLS``.

DeepLIFT/SHAP with shuffled references of each region and a tiny network.  One store is written in one go, another by
two shards whose processes are killed with SIGKILL; prints whether the two are bit-equal.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time

import torch
from torch import Tensor, nn

from gradkern.data import Results, merge, run

LENGTH, CHUNK = 24, 100


def shuffled(inputs: Tensor, n: int, random_state: int | None) -> Tensor:
    generator = torch.Generator().manual_seed(random_state or 0)
    return torch.stack([inputs[..., torch.randperm(LENGTH, generator=generator)] for _ in range(n)], 1)


ARGUMENTS = {"baselines": shuffled, "n_references": 3, "random_state": 0, "hypothetical": True}


def child(net: nn.Module, x: Tensor, out: str, shard: tuple[int, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        run(net, x, out, "deep_lift_shap", arguments=ARGUMENTS, chunk=CHUNK, shard=shard)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def finished(out: str) -> int:
    return len(Results.open(out).ledger.finished()) if os.path.exists(out) else 0


def main(regions: int, kills: int) -> None:
    torch.set_num_threads(1)  # no thread of OpenMP's may be alive when the process forks
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6 * (LENGTH - 4), 2)).eval()
    x = nn.functional.one_hot(torch.randint(4, (regions, LENGTH)), 4).mT.float().contiguous()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = f"{folder}/whole.zarr", f"{folder}/parts.zarr"
        run(net, x, whole, "deep_lift_shap", arguments=ARGUMENTS, chunk=CHUNK)
        killed: list[int] = []
        for k in range(kills):
            pid, goal = child(net, x, parts, (k % 2, 2)), finished(parts) + rng.randint(3, 12)
            while finished(parts) < goal and os.waitpid(pid, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed.append(finished(parts))
        for k in range(2):
            os.waitpid(child(net, x, parts, (k, 2)), 0)
        merge(parts)
        a, b = Results.open(whole), Results.open(parts)
        equal = all(torch.equal(a.maps(i, i + CHUNK), b.maps(i, i + CHUNK)) for i in range(0, regions, CHUNK))
    print(f"{regions} regions, killed after {killed} of {regions // CHUNK} chunks: bit-equal {equal}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
