"""The kernels for Arm's NEON, under an emulator, against the oracle in float64."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from gradkern.runtime import executor
from tests.cases import CASES
from tests.support import emulator, oracle
from tests.support.case_runs import EXACT, exact, parts
from tests.support.emulator import COMPILER, EMULATOR, Emulator
from tests.support.host_device import installed

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not COMPILER or not EMULATOR, reason=emulator.MISSING)]
#: Windows, patterns with and without padding, bits of 16 channels and of fewer, functions, sums, products.
NAMES = (
    "cnn1d_strided", "maxpool1d_overlap_pad", "maxpool2d_mixed", "conv1d_groups", "residual", "elu",
    "avgpool2d_ceil_exclude", "log_softmax", "two_inputs", "conv1d_depthwise", "matmul",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_neon_kernels_equal_the_oracle(name: str, dtype: torch.dtype) -> None:
    _, inputs, program, params = parts(name, 3, dtype)
    with torch.no_grad(), installed(device := Emulator()):
        y, got = executor.jacobian(program, params, inputs)
    assert device.launches > 0
    want_y, want = exact(name, 3)
    if dtype == torch.float64:
        assert oracle.largest_error((y, *got), (want_y, *want)) <= EXACT
    else:
        want = oracle.jacobian(CASES[name].build(), inputs)[1]
        assert max(oracle.disagreeing(g, w) for g, w in zip(got, want, strict=True)) <= 0.1


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
def test_clang_takes_the_sources_without_a_warning() -> None:
    """The kind of compiler that macOS has."""
    clang = ["clang++", "--target=aarch64-linux-gnu", "-fsyntax-only", *emulator.WARNINGS]
    done = subprocess.run([*clang, *emulator.SOURCES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
