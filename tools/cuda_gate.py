"""Compiles the CUDA kernels and looks at what came out.  Needs nvcc, no GPU and no torch.

    python tools/cuda_gate.py [--nvcc PATH] [--jobs 2]

Fails where a kernel does not compile for the architectures that setup.py builds for, where the compiler warns, where a
function spills registers (a kernel may keep a few numbers of its own while it calls others), where a kernel file
reaches a header of torch, and where setup.py compiles by another standard.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = re.compile(r"#\s*include\s*[<\"](torch/|ATen/|c10/|pybind11/|Python\.h)")
# What is compiled together: most of the time goes into PTX, which is the same for architectures of one generation.
Targets = tuple[str, ...]
STANDARD = "-std=c++20"
#: Bytes that a kernel which only calls functions may keep of its own while they run: once per call, not in a loop.
CALLS = 96
FLAGS = ("-O3", STANDARD, "-Xptxas", "-v", "-Werror", "all-warnings")


def find_nvcc() -> str | None:
    """nvcc on the PATH, in CUDA_HOME or in its usual place."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return shutil.which("nvcc") or (str(home) if home.exists() else None)


def reached(source: Path) -> list[Path]:
    """The file and every header of this repository that it includes."""
    files, todo = [], [source]
    while todo:
        path = todo.pop()
        if path in files:
            continue
        files.append(path)
        for name in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text()):
            for base in (path.parent, ROOT / "csrc"):
                if (base / name).exists():
                    todo.append((base / name).resolve())
                    break
    return files


def targets(setup: str) -> list[Targets]:
    """The architectures that setup.py builds for, ``("80", "86", "89"), ("90",), …``."""
    found = re.search(r"^ARCHITECTURES = (\(.*\))$", setup, re.M)
    if found is None:
        raise SystemExit("tools/cuda_gate.py: setup.py has no line ARCHITECTURES = (...)")
    names = [name.replace(".", "") for name in ast.literal_eval(found.group(1))]
    return [tuple(group) for _, group in groupby(names, key=lambda name: name[:-1])]


def spilled(text: str) -> dict[str, int]:
    """Bytes that each function spills, the most of its architectures, in what ptxas says."""
    most: dict[str, int] = {}
    pattern = r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    for function, stores, loads in re.findall(pattern, text):
        most[function] = max(most.get(function, 0), int(stores), int(loads))
    return most


def check(nvcc: str, source: Path, targets: Targets, folder: Path) -> tuple[str, list[str]]:
    """One line of facts, and what is wrong."""
    out = folder / f"{source.stem}.{targets[0]}.o"
    codes = [x for t in targets for x in ("-gencode", f"arch=compute_{targets[0]},code=sm_{t}")]
    command = [nvcc, *FLAGS, *codes, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    wrong = []
    if done.returncode:
        wrong.append(f"does not compile:\n{text}")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    functions = spilled(text)
    for function, size in functions.items():
        if size > CALLS * (f"entry function '{function}'" in text and len(functions) > 1):
            wrong.append(f"{function} spills {size} bytes: use fewer registers or threads")
    name = f"{source.relative_to(ROOT)} {' '.join(f'sm_{t}' for t in targets)}"
    return f"{name}: {max(registers, default=0)} registers, {sum(functions.values())} bytes spilled", [
        f"{name}: {w}" for w in wrong
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", default=find_nvcc())
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    wrong = [
        f"{path.relative_to(ROOT)} includes a header of torch; kernels know nothing of it"
        for path in sorted({p for source in sources for p in reached(source)})
        if TORCH.search(path.read_text())
    ]
    setup = (ROOT / "setup.py").read_text()
    nvcc_flags = re.search(r"^NVCC_FLAGS = .*$", setup, re.M)
    if nvcc_flags is None or f'"{STANDARD}"' not in nvcc_flags.group():
        wrong.append(f"setup.py gives nvcc no {STANDARD} in NVCC_FLAGS: torch would choose another standard")
    if args.nvcc is None:
        print(f"nvcc not found: {len(sources)} CUDA kernel files NOT compiled")
    else:
        work = [(s, t) for s in sources for t in targets(setup)]
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
            for line, problems in pool.map(lambda w: check(args.nvcc, *w, Path(folder)), work):
                print(line, flush=True)
                wrong += problems
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
