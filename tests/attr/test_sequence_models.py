"""Models of regulatory genomics, cut small: they have a Program, and DeepLIFT/SHAP on the kernels adds up.

Where bpnet-lite is installed its own networks are tried too; the others are written in
tests/support/sequence_models.py in the published shapes.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkern
from gradkern.attr import DeepLiftShap
from tests.support.sequence_models import LENGTH, MODELS, Controlled

R = 2


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_attributions_add_up_on_kernels(name: str) -> None:
    if name.startswith("bpnet-lite"):
        pytest.importorskip("bpnetlite.bpnet")
    torch.manual_seed(0)
    net = MODELS[name]().double().eval()
    x, refs = (
        nn.functional.one_hot(torch.randint(4, (*shape, LENGTH)), 4).transpose(-1, -2).double()
        for shape in ((2,), (2, R))
    )
    control = (torch.rand(2, 2, LENGTH, dtype=torch.float64),) if isinstance(net, Controlled) else ()
    assert gradkern.prepare(net, (x, *control)).program is not None, "the model has no Program"
    maps = DeepLiftShap(net, engine="kernel").attribute_all(x, refs, additional_forward_args=control or None)
    with torch.no_grad():
        before = net(refs.flatten(0, 1), *(c.repeat_interleave(R, 0) for c in control))
        change = net(x, *control) - before.view(2, R, -1).mean(1)
    torch.testing.assert_close(maps.sum((2, 3)), change)
