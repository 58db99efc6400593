"""Small calls of the CUDA kernels, for compute-sanitizer: ``compute-sanitizer python -m tests.gpu.small``."""

from dataclasses import replace
from unittest import mock

import torch

import gradkern
from gradkern import attr
from gradkern.runtime import ops
from tests import oracle
from tests.cases import CASES

NETS = ("maxpool1d", "conv2d_uneven", "residual", "softmax", "matmul", "attention")
BOUND = {"highest": 1e-4, "high": 1e-4, "medium": 5e-2}


def check(name: str, n: int) -> None:
    model, x = CASES[name].build(), CASES[name].inputs(n)[0]
    _, (want,) = oracle.jacobian(model, x[:8])  # on the CPU: a sanitizer slows every kernel
    model, x = model.cuda(), x.cuda()
    for precision, bound in BOUND.items():
        torch.set_float32_matmul_precision(precision)
        found = gradkern.jacobian(model, x, engine="kernel")
        torch.cuda.synchronize()
        assert oracle.disagreeing(found[:8].reshape(want.shape).cpu(), want, bound) <= 0.3, (name, precision)
    torch.set_float32_matmul_precision("highest")


def main() -> None:
    for name in NETS:
        check(name, 40)
    for method in (attr.GuidedBackprop, attr.DeepLift, attr.LRP):
        method(CASES["residual"].build().cuda(), engine="kernel").attribute_all(CASES["residual"].inputs(5)[0].cuda())
    real = ops.machine

    def little(device=None):  # hardly any shared memory: contractions run by the step kernel
        return replace(real(device), shared_bytes=256, steps="kernel") if device and device.type == "cuda" else real()

    with mock.patch.object(ops, "machine", little):
        for name in ("maxpool2d", "residual"):
            check(name, 6)
    torch.cuda.synchronize()
    print("small: right")


if __name__ == "__main__":
    main()
