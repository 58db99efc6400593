"""What a machine with a GPU is given to run: two parts of at most eight minutes, the first without Captum."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import cuda_gate, validated

ROOT = Path(__file__).resolve().parents[2]
MOST = 480  # seconds
WITHOUT = """
import sys
for name in ("captum", "pytest", "hypothesis", "jax"):
    sys.modules[name] = None
import tests.gpu.smoke, benchmarks.gpu_records, benchmarks.gpu
"""


def steps(part: str, folder: Path) -> dict[str, int]:
    environment = os.environ | {"DRY_RUN": "1", "OUT": str(folder), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu.sh"), part], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return {name: int(limit) for name, limit in re.findall(r"^step (\w+) (\d+)", done.stdout, re.M)}


@pytest.mark.parametrize(
    ("part", "names"),
    [("1", ["build", "smoke", "records", "own"]), ("2", ["tests", "memcheck", "racecheck", "peers"])],
)
def test_each_part_takes_at_most_eight_minutes(part: str, names: list[str], tmp_path: Path) -> None:
    found = steps(part, tmp_path)
    assert list(found) == names
    assert sum(found.values()) <= MOST


def test_the_first_part_needs_no_captum() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_gate_compiles_what_setup_builds() -> None:
    setup = (ROOT / "setup.py").read_text()
    found = cuda_gate.targets(setup)
    assert [name for group in found for name in group] == ["80", "86", "89", "90", "100", "120"]
    assert ("100",) in cuda_gate.targets('ARCHITECTURES = ("9.0", "10.0")')
    with pytest.raises(SystemExit, match="ARCHITECTURES"):
        cuda_gate.targets("")
    builds = next(
        x for x in ast.walk(ast.parse(setup)) if isinstance(x, ast.Call) and "TORCH_CUDA_ARCH_LIST" in ast.dump(x)
    )
    assert "ARCHITECTURES" in ast.dump(builds)


def test_the_table_takes_what_both_parts_have_passed(tmp_path: Path) -> None:
    assert "passed1 is missing" in validated.passed(tmp_path, "abc")
    (tmp_path / "passed1").write_text("abc\n")
    (tmp_path / "passed2").write_text("abd\n")
    assert "passed2 is of other kernels" in validated.passed(tmp_path, "abc")
    (tmp_path / "passed2").write_text("abc\n")
    assert validated.passed(tmp_path, "abc") is None
    assert validated.added({"sm_90": {"gpu": "old"}}, "sm_90", {"gpu": "new"}) == {"sm_90": {"gpu": "new"}}
    assert list(validated.added({"sm_90": {}}, "sm_80", {})) == ["sm_80", "sm_90"]


def test_an_edited_kernel_has_another_fingerprint(tmp_path: Path, monkeypatch) -> None:
    before = validated.sources_fingerprint()
    for path in (ROOT / "csrc").glob("*.h"):
        (tmp_path / "csrc" / "cuda").mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / path.name).write_bytes(path.read_bytes())
    for path in (ROOT / "csrc" / "cuda").iterdir():
        (tmp_path / "csrc" / "cuda" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert validated.sources_fingerprint() == before
    edited = tmp_path / "csrc" / "cuda" / "quads.cuh"
    edited.write_text(edited.read_text() + "\n")
    assert validated.sources_fingerprint() != before
