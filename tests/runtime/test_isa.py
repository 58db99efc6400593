"""Every instruction set of one build, each in a fork of its own: the choice is made once per process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gradkern.runtime import ops

ROOT = Path(__file__).parents[2]
CPUINFO = Path("/proc/cpuinfo")
#: The instruction sets of an x86 build, best first, and the processor's flags that each needs.
NEEDS: dict[str, set[str]] = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "bmi1", "bmi2", "popcnt"},
    "avx2": {"avx2", "fma", "bmi1", "bmi2", "popcnt", "aes"},
    "avx": {"avx", "popcnt"},
    "portable": set(),
}
KNOWN = list(NEEDS) if platform.machine() in ("x86_64", "AMD64") else ["neon", "portable"]
NAMES = (
    "cnn1d_strided", "lenet5", "maxpool1d_overlap_pad", "maxpool2d_mixed", "conv1d_groups", "residual",
    "elu", "tanh", "sigmoid", "leaky_relu", "bn_after_pool", "avgpool2d_ceil_exclude", "log_softmax", "two_inputs",
    "conv1d_depthwise", "conv2d_uneven", "squeeze", "resnet1d_opaque",
)  # fmt: skip


def python(isa: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "GRADKERN_ISA"} | {"OMP_NUM_THREADS": "1"}
    if isa is not None:
        environment["GRADKERN_ISA"] = isa
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def supported() -> list[str]:
    extension = ops.extension()
    return [] if extension is None else list(extension.isas())


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    done = python(None, "-m", "tests.support.isa_runs", ",".join(NAMES), *supported())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("isa", supported())
def test_every_instruction_set_equals_the_oracle(isa, failures):
    assert failures[isa] == ""


def flags() -> set[str]:
    """What the processor says of itself; on Arm the line has another name, and none of these sets exist."""
    lines = CPUINFO.read_text().splitlines()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


@pytest.mark.skipif(not CPUINFO.exists(), reason="no /proc/cpuinfo")
def test_instruction_sets_are_those_of_the_processor():
    has = flags()
    assert supported() == [name for name in KNOWN if NEEDS.get(name, set()) <= has]


def test_best_instruction_set_is_used_unless_another_is_named():
    assert ops.machine().isa == (os.environ.get("GRADKERN_ISA") or supported()[0])


def test_an_unknown_instruction_set_is_an_error():
    done = python("avx1024", "-c", "from gradkern.runtime import ops; ops.machine()")
    assert done.returncode != 0
    assert f"GRADKERN_ISA=avx1024 is unknown; use one of {', '.join(KNOWN)}\n" in done.stderr
