"""What a header may ask for: a file of a few bytes must not make gradkern allocate more than the machine has."""

from __future__ import annotations

import os

from .options import BadValue


def physical_memory() -> int:
    """Bytes of memory of this machine; a large number where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 40


def check_memory(wanted: int, what: str) -> None:
    """Raise `BadValue` if ``what`` says that it needs more bytes than this machine has."""
    if wanted > physical_memory():
        raise BadValue(
            f"{what} would take {wanted / 2**30:,.0f} GiB, and this machine has {physical_memory() / 2**30:,.0f} GiB. "
            "The file may be damaged."
        )
