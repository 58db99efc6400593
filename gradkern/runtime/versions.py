"""The facts for a bug report: versions, processor, and whether the compiled kernels are there."""

from __future__ import annotations

import os
import platform
import warnings
from importlib import metadata

import torch

from . import ops

PACKAGES = ("gradkern", "torch", "captum", "numpy", "zarr", "click", "matplotlib", "ray")


def show_versions() -> None:
    """Print the versions of gradkern and of the packages that it uses, the instruction set that its kernels run on, and
    the threads and GPUs that torch sees.  Put the lines into a bug report."""
    lines = {"python": f"{platform.python_version()} on {platform.platform()}"}
    for name in PACKAGES:
        try:
            lines[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            lines[name] = "not installed"
    lines["kernels"] = _kernels()
    lines["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines["GPUs"] = ", ".join(gpus) or "none"
    for variable in sorted(name for name in os.environ if name.startswith("GRADKERN_")):
        lines[variable] = os.environ[variable]
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


def _kernels() -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        machine = ops.machine()
    if machine:
        return f"compiled, {machine.isa} on this processor"
    return str(caught[-1].message) if caught else "no compiled extension"
