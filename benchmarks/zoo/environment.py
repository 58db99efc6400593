"""Prepares the environment of the zoo: the project's own, seen through a path file, and the packages next to it.

python -m benchmarks.zoo.environment build/zoo
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def prepare(place: Path) -> Path:
    """Make or update the environment at ``place``; return its Python."""
    python = place / "bin" / "python"
    stamp = place / "requirements.txt"
    if stamp.exists() and stamp.read_text() == REQUIREMENTS.read_text():
        return python
    venv.create(place, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = place / "lib" / version / "site-packages" / "gradkern-environment.pth"
    path.write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(REQUIREMENTS)], check=True)
    stamp.write_text(REQUIREMENTS.read_text())
    return python


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1])))
