"""Decides which GPUs take gradkern's own kernels by default: those on which the same kernels have passed `make gpu`.

``validated.json`` lists the architectures, each with the fingerprint of the kernels that passed.  `make gpu` writes it.
Everywhere else, calls take torch's own kernels with all seeds folded into the batch, and a warning says so once.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from ..codegen.machine import Device, NoKernels
from ..util import options
from ..util.memo import Memo
from ..util.options import GradkernWarning

TABLE = Path(__file__).with_name("validated.json")
VARIABLE = "GRADKERN_CUDA"

#: By architecture: ``fingerprint`` of the kernels that passed, ``gpu``, ``torch`` and ``date``.
Table = Mapping[str, Mapping[str, str]]


@functools.cache
def table() -> Table:
    return json.loads(TABLE.read_text())


def chosen() -> bool | None:
    """True if the caller asks for the CUDA kernels, False if for none; None leaves the choice to the table."""
    variable = os.environ.get(VARIABLE, "")
    if variable not in ("", "0", "1"):
        raise options.BadValue(f"environment variable {VARIABLE}: got {variable!r}, expected 1 or 0.")
    if variable == "0":
        return False
    return True if variable == "1" or options.engine() == "kernel" else None


def refusal(device: Device, fingerprint: str, validated: Table, choice: bool | None) -> str | None:
    """Why kernels with this fingerprint do not run on a device; None if they do."""
    if choice is not None:
        return None if choice else f"{VARIABLE}=0"
    entry = validated.get(device.architecture)
    if entry is None:
        return f"gradkern's CUDA kernels have not been validated on {device.architecture}"
    if entry["fingerprint"] != fingerprint:
        return f"gradkern's CUDA kernels have changed since they were validated on {device.architecture}"
    return None


_said: Memo[bool] = Memo(16)


def permitted(device: Device, fingerprint: str) -> Device | NoKernels:
    """The device, if kernels may run on it; warns once if they could, and do not."""
    choice = chosen()
    reason = refusal(device, fingerprint, table(), choice)
    if reason is None:
        return device
    if choice is None and _said.get(device.architecture) is None:
        _said.put(device.architecture, True)
        warnings.warn(
            f"{reason}: torch's own kernels run, with all seeds folded into the batch. The results are the same. To "
            f'choose gradkern\'s kernels, pass engine="kernel" or set {VARIABLE}=1; their first results are then '
            "compared with torch's.",
            GradkernWarning,
            stacklevel=2,
        )
    return NoKernels(reason)
