"""The same networks in JAX, where it is installed: ``jit`` of ``vmap(jacrev)`` or ``vmap(jacfwd)``, sharing memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import dlpack


def chunk(model: nn.Module, outputs: int, transform: str = "jacrev") -> Callable[[Tensor, Tensor | None], Tensor]:
    """The Jacobian of one chunk.  Raises ImportError without JAX, TypeError for a network that is not a sequence of the
    layers of `layer_of`."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of the GPU from the others
    import jax
    import jax.dlpack

    high = torch.get_float32_matmul_precision() != "highest"
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if high else "highest")
    layers = [layer_of(module) for module in modules_of(model)]

    def network(x: Any) -> Any:  # [*in] -> [C]
        for layer in layers:
            x = layer(x)
        return x

    jacobian = jax.jit(jax.vmap(getattr(jax, transform)(network)))

    def run(x: Tensor, out: Tensor | None) -> Tensor:
        got = jacobian(jax.dlpack.from_dlpack(x.contiguous()))
        got.block_until_ready()
        result = dlpack.from_dlpack(got)
        return result if out is None else out.copy_(result)

    return run


def modules_of(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, nn.Sequential):
        return [module for part in model for module in modules_of(part)]
    if type(model).__name__ == "LeNet5":
        relu, pool = nn.ReLU(), nn.MaxPool2d(2)
        convolutions = [model.conv1, relu, pool, model.conv2, relu, pool, nn.Flatten()]
        return [*convolutions, model.fc1, relu, model.fc2, relu, model.fc3]
    return [model]


def array(t: Tensor | None) -> Any:
    import jax.numpy as jnp

    return None if t is None else jnp.asarray(t.detach().cpu().numpy())


def layer_of(module: nn.Module) -> Callable[[Any], Any]:
    """A torch layer as a function of one sample."""
    import jax
    from jax import lax

    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _convolution(module)
    if isinstance(module, nn.ConvTranspose2d):
        return _transposed_convolution(module)
    if isinstance(module, nn.Linear):
        w, b = array(module.weight), array(module.bias)
        return lambda x: w @ x + b
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d)):
        axes = 1 if isinstance(module, nn.MaxPool1d) else 2
        k = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,) * axes
        return lambda x: lax.reduce_window(x, -math.inf, lax.max, (1, *k), (1, *k), "VALID")
    if isinstance(module, nn.BatchNorm1d):
        scale = module.weight / (module.running_var + module.eps).sqrt()
        a, c = array(scale), array(module.bias - module.running_mean * scale)
        return lambda x: a[:, None] * x + c[:, None]
    if isinstance(module, nn.AdaptiveAvgPool1d):
        return lambda x: x.mean(-1, keepdims=True)
    if isinstance(module, nn.Flatten):
        return lambda x: x.reshape(-1)
    if isinstance(module, nn.Unflatten):
        return lambda x: x.reshape(module.unflattened_size)
    functions = {nn.ReLU: jax.nn.relu, nn.Tanh: jax.numpy.tanh, nn.Sigmoid: jax.nn.sigmoid}
    if type(module) in functions:
        return functions[type(module)]
    if isinstance(module, nn.GELU):
        return lambda x: jax.nn.gelu(x, approximate=module.approximate == "tanh")
    raise TypeError(f"no JAX twin of {type(module).__name__}")


def _convolution(module: nn.Conv1d | nn.Conv2d) -> Callable[[Any], Any]:
    from jax import lax

    w, b = array(module.weight), array(module.bias)
    if isinstance(module.padding, str):
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = [(r // 2, r - r // 2) for r in reach]
    else:
        padding = [(p, p) for p in module.padding]

    def convolution(x: Any) -> Any:
        y = lax.conv_general_dilated(x[None], w, module.stride, padding, rhs_dilation=module.dilation)[0]
        return y if b is None else y + b.reshape(-1, *[1] * (w.ndim - 2))

    return convolution


def _transposed_convolution(module: nn.ConvTranspose2d) -> Callable[[Any], Any]:
    from jax import lax

    w, b = array(module.weight.flip(2, 3).transpose(0, 1)), array(module.bias)  # the kernel of the gradient's layout
    edges = [k - 1 - p for k, p in zip(module.kernel_size, module.padding, strict=True)]
    padding = [(e, e + extra) for e, extra in zip(edges, module.output_padding, strict=True)]

    def convolution(x: Any) -> Any:
        y = lax.conv_general_dilated(x[None], w, (1, 1), padding, lhs_dilation=module.stride)[0]
        return y if b is None else y + b[:, None, None]

    return convolution
