"""Runs a part of the tests with the oldest and the newest Python, torch and Captum that the metadata allow.

    python tools/test_matrix.py [--in build/matrix] [PYTHON/TORCH/CAPTUM | path of an interpreter] ...

One built extension serves all of them: it is no Python module, and knows torch by its stable ABI alone.  Its sources
have to compile with the headers of each torch, too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from fresh_env import NEWEST, OLDEST, ROOT, environment, folder, say

PACKAGES = ("pytest", "hypothesis", "tqdm", "matplotlib", "zarr>=3.1", "fsspec", "click>=8.1", "safetensors", "jinja2")
#: What depends most on the versions, in a few minutes: capture, the ops, Captum's internals, the command line.
TESTS = (
    "tests/runtime/test_ops.py", "tests/frontend/test_capture.py", "tests/attr/test_captum_compat.py",
    "tests/attr/test_layers.py", "tests/test_package.py", "tests/cli/test_archives.py",
)  # fmt: skip


def check_sources(python: Path) -> bool:
    """Whether the CPU part compiles with the headers of this torch, and as C++17, which older ones ask for."""
    code = "import torch.utils.cpp_extension as c; print(*c.include_paths(), sep='\\n')"
    listed = subprocess.run([str(python), "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    folders = [f"-I{folder}" for folder in (ROOT / "csrc", *listed.stdout.split())]
    sources = [path for folder in ("csrc", "csrc/cpu") for path in sorted((ROOT / folder).glob("*.cpp"))]
    options = ("-fsyntax-only", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-w")
    return not subprocess.run(["c++", *options, *folders, *map(str, sources)]).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in", dest="work", type=folder, default=ROOT / "build" / "matrix")
    parser.add_argument("--all", action="store_true", help="all tests but the slow ones")
    parser.add_argument("environments", nargs="*", default=[OLDEST, NEWEST])
    args = parser.parse_args()
    failed = []
    for name in args.environments:
        fresh = environment(name, args.work, PACKAGES)
        say(f"== {fresh.versions}")
        command = [fresh.python, "-m", "pytest", "-q", "-m", "not slow", *(() if args.all else TESTS)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"}
        if not check_sources(fresh.python) or subprocess.run(list(map(str, command)), cwd=ROOT, env=env).returncode:
            failed.append(fresh.versions)
    if failed:
        raise SystemExit("failed with " + "; ".join(failed))


if __name__ == "__main__":
    main()
