"""The NEON kernels under an emulator of a 64-bit Arm processor: csrc/host/chain_run.cpp, by a cross compiler."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from gradkern.codegen.machine import Machine
from gradkern.runtime import ops
from tests.support.host_device import CSRC, bytes_of

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = next((name for name in ("qemu-aarch64", "qemu-aarch64-static") if shutil.which(name)), None)
SOURCES = CSRC / "host" / "chain_run.cpp", CSRC / "cpu" / "isa_neon.cpp"
WARNINGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas")
# -O1 halves the time of the compilation; the emulator's time is negligible.
FLAGS = (*WARNINGS, "-O1", "-static")
MISSING = "no aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)"


@functools.cache
def program() -> Path:
    """The runner; one build per content of the sources."""
    sources = sorted(p for folder in (CSRC, CSRC / "cpu", CSRC / "host") for p in folder.glob("*.[hc]*"))
    content = [*(p.read_bytes() for p in sources), " ".join(FLAGS).encode()]
    target = Path(tempfile.gettempdir(), f"gradkern-neon-{hashlib.sha256(b''.join(content)).hexdigest()[:16]}")
    if not target.exists():
        part = target.with_name(f"{target.name}.{os.getpid()}")
        assert COMPILER is not None
        done = subprocess.run([COMPILER, *FLAGS, *SOURCES, "-o", part], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        part.replace(target)
    return target


class Emulator:
    """Chains on the emulated processor, with the ops' signatures; for `tests.support.host_device.installed`."""

    def __init__(self) -> None:
        ops.extension()  # the other ops
        self.machine, self.program, self.launches = Machine("neon", 16, 4), program(), 0

    def chain_forward(self, inputs, packed, tables, forward, sizes, outputs) -> list[Tensor]:
        return self.chain_vjp(inputs, packed, tables, forward, forward[:0], sizes, outputs, None, None, [], 1, [])

    def chain_vjp(
        self, inputs, packed, tables, forward, backward, sizes, outputs, targets, rows, cotangents, seed_tile, results
    ) -> list[Tensor]:  # fmt: skip
        n = inputs[0].shape[0]
        values = [packed.new_full((n, size), float("nan")) for size in outputs]
        for r in results:
            r.fill_(float("nan"))  # so that a missing write shows
        seeds = 0 if not len(backward) else targets.shape[-1] if targets is not None else cotangents[0].shape[1]
        of_targets = (0, 0) if targets is None else (1, seeds if targets.dim() == 2 else 0)
        width = 0 if rows is None else rows.shape[-1]
        of_rows = (0 if rows is None else 1, seeds * width if rows is not None and rows.dim() == 3 else 0, width)
        counts = len(inputs), len(values), len(cotangents), len(results)
        head = packed.element_size(), n, seeds, seed_tile, *of_targets, *of_rows, *counts, *sizes.integers
        none = torch.empty(0)
        fixed = [forward, backward, packed, tables, *(none if t is None else t for t in (targets, rows))]
        blobs = [bytes_of(t) for t in (*fixed, *inputs, *values, *cotangents, *results)]
        content = b"".join(k.to_bytes(8, "little") for k in head)
        content += b"".join(len(blob).to_bytes(8, "little") + blob for blob in blobs)
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder, "in"), Path(folder, "out")
            given.write_bytes(content)
            assert EMULATOR is not None
            subprocess.run([EMULATOR, str(self.program), str(given), str(made)], check=True)
            computed = torch.frombuffer(bytearray(made.read_bytes()), dtype=packed.dtype)
        for t, part in zip((*values, *results), computed.split([t.numel() for t in (*values, *results)]), strict=True):
            t.copy_(part.view(t.shape))
        self.launches += 1
        return values

    def patches(self) -> list:
        """The patches with which the engine works on this processor."""
        return [mock.patch.object(ops, name, getattr(self, name)) for name in ("chain_forward", "chain_vjp")]
