"""How much memory a process may allocate, and the errors of failed allocations."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

WORDS = ("out of memory", "can't allocate memory", "failed to allocate", "not enough memory", "bad_alloc")


def physical_memory() -> int:
    """Bytes of memory of this machine; a large number where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 40


def out_of_memory(error: BaseException) -> bool:
    """Whether this error is a failed allocation."""
    import torch  # here: the command line uses this module, and its help should not wait for torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)


def allowed() -> int:
    """Bytes that this process may have: the machine's memory, or less under a limit of its address space."""
    try:
        import resource
    except ImportError:  # Windows
        return physical_memory()
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return physical_memory() if limit == resource.RLIM_INFINITY else min(physical_memory(), limit)


class Growth:
    """A context that measures by how much this process's resident memory grows inside.

    ``peak``: at the most; ``kept``: at the end.  None where the system does not tell.
    """

    peak: int | None = None
    kept: int | None = None
    _before: int | None = None

    def __enter__(self) -> Growth:
        try:
            give_back()  # otherwise, memory that is reused would not count
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present use
            self._before = _status("VmRSS")
        except (OSError, StopIteration):
            pass
        return self

    def __exit__(self, *raised: object) -> None:
        if self._before is not None:
            self.peak = max(0, _status("VmHWM") - self._before)
            give_back()
            self.kept = max(0, _status("VmRSS") - self._before)


def give_back() -> None:
    """Return freed memory to the system, of which the C library would keep up to about 100 MiB."""
    with suppress(AttributeError, TypeError, OSError):  # not GNU's C library
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))
