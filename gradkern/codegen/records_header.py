"""Writes csrc/records.h and csrc/record_parts.h, the C++ mirror of :mod:`gradkern.codegen.records` and its `limits`,
comments included, and csrc/record_fields.h, by which records are checked.

``python -m gradkern.codegen.records_header`` rewrites the files; a test fails if one is out of date.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from enum import IntEnum
from pathlib import Path
from typing import Any

from . import limits
from .encoding import HEADER, PLACE, SIZES, WIDTH, c_type, layout_fingerprint, layout_of
from .records import ENUMS, KINDS, PARTS, Place, Record, RecordPart

HEADER_FILE = Path(__file__).parents[2] / "csrc" / "records.h"
PARTS_FILE = HEADER_FILE.with_name("record_parts.h")
FIELDS_FILE = HEADER_FILE.with_name("record_fields.h")
WRITTEN = [
    "// Written by `python -m gradkern.codegen.records_header` from gradkern/codegen/records.py",
    "// and limits.py; not to be edited.",
    "#pragma once",
]
END = ["", "}  // namespace gradkern", ""]


def comments(cls: type) -> dict[str, str]:
    """The comment on each field in the source, base classes included."""
    by_name: dict[str, str] = {}
    for base in (c for c in reversed(cls.__mro__) if c.__module__.startswith(__package__)):
        for name, text in re.findall(r"^    (\w+):? .*?  # (.*)$", inspect.getsource(base), re.MULTILINE):
            by_name[name] = text.removesuffix("# noqa: E741").strip()
    return by_name


def limit_lines() -> list[str]:
    """The limits of the kernels as constants, with the comments that they have in the source."""
    lines = []
    for name, text in re.findall(r"^([A-Z_]+) = .*?  # (.*)$", inspect.getsource(limits), re.MULTILINE):
        constant, value = "k" + name.title().replace("_", ""), limits.LIMITS[name]
        if isinstance(value, limits.ByType):
            lines.append("template <class T>")
            value = f"sizeof(T) == 4 ? {value.float32} : {value.float64}"
        lines.append(f"constexpr int {constant} = {value};  // {text}")
    return lines


def letters_of(t: Any) -> str:
    """A letter for every number that a field of this type takes in a row, as in `kFields`."""
    if t is Place:
        return "n" * len(PLACE)
    if issubclass(t, RecordPart | Record):
        return "".join(letters_of(inner) for _, inner in layout_of(t))
    if issubclass(t, IntEnum):
        return str(len(t))
    return "2" if t is bool else "d" if t is float else "n"


def field_ranges() -> str:
    """The text of csrc/record_fields.h: the range of every number of a row, by kind."""
    lines = [
        "// What the numbers of a row may be, by kind: a digit is the number of values of an enum or a flag, n is any",
        "// integer that is not negative, d is a double.  The rest of a row is zero.",
        "//",
        *WRITTEN,
        '#include "records.h"',
        "",
        "namespace gradkern {",
        "",
        "struct Fields {",
        "  const char *kind, *letters;",
        "};",
        "constexpr Fields kFields[] = {",
        *(f'    {{"{kind.__name__}", "n2n{letters_of(kind)}"}},' for kind in KINDS),
        "};",
    ]
    return "\n".join([*lines, *END])


def line(indent: str, text: str, comment: str) -> str:
    return f"{indent}{text}  // {comment}" if comment else indent + text


def doc(cls: type) -> list[str]:
    return [f"// {row.strip()}".rstrip() for row in inspect.cleandoc(cls.__doc__ or "").splitlines()]


def members(cls: type) -> list[str]:
    notes = comments(cls)
    return [line("  ", f"{c_type(t)} {name};", notes.get(name, "")) for name, t in layout_of(cls)]


def parts() -> str:
    """The text of csrc/record_parts.h: what records are made of, and the sizes of a chain."""
    out = [
        "// What records are made of, and the memory that a chain of them needs.",
        "//",
        *WRITTEN,
        "#include <cstdint>",
        "",
        "namespace gradkern {",
    ]
    for enum in ENUMS:
        notes = comments(enum)
        out += ["", *doc(enum), f"enum class {enum.__name__} : int64_t {{"]
        out += [line("  ", f"{m.name} = {m.value},", notes.get(m.name, "")) for m in enum] + ["};"]
    out += ["", *doc(Place), "struct Place {", *(line("  ", f"int64_t {n};", text) for n, text in PLACE), "};"]
    for part in (*PARTS, *SIZES):
        out += ["", *doc(part), f"struct {part.__name__} {{", *members(part), "};"]
    return "\n".join([*out, *END])


def header() -> str:
    """The text of csrc/records.h."""
    kinds = textwrap.indent(textwrap.fill(" ".join(f"X({kind.__name__})" for kind in KINDS), 110), "  ")
    out = [
        "// Records of a chain as the kernels read them.  Plain data: no ATen, nothing of the standard library's.",
        "//",
        *WRITTEN,
        '#include "record_parts.h"',
        "",
        "namespace gradkern {",
        "",
        "// Of everything here and in record_parts.h; gradkern compares it with its own when the extension is loaded.",
        f'constexpr char kRecordLayout[] = "{layout_fingerprint()}";',
        f"constexpr int kRecordWidth = {WIDTH};  // integers in a row",
        "",
        "// clang-format off",
        "#define GRADKERN_KINDS(X) \\",
        kinds.replace("\n", " \\\n"),
        "// clang-format on",
        "",
        "enum class Kind : int64_t {",
        "#define X(name) name,",
        "  GRADKERN_KINDS(X)",
        "#undef X",
        "};",
        "",
        "// Any record: a row of integers.",
        "struct Record {",
        "  Kind kind;",
        "  int64_t whole_block;  // " + comments(Record)["whole_block"],
        "  int64_t samples;  // on a GPU: how many samples go together through the record's run",
        f"  int64_t fields[kRecordWidth - {len(HEADER)}];",
        "};",
    ]
    for cls in KINDS:
        out += ["", *doc(cls), f"struct {cls.__name__}Record {{", "  Kind kind;", "  int64_t whole_block, samples;"]
        out += [*members(cls), "};"]
    out += ["", *limit_lines()]
    return "\n".join([*out, *END])


FILES = {HEADER_FILE: header, PARTS_FILE: parts, FIELDS_FILE: field_ranges}

if __name__ == "__main__":
    for file, text in FILES.items():
        file.write_text(text())
