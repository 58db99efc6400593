"""Values and cotangents that cross the borders of groups: ``[C][H][W]`` outside, channels last inside, in blocks of as
many channels and positions as a vector has lanes."""

from __future__ import annotations

import pytest
import torch

from gradkern.ir.calls import Call, Value
from gradkern.ir.program import Opaque, Program, Scale, Step, View
from gradkern.runtime import executor, reference
from tests.support.programs import conv, linear, program


@pytest.mark.parametrize("shape", [(16, 1, 16), (17, 3, 33), (40, 2, 5), (5, 1, 40), (32, 64), (1, 1, 20), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_between_torch_and_kernels_keep_their_places(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torchs = Opaque(Call("aten.cumsum.default", (Value(1), 1)), "no form")
    steps = Step(Scale("tanh"), (0,), shape), Step(torchs, (1,), shape), Step(Scale("sin"), (2,), shape)
    program = Program((shape,), steps, 3)
    x = torch.randn(3, *shape, dtype=dtype)
    targets = torch.randint(program.outputs, (5,))
    out = [torch.full((3, 5, *shape), torch.nan, dtype=dtype)]
    y, _ = executor.jacobian(program, {}, [x], targets, out=out)
    want_y, want = reference.jacobian(program, {}, [x.double()], targets)
    assert [g.native for g in executor.plan_for(program, 5, dtype).groups] == [True, False, True]
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-11}
    torch.testing.assert_close(y.double(), want_y, **tolerance)
    torch.testing.assert_close(out[0].double(), want[0], **tolerance)


@pytest.mark.parametrize("seeds", [1, 7])
@pytest.mark.parametrize("groups", [1, 2])
def test_channels_that_send_nothing_back(seeds: int, groups: int) -> None:
    """Where a slope is zero, a channel is left out of the sums of a convolution or a linear layer: for all seeds."""
    flat = Scale("hardtanh", (-1.0, 1.0))
    layers = Step(conv(3, groups=groups), (0,), (20, 8)), Step(flat, (1,), (20, 8)), Step(View(), (2,), (160,))
    head = Step(linear("f"), (3,), (18,)), Step(flat, (4,), (18,)), Step(linear("g"), (5,), (7,))
    net = program(*layers, *head, inputs=((4, 8),))
    shapes = {"w.weight": (20, 4 // groups, 3), "w.bias": (20,), "f.weight": (18, 160), "g.weight": (7, 18)}
    shapes |= {"f.bias": (18,), "g.bias": (7,)}
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    params["g.weight"][0, : 9 * (seeds > 1)] = 0.0  # the first seed sends nothing where others do
    x = torch.randn(4, 4, 8, dtype=torch.float64)
    x[1] = 1e3  # every channel of some positions is flat
    _, (got,) = executor.jacobian(net, params, [x], torch.arange(seeds))
    _, (want,) = reference.jacobian(net, params, [x], torch.arange(seeds))
    assert executor.plan_for(net, seeds, torch.float64).single_chain
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
