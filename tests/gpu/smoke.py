"""The first seconds on a GPU: ``python -m tests.gpu.smoke``.  `cnn1d` against float64, and a first time."""

import time

import torch

import gradkern
from tests.cases import CASES
from tests.support import oracle

SAMPLES = 20000


def main() -> None:
    torch.backends.cudnn.allow_tf32 = False
    for name in ("cnn1d", "lenet5", "mlp"):
        model = CASES[name].build().cuda()
        x = torch.randn(SAMPLES, *CASES[name].shapes[0], device="cuda")
        got = gradkern.jacobian(model, x, engine="kernel")
        torch.cuda.synchronize()
        begun = time.perf_counter()
        gradkern.jacobian(model, x, engine="kernel")
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        _, (want,) = oracle.jacobian(CASES[name].build(), x[:64].cpu())
        share = oracle.disagreeing(got[:64].reshape(want.shape).cpu(), want, 1e-4)
        print(f"{name}: {1e9 * seconds / SAMPLES:.1f} ns per sample, share of samples that disagree {share:.3f}")
        print(str(gradkern.explain(model, x[:4], show=False)).splitlines()[-1])
        assert share <= 0.1, name


if __name__ == "__main__":
    main()
