"""The package as people meet it: importing it, its version, its help, what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gradkern
from gradkern.codegen.machine import NoKernels
from gradkern.runtime import ops, versions


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def test_importing_it_and_its_help_load_no_torch() -> None:
    code = "import sys, gradkern, gradkern.cli.main; print('torch' in sys.modules)"
    assert run("-c", code).strip() == "False"
    assert "maps.zarr" in run("-m", "gradkern", "--help")


def test_every_public_name_is_there() -> None:
    for name in [*gradkern.__all__, "attr", "plot"]:
        assert getattr(gradkern, name) is getattr(gradkern, name)
        assert name in dir(gradkern)
    for name in ("attr", "data", "kernels", "plot"):  # in a process that has imported no other
        assert run("-c", f"import gradkern; print(gradkern.{name}.__name__)").strip() == f"gradkern.{name}"
    with pytest.raises(AttributeError, match="no attribute 'jacobien'"):
        gradkern.jacobien  # noqa: B018


def test_versions_for_a_bug_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADKERN_SOMETHING", "1")
    gradkern.show_versions()
    shown = capsys.readouterr().out
    for name in ("python", "torch", "captum", "kernels", "threads", "GPUs", "GRADKERN_SOMETHING"):
        assert f"\n{name} " in f"\n{shown}"
    monkeypatch.setattr(ops, "machine", NoKernels)
    assert versions._kernels() == "no compiled extension"
    assert run("-m", "gradkern", "--version") == f"gradkern, version {gradkern.__version__}\n"


def test_a_checkout_that_hides_the_installed_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops._way_out() == ops.HOW_TO_BUILD
    (tmp_path / "gradkern").mkdir()
    (tmp_path / "gradkern" / "_C.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert str(tmp_path / "gradkern") in ops._way_out()
    assert "start Python in another folder" in ops._way_out()
