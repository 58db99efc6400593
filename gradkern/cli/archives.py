"""Loads the ``.pt2`` of `torch.export.save` without running code that the file brings along.

`torch.export.load` trusts its file.  It unpickles weights, constants and example inputs where the archive asks for it,
evaluates symbolic sizes and guards as Python, takes any function under `torch` for an operation, imports modules that a
tree of arguments names, and pastes names into generated code.  So every part of the archive is checked before torch
loads it.  What torch writes for an ordinary network passes; what is not known to be harmless is refused.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import zipfile
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader
from torch.utils import _pytree as pytree

from ..util.options import BadValue
from ..util.untrusted import check_memory

MODEL = re.compile(r"models/(\w+)\.json")
#: The records of an archive of `torch.export.save`.  Compiled libraries and pickled objects have other names.
RECORDS = re.compile(
    r"models/\w+\.json|data/weights/(weight_\d+|\w+_weights_config\.json|\w+\.pt)|data/sample_inputs/\w+\.pt"
    r"|data/constants/(tensor_\d+|\w+_constants_config\.json|\w+\.pt)|extra/[\w./-]+"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
UNPICKLED = re.compile(r"data/(weights|constants|sample_inputs)/\w+\.pt")
PATH = re.compile(r"[\w.\-:/+ ]*")  # a place in a model, such as layers.0.weight: nothing that ends a string
#: Where a string stands in the graph, if it is not an identifier: keys of torch's schema.
PATHS = {
    "parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "user_input_name", "class_fqn", "fqn",
    "path_name", "torch_version", "field_names",
}  # fmt: skip
#: Values of operations, which stay strings; stack traces and the like; guards, which `load` does not generate.
FREE = {"as_string", "as_strings", "metadata", "guards_code"}
#: Dicts whose keys are the file's own names, and say nothing about what stands under them.
NAMED = {
    "tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "custom_obj_values", "range_constraints",
    "opset_version", "treespec_namedtuple_fields", "as_string_to_argument",
}  # fmt: skip
NOT_FINITE = {"Infinity", "-Infinity", "NaN"}
OPERATORS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|xor|lshift|rshift"
    r"|getitem)|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(float|int|ite|max|min|not|sum)|torch\._sym_sqrt"
    r"|torch\.ops\.higher_order\.(cond|map_impl|scan|while_loop|wrap_with_set_grad_enabled)"
)
NAMESPACES = ("aten", "prims")
SIDE_EFFECTS = {"from_file", "save", "_print", "warn"}  # operations that touch files, or print
SYMPY = re.compile(
    "Symbol|Integer|Float|Rational|Half|One|Zero|NegativeOne|Add|Mul|Pow|Max|Min|Abs|Mod|Not|And|Or|floor|ceiling"
    "|Equality|Unequality|LessThan|GreaterThan|StrictLessThan|StrictGreaterThan|Eq|Ne|Le|Ge|Lt|Gt|FloorDiv"
    "|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow"
    "|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity"
)
POWERS = {"Pow", "PowByNatural", "LShift"}
LARGEST_POWER = 64
ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod,
    ast.USub, ast.UAdd, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Load,
)  # fmt: skip
CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def load(path: str) -> ExportedProgram:
    """The exported program of a ``.pt2``, after `check`.

    Raises `BadValue` if the file is damaged, or holds what cannot be loaded without running its code.
    """
    from torch.export.pt2_archive._package import load_pt2  # `torch.export.load` unpickles where this one fails

    try:
        check(PT2ArchiveReader(path), path)
        return load_pt2(path).exported_programs["model"]
    except (BadValue, MemoryError):
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadValue(
            f"model: {path} cannot be read as a .pt2 of torch.export.save ({first[:200]}). The file may be damaged, or "
            "from another version of torch; export it again."
        ) from error


class Refused(Exception):
    """The file holds something that might run code; the message says what."""


def _size(reader: PT2ArchiveReader, names: list[str], path: str) -> int:
    """The bytes of all records."""
    if hasattr(reader.archive_file, "get_record_size"):
        return sum(map(reader.archive_file.get_record_size, names))
    with zipfile.ZipFile(path) as archive:  # torch 2.11's reader does not say
        return sum(record.file_size for record in archive.infolist())


def check(reader: PT2ArchiveReader, path: str) -> None:
    """Raise `BadValue` if the archive holds anything that torch would run, import or unpickle."""
    try:
        names = reader.get_file_names()
        for name in names:
            if not RECORDS.fullmatch(name):
                raise Refused(f"the record {name!r}")
        check_memory(_size(reader, names, path), f"model: {path}")
        for name in names:
            if UNPICKLED.fullmatch(name):
                _check_unpickled(name, reader.read_bytes(name))
            elif name.endswith("_config.json"):
                _check_payload(name, json.loads(reader.read_string(name)), reader, names)
            elif MODEL.fullmatch(name):
                _check_graph(json.loads(reader.read_string(name)), "")
    except Refused as what:
        raise BadValue(
            f"model: {path} is refused: it holds {what}, which might run code while it is loaded. Export the network "
            "with torch.export.save from torch's own layers, or give package.module:factory with --weights."
        ) from None


def _check_unpickled(name: str, content: bytes) -> None:
    """Check a record that torch loads as plain tensors if it can, and otherwise as a pickle."""
    if not content:
        return
    try:
        artifact = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        raise Refused(f"a pickle in {name!r}") from None
    for leaf in pytree.tree_leaves(artifact):
        if not isinstance(leaf, (torch.Tensor, int, float, bool, str, type(None))):
            raise Refused(f"{type(leaf).__name__} in {name!r}")


def _check_payload(name: str, config: Any, reader: PT2ArchiveReader, names: list[str]) -> None:
    """Check the weights or constants: tensors whose numbers are in the archive, none of them pickled."""
    folder, elements = name.rpartition("/")[0], 0
    for place, entry in config["config"].items():
        if not PATH.fullmatch(place):
            raise Refused(f"the name {place!r}")
        record = f"{folder}/{entry['path_name']}"
        if entry["use_pickle"] is not False or record not in names or not re.fullmatch(r".*_\d+", record):
            raise Refused(f"{place!r} as a pickle, in {name!r}")
        _check_graph(entry, "")
        elements += math.prod(max(int(size["as_int"]), 0) for size in entry["tensor_meta"]["sizes"])
        check_memory(8 * elements, f"model: {place!r} in {name!r}")


def _check_graph(value: Any, key: str) -> None:
    """Check the serialized graph, string by string: what is not known to be text or a path must be an identifier."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not PATH.fullmatch(name):
                raise Refused(f"the name {name!r}")
            if name not in FREE or key in NAMED or not _is_text(inner):
                _check_graph(inner, "" if key in NAMED else name)
    elif isinstance(value, list):
        for inner in value:
            _check_graph(inner, key)
    elif isinstance(value, str):
        if key in ("target", "as_operator"):
            _check_operation(value)
        elif key == "expr_str":
            _check_expression(value)
        elif key in ("in_spec", "out_spec"):
            _check_tree(value)
        elif key in PATHS:
            if not PATH.fullmatch(value):
                raise Refused(f"the name {value!r}")
        elif value and not value.isidentifier() and value not in NOT_FINITE:
            raise Refused(f"the name {value!r}")


def _is_text(value: Any) -> bool:
    """Whether this is a string, or a list or dict of strings, in which torch looks for nothing else."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(isinstance(part, str) for part in parts)


def _check_operation(target: str) -> None:
    """Check that this is an operation of torch's own on tensors and numbers."""
    parts = target.split(".")
    if OPERATORS.fullmatch(target):
        return
    if parts[:2] == ["torch", "ops"] and len(parts) == 5 and parts[2] in NAMESPACES:
        packet = getattr(getattr(torch.ops, parts[2]), parts[3], None)
        operation = getattr(packet, parts[4], None)
        if isinstance(operation, torch._ops.OpOverload) and parts[3] not in SIDE_EFFECTS:
            arguments = [argument.name for argument in operation._schema.arguments]
            if not any("file" in name for name in arguments):
                return
    raise Refused(f"the operation {target!r}")


def _check_expression(text: str) -> None:
    """Check a symbolic size, which sympy evaluates as Python: arithmetic on symbols and sympy's own numbers."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Refused(f"the size {text[:80]!r}") from None
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    texts = {id(c.args[0]) for c in calls if _called(c) in ("Symbol", "Float") and len(c.args) == 1}
    called = {id(c.func) for c in calls}
    powers = 0
    for node in nodes:
        if isinstance(node, ARITHMETIC):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            ok = abs(node.value) < 1 << 64
        elif isinstance(node, ast.Constant):
            ok = id(node) in texts and isinstance(node.value, str) and bool(re.fullmatch(r"[\w.+-]+", node.value))
        elif isinstance(node, ast.Name):
            ok = not node.id.startswith("_") and (id(node) in called or not SYMPY.fullmatch(node.id))
        elif isinstance(node, ast.keyword):
            ok = isinstance(node.value, ast.Constant) and not isinstance(node.value.value, str)
        elif isinstance(node, ast.Call):
            powers += _called(node) in POWERS
            ok = bool(SYMPY.fullmatch(_called(node))) and (_called(node) not in POWERS or _is_small_power(node))
        else:
            ok = isinstance(node, ast.Pow) and powers == 0  # ** is never written: sizes are in functional form
            powers += 1
        if not ok or powers > 8:
            raise Refused(f"the size {text[:80]!r}")


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _is_small_power(call: ast.Call) -> bool:
    """Whether the exponent is a small number: nested powers could take forever."""
    if len(call.args) != 2:
        return False
    exponent = call.args[1]
    if isinstance(exponent, ast.Call) and _called(exponent) == "Integer" and len(exponent.args) == 1:
        exponent = exponent.args[0]
    try:
        return abs(int(ast.literal_eval(exponent))) <= LARGEST_POWER
    except (ValueError, TypeError):
        return False


def _check_tree(text: str) -> None:
    """Check how arguments or outputs are nested: only in tuples, lists and dicts, as other types are imported."""
    try:
        todo = [json.loads(text)[1]]
        while todo:
            node = todo.pop()
            if node["type"] not in CONTAINERS:
                raise Refused(f"a container of type {node['type']!r}")
            keys = [] if node["context"] is None else json.loads(node["context"]) or []
            if not (isinstance(keys, list) and all(isinstance(k, str) and k.isidentifier() for k in keys)):
                raise Refused(f"a container with the keys {node['context'][:80]!r}")
            todo += node["children_spec"]
    except (ValueError, TypeError, LookupError):
        raise Refused(f"the container {text[:80]!r}") from None
