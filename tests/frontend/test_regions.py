"""Backward passes that few samples exercise, at random places of random networks, against live autograd.

What a region does to gradients shows for one sample in 2,000: comparing a few samples cannot find it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.dispatch import first_use
from tests.support.modules import Through

pytestmark = [pytest.mark.real_export, pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")]
SAMPLES = 2000


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned round where the limit is exceeded."""

    @staticmethod
    def forward(ctx, h: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(h.abs() > limit)
        return h.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.saved_tensors[0], -g, g), None


def twice(h: Tensor) -> Tensor:
    return h * 2 + 1


def where(special: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """``special`` where the limit is exceeded."""
    return lambda h, limit: torch.where(h.abs() > limit, special(h), h)


def added(special: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """``special`` of what exceeds the limit is added."""
    return lambda h, limit: h + special(nn.functional.relu(h.abs() - limit))


def no_grad_block(h: Tensor) -> Tensor:
    with torch.no_grad():
        return twice(h)


def with_grad_inside(h: Tensor) -> Tensor:
    with torch.no_grad():
        a = twice(h)
        with torch.enable_grad():
            b = twice(h)
        c = a * 3
    return b + c


def inference_block(h: Tensor) -> Tensor:
    with torch.inference_mode():
        z = twice(h)
    return z + 0


def switched_off(h: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    z = twice(h)
    torch.set_grad_enabled(before)
    return z * 2


def set_grad_block(h: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        z = twice(h)
    return z


def hooked(h: Tensor, limit: float) -> Tensor:
    h = h * 1
    far = h.detach().abs() > limit
    h.register_hook(lambda g: torch.where(far, 3 * g, g))
    return h


def in_place(h: Tensor) -> Tensor:
    with torch.no_grad():
        z = h * 2
        z += 1
        z[:, 0] = 0.0
    return z


PLAIN = {
    "no_grad block": no_grad_block,
    "no_grad decorator": torch.no_grad()(twice),
    "enable_grad inside": with_grad_inside,
    "set_grad_enabled block": set_grad_block,
    "set_grad_enabled": switched_off,
    "inference_mode block": inference_block,
    "inference_mode decorator": torch.inference_mode()(lambda h: h * 2),
    "in place without gradients": in_place,
    "detach": lambda h: twice(h).detach(),
    "data": lambda h: twice(h).data,
    "detach of a branch": lambda h: twice(h) * h.detach(),
}
REGIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    **{f"{name}, where": where(special) for name, special in PLAIN.items()},
    **{f"{name}, added": added(special) for name, special in PLAIN.items()},
    "straight through": Through.apply,
    "gradient reversal": Reversed.apply,
    "tensor hook": hooked,
    "forward hook": lambda h, limit: h,  # registered on the module itself
}
CAPTURED = {
    "no_grad block, where",
    "no_grad decorator, added",
    "set_grad_enabled, where",
    "detach, where",
    "data, added",
}


class Region(nn.Module):
    def __init__(self, run: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.run, self.limit = run, 1e9

    def forward(self, h: Tensor) -> Tensor:
        return self.run(h, self.limit)


def network(name: str, draw: random.Random) -> tuple[nn.Sequential, Tensor]:
    """A random network with a region at a random place, and samples of which one reaches it."""
    width, layers = 4, []
    for _ in range(draw.randint(2, 4)):
        wider = draw.randint(3, 7)
        act = draw.choice([nn.ReLU(), nn.LeakyReLU(0.2), nn.ELU(), nn.Identity()])
        layers += [nn.Linear(width, wider), act]
        width = wider
    place = draw.randint(1, len(layers))
    region = Region(REGIONS[name])
    model = nn.Sequential(*layers[:place], region, *layers[place:], nn.Linear(width, 3)).double().eval()
    x = torch.randn(SAMPLES, 4, dtype=torch.float64)
    rare = draw.randrange(5, SAMPLES)
    x[rare] = 0.0
    with torch.no_grad():
        region.limit = 1.1 * float(model[:place](x).abs().max())
        x[rare] = max(50 * torch.randn(40, 4, dtype=torch.float64), key=lambda far: model[:place](far).abs().max())
        assert (model[:place](x).abs() > region.limit).any(1).nonzero().tolist() == [[rare]]
    if name == "forward hook":
        limit = region.limit
        region.register_forward_hook(lambda m, inputs, h: torch.where(h.abs() > limit, 2 * h.detach(), h))
    return model, x


def check(name: str, seed: int, engine: str) -> None:
    draw = random.Random(f"{name} {seed}")
    torch.manual_seed(draw.randrange(1 << 30))
    model, x = network(name, draw)
    want = gradkern.jacobian(model, x, engine="autograd").clone()
    got = gradkern.jacobian(model, x, engine=engine)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_that_one_sample_reaches(name: str) -> None:
    check(name, 0, "kernel")


@pytest.mark.parametrize("seed", range(1, 9))
def test_random_regions_once_auto_has_switched(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "capture_cost", lambda: 0.0)
    check(random.Random(seed).choice(list(REGIONS)), seed, "auto")


@pytest.mark.parametrize("name", sorted(CAPTURED))
def test_regions_without_gradients_are_captured(name: str) -> None:
    model, x = network(name, random.Random(name))
    assert gradkern.prepare(model, x).program is not None


@pytest.mark.parametrize("name", ["straight through", "gradient reversal", "tensor hook"])
def test_other_backwards_are_refused_with_their_place(name: str) -> None:
    model, x = network(name, random.Random(name))
    with pytest.warns(gradkern.GradkernWarning, match=r"autograd.*(Function|hook).*test_regions\.py:\d+"):
        assert gradkern.prepare(model, x).program is None


def test_two_regions_in_one_network() -> None:
    """One inside the other's layers, in both orders."""
    for names in (("no_grad block, where", "detach, added"), ("data, where", "set_grad_enabled, added")):
        draw = random.Random(str(names))
        parts = [network(name, draw)[0] for name in names]
        model = nn.Sequential(parts[0], nn.Linear(3, 4), parts[1]).double().eval()
        x = torch.randn(50, 4, dtype=torch.float64)
        for part in model.modules():
            if isinstance(part, Region):
                part.limit = 0.3
        want = gradkern.jacobian(model, x, engine="autograd")
        torch.testing.assert_close(gradkern.jacobian(model, x, engine="kernel"), want, rtol=1e-9, atol=1e-12)
