"""DeepLift's rescale rule and LRP by their definitions, in float64, module by module, window by window.

Slow and plain on purpose; shares no code with gradkern.  Networks are lists of modules, each applied once in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def flat_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a (nested) `nn.Sequential` in order."""
    found = []
    for module in model.children():
        found += flat_modules(module) if isinstance(module, nn.Sequential) else [module]
    return found


def pull(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """The transposed linear part of a module at one sample ``x [1, *in]``."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x), x, g)[0]


def windows(pool: nn.Module, x: Tensor, y: Tensor) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """For each output position of a pool, the input positions of its window (padding left out)."""
    dims = y.dim() - 2

    def pair(v: object) -> tuple[int, ...]:
        return v if isinstance(v, tuple) else (v,) * dims

    kernel, stride = pair(pool.kernel_size), pair(pool.stride)
    padding, dilation = pair(pool.padding), pair(pool.dilation)
    found = []
    for out in itertools.product(*(range(n) for n in y.shape[2:])):
        inside = []
        for tap in itertools.product(*(range(k) for k in kernel)):
            place = tuple(o * s - p + t * d for o, s, p, t, d in zip(out, stride, padding, tap, dilation, strict=True))
            if all(0 <= i < n for i, n in zip(place, x.shape[2:], strict=True)):
                inside.append(place)
        found.append((out, inside))
    return found


def pool_multipliers(pool: nn.Module, x: Tensor, r: Tensor, y: Tensor, yr: Tensor, g: Tensor) -> Tensor:
    """A window's change goes to the input's maximum and to the reference's, as far as each has moved."""
    m = torch.zeros_like(x)
    for c in range(x.shape[1]):
        for out, inside in windows(pool, x, y):
            here = max(inside, key=lambda i: x[(0, c, *i)].item())
            there = max(inside, key=lambda i: r[(0, c, *i)].item())
            top = max(y[(0, c, *out)], yr[(0, c, *out)])
            share = {here: top - yr[(0, c, *out)]}
            share[there] = share.get(there, 0) + y[(0, c, *out)] - top
            for place in inside:
                moved = x[(0, c, *place)] - r[(0, c, *place)]
                if abs(moved) < 1e-10:
                    m[(0, c, *place)] += g[(0, c, *out)] * (place == here)
                elif place in share:
                    m[(0, c, *place)] += g[(0, c, *out)] * share[place] / moved
    return m


def deep_lift(modules: Sequence[nn.Module], x: Tensor, r: Tensor, target: int) -> Tensor:
    """Contributions ``[1, *in]`` of one sample by the rescale rule."""
    xs, rs = [x], [r]
    with torch.no_grad():
        for module in modules:
            xs.append(module(xs[-1]))
            rs.append(module(rs[-1]))
    g = torch.zeros_like(xs[-1])
    g[0, target] = 1
    for module, a, b, y, z in zip(reversed(modules), xs[-2::-1], rs[-2::-1], xs[::-1], rs[::-1], strict=False):
        if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d)):
            g = pool_multipliers(module, a, b, y, z, g)
        elif isinstance(module, (nn.ReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU)):
            slope = pull(module, a, torch.ones_like(a))
            moved = a - b
            g = g * torch.where(moved.abs() < 1e-10, slope, (y - z) / moved)
        elif isinstance(module, nn.Softmax):
            g = through_softmax(a, b, y, z, g)
        else:
            g = pull(module, a, g)
    return g * (x - r)


def through_softmax(x: Tensor, r: Tensor, y: Tensor, y_ref: Tensor, g: Tensor) -> Tensor:
    """``exp(z - log Σ exp(z))`` of logits less their mean: secants of the exponentials and of the logarithm between."""
    x, r = x - x.mean(), r - r.mean()
    shift = max(x.max().item(), r.max().item())
    e, f = (x - shift).exp(), (r - shift).exp()
    shares = torch.where((x - r).abs() < 1e-10, e, (e - f) / (x - r))
    shares = shares * (e.sum().log() - f.sum().log()) / (e.sum() - f.sum())
    moved = (x - x.logsumexp(1)) - (r - r.logsumexp(1))
    g = g * torch.where(moved.abs() < 1e-10, y, (y - y_ref) / moved)
    g = g - shares * g.sum()
    return g - g.mean()


RECTIFIERS = (nn.ReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Softmax, nn.MaxPool1d, nn.MaxPool2d)


def least_movement(modules: Sequence[nn.Module], x: Tensor, r: Tensor) -> Tensor:
    """``[N]``: the smallest change of a number that a sample's multipliers are divided by, unmoved ones left out.

    A multiplier is a quotient of differences, so rounding of size u becomes an error of u over this.
    """
    least = torch.full((len(x),), float("inf"), dtype=x.dtype)
    with torch.no_grad():
        for module in modules:
            if isinstance(module, RECTIFIERS):
                moved = (x - r).flatten(1)  # [N, numbers]
                if isinstance(module, nn.Softmax):
                    moved = torch.cat([moved, x.log_softmax(1) - r.log_softmax(1)], 1)
                moved = moved.abs()
                least = least.minimum(moved.where(moved >= 1e-10, float("inf")).amin(1))
            x, r = module(x), module(r)
    return least


def relevance(modules: Sequence[nn.Module], x: Tensor, target: int, epsilon: float = 1e-9) -> Tensor:
    """Relevance ``[1, *in]`` of one sample, the epsilon rule everywhere, activations handing it through."""
    values = [x]
    with torch.no_grad():
        for module in modules:
            values.append(module(values[-1]))
    share = torch.zeros_like(values[-1])
    share[0, target] = values[-1][0, target]
    for module, a, z in zip(reversed(modules), values[-2::-1], values[::-1], strict=False):
        if isinstance(module, (nn.ReLU, nn.ELU, nn.Tanh)):
            continue
        if isinstance(module, nn.Flatten):
            share = share.view_as(a)
            continue
        stable = z + torch.where(z < 0, -1.0, 1.0).to(z) * epsilon
        share = a * pull(module, a, share / stable)
    return share
