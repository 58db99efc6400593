"""The Python on the documentation pages runs as it stands, and prints what the pages say it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/captum.md", "docs/jacobians.md", "docs/datasets.md", "docs/sequences.md"]

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PRINTS = re.compile(r"^print\(.*\) +# (.*)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run_and_print_what_is_written(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page} has no Python on it"
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")  # so that a traceback names the page's own line
        exec(compile("\n" * line + block[1], str(ROOT / page), "exec"), namespace)
        printed = capsys.readouterr().out
        for expected in PRINTS.findall(block[1]):
            assert expected in printed.splitlines(), f"{page}:{line + 1}: {expected!r} is not in what was printed"


def test_measured_tables_are_what_the_results_say():
    assert tables.main(["--check"]) == 0
