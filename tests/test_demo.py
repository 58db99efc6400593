"""The demo runs from end to end, in its quick form."""

from __future__ import annotations

import runpy
from pathlib import Path

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def test_demo_runs_and_writes_its_report(tmp_path, capsys):
    path = runpy.run_path(str(DEMO))["main"](["--quick", "--out", str(tmp_path / "report.html")])
    printed = capsys.readouterr().out
    page = path.read_text(encoding="utf-8")
    assert str(path) in printed
    assert printed.count("10 most important features per class") == 2
    assert page.count("data:image/png") == 6
    assert page.count("data:image/svg+xml") == 4
    differences = [
        float(line.split(":")[1].split()[0]) for line in printed.splitlines() if "largest difference" in line
    ]
    assert len(differences) == 2
    assert all(difference < 1e-5 for difference in differences)
