"""Runs work in forks of this process, which need not import and capture everything again."""

from __future__ import annotations

import os
import threading
import traceback
import warnings
from collections.abc import Callable

from tqdm import tqdm


def start(work: Callable[[], object]) -> int:
    """Do some work in a fork, which exits with 0, or with 1 after an error; returns its process number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads, of which none is at work here
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and stays held if its holder is killed
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def end(pid: int) -> int:
    """The exit code; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
