"""Builds, links and imports the whole extension against a CUDA build of torch.  Needs a CUDA toolkit, no GPU.

    python tools/cuda_check.py [--venv .venv-cuda] [--torch torch==2.13.0]

Makes a second virtual environment (about 5 GB) the first time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = 8 << 30  # bytes of disk for the environment and the build
PACKAGES = ("setuptools>=64", "wheel", "ninja", "numpy", "tqdm", "packaging", "matplotlib", "captum>=0.9")
LOOK = """
import torch
from gradkern.runtime import ops
c = ops.extension()
assert c is not None and c.has_cuda(), "the extension has no CUDA part"
for op in ("chain_forward", "chain_vjp", "content_hash", "rescale"):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gradkern::{op}", key), (op, key)
x = torch.randn(5, 4)
import gradkern
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()
assert gradkern.jacobian(model, x, engine="kernel").shape == (5, 3, 4)
print(f"imported with torch {torch.__version__}: CUDA ops registered, CPU kernels run ({c.isa()})")
"""


def toolkit() -> Path:
    """The folder of a whole CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    linked = Path(nvcc).resolve().parent.parent if nvcc else None
    for home in (os.environ.get("CUDA_HOME"), linked, "/usr/local/cuda"):
        if home and Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime.h").exists():
            return Path(home)
    raise SystemExit("cuda-check: no CUDA toolkit found. Set CUDA_HOME to one.")


def torch_cuda(python: Path) -> str:
    """The CUDA version of the environment's torch; empty without one."""
    code = "import torch; print(torch.version.cuda or '')"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, cwd="/")
    return done.stdout.strip() if done.returncode == 0 else ""


def run(*command: str | Path, **more: str) -> None:
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=os.environ | more)
    if done.returncode:
        raise SystemExit(f"cuda-check: failed: {' '.join(map(str, command))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-cuda")
    parser.add_argument("--torch", default="torch==2.13.0")
    parser.add_argument("--keep", type=Path, help="a folder for the compiled extension, for tools/gpu.sh")
    args = parser.parse_args()
    home, python = toolkit(), args.venv / "bin" / "python"
    if not python.exists():
        free = shutil.disk_usage(ROOT).free
        if free < NEEDED:
            raise SystemExit(f"cuda-check: {free >> 30} GiB of disk are free, {NEEDED >> 30} are needed.")
        venv.create(args.venv, with_pip=True)
    if not torch_cuda(python):
        print(f"cuda-check: installing {args.torch} with CUDA (several GB)", flush=True)
        # --isolated: a package source that is set up for CPU builds would be preferred otherwise.
        run(python, "-m", "pip", "--isolated", "install", "-q", *args.torch.split())
        if not torch_cuda(python):
            raise SystemExit("cuda-check: the package index gave a torch without CUDA.")
    run(python, "-m", "pip", "install", "-q", *PACKAGES)
    library = ROOT / "build" / "cuda-check"
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")
    print(f"cuda-check: building for {arch} with torch for CUDA {torch_cuda(python)} and {home}", flush=True)
    flags = {"CUDA_HOME": str(home), "GRADKERN_REQUIRE_EXT": "1", "TORCH_CUDA_ARCH_LIST": arch}
    log = ROOT / "build" / "cuda-check.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as out:
        command = [
            str(python),
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            str(library),
            "--build-temp",
            f"{library}.tmp",
        ]
        built = subprocess.run(command, cwd=ROOT, env=os.environ | flags, stdout=out, stderr=subprocess.STDOUT)
    if built.returncode:
        sys.stderr.write(log.read_text()[-6000:])
        raise SystemExit(f"cuda-check: the extension did not build; the whole log: {log.relative_to(ROOT)}")
    for source in (ROOT / "gradkern").rglob("*.py"):
        target = library / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    done = subprocess.run([str(python), "-c", LOOK], cwd="/", env=os.environ | {"PYTHONPATH": str(library)})
    if done.returncode:
        raise SystemExit("cuda-check: the extension was built but cannot be used.")
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
        for extension in (library / "gradkern").glob("_C*.so"):
            print(f"cuda-check: kept {shutil.copy(extension, args.keep)}")


if __name__ == "__main__":
    main()
