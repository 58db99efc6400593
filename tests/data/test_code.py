"""A method of the caller's own is known by its code: an edit anywhere that it uses is noticed, and nothing else is."""

from __future__ import annotations

import importlib
import linecache
import sys

import pytest
import torch
from torch import nn

from gradkern.data import methods
from gradkern.data.runs import fingerprint
from gradkern.data.runs.code import class_lines, code_text
from gradkern.data.runs.settings import Settings

MAIN = """
import functools
from dataclasses import dataclass
import torch
import helpers
import pack.deep
from helpers import imported, Base
from pack import inner

FACTOR, NOT_USED = 1.0, 5
WEIGHTS, TABLE = [1, 2], {"a": lambda x: x + 1}
TENSOR = torch.ones(3)

def plain(x, factor=1, *, more=2): return helper(x) * factor * FACTOR
def helper(x): return x
def elsewhere(x): return helpers.scale(x)
def deeper(x): return pack.deep.scale(x) + imported(x)
def late(x):
    from pack.late import scale
    return scale(x)
def tables(x): return TABLE["a"](x) * WEIGHTS[0] * TENSOR
def outer(a, b, c):
    def one(x): return x * a * b
    def two(x): return x * c
    return lambda x: one(x) + two(x)
closure = outer(2, 3, 2)
split = functools.cache(
    lambda x: helper(
        x + 1
    )
)
part = functools.partial(lambda x, k: x * k, k=2)
def decorated(f):
    @functools.wraps(f)
    def wrapper(x): return f(x) * 2
    return wrapper
@decorated
def wrapped(x): return x
@dataclass(slots=True)
class Slotted:
    k: int = 1
    def __call__(self, x): return x * self.k
slotted = Slotted()
class Child(Base):
    @property
    def k(self): return helper(2)
    def __call__(self, x): return self.scaled(x) * self.k
child = Child()
def relative(x): return inner.scale(x)
"""
FILES = {
    "main_of_test.py": MAIN,
    "helpers.py": "def scale(x): return x\ndef imported(x): return x\n"
    "class Base:\n    def scaled(self, x): return x * 3\ndef not_used(): return 1\n",
    "pack/__init__.py": "",
    "pack/inner.py": "def scale(x):\n    from .late import scale as s\n    return s(x)\n",
    "pack/deep.py": "def scale(x): return x * 4\n",
    "pack/late.py": "def scale(x): return x * 5\n",
}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Import the files anew, with an edit, and give the text of an object in the first one."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "pack").mkdir()

    def forget():
        for name in [n for n in sys.modules if n.partition(".")[0] in ("main_of_test", "helpers", "pack")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        linecache.clearcache()

    def read(name: str, file: str = "", before: str = "", after: str = "") -> str:
        assert before in FILES.get(file, "")
        for path, text in FILES.items():
            (tmp_path / path).write_text(text.replace(before, after) if path == file else text)
        forget()
        return code_text(getattr(importlib.import_module("main_of_test"), name))

    yield read
    forget()


HERE = "main_of_test.py"


@pytest.mark.parametrize(
    ("name", "file", "before", "after"),
    [
        ("plain", HERE, "factor=1", "factor=3"),
        ("plain", HERE, "more=2", "more=3"),
        ("plain", HERE, "FACTOR, NOT_USED = 1.0", "FACTOR, NOT_USED = 2.0"),
        ("plain", HERE, "def helper(x): return x", "def helper(x): return -x"),
        ("elsewhere", "helpers.py", "def scale(x): return x", "def scale(x): return -x"),
        ("deeper", "pack/deep.py", "x * 4", "x * 5"),
        ("deeper", "helpers.py", "def imported(x): return x", "def imported(x): return -x"),
        ("late", "pack/late.py", "x * 5", "x * 6"),
        ("relative", "pack/late.py", "x * 5", "x * 6"),
        ("tables", HERE, "x + 1}", "x + 2}"),
        ("tables", HERE, "[1, 2]", "[1, 3]"),
        ("tables", HERE, "torch.ones(3)", "torch.ones(3) * 2"),
        ("closure", HERE, "outer(2, 3, 2)", "outer(2, 3, 3)"),
        ("closure", HERE, "return x * c", "return x + c"),
        ("split", HERE, "        x + 1", "        x + 2"),
        ("split", HERE, "def helper(x): return x", "def helper(x): return -x"),
        ("part", HERE, "k=2)", "k=3)"),
        ("part", HERE, "x * k, k", "x + k, k"),
        ("wrapped", HERE, "f(x) * 2", "f(x) * 3"),
        ("wrapped", HERE, "def wrapped(x): return x", "def wrapped(x): return -x"),
        ("slotted", HERE, "Slotted()", "Slotted(2)"),
        ("child", "helpers.py", "x * 3", "x * 4"),
        ("child", HERE, "def helper(x): return x", "def helper(x): return -x"),
    ],
)
def test_an_edit_of_what_a_method_uses_is_noticed(read, name, file, before, after):
    assert read(name, file, before, after) != read(name)


def test_an_edit_of_anything_else_is_not(read):
    for name in ("plain", "elsewhere", "deeper", "closure", "tables"):
        first = read(name)
        assert first == read(name, HERE, "NOT_USED = 1.0, 5", "NOT_USED = 1.0, 6"), name
        assert first == read(name, "helpers.py", "return 1", "return 2"), name
    assert "torch" not in read("tables").replace("torch.float32", "")


def test_what_changes_while_a_method_runs_is_a_state(monkeypatch):
    """Counters and lists of what was seen are not the code; what a run leaves as it is counts."""
    seen, table, buffer = [0], [1.0, 2.0], torch.zeros(2)

    def method(batch):
        seen[0] += 1
        buffer.add_(1)
        return batch * table[0]

    monkeypatch.setitem(methods.METHODS, "counting", method)
    settings, codes = Settings("counting"), []
    for _ in range(2):
        before = fingerprint.code_before(nn.ReLU(), settings)
        method(1.0)
        codes.append(fingerprint.of_code("counting", None, before))
    table[0] = 3.0
    codes.append(fingerprint.of_code("counting", None, fingerprint.code_before(nn.ReLU(), settings)))
    assert codes[0] == codes[1] != codes[2]


def test_the_code_of_a_model_that_is_not_captured_counts(monkeypatch):
    """Its weights do not show an edit, nor does a graph."""

    class Own(nn.Linear):
        def forward(self, x):
            return FACTOR * super().forward(x)

    model = nn.Sequential(Own(2, 2), nn.ReLU())
    before = fingerprint.of_model(model, None)
    assert before == fingerprint.of_model(model, None)
    assert not any("class ReLU" in line for line in class_lines(model))
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert fingerprint.of_model(model, None)["graph"] != before["graph"]


FACTOR = 1.0
