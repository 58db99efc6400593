"""Captum's ``target`` as seeds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..dispatch.targets import Seeds
from ..ir.program import Shape
from ..util.options import BadValue
from .captum_compat import select_targets


def captum_seeds(target: Any, samples: int, out_shape: Shape) -> Seeds:
    """Captum's reading of ``target``, found by applying Captum's own code to a tensor of output indices.

    Raises `BadValue` for a target that does not fit; `compute_gradients` then raises Captum's own error.
    """
    indices = torch.arange(math.prod(out_shape)).view(1, *out_shape)  # [1, *out]
    try:
        chosen = select_targets(
            indices.expand(samples, *out_shape),  # [N, *out], takes no memory
            target.cpu() if isinstance(target, Tensor) else target,
        )
        flat = chosen.reshape(samples)  # [N]
    except Exception as error:
        raise BadValue(f"target: got {target!r}, which Captum refuses for outputs [N, {out_shape}]: {error}") from error
    if bool((flat == flat[0]).all()):
        return Seeds(1, (1,), flat[:1].clone())
    return Seeds(1, (1,), flat[:, None])
