"""Every instruction set of one build, each in a process of its own: the choice is made once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradkern.runtime import ops

ROOT = Path(__file__).parents[2]
NAMES = (
    "cnn1d_strided", "lenet5", "maxpool1d_overlap_pad", "maxpool2d_mixed", "conv1d_groups", "residual",
    "elu", "tanh", "sigmoid", "leaky_relu", "bn_after_pool", "avgpool2d_ceil_exclude", "log_softmax", "two_inputs",
    "conv1d_depthwise", "conv2d_uneven", "squeeze", "resnet1d_cumsum",
)  # fmt: skip
PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from gradkern import ops
from tests import oracle
from tests.cases import CASES
from tests.traced import EXACT, exact, parts, run, worst
print(ops.machine().isa)
for name in sys.argv[1:]:
    for n in (1, 7):
        _, inputs, program, params = parts(name, n)
        y, jacobians = run(program, params, inputs)
        error = worst((y, *jacobians), (exact(name, n)[0], *exact(name, n)[1]))
        assert error <= EXACT, (name, n, error)
    if not CASES[name].opaque:
        _, inputs, program, params = parts(name, 16, torch.float32)
        _, jacobians = run(program, params, inputs)
        for got, want in zip(jacobians, oracle.jacobian(CASES[name].build(), inputs)[1]):
            assert oracle.disagreeing(got, want) <= 0.1, name
"""


def python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GRADKERN_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def supported() -> list[str]:
    extension = ops.extension()
    return [] if extension is None else list(extension.isas())


@pytest.mark.parametrize("isa", supported())
def test_agrees_with_the_oracle(isa):
    done = python(isa, PROGRAM, *NAMES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [isa]


def test_the_portable_body_is_always_there():
    assert "portable" in supported()


def test_an_unknown_instruction_set_is_an_error():
    done = python("avx1024", "from gradkern import ops; ops.machine()")
    assert done.returncode != 0
    assert "GRADKERN_ISA=avx1024 is unknown; use avx512, avx2 or portable" in done.stderr
