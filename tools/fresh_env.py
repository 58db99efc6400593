"""Fresh environments with a chosen Python, torch and Captum, for `tools/wheel.py` and `tools/test_matrix.py`.

An environment is named ``PYTHON/TORCH/CAPTUM``, such as ``python3.11/2.11.0/0.9.0``, where PYTHON may be a path; or it
is the path of an interpreter that has torch and Captum already, which is used as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "python3.11/2.11.0/0.9.0"
NEWEST = "python3.13/2.15.0/0.9.0"
COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++")


@dataclass(frozen=True)
class Fresh:
    """An interpreter, and what it imports."""

    python: Path
    versions: str


def folder(name: str) -> Path:
    """An argument of a command line; absolute, since commands run in another folder."""
    return Path(name).absolute()


def run(*command: object, **more: str) -> None:
    """Run a command; stop with its output if it fails."""
    done = subprocess.run(list(map(str, command)), env=os.environ | more, capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\nfailed: {' '.join(map(str, command))}")


def interpreter(name: str, work: Path) -> Path:
    """The Python of the environment of this name, which is made in ``work``, empty, unless it is there."""
    if Path(name).is_file():
        return Path(name).absolute()
    if name.count("/") < 2:
        raise SystemExit(f"{name} is neither an interpreter nor PYTHON/TORCH/CAPTUM, such as {OLDEST}")
    base, torch, captum = name.rsplit("/", 2)
    found = shutil.which(base)
    if found is None:
        raise SystemExit(f"no {base} on the PATH; name another: PYTHON/TORCH/CAPTUM, such as {OLDEST}")
    place = work / f"{Path(base).name}-{torch}-{captum}"
    if not (place / "bin" / "python").exists():
        run(found, "-m", "venv", place)
    return place / "bin" / "python"


def environment(name: str, work: Path, packages: Sequence[str] = ()) -> Fresh:
    """The environment of this name, made in ``work`` unless it is there, with ``packages``."""
    python = interpreter(name, work)
    if not Path(name).is_file():
        _, torch, captum = name.rsplit("/", 2)
        run(python, "-m", "pip", "install", "-q", f"torch=={torch}", f"captum=={captum}", "numpy", *packages)
    code = "import sys, torch, captum; print(sys.version.split()[0], torch.__version__, captum.__version__)"
    shown = subprocess.run([str(python), "-W", "ignore", "-c", code], capture_output=True, text=True, cwd="/")
    if shown.returncode:
        raise SystemExit(f"{python} cannot import torch and captum:\n{shown.stderr[-2000:]}")
    return Fresh(python, "Python {}, torch {}, Captum {}".format(*shown.stdout.split()))


def without_compilers(work: Path) -> str:
    """A PATH with everything but compilers."""
    links = work / "path"
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            if program.name.startswith(COMPILERS) or (links / program.name).exists():
                continue
            (links / program.name).symlink_to(program)
    return str(links)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
