"""A ``.pt2`` from anyone: whatever stands in it, loading it runs no code, and what torch itself writes still loads."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from gradkern.cli import archives
from gradkern.cli.models import load_exported
from gradkern.util.memory import physical_memory
from gradkern.util.options import BadValue

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
INPUTS = "data/sample_inputs/model.pt"
Records = dict[str, bytes]


class Small(nn.Module):
    """Parameters, a buffer, a constant, an operation with words, two inputs, a dict of outputs, a mask of -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(1, 2, 3, padding="same"), nn.Linear(20, 3)
        self.register_buffer("scale", torch.ones(3))
        self.shift = torch.ones(3)

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> dict[str, Any]:
        h = torch.nn.functional.gelu(self.conv(x), approximate="tanh").flatten(1)
        y = self.linear(torch.cat([h, h[:, :0]], 1)) * self.scale + self.shift
        return {"y": torch.where(y > 1e9, float("-inf"), y), "both": torch.einsum("ij,ij->i", y, more[:, :3])}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The records of an archive that torch has written."""
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    free = {0: torch.export.Dim("N")}
    program = torch.export.export(
        Small().eval(), (torch.randn(4, 1, 10), torch.randn(4, 5)), dynamic_shapes=(free, free)
    )
    torch.export.save(program, path)
    reader = PT2ArchiveReader(str(path))
    return {name: reader.read_bytes(name) for name in reader.get_file_names() if not name.startswith(".data/")}


def written(records: Records, path: Path) -> str:
    with PT2ArchiveWriter(str(path)) as writer:
        for name, content in records.items():
            if name != "byteorder":  # the writer adds its own
                writer.write_bytes(name, content)
    return str(path)


def changed(records: Records, name: str, change: Callable[[Any], Any]) -> Records:
    """The records with the JSON of one of them changed in place."""
    content = json.loads(records[name])
    change(content)
    return records | {name: json.dumps(content).encode()}


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_an_archive_of_torch_loads(archive: Records, tmp_path: Path) -> None:
    module = load_exported(written(archive, tmp_path / "net.pt2"))
    x, more = torch.randn(3, 1, 10), torch.randn(3, 5)
    assert module(x, more)["y"].shape == (3, 3)


# ---------------------------------------------------------------------------------------------------------------
# Pickles


def pickled(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(canary), buffer)
    return buffer.getvalue()


def weight(records: Records, canary: Path) -> Records:
    def change(config: Any) -> None:
        entry = next(iter(config["config"].values()))
        entry |= {"use_pickle": True, "path_name": "weight_0"}

    return changed(records, WEIGHTS, change) | {"data/weights/weight_0": pickled(canary)}


def weight_elsewhere(records: Records, canary: Path) -> Records:
    def change(config: Any) -> None:
        config["config"]["linear.bias"] |= {"use_pickle": 1, "path_name": "../sample_inputs/model.pt"}

    return changed(records, WEIGHTS, change) | {INPUTS: pickled(canary)}


def constant(records: Records, canary: Path) -> Records:
    def change(config: Any) -> None:
        config["config"]["shift"]["use_pickle"] = True

    return changed(records, CONSTANTS, change) | {"data/constants/tensor_0": pickled(canary)}


def custom_object(kind: str) -> Callable[[Records, Path], Records]:
    def make(records: Records, canary: Path) -> Records:
        def change(config: Any) -> None:
            config["config"]["more"] = config["config"]["shift"] | {"path_name": f"{kind}_0"}

        return changed(records, CONSTANTS, change) | {f"data/constants/{kind}_0": pickle.dumps(Payload(canary))}

    return make


def inputs(records: Records, canary: Path) -> Records:
    return records | {INPUTS: pickled(canary)}


def legacy_weights(records: Records, canary: Path) -> Records:
    return records | {"data/weights/model.pt": pickled(canary)}


def legacy_constants(records: Records, canary: Path) -> Records:
    return records | {"data/constants/model.pt": pickled(canary)}


def library(records: Records, canary: Path) -> Records:
    return records | {"data/aotinductor/model/x.so": b"\x7fELF"}


def second_model(records: Records, canary: Path) -> Records:
    """The first model is as torch wrote it."""
    other = weight(records, canary)
    names = {n: n.replace("model_w", "b_w").replace("model_c", "b_c").replace("model.", "b.") for n in other}
    return records | {names[n]: content for n, content in other.items() if "model" in n.rpartition("/")[2]}


PICKLES = [
    weight, weight_elsewhere, constant, custom_object("custom_obj"), custom_object("opaque_obj"), inputs,
    legacy_weights, legacy_constants, library, second_model,
]  # fmt: skip


@pytest.mark.parametrize("make", PICKLES)
def test_loading_an_archive_unpickles_nothing(
    make: Callable[[Records, Path], Records], archive: Records, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(BadValue, match="might run code while it is loaded"):
        load_exported(written(make(archive, canary), tmp_path / "net.pt2"))
    assert not canary.exists()


def test_an_archive_of_an_older_kind_is_not_tried(tmp_path: Path) -> None:
    """torch falls back on a format that is pickled throughout where the present one fails."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as file:
        file.writestr("version", "8.1")
        for name in ("exported_program.json", "state_dict.pt", "constants.pt", "example_inputs.pt"):
            file.writestr(f"serialized_{name}", pickled(tmp_path / "canary"))
    with pytest.raises(BadValue, match="export it again"):
        load_exported(str(tmp_path / "net.pt2"))
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------------------------------------------------------
# Code in place of names, sizes, operations: in every string of the graph


def strings(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all strings in JSON, keys of dicts among them (as ``(*place, key, None)``)."""
    if isinstance(value, str):
        return [place]
    if isinstance(value, list):
        return [p for i, inner in enumerate(value) for p in strings(inner, (*place, i))]
    if isinstance(value, dict):
        return [p for k, inner in value.items() for p in ((*place, k, None), *strings(inner, (*place, k)))]
    return []


def put(content: Any, place: tuple[Any, ...], text: str) -> None:
    for step in place[: -2 if place[-1] is None else -1]:
        content = content[step]
    if place[-1] is None:
        content[text] = content.pop(place[-2])
    else:
        content[place[-1]] = text


def one_per_kind(places: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The first place of each kind: places that differ only in numbers, or in the names of tensors, are one kind."""
    kinds: dict[Any, tuple[Any, ...]] = {}
    for place in places:
        kinds.setdefault(tuple(type(p) if isinstance(p, int) else p for p in place[-2:]), place)
    return list(kinds.values())


def attacks(canary: Path) -> list[str]:
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    return [
        code,
        f"x=({code})",
        f"x): return {code}\n#",
        f'a", {code}) #',
        f"Symbol({code!r})",
        f"Add({code!r})",
        f"Symbol('s0', integer={code})",
        f"s0.__class__({code})",
        f"[{code} for x in [1]][0]",
        json.dumps([1, {"type": "builtins.tuple", "context": json.dumps([f"x=({code})"]), "children_spec": []}]),
    ]


def key(place: tuple[Any, ...]) -> str:
    return next(p for p in reversed(place) if isinstance(p, str))


def refused(content: Any) -> bool:
    try:
        archives._check_graph(content, "")
    except archives.Refused:
        return True
    return False


def test_no_string_of_the_graph_is_code(archive: Records, tmp_path: Path) -> None:
    canary, places = tmp_path / "canary", one_per_kind(strings(json.loads(archive[MODEL])))
    free = []
    for text in attacks(canary):
        for place in places:
            content = json.loads(archive[MODEL])
            put(content, place, text)
            if place not in free and not refused(content):
                free.append(place)
    texts = {"as_string", "stack_trace", "torch_fn", "guards_code"}
    assert {key(place) for place in free} <= texts | {"nn_module_stack"}
    for text in attacks(canary)[:5:2]:  # in all of these at once
        together = json.loads(archive[MODEL])
        for place in free:
            if key(place) in texts and place[-1] is not None:  # torch cuts a stack of modules at commas
                put(together, place, text)
        module = load_exported(written(archive | {MODEL: json.dumps(together).encode()}, tmp_path / "net.pt2"))
        with contextlib.suppress(Exception):  # it need not make sense
            module(torch.randn(3, 1, 10), torch.randn(3, 5))
        assert not canary.exists(), text


@pytest.mark.parametrize("name", ["metadata", "as_string", "as_strings", "guards_code"])
@pytest.mark.parametrize("values", ["tensor_values", "sym_int_values", "custom_obj_values"])
def test_a_value_with_the_name_of_a_free_field_is_checked(name: str, values: str, archive: Records) -> None:
    content = json.loads(archive[MODEL])
    content["graph_module"]["graph"][values][name] = {"sizes": [{"as_expr": {"expr_str": "exit()"}}], "name": "a b"}
    assert refused(content)
    content["graph_module"]["graph"][values][name] = {"name": "x=exit()"}
    assert refused(content)


@pytest.mark.parametrize("name", [WEIGHTS, CONSTANTS])
def test_no_string_of_the_weights_is_code(name: str, archive: Records, tmp_path: Path) -> None:
    reader = PT2ArchiveReader(written(archive, tmp_path / "net.pt2"))
    for place in one_per_kind(strings(json.loads(archive[name]))):
        for text in attacks(tmp_path / "canary"):
            content = json.loads(archive[name])
            put(content, place, text)
            with pytest.raises((archives.Refused, LookupError)):
                archives._check_payload(name, content, reader, list(archive))


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system", "torch.load", "torch.hub.load", "torch.ops.load_library", "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default", "torch.ops.aten.__class__.mro", "torch.ops.aten.relu.__call__", "_operator.call",
        "_operator.attrgetter", "_operator.methodcaller", "math.__loader__.load_module", "#registered:anything",
        "torch.ops.higher_order.triton_kernel_wrapper_mutation", "torch.ops.higher_order.call_torchbind",
        "torch.ops.mine.op.default", "os.system", "", "torch.ops.aten._print.default", "torch.classes.x.y",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["target", "as_operator"])
def test_only_operations_of_torch(key: str, target: str, archive: Records, tmp_path: Path) -> None:
    def change(content: Any) -> None:
        node = content["graph_module"]["graph"]["nodes"][0]
        node |= {"target": target} if key == "target" else {}
        node["inputs"] += [{"name": "", "arg": {"as_operator": target}, "kind": 1}] if key == "as_operator" else []

    path = written(changed(archive, MODEL, change), tmp_path / "net.pt2")
    with pytest.raises(BadValue, match="it holds the operation"):
        load_exported(path)


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "builtins.dict", "context": json.dumps([{"__enum__": True, "fqn": "helper:X", "name": "A"}])},
        {"type": "collections.defaultdict", "context": json.dumps({"default_factory_module": "helper"})},
        {"type": "collections.deque", "context": "3"},
        {"type": "builtins.tuple", "context": json.dumps({"__enum__": True, "fqn": "helper:X", "name": "A"})},
    ],
)
@pytest.mark.parametrize("key", ["in_spec", "out_spec"])
def test_arguments_import_nothing(tree: Any, key: str, archive: Records, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "helper.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(content: Any) -> None:
        signature = content["graph_module"]["module_call_graph"][0]["signature"]
        signature[key] = json.dumps([1, tree | {"children_spec": []}])

    with pytest.raises(BadValue, match="it holds a container"):
        load_exported(written(changed(archive, MODEL, change), tmp_path / "net.pt2"))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("size", "ok"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Add(Mul(Integer(2), Symbol('s0')), Integer(-1))", True),
        ("FloorDiv(Symbol('s0', integer=True), Integer(2))", True),
        ("Max(Integer(1), Pow(Symbol('s0'), Integer(2)))", True),
        ("Float('0.5', precision=53)", True),
        ("s0 + 2*s1//3", True),
        ("Pow(Integer(9), Pow(Integer(9), Integer(99)))", False),
        ("9**9**9**9", False),
        ("(lambda: 1)()", False),
        ("Symbol", False),
        ("exit()", False),
        ("(" * 5000, False),
        ("s0 if 1 else 2", False),
        ("f'{s0}'", False),
        ("Integer('1+1')", False),
    ],
)
def test_sizes_are_arithmetic(size: str, ok: bool) -> None:
    if ok:
        archives._check_expression(size)
    else:
        with pytest.raises(archives.Refused):
            archives._check_expression(size)


# ---------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.7, 0.99, -1])
def test_a_truncated_archive_is_one_line(kept: float, archive: Records, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    content = Path(written(archive, path)).read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(BadValue, match=r"export it again") as caught:
        load_exported(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [["linear.bias"], ["linear.bias", "conv.bias"]])
def test_weights_that_are_larger_than_the_machine(names: list[str], archive: Records, tmp_path: Path) -> None:
    """One of them, or all together; a record that is empty stands for as many zeros as it says."""
    each = physical_memory() // 8 // len(names) + 1

    def change(config: Any) -> None:
        for name in names:
            config["config"][name]["tensor_meta"]["sizes"] = [{"as_int": each}]

    records = changed(archive, WEIGHTS, change)
    entries = json.loads(records[WEIGHTS])["config"]
    empty = {f"data/weights/{entries[name]['path_name']}": b"" for name in names}
    with pytest.raises(BadValue, match=r"would take .* GiB, and this machine has"):
        load_exported(written(records | empty, tmp_path / "net.pt2"))


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, CONSTANTS])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"config": 3}', b"[" * 100_000, b"\xff"])
def test_damaged_json_is_one_line(name: str, content: bytes, archive: Records, tmp_path: Path) -> None:
    with pytest.raises(BadValue):
        load_exported(written(archive | {name: content}, tmp_path / "net.pt2"))
