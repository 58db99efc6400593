"""The table of GPU architectures on which gradkern's CUDA kernels have passed `make gpu`.

python -m tools.validated build/gpu      adds this machine's GPU, if both parts passed with the kernels that are here
python -m tools.validated --fingerprint  prints the fingerprint of these kernels
python -m tools.validated --fits         succeeds if the compiled extension was built from these sources
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("passed1", "passed2")  # files that tools/gpu.sh leaves, with the fingerprint of what passed


def sources_fingerprint() -> str:
    """What setup.py compiles into the extension."""
    text = (ROOT / "setup.py").read_text()
    tree = ast.parse(text)
    function = next(x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "fingerprint")
    names: dict[str, Any] = {"hashlib": hashlib, "Path": Path}
    exec(ast.get_source_segment(text, function), names)
    return names["fingerprint"]()


def added(table: dict[str, Any], architecture: str, entry: dict[str, str]) -> dict[str, Any]:
    """The table with an entry for an architecture, in place of one that is there."""
    return dict(sorted({**table, architecture: entry}.items()))


def passed(folder: Path, fingerprint: str) -> str | None:
    """Why the two parts in ``folder`` do not count for kernels with this fingerprint; None if they do."""
    for name in PARTS:
        path = folder / name
        if not path.exists():
            return f"{name} is missing: that part of make gpu has not passed"
        if path.read_text().strip() != fingerprint:
            return f"{name} is of other kernels: run both parts again"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the logs of make gpu are")
    parser.add_argument("--fingerprint", action="store_true")
    parser.add_argument("--fits", action="store_true")
    args = parser.parse_args()

    import torch

    from gradkern.codegen.machine import Device
    from gradkern.runtime import ops, validation

    if args.fits:
        compiled = ops.extension().cuda_fingerprint() if ops.extension() else None
        raise SystemExit(0 if compiled == sources_fingerprint() else f"the extension is of other sources: {compiled}")
    if args.fingerprint:
        print(ops.cuda_fingerprint())
        return
    if args.folder is None:
        parser.error("name the folder with the logs of make gpu")
    reason = passed(args.folder, ops.cuda_fingerprint())
    machine = ops._machine(torch.device("cuda", 0))
    if reason is None and not isinstance(machine, Device):
        reason = machine.reason
    if reason is not None:
        raise SystemExit(f"tools.validated: nothing was added to the table: {reason}")
    entry = {
        "fingerprint": ops.cuda_fingerprint(),
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    table = added(json.loads(validation.TABLE.read_text()), machine.architecture, entry)
    for path in (validation.TABLE, args.folder / validation.TABLE.name):
        path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"validated: {machine.architecture}, {entry['gpu']}; commit {validation.TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
