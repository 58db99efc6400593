"""How much memory a process may allocate, and the errors of failed allocations."""

from __future__ import annotations

import torch

from .untrusted import physical_memory

WORDS = ("out of memory", "can't allocate memory", "failed to allocate", "not enough memory", "bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Whether this error is a failed allocation."""
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
