"""A store from anyone: reading it, and reporting on it, runs nothing, prints nothing but text, and asks for no more
memory than its files are worth."""

from __future__ import annotations

import html.parser
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from gradkern.cli.main import main
from gradkern.data import open_store, verify
from gradkern.util.options import BadValue
from gradkern.util.untrusted import check_array, plain

STORES = Path(__file__).parents[1] / "data" / "stores"
ROOT = Path(__file__).parents[2]
RECORD = "chunks/finished/03.00000000.npz"
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e<script>alert(1)</script>\" onload='x' $\\frac{ $x$ & \r\nforged"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    shutil.copytree(STORES / "finished.zarr", tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


def call(*words: object, code: int | None = 0) -> Any:
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert code is None or done.exit_code == code, done.output
    return done


def change(store: Path, name: str, edit: Callable[[Any], Any]) -> None:
    content = json.loads((store / name / "zarr.json").read_text())
    edit(content)
    (store / name / "zarr.json").write_text(json.dumps(content))


def change_attributes(store: Path, edit: Callable[[Any], Any]) -> None:
    change(store, "", lambda content: edit(content["attributes"]["gradkern"]))


def strings(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all strings in nested dicts and lists."""
    if isinstance(value, str):
        return [place]
    inner = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    return [p for key, v in inner for p in strings(v, (*place, key))]


def put(content: Any, place: tuple[Any, ...], value: Any) -> None:
    for step in place[:-1]:
        content = content[step]
    content[place[-1]] = value


# ---------------------------------------------------------------------------------------------------------------
# What the store names is not loaded


@pytest.mark.parametrize("model", ["os:abort", "helper:build", "maps.zarr/net.pt2", "net.pt"])
def test_a_report_loads_nothing_that_the_store_names(model: str, store: Path, monkeypatch: Any) -> None:
    (store.parent / "helper.py").write_text(f"open({str(store / 'canary')!r}, 'w')")
    monkeypatch.chdir(store.parent)
    made_by = {"model": model, "weights": "net.pt", "source": "x.pt", "columns": HOSTILE, "cast": "load"}
    change_attributes(store, lambda about: about.update(made_by=made_by))
    done = call("report", store)
    assert f"--model {model} --source x.pt" in done.stderr
    assert "if you trust these files" in done.stderr
    assert not (store / "canary").exists()


def test_what_the_store_says_about_reading_is_checked(store: Path) -> None:
    change_attributes(store, lambda about: about.update(made_by={"source": "x.npy", "cast": "load"}))
    done = call("report", store, "--source", STORES / "x.npy", code=1)
    assert "got 'load', expected float32 or float64" in done.stderr


# ---------------------------------------------------------------------------------------------------------------
# Strings


class Tags(html.parser.HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attrs} | {(tag, "")}


def tags(path: Path) -> set[tuple[str, str]]:
    parser = Tags()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.found


def test_every_string_is_shown_and_never_obeyed(store: Path) -> None:
    about = json.loads((store / "zarr.json").read_text())["attributes"]["gradkern"]
    places = [p for p in strings(about) if p[0] not in ("inputs", "reductions", "arrays")]
    places += [("made_by", name) for name in ("model", "source", "columns")] + [("notes", 0)]
    call("report", store, "--out", store.parent / "before.html")

    def edit(about: Any) -> None:
        about |= {"made_by": {}, "exact": False, "notes": [""], "tolerance": 1e-4}
        for place in places:
            put(about, place, HOSTILE)
        about["fingerprint"]["source"]["dtypes"] = [HOSTILE]
        about["pinned"][HOSTILE] = about["fingerprint"]["model"][HOSTILE] = HOSTILE

    change_attributes(store, edit)
    page = store.parent / "page.html"
    for words in (("info", store), ("info", store, "--json"), ("report", store, "--out", page, "--title", HOSTILE)):
        output = call(*words).output
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", output), repr(output)
        assert not [line for line in output.splitlines() if line.startswith("forged")]
    assert tags(page) <= tags(store.parent / "before.html")
    assert "&lt;script&gt;" in page.read_text(encoding="utf-8")


def test_names_of_outputs_are_text(store: Path) -> None:
    names = ["$a", "$\\frac{", HOSTILE.replace(",", "")]
    page = store.parent / "page.html"
    call("report", store, "--out", page, "--names", ",".join(names))
    assert "$\\frac{" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 ×\n\tnext", "plain é 漢 ×\n\tnext"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b1m\x7f\x00\r", "\\x9b1m\\x7f\\x00\\r"),
        ("\u202eabc\u2066\u200b", "\\u202eabc\\u2066\\u200b"),
        ("\ud800 \u2028", "\\ud800 \\u2028"),
    ],
)
def test_text_of_a_store_is_shown_without_control_characters(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert "\n" not in plain(text, lines=False)


# ---------------------------------------------------------------------------------------------------------------
# Attributes, arrays and records that are not those of a run


WRONG = [None, True, -1, 0, 1 << 70, 1e300, "x", [], {}, [None], {"samples": 1}]


def test_attributes_of_other_types_are_one_line(store: Path) -> None:
    """Every attribute that the code reads, replaced by every kind of value."""
    original = (store / "zarr.json").read_text()
    about = json.loads(original)["attributes"]["gradkern"]
    places = [("format",), *((k,) for k in about), *(("fingerprint", k) for k in about["fingerprint"])]
    places += [("pinned", k) for k in about["pinned"]] + [("fingerprint", "source", k) for k in ("samples", "shapes")]
    for place in places:
        for value in WRONG:
            (store / "zarr.json").write_text(original)
            change_attributes(store, lambda a, p=place, v=value: put(a, p, v))
            done = call("info", store, code=None)
            assert len(done.stderr.strip().splitlines()) <= 1, (place, value, done.stderr)
        (store / "zarr.json").write_text(original)
        change_attributes(store, lambda a, p=place: a.pop(p[0]) if len(p) == 1 else a[p[0]].pop(p[1], None))
        call("info", store, code=None)


def npz(compression: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(shape: tuple[int, ...], dtype: str, content: bytes = b"") -> bytes:
    """An ``.npy`` whose header may ask for more than there is."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def records(record: bytes) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    flipped = bytearray(record)
    for i in rng.integers(0, len(record), 40):
        flipped[i] ^= 255
    return {
        "empty": b"",
        "truncated": record[: len(record) // 2],
        "cut at the end": record[:-30],
        "flipped": bytes(flipped),
        "noise": rng.bytes(1000),
        "a pickle": b"\x80\x04cos\nabort\n.",
        "header": npz(a=npy((1 << 40,), "<f8")),
        "negative": npz(a=npy((-5,), "<f8")),
        "objects": npz(a=npy((1,), "|O", b"\x80\x04cos\nabort\n.")),
        "deflated": npz(zipfile.ZIP_DEFLATED, a=npy((1 << 22,), "<f8", bytes(1 << 25))),
        "facts": npz(**{"facts.json": npy((2,), "|u1", b"{}")}),
        "no facts": npz(a=npy((1,), "<f8", bytes(8))),
    }


@pytest.mark.parametrize("kind", list(records(b"x" * 100)))
@pytest.mark.parametrize("command", ["info", "report", "merge"])
def test_a_damaged_record_is_one_line(command: str, kind: str, store: Path) -> None:
    change_attributes(store, lambda about: about.update(finished=False))
    (store / RECORD).write_bytes(records((store / RECORD).read_bytes())[kind])
    done = call(command, store, code=None)
    assert len(done.stderr.strip().splitlines()) <= 1
    if command != "info":
        assert "03.00000000.npz is damaged" in done.stderr


@pytest.mark.parametrize("name", ["99.00000000.npz", "00.99999999.npz", "9" * 9 + ".0.npz", "²².00000000.npz", "..npz"])
def test_records_of_other_names(name: str, store: Path) -> None:
    (store / "chunks" / "finished" / name).write_bytes(b"")
    call("info", store, code=None)


@pytest.mark.parametrize("name", ["targets", "predictions", "attributions", "reductions/mean_abs"])
def test_an_array_larger_than_the_machine(name: str, store: Path) -> None:
    def edit(content: Any) -> None:
        content["shape"][-1] = 1 << 50
        content["chunk_grid"]["configuration"]["chunk_shape"][-1] = 1 << 50

    change(store, name, edit)
    done = call("report", store, code=1)
    assert "and this machine has" in done.stderr


def test_more_chunks_than_there_are(store: Path) -> None:
    def edit(about: Any) -> None:
        about["fingerprint"]["source"]["samples"], about["pinned"]["chunk"] = 1 << 60, 1

    change_attributes(store, edit)
    assert "it has no list of its" in call("info", store, code=1).stderr


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("dtype", ["<f4", "|O"])
@pytest.mark.parametrize("place", ["filters", "compressor", "numcodecs"])
def test_codecs_that_unpickle(place: str, dtype: str, tmp_path: Path) -> None:
    from gradkern.data import open_source

    folder, codec = tmp_path / "x.zarr", {"id": "pickle", "protocol": 5}
    folder.mkdir()
    old = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": dtype, "order": "C", "fill_value": 0}
    old |= {"filters": [codec] if place == "filters" else None, "compressor": codec if place == "compressor" else None}
    new = {"zarr_format": 3, "node_type": "array", "shape": [4], "data_type": "float32", "fill_value": 0}
    new |= {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}}, "attributes": {}}
    new |= {"chunk_key_encoding": {"name": "v2"}, "codecs": [{"name": "numcodecs.pickle", "configuration": codec}]}
    (folder / (".zarray" if place != "numcodecs" else "zarr.json")).write_text(
        json.dumps(new if place == "numcodecs" else old)
    )
    (folder / "0").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    with pytest.raises(BadValue, match=r"x\.zarr|the codec Pickle|expected numbers"):
        open_source(str(folder)).read(0, 1)
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("what", ["attributions/c.0.0.0.0", "attributions", "chunks/finished", "zarr.json", RECORD])
def test_links_out_of_the_store(what: str, store: Path) -> None:
    outside = store.parent / "outside"
    shutil.move(store / what, outside)
    os.symlink(outside, store / what)
    for read in (open_store, verify):
        for place in (str(store), f"file://{store}"):
            with pytest.raises(BadValue, match="a symbolic link that leads out of"):
                read(place)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: os.symlink(path, path), lambda path: os.symlink("gone", path)]
)
def test_what_is_no_file_is_not_waited_for(make: Any, store: Path) -> None:
    make(store / "attributions" / "c.9.9.9.9")
    with pytest.raises(BadValue, match=r"c\.9\.9\.9\.9 is neither a file nor a folder"):
        open_store(store)


def test_codecs_inside_of_shards() -> None:
    class ShardingCodec:
        def __init__(self, *codecs: Any) -> None:
            self.codecs = codecs

    array = SimpleNamespace(
        filters=(), compressors=(), serializer=ShardingCodec(ShardingCodec(Payload(Path()))), dtype=np.dtype("f4"),
        metadata=SimpleNamespace(zarr_format=3), chunks=(4,),
    )  # fmt: skip
    with pytest.raises(BadValue, match="the codec Payload"):
        check_array(array, "x")


def test_the_store_itself_may_be_a_link(store: Path) -> None:
    os.symlink(store, store.parent / "b.zarr")
    os.symlink("c.0.0.0.0", store / "attributions" / "c.9.0.0.0")
    assert open_store(store.parent / "b.zarr").maps(0, 9).shape[0] == 9


def test_a_link_beside_the_store_is_not_followed(store: Path) -> None:
    precious = store.parent / "precious"
    precious.write_text("kept")
    os.symlink(precious, store.with_suffix(".html"))
    assert "Say where the page shall go with --out" in call("report", store, code=1).stderr
    assert precious.read_text() == "kept"


@pytest.mark.parametrize("name", ["../../etc", "/etc", "attributions/../../x"])
def test_paths_out_of_the_store(name: str, store: Path) -> None:
    change_attributes(store, lambda about: about.update(inputs=[name]))
    assert "its attributes are not those of a run" in call("report", store, code=1).stderr


def test_a_closed_pipe_is_no_error(store: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        command = [sys.executable, "-c", "from gradkern.cli import main; main()", "info", str(store)]
        done = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr == ""
