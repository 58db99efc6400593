"""What a fresh installation must do: `python tools/smoke.py FOLDER`, where gradkern is expected to be installed."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from captum.attr import IntegratedGradients
from torch import nn

import gradkern
from gradkern.runtime import ops


def expected(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The Jacobian by a backward per output, ``[N, C, *in]``."""
    x = x.detach().requires_grad_()
    y = model(x)
    return torch.stack([torch.autograd.grad(y[:, c].sum(), x, retain_graph=True)[0] for c in range(y.shape[1])], 1)


def first_commands() -> None:
    """`gradkern --version` and the way to the command line work in a base installation, too."""
    help_or_hint = "maps.zarr" if find_spec("click") else "pip install 'gradkern[data]'"
    for option, expected in (("--version", gradkern.__version__), ("--help", help_or_hint)):
        done = subprocess.run([sys.executable, "-m", "gradkern", option], capture_output=True, text=True)
        assert expected in done.stdout + done.stderr, done
    description = metadata("gradkern").get_payload()
    assert "jacobian" in description and not re.search(r"\]\((?!\w+://)", description), "links that lead nowhere"


def main() -> None:
    first_commands()
    home = Path(gradkern.__file__).parent
    assert home == Path(sys.argv[1]).resolve() / "gradkern", f"gradkern comes from {home}"
    assert ops.extension() is not None, "the extension is not loaded"
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv1d(2, 8, 5, padding="same"), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    norm = nn.Sequential(nn.Linear(10, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3), nn.Softmax(1))
    for model, shape in ((cnn, (2, 32)), (norm, (10,))):
        for dtype in (torch.float32, torch.float64):
            model, x = model.to(dtype).eval(), torch.randn(50, *shape, dtype=dtype)
            torch.testing.assert_close(gradkern.jacobian(model, x, engine="kernel"), expected(model, x))
        plan = gradkern.explain(model, x, show=False)
        assert plan.native_share == 1.0, plan
    maps = gradkern.attr.IntegratedGradients(cnn.float()).attribute_all(torch.randn(5, 2, 32), targets=[1])
    assert maps.shape == (5, 1, 2, 32)
    x = torch.randn(4, 2, 32)
    stock, ours = IntegratedGradients(cnn), gradkern.accelerate(IntegratedGradients(cnn))
    torch.testing.assert_close(ours.attribute(x, target=2), stock.attribute(x, target=2))
    print(f"{ops.machine()} from {home}")


if __name__ == "__main__":
    main()
