"""Small calls of the CUDA kernels, for compute-sanitizer: ``compute-sanitizer python -m tests.gpu.small``."""

from dataclasses import replace
from unittest import mock

import torch

import gradkern
from gradkern import attr
from gradkern.runtime import ops
from tests.cases import CASES
from tests.support import oracle

NETS = ("maxpool1d", "conv2d_uneven", "residual", "softmax", "matmul", "attention")


def check(name: str, n: int) -> None:
    model, x = CASES[name].build(), CASES[name].inputs(n)[0]
    _, (want,) = oracle.jacobian(model, x[:8])  # on the CPU: a sanitizer slows every kernel
    model, x = model.cuda(), x.cuda()
    got = gradkern.jacobian(model, x, engine="kernel")
    torch.cuda.synchronize()
    assert oracle.disagreeing(got[:8].reshape(want.shape).cpu(), want, 1e-4) <= 0.3, name


def main() -> None:
    torch.backends.cudnn.allow_tf32 = False
    for name in NETS:
        check(name, 40)
    for method in (attr.GuidedBackprop, attr.DeepLift, attr.LRP):
        method(CASES["residual"].build().cuda(), engine="kernel").attribute_all(CASES["residual"].inputs(5)[0].cuda())
    real = ops.machine

    def little(device=None):  # hardly any shared memory: several chains beside ATen
        return replace(real(device), shared_bytes=2048) if device and device.type == "cuda" else real()

    with mock.patch.object(ops, "machine", little):
        for name in ("maxpool2d", "residual"):
            check(name, 6)
    torch.cuda.synchronize()
    print("small: right")


if __name__ == "__main__":
    main()
