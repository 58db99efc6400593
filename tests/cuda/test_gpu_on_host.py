"""Tests of ``gpu/`` themselves on the stand-in GPU, with few samples: a machine with a GPU is no place to find that a
test is wrong.  Left out: streams, graphs, and what would take minutes here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from tests.gpu import test_gpu
from tests.gpu.test_gpu import (  # noqa: F401
    test_every_number_is_written,
    test_hash_on_a_gpu_sees_every_change,
    test_the_plan_says_cuda,
    test_the_public_call_follows_the_weights,
)
from tests.support.case import Case
from tests.support.host_device import Launchers, installed

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="they are run as they are here"),
]
FEW = 3  # samples


@pytest.fixture(autouse=True)
def stand_in() -> Iterator[Launchers]:
    device, inputs = Launchers(), Case.inputs

    def few(self, n=FEW, *args, **how):
        return inputs(self, min(n, FEW), *args, **how)

    with installed(device), ExitStack() as stack:
        for patch in (
            mock.patch.object(test_gpu, "CUDA", torch.device("cpu")),
            mock.patch.object(Case, "inputs", few),
        ):
            stack.enter_context(patch)
        yield device
