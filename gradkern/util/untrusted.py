"""Guards for files of unknown origin: the memory they ask for, the paths they lead to, the text they print."""

from __future__ import annotations

import math
import os
import unicodedata
from pathlib import Path
from typing import Any

from .memory import physical_memory
from .options import BadValue

#: The codecs of zarr and numcodecs that only decompress or convert numbers.  Others may unpickle.
CODECS = {
    "BytesCodec", "TransposeCodec", "GzipCodec", "ZstdCodec", "BloscCodec", "Crc32cCodec", "ShardingCodec",
    "Adler32", "BZ2", "BitRound", "Blosc", "CRC32", "CRC32C", "Delta", "FixedScaleOffset", "Fletcher32", "GZip",
    "JenkinsLookup3", "LZ4", "LZMA", "PackBits", "PCodec", "Quantize", "Shuffle", "ZFPY", "Zlib", "Zstd",
}  # fmt: skip
NUMBERS = "biufcV"


def check_memory(wanted: int, what: str) -> None:
    """Raise `BadValue` if ``what``, by its own header, needs more bytes than this machine has."""
    if wanted > physical_memory():
        raise BadValue(
            f"{what} would take {wanted / 2**30:,.0f} GiB, and this machine has {physical_memory() / 2**30:,.0f} GiB. "
            "The file may be damaged."
        )


def local_path(place: str) -> Path | None:
    """The folder that an address names on this machine; None for object stores and the like."""
    protocol, colon, path = place.partition("://")
    if colon and protocol not in ("file", "local"):
        return None
    return Path(path if colon else place).expanduser()


def check_links(folder: str | Path) -> None:
    """Raise `BadValue` if a symbolic link inside ``folder`` leads out of it, or if it holds anything but files and
    folders: reading a pipe waits for ever."""
    root = os.path.realpath(folder)
    todo = [root]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.is_symlink() and not os.path.realpath(entry.path).startswith(root + os.sep):
                    raise BadValue(
                        f"{entry.path} is a symbolic link that leads out of {folder}: reading it would read, and "
                        "writing it might change, other files. Copy the files themselves into the folder."
                    )
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                elif not (
                    entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or os.path.isdir(entry.path)
                ):
                    raise BadValue(f"{entry.path} is neither a file nor a folder, expected the files of a store.")


def plain(text: str, *, lines: bool = True) -> str:
    """``text`` as a terminal shows it safely: control and format characters (colours, cursor moves, changes of the
    writing direction) become escapes such as ``\\x1b``.  Without ``lines``, line ends are escaped as well."""
    kept = "\n\t" if lines else ""
    return "".join(
        c if c in kept or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else ascii(c)[1:-1]
        for c in text
    )


def check_array(array: Any, what: str, *, text: bool = False) -> None:
    """Raise `BadValue` if a zarr array holds anything but numbers (or, if ``text``, strings), or one of its chunks, or
    the index of a shard, is larger than the memory."""
    codecs = [*array.filters, *([array.serializer] if array.metadata.zarr_format == 3 else []), *array.compressors]
    while codecs:
        codec = codecs.pop()
        if codec is not None and type(codec).__name__ not in (CODECS | {"VLenUTF8Codec"} if text else CODECS):
            raise BadValue(
                f"{what} is stored with the codec {type(codec).__name__}, which is not known to be harmless."
            )
        codecs += [*getattr(codec, "codecs", ()), *getattr(codec, "index_codecs", ())]  # of shards
    if array.dtype.kind not in ("OT" if text else NUMBERS):
        raise BadValue(f"{what} holds {array.dtype}, expected numbers.")
    chunk = math.prod(array.chunks)
    check_memory(array.dtype.itemsize * chunk, f"{what}: a chunk")
    if getattr(array, "shards", None) and chunk:  # where each of its chunks lies: two numbers of eight bytes
        check_memory(16 * math.prod(array.shards) // chunk, f"{what}: the index of a shard")
