"""One small call of the CUDA kernels, for compute-sanitizer: ``compute-sanitizer python -m tests.gpu.small``."""

import torch

import gradkern
from tests import oracle
from tests.cases import CASES


def main() -> None:
    for name in ("maxpool1d", "conv2d_uneven", "residual", "softmax"):
        model = CASES[name].build().cuda()
        x = CASES[name].inputs(40)[0].cuda()
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found = gradkern.jacobian(model, x, engine="kernel")
            torch.cuda.synchronize()
        _, (want,) = oracle.jacobian(model, x[:8])
        assert oracle.disagreeing(found[:8].reshape(want.shape), want, 1e-4) <= 0.3, name
    print("small: right")


if __name__ == "__main__":
    main()
