"""What a process may allocate, and the errors of what it could not."""

from __future__ import annotations

import os

import torch

WORDS = ("out of memory", "can't allocate memory", "failed to allocate", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether this error is a failed allocation."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)


def allowed() -> int:
    """Bytes that this process may have: the machine's memory, or less under a limit of its address space.  A large
    number where the system does not say."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 40
    try:
        import resource
    except ImportError:  # Windows
        return machine
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return machine if limit == resource.RLIM_INFINITY else min(machine, limit)
