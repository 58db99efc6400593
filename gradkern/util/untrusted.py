"""Guards for files that somebody else has made: what they may ask for, where they may lead, what they may print."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from .options import BadValue


def physical_memory() -> int:
    """Bytes of memory of this machine; a large number where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 40


def check_memory(wanted: int, what: str) -> None:
    """Raise `BadValue` if ``what``, by its own header, needs more bytes than this machine has."""
    if wanted > physical_memory():
        raise BadValue(
            f"{what} would take {wanted / 2**30:,.0f} GiB, and this machine has {physical_memory() / 2**30:,.0f} GiB. "
            "The file may be damaged."
        )


def check_links(folder: str | Path) -> None:
    """Raise `BadValue` if a symbolic link inside ``folder`` leads out of it, to files that are not part of it."""
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


def plain(text: str, *, lines: bool = True) -> str:
    """``text`` as a terminal shows it safely: control and format characters (colours, cursor moves, changes of the
    writing direction) become escapes such as ``\\x1b``.  Without ``lines``, line ends do too."""
    kept = "\n\t" if lines else ""
    return "".join(
        c if c in kept or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else ascii(c)[1:-1]
        for c in text
    )
