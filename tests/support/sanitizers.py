"""The kernels under the sanitizers, on the host and without torch::

    python -m tests.support.sanitizers [address|thread] [--cpu|--long] [avx512|avx2|…]

The CUDA kernels: launches of a few networks are recorded, and `csrc/host/replay.cpp`, built with each sanitizer, runs
them again: as many threads as the block has, so the thread sanitizer sees every missing barrier.  Results must be
bit-equal.  ``--cpu``: also the CPU's kernels and ops (`cpu_replay.py`) for one instruction set; ``--long``: for all, or
for those that are named, with ten times as many networks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gradkern import attr
from gradkern.attr.rules.rule_methods import with_relu
from gradkern.runtime import executor
from tests.cases import CASES
from tests.support import capturing, cpu_replay
from tests.support.host_device import CSRC, FLAGS, HostDevice, installed

KINDS = {"address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), "thread": ("-fsanitize=thread",)}
NETS = [
    *("conv1d_stride_pad", "conv1d_groups", "conv1d_depthwise", "maxpool1d_overlap_pad", "maxpool2d_mixed", "residual"),
    *(
        "two_inputs",
        "softmax",
        "avgpool2d",
        "bn_first",
        "view_channels",
        "elu",
        "conv1d_circular",
        "matmul",
        "attention",
    ),
]


RULED = ["residual"]  # once more by the rules of guided backpropagation and DeepLift


def recordings():
    for name in NETS:
        model, inputs = CASES[name].build(), CASES[name].inputs(3)
        device = HostDevice(blocks=2, threads=64)
        device.record = []
        with torch.no_grad(), installed(device):
            program = capturing.to_program(model, inputs)
            params = capturing.bind(program, model)
            executor.jacobian(program, params, inputs)
            if name in RULED:
                executor.jacobian(with_relu(program, "guided_relu"), params, inputs)
                attr.DeepLift(model, False, engine="kernel").attribute_all(inputs)  # its maps, left as they are
        for number, recording in enumerate(device.record):
            yield f"{name} {number}", recording


def main(words: list[str]) -> int:
    kinds, failed = [w for w in words if w in KINDS], 0
    isas = [w for w in words if w not in KINDS and not w.startswith("--")]
    with tempfile.TemporaryDirectory() as folder:
        launches = list(recordings())
        for kind in kinds or list(KINDS):
            program = Path(folder, kind)
            sources = [str(CSRC / "host" / n) for n in ("replay.cpp", "run.cpp")]
            subprocess.run(["g++", "-O1", "-g", *FLAGS, *KINDS[kind], *sources, "-o", str(program)], check=True)
            for name, recording in launches:
                source, target = Path(folder, "in"), Path(folder, "out")
                source.write_bytes(recording.content)
                target.unlink(missing_ok=True)
                done = subprocess.run([str(program), str(source), str(target)], capture_output=True, text=True)
                good = done.returncode == 0 and target.read_bytes() == recording.expected()
                failed += not good
                if not good:
                    print(f"{kind}: {name}: FAILED (exit {done.returncode})\n{done.stderr[:6000]}", flush=True)
            print(
                f"{kind}: {len(launches)} launches of {len(NETS)} networks",
                "clean" if not failed else "",
                flush=True,
            )
            if {"--cpu", "--long"} & set(words):
                failed += cpu_replay.main(kind, KINDS[kind], Path(folder), "--long" in words, isas)
    return failed > 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
