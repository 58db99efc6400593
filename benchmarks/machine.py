"""What the figures were measured on, as data for the JSON."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve")


def cpuinfo(field: str) -> str:
    """The first value of a field of the kernel's processor list; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def caches() -> dict[str, str]:
    """Size of each cache level of the first core, as the system names it."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / part).read_text().strip() for part in ("level", "type", "size"))
        except OSError:
            continue
        sizes[f"L{level}{kind[0].lower() if kind != 'Unified' else ''}"] = size
    return sizes


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git(*words: str) -> str:
    """The output of a git command in this repository; empty without git or outside a checkout."""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    return git("rev-parse", "--short=12", "HEAD") or "unknown"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe(threads: int) -> dict[str, Any]:
    """The machine, the software and the moment.  Nothing in it names a person, a host or a path."""
    flags = (cpuinfo("flags") or cpuinfo("Features")).split()
    return {
        "cpu": cpuinfo("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "family_model": f"{cpuinfo('cpu family')}/{cpuinfo('model')}",
        "cores": cores(),
        "threads": threads,
        "caches": caches(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "isa_flags": [f for f in FLAGS if f in flags],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "captum": version("captum"),
        "gradkern": version("gradkern"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": commit(),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def one_line(machine: dict[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return f"{machine['cpu']}, {machine['cores']} cores, {threads}, {machine['isa']}, torch {machine['torch']}"
