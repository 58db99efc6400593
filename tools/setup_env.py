"""Prepares the virtual environment that the Makefile's targets run in.  Standard library only.

    python tools/setup_env.py --venv .venv --torch torch==2.13.0 [--reuse-torch] [--extras demo]

Does nothing, in a few milliseconds, where the environment is as asked for; extras that are missing are added to those
that are there.  It never installs a torch that drags in
gigabytes of CUDA packages on a machine without an NVIDIA GPU: it looks at what pip would fetch first.  A torch that
is already importable in ``--venv`` is kept; ``--reuse-torch`` makes the one of the running Python importable there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 11)
EXTRAS = ("demo", "data", "ray", "bench", "plot", "dev", "docs", "release")
BY_DEFAULT = [name for name in EXTRAS if name not in ("docs", "release")]
PIP_ENV = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "PIP_NO_INPUT": "1"}


def say(text: str) -> None:
    print(f"[env] {text}", flush=True)


def stop(text: str) -> None:
    raise SystemExit(f"[env] {text}")


def pip(python: Path, *args: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs pip quietly: errors alone are printed."""
    command = [str(python), "-m", "pip", "install", "-qq", *args]
    return subprocess.run(command, env=os.environ | PIP_ENV, text=True, capture_output=capture, cwd=ROOT)


def torch_version(python: Path) -> str | None:
    """The version of the torch that ``python`` imports, None without one."""
    code = "import torch; print(torch.__version__)"
    result = subprocess.run([str(python), "-c", code], text=True, capture_output=True, cwd=ROOT / "tools")
    return result.stdout.strip() if result.returncode == 0 else None


def create(venv: Path) -> None:
    say(f"creating {venv} with Python {sys.version.split()[0]}")
    result = subprocess.run([sys.executable, "-m", "venv", str(venv)], text=True, capture_output=True)
    if result.returncode != 0:
        shutil.rmtree(venv, ignore_errors=True)
        detail = (result.stdout + result.stderr).strip()
        stop(f"python -m venv failed:\n{detail}\n[env] On Debian and Ubuntu: apt-get install python3-venv python3-dev")


def share_packages(python: Path, venv: Path) -> None:
    """Makes the packages of the running Python importable in ``venv``, after the venv's own.

    A path file does it for any Python; ``--system-site-packages`` would skip those of a virtual environment.
    """
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([str(python), "-c", code], text=True, capture_output=True, check=True).stdout.strip()
    Path(own, "gradkern-shared-packages.pth").write_text("\n".join(folders) + "\n")
    if torch_version(python) is None:
        stop(f"asked to reuse torch, but {sys.executable} cannot import it. Give PYTHON=... one that can, or leave it.")


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def cuda_packages(python: Path, torch: list[str]) -> list[str]:
    """The CUDA packages that installing ``torch`` would fetch, by pip's own dry run."""
    result = pip(python, "--dry-run", "--report", "-", *torch, capture=True)
    if result.returncode != 0:
        stop(f"pip cannot find {' '.join(torch)}:\n{result.stderr.strip()}")
    names = [item["metadata"]["name"].lower() for item in json.loads(result.stdout)["install"]]
    return [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def install_torch(python: Path, torch: list[str], asked: bool) -> None:
    if not asked and not has_nvidia_gpu() and (extra := cuda_packages(python, torch)):
        stop(
            f"{' '.join(torch)} would bring {len(extra)} CUDA packages (several GB), and no NVIDIA GPU is seen here.\n"
            "[env] For the CPU build, point pip at PyTorch's CPU index (PIP_EXTRA_INDEX_URL, or in TORCH itself:\n"
            "[env]   make test TORCH='torch==2.13.0+cpu --extra-index-url <the CPU index named on pytorch.org>'),\n"
            "[env] reuse a torch you have (make test PYTHON=/its/python REUSE_TORCH=1, or VENV=/path/to/venv),\n"
            f"[env] or accept the packages by asking for them: make test TORCH='{' '.join(torch)}'"
        )
    say(f"installing {' '.join(torch)}")
    if pip(python, *torch).returncode != 0:
        stop(f"pip could not install {' '.join(torch)}; its message is above.")


def install_package(python: Path, venv: Path, version: str, extras: Sequence[str]) -> None:
    """gradkern itself in editable mode without its extension (the Makefile builds that), and its dependencies."""
    package = f".[{','.join(extras)}]"
    say(f"installing the dependencies of gradkern{package[1:]} (minutes, the first time)")
    keep = venv / "gradkern-constraints.txt"
    keep.write_text(f"torch=={version}\n")  # nothing may replace the torch that is there
    os.environ["GRADKERN_BUILD_EXT"] = "0"
    build = pip(python, "setuptools>=64", "wheel", "ninja")
    rest = build.returncode or pip(python, "--no-build-isolation", "-c", str(keep), "-e", package).returncode
    if rest != 0:
        stop("pip could not install the dependencies; its message is above.")


def extras_in(done: Path) -> set[str]:
    """The extras that an earlier run installed."""
    lines = done.read_text().splitlines() if done.exists() else []
    return {name for line in lines if line.startswith("extras ") for name in line.split()[1:]}


def write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--torch", required=True, help="what to hand to pip for torch")
    parser.add_argument("--torch-asked", action="store_true", help="the user chose --torch: do not question its size")
    parser.add_argument("--reuse-torch", action="store_true", help="use the torch of the Python that runs this")
    parser.add_argument(
        "--extras", nargs="+", choices=EXTRAS, default=BY_DEFAULT, help="default: all but docs and release"
    )
    args = parser.parse_args()

    venv = args.venv.absolute()
    python = venv / "bin" / "python"
    recipe = [(ROOT / "pyproject.toml").read_text(), Path(__file__).read_text(), args.torch, str(args.reuse_torch)]
    key = hashlib.sha256("\0".join([str(ROOT), *recipe]).encode()).hexdigest()
    done, marker = venv / "gradkern-env.txt", ROOT / "build" / "env.txt"
    there = extras_in(done) if python.exists() else set()
    extras = [name for name in EXTRAS if name in there | set(args.extras)]
    if not (done.exists() and done.read_text().startswith(key) and there >= set(args.extras)):
        if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything has checked
            stop(f"got Python {sys.version.split()[0]}, 3.11 or newer is needed. Name one: make test PYTHON=python3.11")
        if not python.exists():
            create(venv)
        if args.reuse_torch:
            share_packages(python, venv)
        version = torch_version(python)
        if version is None or (args.torch_asked and not args.reuse_torch):
            install_torch(python, args.torch.split(), args.torch_asked)
            version = torch_version(python)
        if version is None:
            stop(f"{python} cannot import torch after installing {args.torch}. Remove {venv} and try again.")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
            stop(f"torch {version} is too old: gradkern needs 2.11 or newer.")
        install_package(python, venv, version, extras)
        done.write_text(f"{key}\n{python}\ntorch {version}\nextras {' '.join(extras)}\n")
        say(f"ready: torch {version} in {venv}")
    # The extension is rebuilt when this changes: another environment or another torch, not more packages.
    write_if_changed(marker, "".join(done.read_text().splitlines(keepends=True)[:3]))


if __name__ == "__main__":
    main()
