"""The Python on the documentation pages runs as it stands, and prints what the pages say it prints."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import tables
from gradkern.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/captum.md",
    "docs/jacobians.md",
    "docs/datasets.md",
    "docs/sequences.md",
    "docs/kernels.md",
]
#: Pages whose Python is instructions for changing gradkern; tests/test_recipes.py follows them.
INSTRUCTIONS = {"docs/recipes.md"}
GIVEN = {"docs/index.md": "import torch; net = torch.nn.Linear(4, 2).eval(); x = torch.randn(8, 4)"}

ALL_PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LANGUAGES = {"python", "sh", "cpp", "", "{eval-rst}", "{toctree}"}  # of blocks; Python by any other name would not run
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"`((?:make|gradkern|python|pip) [^`\n]*)`")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PRINTS = re.compile(r"^print\(.*\) +# (.*)$", re.MULTILINE)


@pytest.mark.filterwarnings("error:.*is now:DeprecationWarning")  # no page uses an old name
@pytest.mark.parametrize("page", PAGES)
def test_snippets_run_and_print_what_is_written(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page} has no Python on it"
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(GIVEN.get(page, ""), namespace)
    for block in blocks:
        line = text[: block.start(1)].count("\n")  # so that a traceback names the page's own line
        exec(compile("\n" * line + block[1], str(ROOT / page), "exec"), namespace)
        printed = capsys.readouterr().out
        for expected in PRINTS.findall(block[1]):
            assert expected in printed.splitlines(), f"{page}:{line + 1}: {expected!r} is not in what was printed"


def test_measured_tables_are_what_the_results_say():
    assert tables.main(["--check"]) == 0


def test_names_in_backticks_stand_in_the_code():
    suffixes = {".py", ".cpp", ".h", ".cuh", ".cu", ".json", ".toml"}
    folders = [ROOT / name for name in ("gradkern", "csrc", "benchmarks", "tests", "tools")]
    files = [ROOT / "pyproject.toml", *(f for folder in folders for f in folder.rglob("*") if f.suffix in suffixes)]
    words = {word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
    for page in ("architecture", "recipes", "performance", "kernels", "datasets"):
        prose = re.sub(r"^```.*?^```", "", (ROOT / f"docs/{page}.md").read_text(encoding="utf-8"), flags=re.M | re.S)
        for name in re.findall(r"`([A-Za-z][\w.]*)(?:\(\))?`", prose):
            assert set(re.findall(r"\w+", name)) <= words, f"docs/{page}.md: {name}"


def test_every_page_with_python_is_run():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    with_python = {p.relative_to(ROOT).as_posix() for p in pages if BLOCK.search(p.read_text(encoding="utf-8"))}
    assert with_python - INSTRUCTIONS == set(PAGES)
    for page in ALL_PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert set(re.findall(r"^ *```(.*)$", text, flags=re.MULTILINE)) <= LANGUAGES, page
        outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        assert len(re.findall(r"^# |^==+$|^--+$", outside, flags=re.MULTILINE)) == 1, f"{page} needs one title"


@pytest.mark.parametrize("page", ALL_PAGES)
def test_commands_exist_with_the_options_that_they_are_given(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = "\n".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    rules = re.findall(r"^([a-z][\w -]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for line in [*lines, *COMMAND.findall(text)]:
        program, *words = shlex.split(line, comments=True) or [""]
        if program == "make":
            assert {w for w in words if "=" not in w} <= targets, line
        elif program == "gradkern":
            assert words[0].startswith("-") or words[0] in main.commands, line
            command = main.commands.get(words[0], main)
            options = {"--help", *(o for p in [*main.params, *command.params] for o in (*p.opts, *p.secondary_opts))}
            assert {w for w in words if w.startswith("--")} <= options, line
        elif program == "python":
            assert find_spec(words[1]) if words[0] == "-m" else (ROOT / words[0]).exists(), line
        elif program == "pip":
            named = ",".join(re.findall(r"\[([\w,]+)\]", line))
            assert set(filter(None, named.split(","))) <= set(extras), line


@pytest.mark.parametrize("page", [p for p in ALL_PAGES if p not in {"docs/zoo.md", "CHANGELOG.md"}])
def test_prose_is_wrapped_and_has_no_stray_lines(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in prose.splitlines():
        assert len(line) <= 125 or line.startswith("|"), line
        assert not re.fullmatch(r"[=-]+|\w", line), line
    assert text.endswith("\n")


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if "://" in place or place.startswith("mailto:"):
            continue
        file = (ROOT / page).parent / place if place else ROOT / page
        assert file.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in slugs, f"{page} links to {target}, which has no such heading"
