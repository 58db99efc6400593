"""Prepares an environment beside the project's own: that one, seen through a path file, and some packages next to it.

python -m benchmarks.environment build/zoo benchmarks/zoo/requirements.txt
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def prepare(place: Path, requirements: Path) -> Path:
    """Make or update the environment at ``place``; return its Python."""
    python, wanted = place / "bin" / "python", requirements.read_text()
    stamp = place / "requirements.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    venv.create(place, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = place / "lib" / version / "site-packages" / "gradkern-environment.pth"
    path.write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(requirements)], check=True)
    stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1]), Path(sys.argv[2])))
